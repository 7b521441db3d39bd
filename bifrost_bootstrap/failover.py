"""What Celery lacks to outlive the loss of a RabbitMQ node, of one or of several."""

from __future__ import annotations

import logging
import uuid
from typing import Any

import kombu
from celery.app import amqp, control
from kombu import Queue, pidbox
from kombu.exceptions import OperationalError

logger = logging.getLogger(__name__)

#: Seconds for RabbitMQ's answer about a queue. It answers in milliseconds; to a deletion after the 5 that it gives the
#: queue's leader.
LEADER_TIMEOUT = 10.0


class Mailbox(pidbox.Mailbox):  # type: ignore[misc]
    """
    Remote control whose queue lives as long as the worker's connection.

    Celery's has the name of the worker. A worker that comes back over another line finds the old one locked, or its
    node gone, and ends.
    """

    def get_queue(self, hostname: str) -> Queue:
        name = f"{hostname}.{uuid.uuid4().hex[:8]}.{self.namespace}.pidbox"
        return Queue(name, self.exchange, durable=False, exclusive=True, message_ttl=self.queue_ttl)


class Control(control.Control):  # type: ignore[misc]
    """Celery's, with our mailbox."""

    Mailbox = Mailbox


class Producer(kombu.Producer):  # type: ignore[misc]
    """
    Gives up the connection over which a message failed, and the node to which it cannot connect.

    A channel of RabbitMQ goes on to refuse every message for a queue whose leader was lost (seen with 3.10), and a
    frozen node answers none. Celery's own attempts to hand over to the next task stay on connection and node.
    """

    def _publish(self, *arguments: Any, **options: Any) -> Any:
        connection = self.connection
        try:
            return super()._publish(*arguments, **options)
        except connection.recoverable_connection_errors:
            connection.collect()
            raise
        except OperationalError:
            connection.maybe_switch_next()
            raise


class Consumer(kombu.Consumer):  # type: ignore[misc]
    """
    Before it consumes, replaces each empty queue that a killed RabbitMQ has no leader for.

    RabbitMQ 3.10 records after half a second that it leads a new quorum queue. If killed before, it comes back with
    the queue, accepts no message for it and answers no consumer, for ever. Among several nodes, another one has it on
    record.
    """

    def consume(self, no_ack: bool | None = None) -> None:
        if len(self.connection.alt) < 2 and self.connection.transport.driver_type == "amqp":
            replaced = [queue for queue in self.queues if _delete_without_leader(self.connection, queue.name)]
            if replaced:
                self.declare()
        super().consume(no_ack)


def _delete_without_leader(worker_connection: kombu.Connection, queue: str) -> bool:
    """Delete the queue if RabbitMQ reports it as empty, but does not answer a `basic.get` for it. Whether it did."""
    options = {**worker_connection.transport_options, "read_timeout": LEADER_TIMEOUT}
    # Without heartbeats: each of the broker's would count as an answer.
    with worker_connection.clone(heartbeat=0, transport_options=options) as connection:
        channel = connection.connect().channel()
        _, messages, consumers = channel.queue_declare(queue, passive=True)
        if messages or consumers:
            return False
        try:
            # A message that has just arrived returns to the queue when this connection is closed.
            channel.basic_get(queue)
        except TimeoutError:
            # Close the socket only: closing the channel would wait for an answer too.
            connection.collect()
        else:
            return False
    logger.warning("RabbitMQ has no leader for the empty queue %s; replacing the queue", queue)
    with worker_connection.clone(heartbeat=0, transport_options=options) as connection:
        connection.connect().channel().queue_delete(queue)
    return True


class AMQP(amqp.AMQP):  # type: ignore[misc]
    """Celery's, with our consumer and producer."""

    Consumer = Consumer

    @property
    def producer_pool(self) -> Any:
        pool = super().producer_pool
        pool.Producer = Producer
        return pool
