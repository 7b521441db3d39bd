"""
What init does next: one pure function from an observation to a decision.

Celery's results are only a fast notification. init succeeds only on what it has read itself from database and cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bifrost_bootstrap.errors import BootstrapError, MigrateGivenUpError, WarmGivenUpError
from bifrost_bootstrap.progress import MESSAGE_TTL, Progress

#: How many runs of one step may be lost with their worker before init gives up.
MAX_ATTEMPTS = 3
#: Seconds without a sign of our tasks (heartbeat, message in the queue, new state) after which they count as lost.
#: Messages travel in milliseconds; a worker needs seconds to reconnect to its broker.
SILENCE = 5.0
#: Seconds between two chains if the first one failed because the worker could not reach a server.
RETRY_PAUSE = 3.0


@dataclass(frozen=True)
class TaskState:
    """
    One task, from the result backend.

    status: Celery's word; "PENDING" also if nothing is known. alive: a worker sends heartbeats for the task.
    progress: the newest. error: the task failed by itself. worker_lost: how its worker was lost with it.
    transient_failure: the task did nothing for a reason that passes: a server was unreachable, or no init waited any
    more. result: what the task returned.
    """

    status: str = "PENDING"
    alive: bool = False
    progress: Progress | None = None
    error: BootstrapError | None = None
    worker_lost: str = ""
    transient_failure: str = ""
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def started(self) -> bool:
        """Whether the work began. A task that a worker has only received can be lost without harm."""
        return self.status != "PENDING" and not self.transient_failure


@dataclass(frozen=True)
class Observation:
    """
    What init knows now.

    ready: schema and cache were read, and the deployment may start. behind: the schema was read and is not at head.
    refusal: why waiting cannot help. away: the unreachable servers, in words; all other facts may be stale then.
    published: init has published a chain. silent_for: seconds since its last sign. age: seconds since it was published.
    received: a worker has had the current step, or has started it. started: the current step has begun its work.
    losses: runs that were lost with their worker. lock_holder: who holds the migration lock, "" for nobody. queued,
    consumers: messages and workers of the queue, None if the broker does not report them.
    """

    ready: bool = False
    behind: bool = False
    refusal: BootstrapError | None = None
    away: str = ""
    published: bool = False
    migrate: TaskState = TaskState()
    warm: TaskState = TaskState()
    silent_for: float = 0.0
    age: float = 0.0
    received: bool = False
    started: bool = False
    losses: int = 0
    lock_holder: str = ""
    queued: int | None = None
    consumers: int | None = None

    @property
    def progress(self) -> Progress | None:
        """The progress of the current step, or of the last one."""
        return self.warm.progress or self.migrate.progress


@dataclass(frozen=True)
class Succeed:
    """Exit with 0."""


@dataclass(frozen=True)
class Fail:
    """Exit with this error: waiting changes nothing."""

    error: BootstrapError


@dataclass(frozen=True)
class Wait:
    """Go on observing. note: what init waits for."""

    note: str


@dataclass(frozen=True)
class Enqueue:
    """Publish a chain. note: why. worker_lost: a run was lost with its worker; init accepts only a few of these."""

    note: str
    worker_lost: bool = False


Decision = Succeed | Fail | Wait | Enqueue


def decide(seen: Observation) -> Decision:
    """Choose the next action. Pure: the same observation gives the same decision."""
    if seen.ready:
        return Succeed()
    if error := seen.refusal or seen.migrate.error or seen.warm.error:
        return Fail(error)
    if seen.away:
        return Wait(seen.away)
    if not seen.published:
        if seen.lock_holder:
            return Wait(f"a migration runs already, its lock is held by {seen.lock_holder}")
        return Enqueue("enqueueing the chain")
    return _decide_finished(seen) or _decide_in_flight(seen)


def _decide_finished(seen: Observation) -> Decision | None:
    """Decide on a task state that is final; None if no task has one."""
    if failure := seen.migrate.transient_failure or seen.warm.transient_failure:
        return Wait(failure) if seen.age < RETRY_PAUSE else Enqueue(f"{failure}; enqueueing again")
    if loss := seen.migrate.worker_lost or seen.warm.worker_lost:
        return _retry_or_give_up(seen, loss)
    if seen.warm.status == "SUCCESS":
        # Somebody flushed the cache since then, or the schema moved.
        return _retry_or_give_up(seen, "both tasks succeeded, but schema and cache are not ready")
    return None


def _decide_in_flight(seen: Observation) -> Decision:
    """Decide while no task has finished: a worker has the task, or its message is on the way, or it was lost."""
    if seen.migrate.alive or seen.warm.alive:
        return Wait(seen.progress.what if seen.progress else _waiting_note(seen))
    if seen.silent_for < SILENCE:
        return Wait(_waiting_note(seen))
    if seen.lock_holder:
        # Another migration, or ours without its heartbeat. A second one would only wait for the lock.
        return Wait(f"a migration runs, its lock is held by {seen.lock_holder}")
    if seen.started:
        return _retry_or_give_up(seen, "its worker was lost")
    if seen.received:
        return Enqueue("the worker that held the chain has gone; enqueueing again")
    if seen.age < MESSAGE_TTL and seen.queued != 0:
        return Wait("no bootstrap worker takes the chain" if seen.consumers == 0 else "the chain is queued")
    return Enqueue("the message expired or was lost with a worker; enqueueing again")


def _waiting_note(seen: Observation) -> str:
    if seen.consumers == 0 and not seen.received:
        return "no bootstrap worker takes the chain"
    return "warm is about to start" if seen.migrate.status == "SUCCESS" else "migrate is about to start"


def _retry_or_give_up(seen: Observation, reason: str) -> Decision:
    attempts = seen.losses + 1
    if attempts >= MAX_ATTEMPTS:
        migrated = seen.migrate.status == "SUCCESS" and not (seen.behind and seen.warm.status == "SUCCESS")
        given_up = WarmGivenUpError if migrated else MigrateGivenUpError
        return Fail(given_up(attempts, reason))
    return Enqueue(f"{reason}; enqueueing again (attempt {attempts + 1} of {MAX_ATTEMPTS})", worker_lost=True)
