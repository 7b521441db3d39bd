"""
What init knows, and what it does next: `ChainRecord`, `Observation`, and one pure function to a `Decision`.

Celery's results are only a fast notification. init succeeds only on what it has read itself from database and cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, TypeVar

from bifrost_bootstrap.errors import BootstrapError, MigrateGivenUpError, WarmGivenUpError
from bifrost_bootstrap.progress import MESSAGE_TTL, Progress

#: How many runs of one step may be lost with their worker before init gives up.
MAX_ATTEMPTS = 3
#: Seconds without a sign of our tasks (heartbeat, message in the queue, new state) after which they count as lost.
#: Messages travel in milliseconds; a worker needs seconds to reconnect to its broker.
SILENCE = 5.0
#: Seconds between two chains if the first one failed because the worker could not reach a server.
RETRY_PAUSE = 3.0


class Stage(IntEnum):
    """How far a task has come. A task that a worker has only received can be lost without harm."""

    PUBLISHED = 0
    RECEIVED = 1
    STARTED = 2


@dataclass(frozen=True)
class WorkerLost:
    """A task was lost with its worker, or with what it had staged. The next run may succeed."""

    reason: str


@dataclass(frozen=True)
class TransientFailure:
    """A task did nothing, for a reason that passes: a server was unreachable, or no init waited any more."""

    reason: str


#: How a task failed. A BootstrapError is an error of the task itself.
Failure = BootstrapError | WorkerLost | TransientFailure
_Kind = TypeVar("_Kind", BootstrapError, WorkerLost, TransientFailure)


@dataclass(frozen=True)
class TaskState:
    """
    One task, from the result backend.

    status: Celery's word; "PENDING" also if nothing is known. alive: a worker sends heartbeats for the task.
    progress: the newest. failure: None if it has not failed. result: what the task returned.
    """

    status: str = "PENDING"
    alive: bool = False
    progress: Progress | None = None
    failure: Failure | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        if self.status != "PENDING" and not isinstance(self.failure, TransientFailure):
            return Stage.STARTED
        return Stage.RECEIVED if self.alive else Stage.PUBLISHED


@dataclass(frozen=True)
class ChainRecord:
    """
    One published chain.

    migrate_id, warm_id: of its tasks. migrate_id is "" if the warm was published alone; `migrate` then counts as done.
    published_at: when it was published. last_sign_at: when there was a sign of it: a heartbeat, a new state, its
    message in the queue. seen_at: when init last looked for one. (Seconds of the monotonic clock.) stage: how far the
    current step has come; that is the warm once the migrate has succeeded. It stays if Redis forgets the states.
    """

    migrate_id: str
    warm_id: str
    published_at: float = 0.0
    last_sign_at: float = 0.0
    seen_at: float = 0.0
    migrate: TaskState = TaskState()
    warm: TaskState = TaskState()
    stage: Stage = Stage.PUBLISHED

    @property
    def first_id(self) -> str:
        """The task that begins the chain."""
        return self.migrate_id or self.warm_id

    @property
    def age(self) -> float:
        """Seconds since it was published."""
        return self.seen_at - self.published_at

    @property
    def silent_for(self) -> float:
        """Seconds since the last sign of it."""
        return self.seen_at - self.last_sign_at

    @property
    def migrated(self) -> bool:
        return self.migrate.status == "SUCCESS"

    @property
    def warmed(self) -> bool:
        return self.warm.status == "SUCCESS"

    @property
    def alive(self) -> bool:
        return self.migrate.alive or self.warm.alive

    @property
    def progress(self) -> Progress | None:
        """The progress of the current step, or of the last one."""
        return self.warm.progress or self.migrate.progress

    def failure(self, kind: type[_Kind]) -> _Kind | None:
        """The failure of this kind: that of the migrate, else that of the warm, else None."""
        return next((found for found in (self.migrate.failure, self.warm.failure) if isinstance(found, kind)), None)

    def with_states(self, migrate: TaskState, warm: TaskState) -> ChainRecord:
        """The record after these states were read."""
        found = replace(self, migrate=migrate, warm=warm)
        next_step = found.migrated and not self.migrated
        # The warm is a message of its own, and the worker that migrated may be gone.
        before = Stage.PUBLISHED if next_step else self.stage
        current = warm if found.migrated else migrate
        found = replace(found, stage=max(before, current.stage))
        changed = (migrate, warm) != (self.migrate, self.warm)
        return found.with_sign() if found.alive or changed else found

    def with_sign(self) -> ChainRecord:
        """The record after a sign of the chain."""
        return replace(self, last_sign_at=self.seen_at)


@dataclass(frozen=True)
class Observation:
    """
    What init knows now.

    ready: schema and cache were read, and the deployment may start. behind: the schema was read and is not at head.
    refusal: why waiting cannot help. away: the servers that fail now, in words; all other facts may be stale then.
    chain: the chain that init published last, None before the first. losses: chains that were lost with their worker.
    lock_holder: who holds the migration lock, "" for nobody. queued, consumers: messages and workers of the queue, None
    if the broker does not report them.
    """

    ready: bool = False
    behind: bool = False
    refusal: BootstrapError | None = None
    away: str = ""
    chain: ChainRecord | None = None
    losses: int = 0
    lock_holder: str = ""
    queued: int | None = None
    consumers: int | None = None


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
    chain = seen.chain
    if seen.ready:
        return Succeed()
    if error := seen.refusal or (chain and chain.failure(BootstrapError)):
        return Fail(error)
    if seen.away:
        return Wait(seen.away)
    if chain:
        return _decide_finished(seen, chain) or _decide_in_flight(seen, chain)
    if seen.lock_holder:
        return Wait(f"a migration runs already, its lock is held by {seen.lock_holder}")
    return Enqueue("enqueueing the chain")


def _decide_finished(seen: Observation, chain: ChainRecord) -> Decision | None:
    """Decide on a task state that is final; None if no task has one."""
    if failure := chain.failure(TransientFailure):
        again = Enqueue(f"{failure.reason}; enqueueing again")
        return Wait(failure.reason) if chain.age < RETRY_PAUSE else again
    if loss := chain.failure(WorkerLost):
        return _retry_or_give_up(seen, chain, loss.reason)
    if chain.warmed:
        # Somebody flushed the cache since then, or the schema moved.
        return _retry_or_give_up(seen, chain, "both tasks succeeded, but schema and cache are not ready")
    return None


def _decide_in_flight(seen: Observation, chain: ChainRecord) -> Decision:
    """Decide while no task has finished: a worker has the task, or its message is on the way, or it was lost."""
    if chain.alive and chain.progress:
        return Wait(chain.progress.what)
    if chain.alive or chain.silent_for < SILENCE:
        return Wait(_waiting_note(seen, chain))
    if seen.lock_holder:
        # Another migration, or ours without its heartbeat. A second one would only wait for the lock.
        return Wait(f"a migration runs, its lock is held by {seen.lock_holder}")
    if chain.stage is Stage.STARTED:
        return _retry_or_give_up(seen, chain, "its worker was lost")
    if chain.stage is Stage.RECEIVED:
        return Enqueue("the worker that held the chain has gone; enqueueing again")
    if chain.age < MESSAGE_TTL and seen.queued != 0:
        return Wait("no bootstrap worker takes the chain" if seen.consumers == 0 else "the chain is queued")
    return Enqueue("the message expired or was lost with a worker; enqueueing again")


def _waiting_note(seen: Observation, chain: ChainRecord) -> str:
    if seen.consumers == 0 and chain.stage is Stage.PUBLISHED:
        return "no bootstrap worker takes the chain"
    return "warm is about to start" if chain.migrated else "migrate is about to start"


def _retry_or_give_up(seen: Observation, chain: ChainRecord, reason: str) -> Decision:
    attempts = seen.losses + 1
    if attempts >= MAX_ATTEMPTS:
        migrated = chain.migrated and not (seen.behind and chain.warmed)
        given_up = WarmGivenUpError if migrated else MigrateGivenUpError
        return Fail(given_up(attempts, reason))
    return Enqueue(f"{reason}; enqueueing again (attempt {attempts + 1} of {MAX_ATTEMPTS})", worker_lost=True)
