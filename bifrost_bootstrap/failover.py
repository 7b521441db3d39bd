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

#: Seconds for the answer to a deletion; RabbitMQ itself asks the queue's leader for 5.
DELETE_TIMEOUT = 15.0


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
    Deletes an empty queue that a killed RabbitMQ forgot to lead; the next attempt to consume declares it again.

    RabbitMQ 3.10 writes down after half a second that it leads a new quorum queue. Killed before, it comes back with
    the queue, takes no message for it and answers no consumer, for ever; the connection ends after three heartbeats.
    Of several nodes, another has it written down.
    """

    def consume(self, no_ack: bool | None = None) -> None:
        try:
            super().consume(no_ack)
        except self.connection.connection_errors:
            if len(self.connection.alt) < 2:
                for queue in self.queues:
                    _delete_if_nobody_leads(self.connection, queue.name)
            raise


def _delete_if_nobody_leads(lost: kombu.Connection, queue: str) -> None:
    """Delete the queue if RabbitMQ calls it empty and does not let us consume it either."""
    # Without heartbeats, which the broker goes on sending: each would count as an answer.
    with lost.clone(heartbeat=0) as connection:
        channel = connection.connect().channel()
        _, messages, consumers = channel.queue_declare(queue, passive=True)
        if messages or consumers:
            return
        try:
            channel.basic_consume(queue)
        except TimeoutError:
            # Without a farewell, for which it would wait too.
            connection.collect()
        else:
            return
    logger.warning("nobody leads the queue %s since RabbitMQ was killed; it is empty and deleted now", queue)
    with lost.clone(
        heartbeat=0, transport_options={**lost.transport_options, "read_timeout": DELETE_TIMEOUT}
    ) as connection:
        connection.connect().channel().queue_delete(queue)


class AMQP(amqp.AMQP):  # type: ignore[misc]
    """Celery's, with our consumer and producer."""

    Consumer = Consumer

    @property
    def producer_pool(self) -> Any:
        pool = super().producer_pool
        pool.Producer = Producer
        return pool
