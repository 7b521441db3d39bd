"""Direct questions to the broker: who consumes a queue, does it accept messages, may we declare our queues."""

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

#: Routing key of a message that goes to no queue.
PROBE = f"{QUEUE}.nobody"
#: RabbitMQ gives no reason when it does not confirm a message.
_NACKED = (
    "it did not take the message; look for a policy with max-length and reject-publish, and for nodes that are down"
)
#: RabbitMQ's reply codes for a missing right, for a login or virtual host, and for a queue declared with other
#: arguments. 403 and 530 also stand for a limit that is reached, which may pass.
_REJECTIONS = {403: errors.RefusedError, 530: errors.RefusedError, 406: errors.DeclaredOtherwiseError}


@dataclass(frozen=True)
class QueueState:
    """Messages that wait in a queue, and workers that consume it; None if the transport does not report them."""

    messages: int | None
    consumers: int | None


def display_name() -> str:
    """The broker for messages and logs: all of its nodes, without user and password."""
    connection = app.connection_for_write()
    nodes = [Connection(url) for url in connection.alt] or [connection]
    addresses = ",".join(f"{node.hostname}:{node.port or 5672}" for node in nodes)
    return f"RabbitMQ {addresses}/{(nodes[0].virtual_host or '/').lstrip('/')}"


@contextmanager
def translated() -> Iterator[None]:
    """Raise errors of the broker in the block as UnavailableError, RefusedError or CertificateError."""
    try:
        yield
    except Exception as error:
        connection = app.connection_for_write()
        known = (*connection.connection_errors, *connection.channel_errors, RuntimeError)
        # Errors of Redis, which such a block may use too, are translated already.
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
    rejection = _REJECTIONS.get(getattr(error, "code", None) or 0)
    if rejection and "limit" not in text:
        return rejection(server, text)
    return errors.UnavailableError(server, text)


@contextmanager
def connected() -> Iterator[Connection]:
    """A connection to the first node that answers. Each node is tried once; the next call begins with this one."""
    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=max(0, len(connection.alt) - 1), interval_start=0, interval_step=0)
        _prefer_node_of(connection)
        yield connection


def _prefer_node_of(connection: Connection) -> None:
    """Let this process try this node first: a frozen node costs `broker_connection_timeout` each time."""
    nodes = {url: Connection(url) for url in connection.alt}
    preferred = (connection.hostname, connection.port)
    order = sorted(nodes, key=lambda url: (nodes[url].hostname, nodes[url].port) != preferred)
    if order != connection.alt:
        app.conf.broker_url = ";".join(order)


def queue_state(queue: str, *, publishing: bool = True, room_for: int = 0) -> QueueState:
    """
    Read the state of a queue; 0 messages and 0 consumers if nobody declared it.

    publishing: also check that the broker accepts messages. room_for: also check that it accepts so many connections
    more. Raises UnavailableError, RefusedError.
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
            # 404 also stands for a queue whose node is down. Ours are quorum queues, with copies on several nodes.
            if getattr(error, "code", None) == 404:
                return QueueState(0, 0)
            raise
        return QueueState(messages, consumers)


def _publish_to_nobody(connection: Any) -> None:
    """
    Publish a message that goes to no queue: only a client that publishes is told that the broker blocks publishers.

    With an alarm (memory, disk), RabbitMQ accepts the first message of a connection and then answers nothing. A client
    that tries again and again would fill the queue. Here, the next wait for an answer raises RuntimeError instead.
    """

    def on_blocked(_reason: str) -> None:
        # Closing the connection properly would wait for an answer.
        connection.connection.collect()
        raise RuntimeError("it blocks publishers (connection.blocked): it is low on memory or disk")

    connection.connection.on_blocked = on_blocked
    channel = connection.default_channel
    exchange = app.amqp.queues[QUEUE].exchange(channel)
    exchange.declare()
    channel.basic_publish(channel.prepare_message(b""), exchange.name, PROBE)


def check_permissions(*queues: str) -> None:
    """Declare the same as a worker of these queues will. Raises UnavailableError, RefusedError."""
    with translated(), connected() as connection:
        app.control.mailbox.exchange(connection.default_channel).declare()
        for name in queues:
            add_queue(name)(connection.default_channel).declare()
