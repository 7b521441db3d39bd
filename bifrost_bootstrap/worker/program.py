"""
The bootstrap worker: Celery's worker with our queues, acknowledgement, heartbeats and health file.

Every worker of the app loads this module (`imports` in `celeryconfig.py`), also the stock `celery worker`.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

from celery import bootsteps
from celery.bin.celery import celery as celery_command
from celery.exceptions import CPendingDeprecationWarning, InvalidTaskError
from celery.platforms import SecurityWarning
from celery.signals import celeryd_after_setup, setup_logging
from celery.worker import consumer, state
from celery.worker.request import Request
from kombu.exceptions import OperationalError

from bifrost_bootstrap import broker, logs, settings as environment
from bifrost_bootstrap.celery import WARM, add_queue, app
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import BootstrapError
from bifrost_bootstrap.migrate import tree_loading
from bifrost_bootstrap.migrate.tree import QUEUE, Tree
from bifrost_bootstrap.progress import BEAT, HEARTBEAT_TTL, MESSAGE_TTL, heartbeat_key
from bifrost_bootstrap.redaction import masked
from bifrost_bootstrap.servers import redis_server, waiting
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.worker.cache_monitor import ANY_WORKER_BUSY, CacheMonitor

logger = logging.getLogger(__name__)

#: Seconds that one heartbeat may block the worker's loop if Redis does not answer.
BEAT_TIMEOUT = 1.0
#: Boot steps that require these start after the pool and stop before it. Otherwise Python's hashes would decide the
#: order: a worker that stops would send heartbeats in one run and none in the next.
AFTER_POOL = ("celery.worker.components:Timer", "celery.worker.components:Pool")


class AcknowledgedOnReceipt(Request):  # type: ignore[misc]
    """
    Acknowledges a message when it arrives, not when its task starts.

    A message that waits unacknowledged behind a long migration would run into RabbitMQ's consumer timeout, which closes
    the worker's channel. If a worker dies with a message, the init that waits for it publishes the chain again.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # If the worker is shutting down, this leaves the message unacknowledged: RabbitMQ redelivers it.
        state.maybe_shutdown()
        try:
            super().__init__(*arguments, **options)
        except ValueError as error:
            # A ValueError would end the worker. Celery rejects the message after an InvalidTaskError.
            raise InvalidTaskError(f"its body is no task's: {error}") from error
        self.acknowledge()


@setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]
def configure_logging(**_signal: Any) -> None:
    """Set up our logging in place of Celery's, also under the stock `celery worker`."""
    settings = environment.load()
    logs.configure(settings.log_format, settings.log_level)


@celeryd_after_setup.connect(weak=False)  # type: ignore[untyped-decorator]
def choose_queues(**_signal: Any) -> None:
    """Consume calls by hand and the chains of our tree; the worker of one init consumes only the queue of that init."""
    # Celery warns at every reconnect about late acknowledgement, which we do not use.
    warnings.simplefilter("ignore", CPendingDeprecationWarning)
    try:
        settings = environment.load(needs=("database", "redis", "rabbitmq"))
        tree = tree_loading.load(settings)
    except BootstrapError as error:
        logger.error("%s", error)
        raise SystemExit(int(error.exit_code)) from None
    queue = add_queue(chain_queue(settings, tree))
    if settings.run_queue:
        app.amqp.queues.select([queue.name])
    else:
        app.amqp.queues.select_add(queue)
    logger.info("bootstrap worker of tree %s (%s), queue %s", tree.alembic.config, tree.why, queue.name)


def chain_queue(settings: Settings, tree: Tree) -> str:
    """The queue of this worker's chains: that of its tree, or that of the one init which has started the worker."""
    return settings.run_queue or tree.queue(settings.database.target)


def wait_for_broker(settings: Settings, tree: Tree) -> None:
    """
    Wait until the broker lets this worker declare its queues, and touch the health file meanwhile.

    Celery itself would end with 0 if the broker rejects the login, with 1 if a right is missing, and would try a wrong
    virtual host forever. Raises UnavailableError at the deadline, RefusedError.
    """
    start_health_file(settings.worker_health_file)
    by_hand = [] if settings.run_queue else [QUEUE]
    queues = [*by_hand, chain_queue(settings, tree)]
    probes = {broker.display_name(): lambda: broker.check_permissions(*queues)}
    waiting.wait_for(probes, Deadline(settings.init_timeout))


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Celery's consumer, without the 28 queues for delayed tasks that Celery declares beside a quorum queue."""

    class Blueprint(consumer.Consumer.Blueprint):  # type: ignore[misc]
        """A task with a countdown waits in the worker, as it does with a classic queue."""

        default_steps = frozenset(
            step for step in consumer.Consumer.Blueprint.default_steps if "delayed_delivery" not in step
        )


