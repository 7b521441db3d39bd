"""Who keeps the runner of a migration waiting for a lock, and for how long."""

from __future__ import annotations

import logging
from threading import Event, Thread
from typing import Self

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import BootstrapError
from bifrost_bootstrap.migrate.lock import KEEP_ALIVE, RUNNERS, RUNNERS_PARAMETERS, MigrationLock
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.servers.postgres import ANSWER_TIMEOUT, Connection
from bifrost_bootstrap.urls import PostgresUrl

logger = logging.getLogger(__name__)

#: Seconds after which the thread has no connection if it has read nothing; one reading takes milliseconds.
LATE = 2.0
#: Seconds that one wait for a lock must have lasted, at least, before the deadline ends it: work has short waits too.
SHORTEST_BLOCK = 5.0


class BlockerWatch:
    """
    Watches our runner until the block ends. `sessions`: who kept it waiting last, in words; "" if nobody has.

    A thread reads every second, on connections of its own: the lock's connection must hold no snapshot. If a small
    pool has no third connection, `must_end_wait` reads on the lock's connection, seldom.
    """

    def __init__(self, url: PostgresUrl, lock: MigrationLock, lock_timeout: float) -> None:
        self.sessions = ""
        self._waited = 0.0
        self._url = url
        self._lock = lock
        self._lock_timeout = lock_timeout
        self._thread_is_late = Deadline(LATE)
        self._stop = Event()
        self.note_progress()

    def __enter__(self) -> Self:
        Thread(target=self._watch, name="blockers", daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()

    def note_progress(self) -> None:
        """The runner has gone on: ask for blockers on the lock's connection only after half of a lock timeout."""
        self._next_on_lock = Deadline(self._lock_timeout / 2)

    def must_end_wait(self, deadline: Deadline) -> bool:
        """Whether the deadline has passed and the runner waits for a lock. Raises UnavailableError if ours is lost."""
        if self._thread_is_late.passed and self._next_on_lock.passed:
            with self._lock.borrowed_connection() as connection:
                self._read(connection)
            # Once a revision, to name the blocking session; and after the deadline, to end the wait.
            self._next_on_lock = Deadline(max(deadline.remaining, SHORTEST_BLOCK))
        return deadline.passed and self._waited > max(self._lock_timeout, SHORTEST_BLOCK)

    def _watch(self) -> None:
        while not self._stop.wait(KEEP_ALIVE):
            try:
                with postgres.connect(self._url, "migration-watch", answer_timeout=ANSWER_TIMEOUT) as connection:
                    self._read(connection)
                    self._thread_is_late = Deadline(LATE)
            except BootstrapError as error:
                logger.debug("cannot read which session blocks the migration: %s", error)
                self._waited = 0.0

    def _read(self, connection: Connection) -> None:
        self._waited, sessions = read_blockers(connection)
        self.sessions = sessions or self.sessions


def read_blockers(connection: Connection) -> tuple[float, str]:
    """Seconds for which the runner has waited for a lock (0: it does not), and the blocking sessions, in words."""
    rows = connection.execute(
        "SELECT coalesce(extract(epoch FROM clock_timestamp() - waitstart), 0),"  # noqa: S608
        " format('pid %%s (user %%s, application %%L, %%s since %%ss)', blocking.pid, coalesce(b.usename, '?'),"
        " coalesce(b.application_name, ''), coalesce(b.state, 'hidden'),"
        # Not now(): on the lock's connection that is when the lock was taken.
        " coalesce(round(extract(epoch FROM clock_timestamp() - b.xact_start))::text, '?'))"
        f" FROM ({RUNNERS}) AS runners JOIN pg_locks l USING (pid),"
        " unnest(pg_blocking_pids(l.pid)) AS blocking(pid) LEFT JOIN pg_stat_activity b USING (pid)"
        " WHERE NOT granted",
        RUNNERS_PARAMETERS,
    ).fetchall()
    waited = max((float(str(seconds)) for seconds, _ in rows), default=0.0)
    return waited, "; ".join(dict.fromkeys(str(session) for _, session in rows))
