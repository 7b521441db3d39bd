"""What Celery lacks to outlive the loss of one of several RabbitMQ nodes."""

from __future__ import annotations

import uuid
from typing import Any

import kombu
from celery.app import amqp, control
from kombu import Queue, pidbox
from kombu.exceptions import OperationalError


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


class AMQP(amqp.AMQP):  # type: ignore[misc]
    """Celery's, with our producer."""

    @property
    def producer_pool(self) -> Any:
        pool = super().producer_pool
        pool.Producer = Producer
        return pool
