"""The chain at the servers: init publishes it to the broker, and reads its states from the result backend."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

import redis
from celery import chain

from bifrost_bootstrap import broker, errors, progress
from bifrost_bootstrap.celery import MIGRATE, WARM, add_queue, app
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.init.decision import ChainRecord, Failure, TaskState, TransientFailure, WorkerLost
from bifrost_bootstrap.init.run import Request

#: Failures after which init publishes the chain again, by the name of the exception.
_RETRIED: dict[str, Failure] = {
    "WorkerLostError": WorkerLost("its worker was lost"),
    "Terminated": WorkerLost("it was terminated"),
    "NotRegistered": WorkerLost("a worker without this task took it"),
    "StagedLostError": WorkerLost("Redis lost what the warm had staged"),
    "OperationalError": TransientFailure("it could not hand over to the next task"),
    "TaskRevokedError": TransientFailure("it was revoked"),
    "UnwantedError": TransientFailure("it was taken when Redis had forgotten that we wait for it"),
}
#: Seconds after the end of its init in which a chain may still begin.
WAITING_INIT_TTL = 30
#: Seconds by which a task gives up waiting before its init does, so that init reports the error of the task. The last
#: attempt begins just before the deadline of the task. It starts the process of the tree (3 s on a busy machine), and
#: then waits for a table lock as long as any attempt.
TASK_HEAD_START = 4.0
#: The head start is at most this share of a short deadline.
HEAD_START_SHARE = 0.2


def publish(
    client: redis.Redis, queue: str, request: Request, deadline: Deadline, *, lock_timeout: float
) -> ChainRecord:
    """
    Publish the requested tasks for an init with this deadline, and wait until the broker has confirmed it.

    The message expires in the broker, and a worker does not begin a chain whose init has gone: an old chain never runs.

    Raises UnavailableError, RefusedError, and WarmError if Redis refuses a write.
    """
    add_queue(queue)
    now = time.monotonic()
    migrate_id = uuid.uuid4().hex if request.migrate else ""
    migrate = TaskState("PENDING" if request.migrate else "SUCCESS")
    record = ChainRecord(migrate_id, uuid.uuid4().hex, now, now, now, migrate)
    headers = {progress.CHAIN_HEADER: record.first_id}
    # For each task: a queue that is given to the call would route only the first one.
    options: dict[str, Any] = {"queue": queue, "expiration": progress.MESSAGE_TTL, "headers": headers}
    arguments = {"full": request.full, "allow_shrink": request.allow_shrink}
    work = app.signature(WARM, kwargs=arguments, immutable=True).set(task_id=record.warm_id, **options)
    if request.migrate:
        work = chain(app.signature(MIGRATE, immutable=True).set(task_id=migrate_id, **options), work)
    # Workers publish each result this way. If Redis refused it to them, their tasks would end without a result, and
    # only their log would say why.
    client.publish(app.backend.get_key_for_task(record.first_id), b"")
    with broker.translated():
        keep_chain_alive(client, record, deadline, lock_timeout)
        work.apply_async()
    return record


def keep_chain_alive(client: redis.Redis, record: ChainRecord, deadline: Deadline, lock_timeout: float) -> None:
    """
    Record for `WAITING_INIT_TTL` seconds that an init waits for this chain, and how long its tasks may wait themselves.

    lock_timeout: seconds that a revision waits for a table lock.
    """
    head_start = min(TASK_HEAD_START + lock_timeout, HEAD_START_SHARE * deadline.seconds)
    client.set(
        progress.waiting_init_key(record.first_id), max(0.0, deadline.remaining - head_start), ex=WAITING_INIT_TTL
    )


def read(client: redis.Redis, record: ChainRecord) -> ChainRecord:
    """The record with the newest states of its tasks, read in one round trip."""
    keys: list[bytes] = []
    for task_id in filter(None, (record.migrate_id, record.warm_id)):
        result_key = bytes(app.backend.get_key_for_task(task_id))
        keys += [result_key, progress.heartbeat_key(task_id), progress.progress_key(task_id)]
    found: list[Any] = client.mget(keys)
    migrate = _state(*found[:3]) if record.migrate_id else record.migrate
    return record.with_states(migrate, _state(*found[-3:]))


def _state(meta: bytes | None, heartbeat: bytes | None, stored_progress: bytes | None) -> TaskState:
    """The state of one task, from its result, its heartbeat and its progress in Redis."""
    fields = _json_object(meta)
    if fields is None:
        return TaskState("FAILURE", failure=WorkerLost("the result backend holds something for it that is not JSON"))
    status = fields.get("status", "PENDING")
    result = fields.get("result")
    if not isinstance(result, dict):
        result = {}
    elif status in ("FAILURE", "REVOKED"):
        return TaskState(status, failure=_failure(result))
    step = _json_object(stored_progress) or {}
    newest = progress.Progress(**step) if step.keys() == progress.Progress("").to_dict().keys() else None
    if status == "SUCCESS":
        return TaskState(status, progress=newest, result=result)
    return TaskState(status, bool(heartbeat), newest)


def _failure(stored: dict[str, Any]) -> Failure:
    """How a task failed, from what Celery stores of its exception."""
    name = stored.get("exc_type", "")
    if name in _RETRIED:
        return _RETRIED[name]
    arguments = stored.get("exc_message", [])
    if not isinstance(arguments, list):
        arguments = [arguments]
    error = errors.rebuild(name, arguments, stored.get("exc_module") or "")
    return TransientFailure(str(error)) if isinstance(error, errors.UnavailableError) else error


def _json_object(stored: bytes | None) -> dict[str, Any] | None:
    """The stored object; empty if nothing is stored; None for anything else."""
    try:
        value = json.loads(stored) if stored else {}
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
