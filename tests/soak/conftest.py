"""The stack of the fault tests, for a long time."""

from tests.faults.fixtures import stack

__all__ = ["stack"]
