"""
Time: the deadline of a command or task, pauses between attempts, and what is done again after a while.

All of it goes by the monotonic clock. This is the only module that sleeps.

    log_again = Interval(LOG_INTERVAL)
    for attempt in deadline.attempts(first=0.1, longest=2.0):
        if try_it():
            return
        if log_again.due():
            logger.info("waiting for ...")
    raise BusyError(...)
"""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from bifrost_bootstrap.errors import CertificateError, RefusedError

#: Seconds for which rejections are tolerated: the official images answer while they still create user and database.
REJECTION_TIMEOUT = 30.0
#: Seconds between two log lines about the same wait: a watcher sees that it goes on, and a log stays short.
LOG_INTERVAL = 10.0


class DeadlineExceeded(BaseException):
    """A block ran past its deadline. Not an Exception, so that no handler on the way takes it for its own failure."""


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
        Raise DeadlineExceeded inside the block if it still runs `grace` seconds after the deadline.

        The last resort against a library call that never returns. Works in the main thread only.
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
        """Sleep `seconds`, but not past the deadline."""
        time.sleep(min(seconds, self.remaining))

    def pause(self, attempt: int, *, first: float, longest: float) -> None:
        """
        Sleep before attempt number `attempt` + 1.

        The pause is `first` × 2^(`attempt` - 1) seconds, at most `longest`, and ends at the deadline. Up to half of it
        is taken off at random, so that replicas that failed together do not return together. `attempt` counts from 1.
        """
        longest_now = min(longest, first * 2 ** min(attempt - 1, 30))
        self.sleep(longest_now * random.uniform(0.5, 1))  # noqa: S311  (jitter, not cryptography)

    def attempts(self, *, first: float, longest: float) -> Iterator[int]:
        """
        Count attempts from 1, with a `pause` between two.

        The first attempt that ends after the deadline is the last one, so there is always one.
        """
        for attempt in itertools.count(1):
            yield attempt
            if self.passed:
                return
            self.pause(attempt, first=first, longest=longest)


class Interval:
    """Something that is due at once, and then every `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pause = Deadline(0)

    def due(self) -> bool:
        """Whether it is to be done now. The answer True starts the next `seconds`."""
        if not self._pause.passed:
            return False
        self._pause = Deadline(self._seconds)
        return True


class RejectionTimer:
    """
    Ends the wait for a server that keeps rejecting us.

    A rejection is an answer that a retry alone does not change: RefusedError, or the given classes. It may still pass
    (see `REJECTION_TIMEOUT`). Any other error, and a success, ends a series of rejections.
    """

    def __init__(self, *rejections: type[BaseException]) -> None:
        self._rejections = rejections or (RefusedError,)
        self._limit: Deadline | None = None

    def expired_by(self, error: BaseException | None) -> bool:
        """
        Whether waiting is of no use after this answer. error: None is a success.

        True if rejections have lasted `REJECTION_TIMEOUT` seconds, and for a CertificateError at once.
        """
        if not isinstance(error, self._rejections):
            self._limit = None
            return False
        self._limit = self._limit or Deadline(REJECTION_TIMEOUT)
        return self._limit.passed or isinstance(error, CertificateError)
