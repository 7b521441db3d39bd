"""What init and worker tell each other through Redis: progress, heartbeats, and that an init still waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Facts:
    """A result with its fields as JSON, for `--json` and for Celery."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Progress(Facts):
    """
    How far a step has got.

    step: "migrate" or "warm". done, total: in `unit`; total is 0 if it is unknown. unit: "revisions", "modules", or ""
    while the step waits. note: what the step does now, in words.
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
        """What the step does now, without how far it has got."""
        return f"{self.step}: {self.note or self.unit}"


#: Takes the progress of a step. It is called in the thread of the step and must not raise.
Report = Callable[[Progress], None]


#: Header of a message: the id of the first task of its chain, if an init waits for it. Calls by hand have none.
CHAIN_HEADER = "bifrost_wanted"


def progress_key(task_id: str) -> bytes:
    """The key of the last `Progress` of a running task, as JSON."""
    return b"bifrost:bootstrap:progress:" + task_id.encode()


def waiting_init_key(task_id: str) -> bytes:
    """
    The key that an init keeps alive while it waits for the chain that begins with this task.

    Its value is the number of seconds that a task may wait from now on. The message cannot hold it: it may be in the
    queue for as long as a worker takes to start.
    """
    return b"bifrost:bootstrap:wanted:" + task_id.encode()


#: Seconds after which the broker drops a message that no worker has received. An init that still waits sends another.
MESSAGE_TTL = 45.0
#: Seconds between two heartbeats.
BEAT = 2.0
#: Seconds that a heartbeat lasts: a worker that pauses for 5 s does not count as dead, and a dead one does within 10 s.
HEARTBEAT_TTL = 10


def heartbeat_key(task_id: str) -> bytes:
    """
    The heartbeat of a task: it exists while a worker has the task. An idle worker has no key.

    The main process of the worker renews the keys of all its tasks; a running task renews its own too.
    """
    return b"bifrost:bootstrap:held:" + task_id.encode()
