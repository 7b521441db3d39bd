"""
The migration lock: at most one runner a database, behind a pooler in transaction mode too.

It is a transaction-level advisory lock on a connection of its own. That transaction stays on its server connection
until it ends. Idle in READ COMMITTED it holds no snapshot, so concurrent index builds do not wait for it.

Each transaction of the runner (`script/`) holds a second, shared lock, and each of its statements outside a transaction
begins with a comment. If a runner has lost the migration lock, the next holder finds by these what that runner has left
in the server. None of it can be recorded any more, so the next holder ends it before it starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import psycopg

from bifrost_bootstrap.deadline import LOG_INTERVAL, Deadline, Interval
from bifrost_bootstrap.errors import BusyError, PoolTooSmallError, UnavailableError
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.servers.postgres import Connection
from bifrost_bootstrap.urls import PostgresUrl

logger = logging.getLogger(__name__)

#: First key of both locks: the first 31 bits of the sha-256 of "bifrost_bootstrap".
LOCK_CLASS = 0x7802FA3E
#: Second key of the migration lock, which the runner's parent holds.
MIGRATION = 1
#: Second key of the lock that the transactions of the runner share.
RUNNER = 2
#: Pauses of a waiter between two tries, seconds. The longest is by how much a waiter may come too late.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 1.0
#: Seconds in which a second connection must answer while the lock's own one does; poolers queue silently.
SECOND_CONNECTION_TIMEOUT = 15.0
#: Seconds between two statements on the lock's connection; below every sane timer of a pooler (2 s tested).
KEEP_ALIVE = 1.0
#: Seconds of silence after which the holder takes its lock for lost; a busy server answers sooner.
LOST_AFTER = 30.0

#: Timers that would end an idle holder.
_MUST_BE_OFF = ("idle_in_transaction_session_timeout", "transaction_timeout")
#: Settings of the lock's transaction. By the keepalives a direct server notices within 45 s (15 + 3 × 10) that the
#: holder vanished without a FIN. `tcp_user_timeout` (ms) does the same in the midst of an answer: no keepalive is sent
#: while data is unacknowledged. A pooler has its own settings.
_OWN_SETTINGS = {
    **dict.fromkeys((*_MUST_BE_OFF, "statement_timeout"), "0"),
    "tcp_keepalives_idle": "15", "tcp_keepalives_interval": "10", "tcp_keepalives_count": "3",
    "tcp_user_timeout": "45000",
}  # fmt: skip

#: Tells one server from every other. The start distinguishes a copy of a server (a restored backup, a replica), which
#: has its identifier; a restart of the same one ends all locks anyway.
SERVER = "(SELECT system_identifier || ' ' || extract(epoch FROM pg_postmaster_start_time()) FROM pg_control_system())"
#: Who has one of our locks in this database. Parameters: class, key.
_HOLDERS = """
    SELECT pid FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND classid::int8 = %s AND objid::int8 = %s AND objsubid = 2
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
#: Begins every statement of a runner outside a transaction (`script/`).
TAG = "/* bifrost-bootstrap autocommit */"
#: The sessions in which a runner is at work. Parameters: class, key, pattern of the comment.
RUNNERS = f"""
    {_HOLDERS} UNION SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND state = 'active' AND pid <> pg_backend_pid() AND query LIKE %s
"""  # noqa: S608  (our own words, here and below)
RUNNERS_PARAMETERS = (LOCK_CLASS, RUNNER, TAG + "%")
#: Concurrent builds whose statement another role may not see: one of them may be what a runner has left.
_HIDDEN_BUILDS = """
    SELECT pid FROM pg_stat_progress_create_index JOIN pg_stat_activity a USING (pid)
    WHERE a.datname = current_database() AND a.state IS NULL
"""
#: Sessions of the role, database and client host of this one, this one included.
_SESSIONS_LIKE_OURS = """
    SELECT count(*) FROM pg_stat_activity a, pg_stat_activity ours
    WHERE ours.pid = pg_backend_pid() AND a.backend_type = 'client backend' AND a.datname = ours.datname
      AND a.usename = ours.usename AND a.client_addr IS NOT DISTINCT FROM ours.client_addr
"""
#: One text about the holder. Parameters: class, key.
_HOLDER_IN_WORDS = f"""
    SELECT coalesce(nullif(application_name, ''), 'an unnamed session') || ' (pid ' || pid || ' from '
      || CASE WHEN state IS NULL THEN 'an address hidden from this role'
         ELSE coalesce(host(client_addr), 'the server itself') END
      || ') since ' || coalesce(to_char(xact_start, 'YYYY-MM-DD"T"HH24:MI:SSOF'), 'unknown')
    FROM ({_HOLDERS}) AS holders LEFT JOIN pg_stat_activity USING (pid)
"""  # noqa: S608


