"""The chain as init sees it: sent to the broker, and followed in the result backend."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

import redis
from celery import chain

from bifrost_bootstrap import broker, errors
from bifrost_bootstrap.celery import MIGRATE, WARM, add_queue, app
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.init.decision import TaskState
from bifrost_bootstrap.progress import (
    CHAIN_HEADER,
    MESSAGE_TTL,
    Progress,
    heartbeat_key,
    progress_key,
    waiting_init_key,
)

#: Failures that lost the work, by the name of the exception. The next run may succeed.
_WORKER_LOST = {
    "WorkerLostError": "its worker was lost",
    "Terminated": "it was terminated",
    "NotRegistered": "a worker without this task took it",
    "StagedLostError": "Redis lost what the warm had staged",
}
#: Failures in which the task did nothing, for a reason that passes.
_TRANSIENT = {
    "OperationalError": "it could not hand over to the next task",
    "TaskRevokedError": "it was revoked",
    "UnwantedError": "it was taken when Redis had forgotten that we wait for it",
}
#: Seconds after the end of its init in which a chain may still begin.
WAITING_INIT_TTL = 30
#: Seconds by which a task gives up waiting before its init does, so that init reports the error of the task. The last
#: attempt begins just before the deadline of the task. It starts the process of the tree (3 s on a busy machine), and
#: then waits for a table lock as long as any attempt.
TASK_HEAD_START = 4.0
#: The head start is at most this share of a short deadline.
HEAD_START_SHARE = 0.2


@dataclass(frozen=True)
class SentChain:
    """The ids of the tasks of one chain; migrate is "" where the warm was sent alone."""

    migrate: str
    warm: str

    @property
    def first(self) -> str:
        return self.migrate or self.warm


def send(
    client: redis.Redis,
    queue: str,
    deadline: Deadline,
    *,
    lock_timeout: float,
    full: bool = False,
    allow_shrink: bool = False,
    migrate: bool = True,
) -> SentChain:
    """
    Publish the chain for an init with this deadline, and wait until the broker has confirmed it.

    The message expires in the broker, and a worker does not begin a chain whose init has gone: an old chain never runs.

    Raises UnavailableError, RefusedError, and WarmError if Redis refuses a write.
    """
    add_queue(queue)
    sent = SentChain(uuid.uuid4().hex if migrate else "", uuid.uuid4().hex)
    # For each task: a queue that is given to the call would route only the first one.
    options: dict[str, Any] = {"queue": queue, "expiration": MESSAGE_TTL, "headers": {CHAIN_HEADER: sent.first}}
    work = app.signature(WARM, kwargs={"full": full, "allow_shrink": allow_shrink}, immutable=True)
    work = work.set(task_id=sent.warm, **options)
    if migrate:
        first = app.signature(MIGRATE, immutable=True).set(task_id=sent.migrate, **options)
        work = chain(first, work)
    # Workers publish each result this way. If Redis refused it to them, their tasks would end without a result, and
    # only their log would say why.
    client.publish(app.backend.get_key_for_task(sent.first), b"")
    with broker.translated():
        keep_chain_alive(client, sent, deadline, lock_timeout)
        work.apply_async()
    return sent


def keep_chain_alive(client: redis.Redis, sent: SentChain, deadline: Deadline, lock_timeout: float) -> None:
    """
    Record for `WAITING_INIT_TTL` seconds that an init waits for this chain, and how long its tasks may wait themselves.

    lock_timeout: seconds that a revision waits for a table lock.
    """
    head_start = min(TASK_HEAD_START + lock_timeout, HEAD_START_SHARE * deadline.seconds)
    client.set(waiting_init_key(sent.first), max(0.0, deadline.remaining - head_start), ex=WAITING_INIT_TTL)


def states(client: redis.Redis, sent: SentChain) -> tuple[TaskState, TaskState]:
    """Both tasks in one round trip."""
    ids = [task_id for task_id in (sent.migrate, sent.warm) if task_id]
    keys = []
    for task_id in ids:
        keys += [bytes(app.backend.get_key_for_task(task_id)), heartbeat_key(task_id), progress_key(task_id)]
    found: list[Any] = client.mget(keys)
    warm = _state(*found[-3:])
    return (_state(*found[:3]) if sent.migrate else TaskState("SUCCESS")), warm


def _state(meta: bytes | None, heartbeat: bytes | None, progress: bytes | None) -> TaskState:
    fields = _json_object(meta)
    if fields is None:
        return TaskState("FAILURE", worker_lost="the result backend holds something for it that is not JSON")
    status = fields.get("status", "PENDING")
    result = fields.get("result")
    if status in ("FAILURE", "REVOKED") and isinstance(result, dict):
        return _failed_state(status, result)
    if status == "SUCCESS":
        return TaskState(status, False, _progress(progress), result=result if isinstance(result, dict) else {})
    return TaskState(status, bool(heartbeat), _progress(progress))


def _failed_state(status: str, stored: dict[str, Any]) -> TaskState:
    """The state of a task that failed, from what Celery stores of its exception."""
    name = stored.get("exc_type", "")
    arguments = stored.get("exc_message", [])
    if not isinstance(arguments, list):
        arguments = [arguments]
    if name in _WORKER_LOST:
        return TaskState(status, worker_lost=_WORKER_LOST[name])
    if name in _TRANSIENT:
        return TaskState(status, transient_failure=_TRANSIENT[name])
    error = errors.rebuild(name, arguments, stored.get("exc_module") or "")
    if isinstance(error, errors.UnavailableError):
        return TaskState(status, transient_failure=str(error))
    return TaskState(status, error=error)


def _json_object(stored: bytes | None) -> dict[str, Any] | None:
    """The stored object; empty if nothing is stored; None for anything else."""
    try:
        value = json.loads(stored) if stored else {}
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _progress(stored: bytes | None) -> Progress | None:
    fields = _json_object(stored)
    return Progress(**fields) if fields and fields.keys() == Progress("").to_dict().keys() else None
