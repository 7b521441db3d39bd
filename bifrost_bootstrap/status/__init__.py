"""Read-only answers: is the deployment ready, what would a run do, which servers answer."""