class MigrationLock:
    """The lock, held. Call `keep_alive` every `KEEP_ALIVE` seconds, or a pooler may take the connection away."""

    def __init__(self, url: PostgresUrl, connection: Connection) -> None:
        self._url = url
        self._connection = connection
        self._change_settings()
        #: How a runner recognises this lock in `pg_locks`, and this database among others.
        self.identity = self._read_identity()

    def keep_alive(self) -> None:
        """
        Run one short statement. Raises UnavailableError if the lock is lost.

        SHOW takes no snapshot. A query takes one, a concurrent index build that sees it waits for the end of our
        transaction, and after a query with parameters the snapshot even stays until the next statement.
        """
        with postgres.translated(self._url):
            self._connection.execute("SHOW transaction_isolation")

    @contextmanager
    def borrowed_connection(self) -> Iterator[Connection]:
        """
        The lock's own connection, for one query; at the end it holds no snapshot. Raises UnavailableError.

        Borrow it rarely while a runner works: a concurrent build that begins to wait for snapshots in these
        milliseconds waits until the lock is released.
        """
        with postgres.translated(self._url):
            # Within a transaction pg_stat_activity shows again what it showed first.
            self._connection.execute("SELECT pg_stat_clear_snapshot()")
            yield self._connection
        self.keep_alive()

    def end_runners(self) -> list[int]:
        """
        End the sessions in which a runner is at work, and return the pids of those that are still there.

        Sessions of another role are not ended. If their statements are hidden, each that builds an index counts.
        """
        with self.borrowed_connection() as connection:
            rows = connection.execute(
                "SELECT pid, CASE usename WHEN current_user THEN pg_terminate_backend(pid) END"  # noqa: S608
                f" FROM ({RUNNERS} UNION {_HIDDEN_BUILDS}) AS runners JOIN pg_stat_activity USING (pid)",
                RUNNERS_PARAMETERS,
            ).fetchall()
        return [int(str(row[0])) for row in rows]

    def has_only_session(self) -> bool:
        """Whether the server has no other session of our role and client host: behind a pooler, its pool is 1."""
        with self.borrowed_connection() as connection:
            return postgres.scalar(connection, _SESSIONS_LIKE_OURS) == 1

    def _change_settings(self) -> None:
        rows = self._connection.execute(
            "SELECT name, set_config(name, wanted.value, true)"
            " FROM pg_settings JOIN unnest(%s::text[], %s::text[]) AS wanted(key, value) ON name = key",
            (list(_OWN_SETTINGS), list(_OWN_SETTINGS.values())),
        )
        for name, value in rows.fetchall():
            if name in _MUST_BE_OFF and value not in ("0", "0ms"):
                raise UnavailableError(str(self._url), f"{name} cannot be turned off for the migration lock ({value})")

    def _read_identity(self) -> dict[str, object]:
        row = self._connection.execute(
            f"SELECT pid, virtualtransaction, {SERVER}, current_database()::text"  # noqa: S608
            f" FROM pg_locks JOIN ({_HOLDERS}) AS holders USING (pid)"
            " WHERE pid = pg_backend_pid() AND locktype = 'virtualxid'",
            (LOCK_CLASS, MIGRATION),
        ).fetchone()
        assert row is not None
        ours = zip(("pid", "virtualtransaction", "server", "database"), row, strict=True)
        return {"class": LOCK_CLASS, "migration": MIGRATION, "runner": RUNNER, **dict(ours)}


