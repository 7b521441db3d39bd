"""Deadlines, with a clock of the test."""

from __future__ import annotations

import itertools
import signal
import time

import pytest

from bifrost_bootstrap import deadline as module
from bifrost_bootstrap.deadline import REJECTION_TIMEOUT, Deadline, DeadlineExceeded, Interval, RejectionTimer
from bifrost_bootstrap.errors import CertificateError, RefusedError, UnavailableError, WarmError


class Clock:
    """Stands in for the module `time`: sleeping is what makes it later."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of deadlines in this test."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_remaining_ends_at_zero(clock: Clock) -> None:
    """Elapsed grows, remaining shrinks to 0 and no further, and then the deadline has passed."""
    deadline = Deadline(10)
    clock.now += 4
    assert (deadline.elapsed, deadline.remaining, deadline.passed) == (4, 6, False)
    clock.now += 6
    assert (deadline.elapsed, deadline.remaining, deadline.passed) == (10, 0, True)
    clock.now += 5
    assert (deadline.elapsed, deadline.remaining, deadline.passed) == (15, 0, True)


def test_deadline_of_zero_has_passed(clock: Clock) -> None:
    """0 seconds: one attempt without a wait."""
    deadline = Deadline(0)
    assert deadline.passed
    deadline.sleep(5)
    assert clock.slept == [0]


def test_sleep_never_goes_past_the_deadline(clock: Clock) -> None:
    """A sleep is cut at the deadline."""
    deadline = Deadline(10)
    deadline.sleep(7)
    deadline.sleep(7)
    deadline.sleep(7)
    assert clock.slept == [7, 3, 0]


def test_pause_doubles_up_to_the_longest(clock: Clock) -> None:
    """Each pause is between half of and the whole of `first` doubled per attempt, at most `longest`."""
    for attempt, whole in [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 5), (1000, 5)]:
        Deadline(1000).pause(attempt, first=0.5, longest=5)
        assert whole / 2 <= clock.slept[-1] <= whole


def test_pauses_differ(clock: Clock) -> None:
    """Replicas that failed together do not retry together."""
    for _ in range(20):
        Deadline(1000).pause(3, first=1, longest=60)
    assert len(set(clock.slept)) > 1


def test_pause_ends_at_the_deadline(clock: Clock) -> None:
    """A pause is a sleep: cut at the deadline."""
    Deadline(0.1).pause(5, first=10, longest=60)
    assert clock.slept == [0.1]


@pytest.mark.usefixtures("clock")
def test_attempts_end_with_one_at_the_deadline() -> None:
    """Attempts are counted from 1, with a pause between two; the last one begins at the deadline."""
    deadline = Deadline(10)
    begun = [(attempt, deadline.elapsed) for attempt in deadline.attempts(first=4, longest=4)]
    assert [attempt for attempt, _ in begun] == list(range(1, len(begun) + 1))
    assert begun[0][1] == 0
    pauses = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(begun)]
    assert all(2 <= pause <= 4 for pause in pauses[:-1])
    assert begun[-1][1] == 10


@pytest.mark.usefixtures("clock")
def test_there_is_always_one_attempt() -> None:
    """0 seconds: one attempt, no pause."""
    assert list(Deadline(0).attempts(first=1, longest=1)) == [1]


def test_an_interval_is_due_at_once_and_then_again(clock: Clock) -> None:
    """What is due is done once, and then not before the interval has passed."""
    interval = Interval(10)
    assert [interval.due(), interval.due()] == [True, False]
    clock.now += 9
    assert not interval.due()
    clock.now += 1
    assert [interval.due(), interval.due()] == [True, False]


def test_rejections_expire_when_nothing_comes_between(clock: Clock) -> None:
    """A rejection is tolerated for a while; another error, and a success, begin that while anew."""
    refused = RefusedError("PostgreSQL", "no such user")
    for between in (UnavailableError("PostgreSQL", "it starts"), None):
        timer = RejectionTimer()
        assert not timer.expired_by(refused)
        clock.now += REJECTION_TIMEOUT - 1
        assert not timer.expired_by(refused)
        assert not timer.expired_by(between)
        clock.now += 1
        assert not timer.expired_by(refused)
        clock.now += REJECTION_TIMEOUT
        assert timer.expired_by(refused)


def test_a_certificate_is_not_waited_for() -> None:
    """A certificate does not become right by itself."""
    assert RejectionTimer().expired_by(CertificateError("Redis", "unknown CA"))


def test_other_classes_may_be_rejections(clock: Clock) -> None:
    """Redis that refuses writes counts for who says so, and for nobody else."""
    full = WarmError("out of memory")
    usual = RejectionTimer()
    both = RejectionTimer(RefusedError, WarmError)
    assert not usual.expired_by(full)
    assert not both.expired_by(full)
    clock.now += REJECTION_TIMEOUT
    assert not usual.expired_by(full)
    assert both.expired_by(full)


def test_enforced_ends_what_does_not_return() -> None:
    """A block that waits without an end is left soon after the deadline, and the handler of before is back."""
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(DeadlineExceeded), Deadline(0.1).interrupt_after(0.1):
        time.sleep(60)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
