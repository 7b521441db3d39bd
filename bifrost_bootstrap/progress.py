"""What a task tells while it is held by a worker: the one progress event, and where it lies in Redis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Facts:
    """What `--json`, or a task's result, says of it: its fields."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Progress(Facts):
    """
    How far a step is.

    step: "migrate" or "warm". done, total: in `unit`; total 0 where it is not known. unit: "revisions",
    "modules", or "" while waiting. note: what is going on now, in words.
    """

    step: str
    done: int = 0
    total: int = 0
    unit: str = ""
    note: str = ""

    def __str__(self) -> str:
        count = f"{self.done:,} of {self.total:,} {self.unit}" if self.total else ""
        return f"{self.step}: {', '.join(filter(None, (count, self.note)))}"

    @property
    def what(self) -> str:
        """What is going on, without how far it is."""
        return f"{self.step}: {self.note or self.unit}"


#: Where a step reports to; called in the thread of the step, must not raise.
Report = Callable[[Progress], None]


#: Message header: the id of the first task of the chain that an init waits for. Calls by hand have none.
CHAIN_HEADER = "bifrost_wanted"


def progress_key(task_id: str) -> bytes:
    """Where a running task leaves its last `Progress`, as JSON."""
    return b"bifrost:bootstrap:progress:" + task_id.encode()


def waiting_init_key(task_id: str) -> bytes:
    """
    Exists while an init waits for the chain that begins with this task: the seconds that a task may wait from now on.

    Not in the message, which may lie in the queue for as long as a worker needs to start.
    """
    return b"bifrost:bootstrap:wanted:" + task_id.encode()


#: Seconds that a message waits in the broker; then the broker drops it, and a living init sends another.
MESSAGE_TTL = 45.0
#: Seconds between two heartbeats, and how long one counts: a worker that is paused for 5 s is not
#: taken for dead, and a dead one is noticed within 10 s.
BEAT, HEARTBEAT_TTL = 2.0, 10


def heartbeat_key(task_id: str) -> bytes:
    """Exists while a worker has the task: the main process renews it for waiting tasks, a running task its own."""
    return b"bifrost:bootstrap:held:" + task_id.encode()
