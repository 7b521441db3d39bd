"""The chain as init sees it: enqueued, in the broker's queue, and in the result backend."""

from __future__ import annotations

import json
import ssl
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import redis
from celery import chain
from kombu.exceptions import OperationalError

from bifrost_bootstrap import errors
from bifrost_bootstrap.celery import MIGRATE, WARM, add_queue, app, described, refuses
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.decision import MESSAGE_TTL, TaskState
from bifrost_bootstrap.progress import WANTED_HEADER, Progress, held_key, progress_key, wanted_key
from bifrost_bootstrap.redaction import masked
from bifrost_bootstrap.tree import QUEUE

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
#: Routing key of a message that no queue is to get.
PROBE = f"{QUEUE}.nobody"
#: What a broker says that does not take a message: nothing, in the library's words.
_NACKED = "it did not take the message; look for a policy with max-length and reject-publish"


@dataclass(frozen=True)
class SentChain:
    """The ids of the tasks of one chain; migrate is "" where the warm was sent alone."""

    migrate: str
    warm: str

    @property
    def first(self) -> str:
        return self.migrate or self.warm


@dataclass(frozen=True)
class QueueState:
    """Messages that wait and workers that consume; None where the transport does not tell."""

    messages: int | None
    consumers: int | None


@contextmanager
def _broker_errors(server: str) -> Iterator[None]:
    connection = app.connection_for_write()
    try:
        yield
    except Exception as error:
        known = (*connection.connection_errors, *connection.channel_errors, RuntimeError)
        # Redis is asked inside of such a block too, and has words of its own.
        if not isinstance(error, known) and not type(error).__module__.startswith(("amqp.", "kombu.")):
            raise
        text = masked(str(error).strip() or type(error).__name__)
        if isinstance(error, OperationalError) and not str(error).strip():
            text = _NACKED
        if isinstance(error, ssl.SSLCertVerificationError):
            raise errors.CertificateError(server, text) from error
        if isinstance(error, FileNotFoundError):
            raise errors.CertificateError(server, errors.NO_TLS_FILE) from error
        if refuses(error):
            raise errors.RefusedError(server, text) from error
        raise errors.UnavailableError(server, text) from error


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
    with _broker_errors(described()):
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


def queue_state(queue: str, *, publishing: bool = True, room_for: int = 0) -> QueueState:
    """
    Who consumes the queue. A queue that nobody declared has nobody.

    publishing: the broker must take messages. room_for: so many more connections must be possible. Raises
    UnavailableError, RefusedError.
    """
    with _broker_errors(described()), app.connection_for_write() as connection, ExitStack() as stack:
        connection.connect()
        if connection.transport.driver_type != "amqp":
            return QueueState(None, None)
        for _ in range(room_for):
            stack.enter_context(app.connection_for_write()).connect()
        if publishing:
            _publish_to_nobody(connection)
        try:
            _, messages, consumers = connection.default_channel.queue_declare(queue, passive=True)
        except connection.channel_errors as error:
            if getattr(error, "code", None) == 404:
                return QueueState(0, 0)
            raise
        return QueueState(messages, consumers)


def _publish_to_nobody(connection: Any) -> None:
    """
    Publish a message that no queue gets: a broker with an alarm says so only to who has published.

    It takes the first message of each connection and answers nothing after that, so whoever goes on trying fills the
    queue. Where it has an alarm, the next wait for an answer on this connection raises RuntimeError at once.
    """

    def on_blocked(_reason: str) -> None:
        # Without a farewell, for which it would wait too.
        connection.connection.collect()
        raise RuntimeError("it blocks publishers (connection.blocked): it is low on memory or disk")

    connection.connection.on_blocked = on_blocked
    channel = connection.default_channel
    exchange = app.amqp.queues[QUEUE].exchange(channel)
    exchange.declare()
    channel.basic_publish(channel.prepare_message(b""), exchange.name, PROBE)


def prove_rights(queue: str) -> None:
    """Declare what a worker of this queue needs, as it will itself. Raises UnavailableError, RefusedError."""
    add_queue(queue)
    with _broker_errors(described()), app.connection_for_write() as connection:
        connection.connect()
        app.control.mailbox.exchange(connection.default_channel).declare()
        for name in (QUEUE, queue):
            app.amqp.queues[name](connection.default_channel).declare()


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
