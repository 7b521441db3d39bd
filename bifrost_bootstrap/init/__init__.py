"""The init container: observe, decide, act, until the deployment may start."""
