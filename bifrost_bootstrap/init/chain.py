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
from bifrost_bootstrap.progress import MESSAGE_TTL, WANTED_HEADER, Progress, held_key, progress_key, wanted_key

#: Failures in which the work was lost, by the name of the exception: the next run may succeed.
_LOST = {"WorkerLostError": "its worker was lost", "Terminated": "it was terminated",
         "NotRegistered": "a worker without this task took it",
         "StagedLostError": "Redis lost what the warm had staged"}  # fmt: skip
#: Failures in which the work is not done for a reason that passes.
_UNDONE = {"OperationalError": "it could not hand over to the next task", "TaskRevokedError": "it was revoked",
           "UnwantedError": "it was taken when Redis had forgotten that we wait for it"}  # fmt: skip
#: Seconds after its init has gone in which a chain may still begin.
WANTED_TTL = 30
#: Seconds by which a task gives up waiting before init does, so that its own error is heard: the last attempt begins
#: just before the task's deadline, starts the tree's process (3 s on a busy machine), and waits for a table lock as
#: long as any. Of a short deadline only a share.
TASK_HEAD_START, HEAD_START_SHARE = 4.0, 0.2


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
    Publish the chain, confirmed by the broker, for an init with this deadline. Raises UnavailableError, RefusedError,
    and WarmError where Redis refuses a write.

    Both tasks are routed: a queue given to the call would route only the first. The message expires in the
    broker, and a worker that held it meanwhile finds that nobody wants it: a chain that nobody began does not
    run long after its init has gone.
    """
    add_queue(queue)
    sent = SentChain(uuid.uuid4().hex if migrate else "", uuid.uuid4().hex)
    options: dict[str, Any] = {"queue": queue, "expiration": MESSAGE_TTL, "headers": {WANTED_HEADER: sent.first}}
    work = app.signature(WARM, kwargs={"full": full, "allow_shrink": allow_shrink}, immutable=True)
    work = work.set(task_id=sent.warm, **options)
    if migrate:
        begin = app.signature(MIGRATE, immutable=True).set(task_id=sent.migrate, **options)
        work = chain(begin, work)
    # As workers announce each result. Where Redis refuses it to them, their tasks end without one, and only their log
    # says why.
    client.publish(app.backend.get_key_for_task(sent.first), b"")
    with broker.as_our_errors():
        want(client, sent, deadline, lock_timeout)
        work.apply_async()
    return sent


def want(client: redis.Redis, sent: SentChain, deadline: Deadline, lock_timeout: float) -> None:
    """
    Say for `WANTED_TTL` seconds that somebody waits for this chain, and how long its tasks may wait themselves.

    lock_timeout: seconds that a revision waits for a table lock.
    """
    head_start = min(TASK_HEAD_START + lock_timeout, HEAD_START_SHARE * deadline.seconds)
    client.set(wanted_key(sent.first), max(0.0, deadline.remaining - head_start), ex=WANTED_TTL)


def states(client: redis.Redis, sent: SentChain) -> tuple[TaskState, TaskState]:
    """Both tasks in one round trip."""
    ids = [task_id for task_id in (sent.migrate, sent.warm) if task_id]
    keys = []
    for task_id in ids:
        keys += [bytes(app.backend.get_key_for_task(task_id)), held_key(task_id), progress_key(task_id)]
    found: list[Any] = client.mget(keys)
    warm = _state(*found[-3:])
    return (_state(*found[:3]) if sent.migrate else TaskState("SUCCESS")), warm


def _state(meta: bytes | None, held: bytes | None, progress: bytes | None) -> TaskState:
    fields = _json_object(meta)
    if fields is None:
        return TaskState("FAILURE", lost="the result backend holds something for it that is not JSON")
    status, result = fields.get("status", "PENDING"), fields.get("result")
    if status in ("FAILURE", "REVOKED") and isinstance(result, dict):
        name, arguments = result.get("exc_type", ""), result.get("exc_message", [])
        arguments = arguments if isinstance(arguments, list) else [arguments]
        error = errors.rebuild(name, arguments, result.get("exc_module") or "")
        if name in _LOST:
            return TaskState(status, lost=_LOST[name])
        if isinstance(error, errors.UnavailableError) or name in _UNDONE:
            return TaskState(status, undone=_UNDONE.get(name, str(error)))
        return TaskState(status, error=error)
    return TaskState(
        status,
        bool(held) and status != "SUCCESS",
        _progress(progress),
        result=result if status == "SUCCESS" and isinstance(result, dict) else {},
    )


def _json_object(stored: bytes | None) -> dict[str, Any] | None:
    """The object that was stored, empty where nothing was; None for anything else, whoever wrote it there."""
    try:
        value = json.loads(stored) if stored else {}
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _progress(stored: bytes | None) -> Progress | None:
    fields = _json_object(stored)
    return Progress(**fields) if fields and fields.keys() == Progress("").to_dict().keys() else None
