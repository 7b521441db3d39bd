"""
What init does next: one pure function from what was observed to a decision.

The Celery result is only the fast way to hear; what decides is the truth that init reads itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bifrost_bootstrap.errors import BootstrapError, MigrateGivenUpError, WarmGivenUpError
from bifrost_bootstrap.progress import MESSAGE_TTL, Progress

#: Runs of a step that may be lost with their worker before it is given up.
MOST_ATTEMPTS = 3
#: Seconds without any sign of our tasks (held, queued, a new state) before they count as lost: messages travel
#: in milliseconds, a worker that reconnects to its broker needs seconds.
SILENCE = 5.0
#: Seconds between two chains of which the first ended because a server was away, seen from the worker.
UNDONE_PAUSE = 3.0


@dataclass(frozen=True)
class TaskState:
    """
    One task, from the result backend.

    status: Celery's word; "PENDING" also where nothing is known. held: a living worker has it. progress: its
    last one. error: it failed by itself. lost: its worker was lost with it, and how. undone: it ended
    without having done anything, for a reason that passes: a server was away, nobody wanted it any more.
    """

    status: str = "PENDING"
    held: bool = False
    progress: Progress | None = None
    error: BootstrapError | None = None
    lost: str = ""
    undone: str = ""
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def begun(self) -> bool:
        """Whether its work began; a task that a worker only holds may still be lost without harm."""
        return self.status != "PENDING" and not self.undone


@dataclass(frozen=True)
class Observation:
    """
    What init knows now.

    ready: schema and cache were read and may be started upon. behind: the schema was read and is not at head.
    refusal: why waiting cannot help. away: the servers that could not be asked, in words; what is known of the rest
    is old then. sent: whether a chain of ours was enqueued. silent: seconds since its last sign. age: seconds since
    it was enqueued. taken: a worker held the step that is at work, begun: it had begun with it. losses: runs that
    were lost with their worker. holder: of the migration lock, "" where free. queued, consumers: messages and workers
    of the queue, None where the broker did not tell.
    """

    ready: bool = False
    behind: bool = False
    refusal: BootstrapError | None = None
    away: str = ""
    sent: bool = False
    migrate: TaskState = TaskState()
    warm: TaskState = TaskState()
    silent: float = 0.0
    age: float = 0.0
    taken: bool = False
    begun: bool = False
    losses: int = 0
    holder: str = ""
    queued: int | None = None
    consumers: int | None = None

    @property
    def progress(self) -> Progress | None:
        """Of the step that is at work, or was the last."""
        return self.warm.progress or self.migrate.progress


@dataclass(frozen=True)
class Succeed:
    """Exit 0 is true."""


@dataclass(frozen=True)
class Fail:
    """Nothing will change by waiting."""

    error: BootstrapError


@dataclass(frozen=True)
class Wait:
    """Something is going on; `note` says what."""

    note: str


@dataclass(frozen=True)
class Enqueue:
    """Send a chain; `note` says why. lost: a run was lost with its worker, which is borne a few times only."""

    note: str
    lost: bool = False


Decision = Succeed | Fail | Wait | Enqueue


def decide(seen: Observation) -> Decision:
    """What to do now. Pure: the same observation gives the same decision."""
    if seen.ready:
        return Succeed()
    if error := seen.refusal or seen.migrate.error or seen.warm.error:
        return Fail(error)
    if seen.away:
        return Wait(seen.away)
    if not seen.sent:
        if seen.holder:
            return Wait(f"a migration runs already, its lock is held by {seen.holder}")
        return Enqueue("enqueueing the chain")
    return _ended(seen) or _going_on(seen)


def _ended(seen: Observation) -> Decision | None:
    """What a state of the result backend that will not change any more means."""
    if undone := seen.migrate.undone or seen.warm.undone:
        return Wait(undone) if seen.age < UNDONE_PAUSE else Enqueue(f"{undone}; enqueueing again")
    if lost := seen.migrate.lost or seen.warm.lost:
        return _again(seen, lost)
    if seen.warm.status == "SUCCESS":
        # Done, and yet not so: the cache was flushed since, or the schema moved.
        return _again(seen, "both tasks succeeded, but schema and cache are not ready")
    return None


def _going_on(seen: Observation) -> Decision:
    """Nothing has ended. Somebody is at it, or a message is on its way, or it was lost."""
    if seen.migrate.held or seen.warm.held:
        return Wait(seen.progress.what if seen.progress else _where(seen))
    if seen.silent < SILENCE:
        return Wait(_where(seen))
    if seen.holder:
        # Whoever runs it cannot tell us, or it is another's; a second one would only wait for the lock.
        return Wait(f"a migration runs, its lock is held by {seen.holder}")
    if seen.begun:
        return _again(seen, "its worker was lost")
    if seen.taken:
        return Enqueue("the worker that held the chain has gone; enqueueing again")
    if seen.age < MESSAGE_TTL and seen.queued != 0:
        return Wait("no bootstrap worker takes the chain" if seen.consumers == 0 else "the chain is queued")
    return Enqueue("the message expired or was lost with a worker; enqueueing again")


def _where(seen: Observation) -> str:
    if seen.consumers == 0 and not seen.taken:
        return "no bootstrap worker takes the chain"
    return "warm is about to start" if seen.migrate.status == "SUCCESS" else "migrate is about to start"


def _again(seen: Observation, reason: str) -> Decision:
    attempts = seen.losses + 1
    if attempts >= MOST_ATTEMPTS:
        migrated = seen.migrate.status == "SUCCESS" and not (seen.behind and seen.warm.status == "SUCCESS")
        given_up = WarmGivenUpError if migrated else MigrateGivenUpError
        return Fail(given_up(attempts, reason))
    return Enqueue(f"{reason}; enqueueing again (attempt {attempts + 1} of {MOST_ATTEMPTS})", lost=True)
