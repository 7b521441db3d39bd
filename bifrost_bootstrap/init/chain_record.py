"""What init knows of the chain that it published last: one record, renewed with each read of the result backend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, TypeVar

from bifrost_bootstrap.errors import BootstrapError
from bifrost_bootstrap.progress import Progress


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
    message in the queue. seen_at: when init last looked for a sign. (Seconds of the monotonic clock.) stage: how far the
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
