"""The broker, asked directly: who consumes a queue, whether it takes messages, and whether we may declare ours."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from amqp.exceptions import MessageNacked
from kombu import Connection
from kombu.exceptions import OperationalError

from bifrost_bootstrap import errors
from bifrost_bootstrap.celery import add_queue, app
from bifrost_bootstrap.migrate.tree import QUEUE
from bifrost_bootstrap.redaction import masked

#: Routing key of a message that no queue is to get.
PROBE = f"{QUEUE}.nobody"
#: What a broker says that does not take a message: nothing, in the library's words.
_NACKED = (
    "it did not take the message; look for a policy with max-length and reject-publish, and for nodes that are down"
)
#: Reply codes by which RabbitMQ refuses a right, a login or a virtual host (the last two also stand for a limit that is
#: reached, which passes), and a queue that was declared with other arguments.
_REFUSALS = {403: errors.RefusedError, 530: errors.RefusedError, 406: errors.DeclaredOtherwiseError}


@dataclass(frozen=True)
class QueueState:
    """Messages that wait and workers that consume; None where the transport does not tell."""

    messages: int | None
    consumers: int | None


def display_name() -> str:
    """The broker in words, without user and password; of several nodes, all."""
    nodes = [Connection(url) for url in app.connection_for_write().alt] or [app.connection_for_write()]
    addresses = ",".join(f"{node.hostname}:{node.port or 5672}" for node in nodes)
    return f"RabbitMQ {addresses}/{(nodes[0].virtual_host or '/').lstrip('/')}"


@contextmanager
def translated() -> Iterator[None]:
    """Raise what the broker says in the block as UnavailableError, RefusedError or CertificateError."""
    try:
        yield
    except Exception as error:
        connection = app.connection_for_write()
        known = (*connection.connection_errors, *connection.channel_errors, RuntimeError)
        # Redis is asked inside of such a block too, and has words of its own.
        if not isinstance(error, known) and not type(error).__module__.startswith(("amqp.", "kombu.")):
            raise
        cause = error.__cause__ if isinstance(error, OperationalError) else None
        raise _as_ours(cause or error) from error


def _as_ours(error: BaseException) -> errors.BootstrapError:
    server = display_name()
    text = _NACKED if isinstance(error, MessageNacked) else masked(str(error).strip() or type(error).__name__)
    if isinstance(error, ssl.SSLCertVerificationError):
        return errors.CertificateError(server, text)
    if isinstance(error, FileNotFoundError):
        return errors.CertificateError(server, errors.NO_TLS_FILE)
    refusal = _REFUSALS.get(getattr(error, "code", None) or 0)
    if refusal and "limit" not in text:
        return refusal(server, text)
    return errors.UnavailableError(server, text)


@contextmanager
def connected() -> Iterator[Connection]:
    """A connection to the first node that answers, each tried once; the next ones begin there."""
    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=max(0, len(connection.alt) - 1), interval_start=0, interval_step=0)
        _begin_at_node_of(connection)
        yield connection


def _begin_at_node_of(connection: Connection) -> None:
    """Let this process try this node first: a frozen one takes `broker_connection_timeout` each time."""
    nodes = {url: Connection(url) for url in connection.alt}
    here = (connection.hostname, connection.port)
    order = sorted(nodes, key=lambda url: (nodes[url].hostname, nodes[url].port) != here)
    if order != connection.alt:
        app.conf.broker_url = ";".join(order)


def queue_state(queue: str, *, publishing: bool = True, room_for: int = 0) -> QueueState:
    """
    Who consumes the queue. A queue that nobody declared has nobody.

    publishing: the broker must take messages. room_for: so many more connections must be possible. Raises
    UnavailableError, RefusedError.
    """
    with translated(), ExitStack() as stack:
        connection = stack.enter_context(connected())
        if connection.transport.driver_type != "amqp":
            return QueueState(None, None)
        for _ in range(room_for):
            stack.enter_context(connected())
        if publishing:
            _publish_to_nobody(connection)
        try:
            _, messages, consumers = connection.default_channel.queue_declare(queue, passive=True)
        except connection.channel_errors as error:
            # Also said of a queue whose node is down, but not of ours: those are on several nodes.
            if getattr(error, "code", None) == 404:
                return QueueState(0, 0)
            raise
        return QueueState(messages, consumers)


def _publish_to_nobody(connection: Any) -> None:
    """
    Publish a message that no queue gets: a broker with an alarm says so only to who has published.

    It takes the first message of each connection and answers nothing after that, so a client that goes on fills the
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


def check_permissions(*queues: str) -> None:
    """Declare what a worker of these queues needs, as it will itself. Raises UnavailableError, RefusedError."""
    with translated(), connected() as connection:
        app.control.mailbox.exchange(connection.default_channel).declare()
        for name in queues:
            add_queue(name)(connection.default_channel).declare()
