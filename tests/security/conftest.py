"""The stack of the fault tests, for messages and results that an enemy of the deployment may write."""

from tests.faults.fixtures import deployment, stack

__all__ = ["deployment", "stack"]
