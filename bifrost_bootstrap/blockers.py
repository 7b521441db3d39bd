"""Who keeps the runner of a migration waiting for a lock, and since when."""

from __future__ import annotations

import logging
from threading import Event, Thread
from typing import Self

from bifrost_bootstrap import postgres
from bifrost_bootstrap.errors import BootstrapError
from bifrost_bootstrap.lock import KEEP_ALIVE, RUNNERS, RUNNERS_PARAMETERS
from bifrost_bootstrap.postgres import Connection
from bifrost_bootstrap.urls import PostgresUrl

logger = logging.getLogger(__name__)


class BlockerWatch:
    """
    Sees who keeps our runner waiting for a lock, for as long as the block lasts.

    On connections of its own, in a thread: the lock's has to be without a snapshot, and a small pool may have no
    third one. `blocked`: seconds that it has waited for one lock at the last look; `last`: the sessions in the way at
    the last look that saw any, in words.
    """

    def __init__(self, url: PostgresUrl) -> None:
        self._url, self._ended = url, Event()
        self.blocked, self.last = 0.0, ""

    def __enter__(self) -> Self:
        Thread(target=self._watch, name="blockers", daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(KEEP_ALIVE):
            try:
                with postgres.connect(
                    self._url, "migration-watch", answer_timeout=postgres.ANSWER_TIMEOUT
                ) as connection:
                    self.blocked = _blocked(connection)
                    self.last = _blockers(connection) or self.last
            except BootstrapError as error:
                logger.debug("who blocks the migration is not to be seen: %s", error)
                self.blocked = 0.0


def _blocked(connection: Connection) -> float:
    row = connection.execute(
        "SELECT coalesce(extract(epoch FROM max(clock_timestamp() - waitstart)), 0)"  # noqa: S608
        f" FROM pg_locks JOIN ({RUNNERS}) AS runners USING (pid) WHERE NOT granted",
        RUNNERS_PARAMETERS,
    ).fetchone()
    return float(str(row[0])) if row else 0.0


def _blockers(connection: Connection) -> str:
    rows = connection.execute(
        "SELECT pid, coalesce(b.usename, '?'), coalesce(b.application_name, ''), coalesce(b.state, 'hidden'),"  # noqa: S608
        " coalesce(round(extract(epoch FROM now() - b.xact_start))::text, '?')"
        f" FROM (SELECT DISTINCT unnest(pg_blocking_pids(pid)) AS pid FROM ({RUNNERS}) AS runners) AS blocking"
        " LEFT JOIN pg_stat_activity b USING (pid)",
        RUNNERS_PARAMETERS,
    )
    return "; ".join(
        f"pid {pid} (user {user}, application {application!r}, {state} since {seconds}s)"
        for pid, user, application, state, seconds in rows
    )
