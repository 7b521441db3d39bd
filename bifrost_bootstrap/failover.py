"""
What Celery lacks to survive the loss of a RabbitMQ node.

The app uses `Control` (remote control) and `AMQP` (queues and messages) in place of Celery's classes of these names.
"""

from __future__ import annotations

import logging
import uuid
from typing import Any

import kombu
from celery.app import amqp, control
from kombu import Queue, pidbox
from kombu.exceptions import OperationalError

logger = logging.getLogger(__name__)

#: Seconds to wait for RabbitMQ's answer about a queue. It answers in milliseconds, but it gives the leader of a queue
#: that is deleted 5 s.
LEADER_TIMEOUT = 10.0


class Mailbox(pidbox.Mailbox):  # type: ignore[misc]
    """
    Remote control with a new queue name for each connection of the worker.

    Celery names this exclusive queue after the worker. A worker that reconnects would find the old queue locked, or its
    node down, and would end.
    """

    def get_queue(self, hostname: str) -> Queue:
        name = f"{hostname}.{uuid.uuid4().hex[:8]}.{self.namespace}.pidbox"
        return Queue(name, self.exchange, durable=False, exclusive=True, message_ttl=self.queue_ttl)


class Control(control.Control):  # type: ignore[misc]
    """Celery's remote control, with our mailbox."""

    Mailbox = Mailbox


class Producer(kombu.Producer):  # type: ignore[misc]
    """
    After a failure, closes the connection or tries the next node.

    A channel of RabbitMQ keeps refusing messages for a queue whose leader was lost (seen with 3.10), and a frozen node
    never answers. Celery's own retries, when a task hands over to the next one, use the same connection and node.
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
    Before it consumes, replaces each empty queue that has lost its leader.

    RabbitMQ 3.10 takes half a second to record that it leads a new quorum queue. If it is killed before, it comes back
    with the queue, but accepts no message for it and answers no consumer, forever. With several nodes, another node has
    the record.
    """

    def consume(self, no_ack: bool | None = None) -> None:
        if len(self.connection.alt) < 2 and self.connection.transport.driver_type == "amqp":
            replaced = [queue for queue in self.queues if _delete_without_leader(self.connection, queue.name)]
            if replaced:
                self.declare()
        super().consume(no_ack)


def _delete_without_leader(worker_connection: kombu.Connection, queue: str) -> bool:
    """Delete the queue if RabbitMQ reports it as empty but does not answer a `basic.get`. Whether it was deleted."""
    options = {**worker_connection.transport_options, "read_timeout": LEADER_TIMEOUT}
    # No heartbeats: a heartbeat of the broker would count as an answer.
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
    """Celery's queues and messages, with our consumer and producer."""

    Consumer = Consumer

    @property
    def producer_pool(self) -> Any:
        pool = super().producer_pool
        pool.Producer = Producer
        return pool
