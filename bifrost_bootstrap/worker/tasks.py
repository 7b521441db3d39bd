"""The two tasks, thin: settings, deadline and progress for a step, its result as JSON."""

from __future__ import annotations

import json
import logging
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

#: Seconds between two writes of the progress, and how long the last one stays to be read.
PROGRESS_PAUSE, PROGRESS_TTL = 0.3, 60
#: Seconds that one write may take; Redis may be away, and the step must go on.
PROGRESS_TIMEOUT = 2.0


class BootstrapTask(Task):  # type: ignore[misc]
    """What both tasks have in common."""

    Request = "bifrost_bootstrap.worker.program:AcknowledgedOnReceipt"
    #: Logged with their own words, not as a crash with a traceback.
    throws = (BootstrapError,)

    @contextmanager
    def step(self) -> Iterator[tuple[Settings, Deadline, progress.Report]]:
        """What a step needs. Every error leaves as one of ours, so that it can be read from the result."""
        headers = self.request.headers or {}
        try:
            settings = environment.load(needs=("database", "redis"))
            deadline = _deadline(settings, headers.get(progress.CHAIN_HEADER), self.request.id)
            with _publishing(settings, self.request.id) as report:
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
    What the init that waits for this chain has left; without one, that of a call by hand.

    Raises UnwantedError for the first task of a chain that no init waits for any more; what has begun goes on.
    """
    if not chain:
        return Deadline(settings.init_timeout)
    with redis_server.connect(settings.redis) as client:
        seconds = client.get(progress.waiting_init_key(chain))
    if seconds is None and chain == task_id:
        raise UnwantedError(chain)
    return Deadline(settings.init_timeout if seconds is None else float(seconds))


@contextmanager
def _publishing(settings: Settings, task_id: str) -> Iterator[progress.Report]:
    """
    Writes the newest progress, and that this task lives, from a thread of its own: a step never waits for Redis.

    Not the worker's main process alone: that does not beat while it connects to a broker that is away, nor while
    it shuts down.
    """
    newest: list[progress.Progress] = []
    ended = Event()

    def publish() -> None:
        written: progress.Progress | None = None
        beat = Deadline(0)
        while not ended.wait(PROGRESS_PAUSE):
            latest = newest[0] if newest else None
            if latest == written and not beat.passed:
                continue
            try:
                with redis_server.connect(settings.redis, answer_timeout=PROGRESS_TIMEOUT) as client:
                    if latest and latest != written:
                        client.set(progress.progress_key(task_id), json.dumps(latest.to_dict()), ex=PROGRESS_TTL)
                    client.set(progress.heartbeat_key(task_id), b"1", ex=progress.HEARTBEAT_TTL)
                written, beat = latest, Deadline(progress.BEAT)
            except BootstrapError as error:
                logger.debug("progress was not written: %s", error)

    thread = Thread(target=publish, name="progress", daemon=True)
    thread.start()
    try:
        yield lambda latest: newest.__setitem__(slice(None), [latest])
    finally:
        ended.set()
        thread.join(PROGRESS_TIMEOUT)