#: Set while the worker is connected to the broker. Then its loop must come round, or it hangs.
_connected = threading.Event()


@functools.cache
def start_health_file(health_file: Path | None) -> None:
    """
    From now on a thread touches the file while the worker has no connection to the broker. Does nothing without a file.

    While the worker is connected, `Heartbeat` touches it: if the worker's loop hangs, the file grows old. A worker that
    only waits for its broker must not be restarted.
    """
    if not health_file:
        return

    def touch_while_disconnected() -> None:
        pause = threading.Event()
        while not pause.wait(BEAT):
            if not _connected.is_set():
                _touch(health_file)

    _touch(health_file)
    threading.Thread(target=touch_while_disconnected, name="health", daemon=True).start()


def _touch(health_file: Path) -> None:
    try:
        health_file.touch()
    except OSError as error:
        logger.warning("BIFROST_WORKER_HEALTH_FILE %s cannot be touched: %s", health_file, error.strerror)


class Connected(bootsteps.StartStopStep):  # type: ignore[misc]
    """A boot step of the consumer: it starts and stops with each connection to the broker."""

    requires = ("celery.worker.consumer.connection:Connection",)

    def start(self, consumer: Any) -> None:
        _connected.set()

    def stop(self, consumer: Any) -> None:
        _connected.clear()


class Timed(bootsteps.StartStopStep):  # type: ignore[misc]
    """A boot step of the worker that does something every few seconds, until it stops. timer: set by `start`."""

    requires = AFTER_POOL
    timer: Any = None

    def stop(self, worker: Any) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer = None


class Heartbeat(Timed):
    """Every `BEAT` seconds, send heartbeats for the tasks that this worker has, and touch the health file."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self.settings: Settings = environment.load(needs=("redis",))
        # The stock `celery worker` has not started it yet.
        start_health_file(self.settings.worker_health_file)

    def start(self, worker: Any) -> None:
        self.timer = worker.timer.call_repeatedly(BEAT, self.beat)

    def beat(self) -> None:
        if file := self.settings.worker_health_file:
            _touch(file)
        task_ids = {request.id for request in (*state.reserved_requests, *state.active_requests)}
        if not task_ids:
            return
        try:
            with (
                redis_server.connect(self.settings.redis, answer_timeout=BEAT_TIMEOUT) as client,
                client.pipeline(transaction=False) as pipeline,
            ):
                for task_id in {*task_ids, ANY_WORKER_BUSY}:
                    pipeline.set(heartbeat_key(task_id), b"1", ex=HEARTBEAT_TTL)
                pipeline.execute()
        except BootstrapError as error:
            logger.debug("heartbeat: %s", error)


class CacheMonitorStep(Timed):
    """Runs the cache monitor now and then. Not in the worker of one init, which ends with that init."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self.settings: Settings = environment.load(needs=("database", "redis", "rabbitmq"))
        self.enabled = bool(self.settings.cache_guard_interval) and not self.settings.run_queue

    def start(self, worker: Any) -> None:
        tree = tree_loading.load(self.settings)
        queue = tree.queue(self.settings.database.target)

        def rewarm() -> None:
            try:
                app.signature(WARM).apply_async(queue=queue, expiration=MESSAGE_TTL)
            except (OperationalError, *app.connection_for_write().connection_errors) as error:
                logger.warning("guard: the warm could not be enqueued: %s", masked(str(error)))

        guard = CacheMonitor(self.settings, tree, rewarm)
        self.timer = worker.timer.call_repeatedly(guard.interval, guard.start_check)


app.steps["worker"].update({Heartbeat, CacheMonitorStep})
app.steps["consumer"].add(Connected)


def run(settings: Settings) -> int:
    """Run a worker until a signal stops it. Returns Celery's exit code: 0 after a clean stop."""
    # Celery warns a worker that runs as root of pickled messages. We accept JSON only.
    warnings.simplefilter("ignore", SecurityWarning)
    if settings.run_queue:
        _exit_when_parent_exits()
    # The process id makes the node name unique among replicas on one host. Mingle and gossip would cost a second.
    name = f"bootstrap-{os.getpid()}@%h"
    options = ["--hostname", name, "--without-mingle", "--without-gossip", "--loglevel", settings.log_level]
    # app.worker_main would drop the exit code.
    arguments = ["--app", "bifrost_bootstrap", "--quiet", "worker", *options]
    return int(celery_command.main(args=arguments, prog_name="celery", standalone_mode=False) or 0)


def _exit_when_parent_exits() -> None:
    """End this worker when the init that started it ends, even if it was killed: the pipe to stdin closes."""

    def wait() -> None:
        # sys.stdin has a lock: a pool process that is forked during the read would inherit it locked.
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
