"""
The Celery app, where `celery -A bifrost_bootstrap …` finds it.

Its configuration is `celeryconfig.py` beside this package, read when first needed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from celery import Celery
from celery.loaders.app import AppLoader
from kombu import Exchange, Queue

from bifrost_bootstrap import settings
from bifrost_bootstrap.errors import SettingsError
from bifrost_bootstrap.migrate.tree import QUEUE

CONFIGURATION = Path(__file__).parent.parent / "celeryconfig.py"
MIGRATE = "bifrost.bootstrap.migrate"
WARM = "bifrost.bootstrap.warm_module_cache"
#: Seconds after which the broker drops the queue of a tree that has no worker any more. Part of the queue's name:
#: never change it under the same prefix.
QUEUE_EXPIRES = 3600.0


class PlacedLoader(AppLoader):  # type: ignore[misc]
    """Reads our configuration by its place; the default looks for bare names in the working folder."""

    def read_configuration(self, env: str = "") -> dict[str, Any]:
        spec = importlib.util.spec_from_file_location("bifrost_bootstrap_celeryconfig", CONFIGURATION)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except SettingsError as error:
            # Reached by Celery's own commands only, which would end in a traceback and 1.
            sys.stderr.write(f"{error}\n")
            raise SystemExit(int(error.exit_code)) from None
        return {name: value for name, value in vars(module).items() if name.islower() and not name.startswith("_")}


settings.forget_celery_variables()
# By name: only a worker needs remote control, and init imports as little as it can.
_PARTS = {"control": "bifrost_bootstrap.failover:Control", "amqp": "bifrost_bootstrap.failover:AMQP"}
app = Celery("bifrost_bootstrap", loader=PlacedLoader, **_PARTS)


def lasting_queue(name: str) -> Queue:
    """
    A queue with the arguments that all sides declare; it outlives the loss of one node, with a copy on each of three.

    Needs RabbitMQ 3.10: before, such queues did not let messages expire. Over Redis it is a queue like any other.
    """
    exchange = Exchange(QUEUE, type="direct", durable=True)
    kind = {"x-queue-type": "quorum"}
    expires = None if name == QUEUE else QUEUE_EXPIRES
    return Queue(name, exchange, routing_key=name, durable=True, expires=expires, queue_arguments=kind)


def add_queue(name: str) -> Queue:
    """Make a queue known to this process."""
    queue = lasting_queue(name)
    app.amqp.queues.add(queue)
    return queue