def read_holder(connection: Connection) -> str:
    """Who holds the migration lock of this database now, in words: application, pid, host, since when. "" if nobody."""
    return str(postgres.scalar(connection, _HOLDER_IN_WORDS, LOCK_CLASS, MIGRATION) or "")


@contextmanager
def hold(url: PostgresUrl, deadline: Deadline, report_wait: Callable[[str], None]) -> Iterator[MigrationLock]:
    """
    Take the lock, polling with short statements until the deadline, and release it at the end.

    `report_wait` hears every `LOG_INTERVAL` seconds whom we wait for, as the log does. When the block begins, no
    transaction of an earlier runner is open and no statement of one is running.

    Raises BusyError at the deadline, PoolTooSmallError if the lock has the pooler's only connection, UnavailableError
    and RefusedError of the server.
    """

    def log_wait(what: str) -> None:
        logger.info("%s", what)
        report_wait(what)

    with postgres.connect(url, "migration-lock", autocommit=False, answer_timeout=LOST_AFTER) as connection:
        # Whatever the role's default: in REPEATABLE READ an idle transaction would hold a snapshot.
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        if postgres.scalar(connection, "SELECT pg_is_in_recovery()"):
            raise UnavailableError(str(url), "it is a standby, in recovery, until it is promoted")
        connection.rollback()
        _take(connection, deadline, log_wait)
        lock = MigrationLock(url, connection)
        _end_earlier_runner(lock, deadline, log_wait)
        _require_second_connection(url, lock)
        yield lock
        # The end of the transaction releases the lock. Losing the lock now, for instance to a pooler's timer, is not an
        # error: each commit under it has checked it.
        with suppress(psycopg.OperationalError):
            connection.rollback()


def _take(connection: Connection, deadline: Deadline, log_wait: Callable[[str], None]) -> None:
    holder = ""
    log_again = Interval(LOG_INTERVAL)
    for _ in deadline.attempts(first=FIRST_PAUSE, longest=LONGEST_PAUSE):
        if postgres.scalar(connection, "SELECT pg_try_advisory_xact_lock(%s, %s)", LOCK_CLASS, MIGRATION):
            return
        holder = read_holder(connection)
        connection.rollback()
        if not deadline.passed and log_again.due():
            held_by = f", held by {holder}" if holder else ""
            log_wait(f"waiting for the migration lock{held_by}")
    raise BusyError("the migration lock", holder or "a session that has just ended")


def _end_earlier_runner(lock: MigrationLock, deadline: Deadline, log_wait: Callable[[str], None]) -> None:
    what = ""
    for attempt in deadline.attempts(first=FIRST_PAUSE, longest=LONGEST_PAUSE):
        left = lock.end_runners()
        if not left:
            return
        what = f"what an earlier runner has left in the server (pid {', '.join(map(str, left))})"
        if attempt == 1:
            log_wait(f"ending {what}")
    raise BusyError("the database", what)


def _require_second_connection(url: PostgresUrl, lock: MigrationLock) -> None:
    """The runner needs a connection beside the lock's. Connect in a thread: the lock has to be kept alive meanwhile."""

    def connect() -> None:
        with postgres.connect(url, "migration-start", answer_timeout=SECOND_CONNECTION_TIMEOUT) as connection:
            postgres.scalar(connection, "SELECT 1")

    with ThreadPoolExecutor(1) as threads:
        connecting = threads.submit(connect)
        while wait([connecting], timeout=KEEP_ALIVE).not_done:
            lock.keep_alive()
    try:
        connecting.result()
    except UnavailableError as error:
        # A pooler without a free connection says nothing, or that its own timeout has passed.
        waited = isinstance(error.__cause__, postgres.NoAnswer) or "query_wait_timeout" in str(error)
        if waited and lock.has_only_session():
            raise PoolTooSmallError(str(url), SECOND_CONNECTION_TIMEOUT) from error
        raise
