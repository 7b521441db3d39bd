"""The two tasks. Each gives its step settings, a deadline and a progress report, and returns its result as JSON."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from celery import Task
from celery.exceptions import SoftTimeLimitExceeded

from bifrost_bootstrap import progress, settings as environment
from bifrost_bootstrap.celery import MIGRATE, WARM, app
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import BootstrapError, TimeLimitError, UnwantedError, unexpected
from bifrost_bootstrap.migrate.step import migrate as migrate_step
from bifrost_bootstrap.redaction import masked
from bifrost_bootstrap.servers import redis_server
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.warm.step import warm as warm_step

logger = logging.getLogger(__name__)

#: Seconds between two writes of the progress: a terminal needs no more.
PROGRESS_INTERVAL = 0.3
#: Seconds that the last progress of a task stays in Redis.
PROGRESS_TTL = 60
#: Seconds that one write may take. Redis may be unreachable, and the step must go on.
PROGRESS_TIMEOUT = 2.0


class BootstrapTask(Task):  # type: ignore[misc]
    """What both tasks have in common."""

    Request = "bifrost_bootstrap.worker.program:AcknowledgedOnReceipt"
    #: Celery logs these with their message only, other exceptions with a traceback.
    throws = (BootstrapError,)

    @contextmanager
    def step(self) -> Iterator[tuple[Settings, Deadline, progress.Report]]:
        """What a step needs. Every error leaves as a BootstrapError, which init can read from the result."""
        headers = self.request.headers or {}
        try:
            settings = environment.load(needs=("database", "redis"))
            deadline = _deadline(settings, headers.get(progress.CHAIN_HEADER), self.request.id)
            with _progress_reporter(settings, self.request.id) as report:
                yield settings, deadline, report
        except BootstrapError as error:
            logger.error("%s: %s", self.name, error)
            raise
        except SoftTimeLimitExceeded:
            raise TimeLimitError("--soft-time-limit or task_soft_time_limit") from None
        except Exception as error:
            logger.exception("%s: unexpected error", self.name)
            raise unexpected(error, masked(f"{type(error).__name__}: {error}")) from None


@app.task(bind=True, base=BootstrapTask, name=MIGRATE)  # type: ignore[untyped-decorator]
def migrate(self: BootstrapTask) -> dict[str, Any]:
    """Bring the schema to this image's head. Safe to call at any time; nothing to do is a result, not an error."""
    with self.step() as (settings, deadline, report):
        return migrate_step(settings, deadline, report).to_dict()


@app.task(bind=True, base=BootstrapTask, name=WARM)  # type: ignore[untyped-decorator]
def warm_module_cache(self: BootstrapTask, full: bool = False, allow_shrink: bool = False) -> dict[str, Any]:
    """Make the module cache equal to the database. full: rewrite every entry. allow_shrink: remove however many."""
    with self.step() as (settings, deadline, report):
        return warm_step(settings, deadline, report, full=full, allow_shrink=allow_shrink).to_dict()


def _deadline(settings: Settings, chain: str | None, task_id: str) -> Deadline:
    """
    The time that the waiting init has left; for a call by hand (no chain), BIFROST_INIT_TIMEOUT.

    Raises UnwantedError for the first task of a chain that no init waits for any more. A chain that has begun goes on.
    """
    if not chain:
        return Deadline(settings.init_timeout)
    with redis_server.connect(settings.redis) as client:
        seconds = client.get(progress.waiting_init_key(chain))
    if seconds is None and chain == task_id:
        raise UnwantedError(chain)
    return Deadline(settings.init_timeout if seconds is None else float(seconds))


@contextmanager
def _progress_reporter(settings: Settings, task_id: str) -> Iterator[progress.Report]:
    """
    A report for one task. A thread writes the newest progress and the task's heartbeat: a step never waits for Redis.

    The worker's main process sends heartbeats too, but none while it reconnects to the broker or shuts down.
    """
    # Its length is 1: the step's thread appends, and older progress falls out.
    newest: deque[progress.Progress] = deque(maxlen=1)
    ended = Event()

    def write_until_ended() -> None:
        written: progress.Progress | None = None
        heartbeat_due = Deadline(0)
        while not ended.wait(PROGRESS_INTERVAL):
            latest = newest[0] if newest else None
            if latest == written and not heartbeat_due.passed:
                continue
            try:
                with redis_server.connect(settings.redis, answer_timeout=PROGRESS_TIMEOUT) as client:
                    if latest and latest != written:
                        client.set(progress.progress_key(task_id), json.dumps(latest.to_dict()), ex=PROGRESS_TTL)
                    client.set(progress.heartbeat_key(task_id), b"1", ex=progress.HEARTBEAT_TTL)
                written = latest
                heartbeat_due = Deadline(progress.BEAT)
            except BootstrapError as error:
                logger.debug("progress was not written: %s", error)

    thread = Thread(target=write_until_ended, name="progress", daemon=True)
    thread.start()
    try:
        yield newest.append
    finally:
        ended.set()
        thread.join(PROGRESS_TIMEOUT)
