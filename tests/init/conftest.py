"""The stack of the fault tests: init among servers and processes that come, go, freeze and die."""

from tests.faults.fixtures import deployment, stack

__all__ = ["deployment", "stack"]
