"""
What makes Celery's worker ours: which queues it consumes, when it acknowledges, and its heartbeat.

Loaded by every worker of the app (`imports` in `celeryconfig.py`), also by the stock `celery worker` command.
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

import redis
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

#: Seconds that one heartbeat may block the worker's loop when Redis is silent.
BEAT_TIMEOUT = 1.0


#: Steps that require the pool start after it and stop before it. Without this, the order would depend on Python's
#: hashes: a worker that stops would go on with heartbeats in one run and not in another.
AFTER_POOL = ("celery.worker.components:Timer", "celery.worker.components:Pool")


class AcknowledgedOnReceipt(Request):  # type: ignore[misc]
    """
    Acknowledges a message when it arrives, not when its task starts.

    A message that waits unacknowledged behind a long migration would run into the broker's consumer timeout,
    which ends the worker. What is lost with a worker is enqueued again by the init that waits for it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # Told to stop since the loop last looked: unacknowledged, the message goes to another worker.
        state.maybe_shutdown()
        try:
            super().__init__(*arguments, **options)
        except ValueError as error:
            # Celery would end the worker for it.
            raise InvalidTaskError(f"its body is no task's: {error}") from error
        self.acknowledge()


@setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]
def configure_logging(**_facts: Any) -> None:
    """Our log set-up in place of Celery's, also under the stock command."""
    settings = environment.load()
    logs.configure(settings.log_format, settings.log_level)


@celeryd_after_setup.connect(weak=False)  # type: ignore[untyped-decorator]
def choose_queues(**_facts: Any) -> None:
    """Consume the calls by hand and the queue of our tree; the worker of one run consumes that run's queue alone."""
    # Told at every reconnect, about late acknowledgement, which we do not use.
    warnings.simplefilter("ignore", CPendingDeprecationWarning)
    try:
        settings = environment.load(needs=("database", "redis", "rabbitmq"))
        tree = tree_loading.load(settings)
    except BootstrapError as error:
        logger.error("%s", error)
        raise SystemExit(int(error.exit_code)) from None
    own = add_queue(chain_queue(settings, tree))
    if settings.run_queue:
        app.amqp.queues.select([own.name])
    else:
        app.amqp.queues.select_add(own)
    logger.info("bootstrap worker of tree %s (%s), queue %s", tree.alembic.config, tree.why, own.name)


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
    """Celery's, without its 28 queues for tasks with a countdown, which it makes where it finds a quorum queue."""

    class Blueprint(consumer.Consumer.Blueprint):  # type: ignore[misc]
        """Such a task waits in the worker, as always over a direct exchange."""

        default_steps = frozenset(
            step for step in consumer.Consumer.Blueprint.default_steps if "delayed_delivery" not in step
        )


#: Set while the worker has a connection to the broker: then its loop comes round, or it hangs.
_connected = threading.Event()


@functools.cache
def start_health_file(health_file: Path | None) -> None:
    """
    From now on touch the file, if there is one, while there is no connection to the broker; else the loop touches it.

    A worker that waits for its broker does nothing else, and to start it again would not help; one whose loop hangs
    lets the file grow old.
    """

    def touch_while_waiting(health_file: Path) -> None:
        pause = threading.Event()
        while not pause.wait(BEAT):
            if not _connected.is_set():
                _touch(health_file)

    if health_file:
        _touch(health_file)
        threading.Thread(target=touch_while_waiting, args=(health_file,), name="life", daemon=True).start()


def _touch(health_file: Path) -> None:
    try:
        health_file.touch()
    except OSError as error:
        logger.warning("BIFROST_WORKER_HEALTH_FILE %s cannot be touched: %s", health_file, error.strerror)


class Connected(bootsteps.StartStopStep):  # type: ignore[misc]
    """Of the consumer: begins and ends with each connection to the broker."""

    requires = ("celery.worker.consumer.connection:Connection",)

    def start(self, consumer: Any) -> None:
        _connected.set()

    def stop(self, consumer: Any) -> None:
        _connected.clear()


class Timed(bootsteps.StartStopStep):  # type: ignore[misc]
    """What a worker does now and then; `timer` ends with it."""

    requires = AFTER_POOL
    timer: Any = None

    def stop(self, worker: Any) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer = None


class Heartbeat(Timed):
    """Every two seconds: send heartbeats for the tasks that this worker has, and touch the health file."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self.settings: Settings = environment.load(needs=("redis",))
        start_health_file(self.settings.worker_health_file)  # also under the stock command

    def start(self, worker: Any) -> None:
        self.timer = worker.timer.call_repeatedly(BEAT, self.beat)

    def beat(self) -> None:
        if file := self.settings.worker_health_file:
            _touch(file)
        held = {request.id for request in (*state.reserved_requests, *state.active_requests)}
        if not held:
            return
        try:
            with redis_server.connect(self.settings.redis, answer_timeout=BEAT_TIMEOUT) as client:
                _send_heartbeats(client, {*held, ANY_WORKER_BUSY})
        except BootstrapError as error:
            logger.debug("heartbeat: %s", error)


def _send_heartbeats(client: redis.Redis, task_ids: set[str]) -> None:
    with client.pipeline(transaction=False) as pipeline:
        for task_id in task_ids:
            pipeline.set(heartbeat_key(task_id), b"1", ex=HEARTBEAT_TTL)
        pipeline.execute()


class CacheMonitorStep(Timed):
    """Has the guard look at the module cache now and then; not in the worker of one run, which ends with it."""

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
        self.timer = worker.timer.call_repeatedly(guard.interval, guard.start_look)


app.steps["worker"].update({Heartbeat, CacheMonitorStep})
app.steps["consumer"].add(Connected)


def run(settings: Settings) -> int:
    """Run a worker until it is told to stop; return Celery's exit code, 0 where it ended as it was told."""
    # Celery warns root because of pickled messages; ours are JSON, and any other is refused.
    warnings.simplefilter("ignore", SecurityWarning)
    if settings.run_queue:
        _exit_when_parent_exits()
    # The node name tells replicas on one host apart; mingle and gossip would cost a second and serve nothing.
    name = f"bootstrap-{os.getpid()}@%h"
    options = ["--hostname", name, "--without-mingle", "--without-gossip", "--loglevel", settings.log_level]
    # Not app.worker_main, which drops the exit code.
    arguments = ["--app", "bifrost_bootstrap", "--quiet", "worker", *options]
    return int(celery_command.main(args=arguments, prog_name="celery", standalone_mode=False) or 0)


def _exit_when_parent_exits() -> None:
    """The worker of one init ends when that init does, however it ends: their pipe closes."""

    def wait() -> None:
        # Not sys.stdin: a pool process forked meanwhile would inherit its lock, taken.
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
