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
from kombu.exceptions import OperationalError

from bifrost_bootstrap import settings
from bifrost_bootstrap.errors import SettingsError
from bifrost_bootstrap.tree import QUEUE

CONFIGURATION = Path(__file__).parent.parent / "celeryconfig.py"
MIGRATE = "bifrost.bootstrap.migrate"
WARM = "bifrost.bootstrap.warm_module_cache"
#: Seconds after which the broker drops the queue of a tree that has no worker any more. Part of the queue's name:
#: never change it under the same prefix.
QUEUE_EXPIRES = 3600.0

#: Reply codes by which RabbitMQ refuses a right, a queue that was declared otherwise, a login or a virtual host. The
#: last two also stand for a limit that is reached, which passes.
_REFUSALS = (403, 406, 530)


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
app = Celery("bifrost_bootstrap", loader=PlacedLoader)


def add_queue(name: str) -> Queue:
    """Make the queue of a tree (or of one run) known to this process, with the arguments that all sides declare."""
    exchange = Exchange(QUEUE, type="direct", durable=True)
    queue = Queue(name, exchange, routing_key=name, durable=True, expires=QUEUE_EXPIRES)
    app.amqp.queues.add(queue)
    return queue


def described() -> str:
    """The broker in words, without user and password."""
    connection = app.connection_for_write()
    return f"RabbitMQ {connection.hostname}:{connection.port or 5672}/{(connection.virtual_host or '/').lstrip('/')}"


def refuses(error: BaseException) -> bool:
    """Whether RabbitMQ refuses us for a reason that an operator has to mend, and not for a limit that is reached."""
    cause = error.__cause__ if isinstance(error, OperationalError) else error
    return getattr(cause, "code", None) in _REFUSALS and "limit" not in str(error)
