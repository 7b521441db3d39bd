"""The whole wait of a command or task, on the monotonic clock. The only module that sleeps."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from bifrost_bootstrap.errors import CertificateError, RefusedError

#: Seconds for which a refused login may still become right: the official images create user and database while
#: they already answer.
REJECTION_TIMEOUT = 30.0


class DeadlineExceeded(BaseException):
    """A block ran past its deadline. No Exception, so that nothing on the way takes it for its own failure."""


class Deadline:
    """A point in time `seconds` from now. Everything that waits is given one and never waits past it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the deadline was set."""
        return time.monotonic() - self._started

    @property
    def remaining(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self.seconds - self.elapsed)

    @property
    def passed(self) -> bool:
        return self.remaining <= 0

    @contextmanager
    def interrupt_after(self, grace: float) -> Iterator[None]:
        """
        Raise DeadlineExceeded in the block, wherever it is, when it still runs `grace` seconds after the deadline.

        For what nobody thought of: a call into a library that waits without an end. Main thread only.
        """

        def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
            raise DeadlineExceeded

        previous = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, self.remaining + grace)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def sleep(self, seconds: float) -> None:
        """Sleep `seconds`, less where the deadline comes first."""
        time.sleep(min(seconds, self.remaining))

    def pause(self, attempt: int, *, first: float, longest: float) -> None:
        """
        Sleep before attempt number `attempt` + 1.

        The pause is `first` × 2^(`attempt` - 1) seconds, at most `longest`, less up to half of it at random, so
        that replicas that failed together do not come back together. `attempt` counts from 1.
        """
        longest_now = min(longest, first * 2 ** min(attempt - 1, 30))
        self.sleep(longest_now * random.uniform(0.5, 1))  # noqa: S311  (jitter, not cryptography)


class RejectionTimer:
    """How long a server has rejected us without a break. After `REJECTION_TIMEOUT` waiting does not help any more."""

    def __init__(self) -> None:
        self._until: Deadline | None = None

    def expired_by(self, error: BaseException) -> bool:
        """Whether waiting does not help any more. Any other error starts it anew. A CertificateError ends it."""
        if not isinstance(error, RefusedError):
            self._until = None
            return False
        self._until = self._until or Deadline(REJECTION_TIMEOUT)
        return self._until.passed or isinstance(error, CertificateError)
