"""Who keeps the runner of a migration waiting for a lock, and since when."""

from __future__ import annotations

import logging
from threading import Event, Thread
from typing import Self

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import BootstrapError
from bifrost_bootstrap.migrate.lock import KEEP_ALIVE, RUNNERS, RUNNERS_PARAMETERS
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.servers.postgres import ANSWER_TIMEOUT, Connection
from bifrost_bootstrap.urls import PostgresUrl

logger = logging.getLogger(__name__)


#: Seconds without a look of its own after which the watch is blind; one takes milliseconds.
LATE = 2.0


class BlockerWatch:
    """
    Sees who keeps our runner waiting for a lock, for as long as the block lasts.

    On connections of its own, in a thread: the lock's has to be without a snapshot, and a small pool may have no
    third one. `blocked`: seconds that it has waited for one lock at the last look; `last`: the blocking sessions, in
    words, at the last look that saw any.
    """

    def __init__(self, url: PostgresUrl) -> None:
        self._url, self._ended, self._late = url, Event(), Deadline(LATE)
        self.blocked, self.last = 0.0, ""

    def __enter__(self) -> Self:
        Thread(target=self._watch, name="blockers", daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()

    @property
    def blind(self) -> bool:
        """Whether it gets no connection now; then `look` on another one tells."""
        return self._late.passed

    def read_blockers(self, connection: Connection) -> None:
        """Set `blocked` and `last`, by one statement."""
        rows = connection.execute(
            "SELECT coalesce(extract(epoch FROM clock_timestamp() - waitstart), 0), blocking.pid,"  # noqa: S608
            " coalesce(b.usename, '?'), coalesce(b.application_name, ''), coalesce(b.state, 'hidden'),"
            # Not now(): on the lock's connection that is when the lock was taken.
            " coalesce(round(extract(epoch FROM clock_timestamp() - b.xact_start))::text, '?')"
            f" FROM ({RUNNERS}) AS runners JOIN pg_locks l USING (pid),"
            " unnest(pg_blocking_pids(l.pid)) AS blocking(pid) LEFT JOIN pg_stat_activity b USING (pid)"
            " WHERE NOT granted",
            RUNNERS_PARAMETERS,
        ).fetchall()
        self.blocked = max((float(str(row[0])) for row in rows), default=0.0)
        self.last = "; ".join(dict.fromkeys(
            f"pid {pid} (user {user}, application {application!r}, {state} since {seconds}s)"
            for _, pid, user, application, state, seconds in rows
        )) or self.last  # fmt: skip

    def _watch(self) -> None:
        while not self._ended.wait(KEEP_ALIVE):
            try:
                with postgres.connect(self._url, "migration-watch", answer_timeout=ANSWER_TIMEOUT) as connection:
                    self.read_blockers(connection)
                    self._late = Deadline(LATE)
            except BootstrapError as error:
                logger.debug("cannot read which session blocks the migration: %s", error)
                self.blocked = 0.0
