"""
The migration lock: at most one runner a database, behind a pooler in transaction mode too.

A transaction-level advisory lock on a connection of its own, idle in READ COMMITTED, which holds no snapshot
(so concurrent index builds do not wait for it) and stays on its server connection until it ends. Every
transaction of the runner bears a second lock, shared (`script/`), and every statement outside one a
comment: by these a new holder finds what a runner that lost the first lock has left in the server. None of it
can be recorded any more, so the new holder ends it before it starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psycopg

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import BusyError, PoolTooSmallError, UnavailableError
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.servers.postgres import Connection
from bifrost_bootstrap.urls import PostgresUrl

logger = logging.getLogger(__name__)

#: First key of both locks: the first 31 bits of the sha-256 of "bifrost_bootstrap".
LOCK_CLASS = 0x7802FA3E
#: Second keys: held by the runner's parent; shared by each transaction of the runner.
MIGRATION, RUNNER = 1, 2
#: Longest pause of a waiter between two short tries, seconds: what a waiter may come too late.
TRY_PAUSE = 1.0
#: Seconds between two log lines of a waiter.
LOG_INTERVAL = 10.0
#: Seconds in which a second connection must answer while the lock's own one does; poolers queue silently.
SECOND_CONNECTION_TIMEOUT = 15.0
#: Seconds between two statements on the lock's connection; below every sane timer of a pooler (2 s tested).
KEEP_ALIVE = 1.0
#: Seconds of silence after which the holder takes its lock for lost; a busy server answers sooner.
LOST_AFTER = 30.0

# Off for this transaction only: an idle holder must outlive them. The keepalives have a direct server notice
# within 45 s (15 + 3 × 10) that the holder vanished without a FIN, and the last (milliseconds) where that was within an
# answer: no keepalive is sent while data is unacknowledged. A pooler has its own.
_MUST_BE_OFF = ("idle_in_transaction_session_timeout", "transaction_timeout")
_OWN_SETTINGS = dict.fromkeys((*_MUST_BE_OFF, "statement_timeout"), "0") | {
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


@dataclass(frozen=True)
class Holder:
    """Who holds the migration lock: server process, application name, client host, since when (ISO time)."""

    pid: int
    application: str
    host: str
    since: str

    def __str__(self) -> str:
        return f"{self.application or 'an unnamed session'} (pid {self.pid} from {self.host}) since {self.since}"


@dataclass(frozen=True)
class LockIdentity:
    """By what a runner recognises our lock in `pg_locks`, and our database among others."""

    pid: int
    virtualtransaction: str
    server: str
    database: str


class MigrationLock:
    """The lock, held. `keep_alive` every `KEEP_ALIVE` seconds, or a pooler may take the connection away."""

    def __init__(self, url: PostgresUrl, connection: Connection) -> None:
        self._url, self._connection = url, connection
        self.proof = self._prepare()

    def keep_alive(self) -> None:
        """
        One short statement. Raises UnavailableError: the lock is lost.

        SHOW, by the simple protocol: any query takes a snapshot, a concurrent index build that sees it waits for the
        end of our transaction, and with parameters the snapshot even stays until the next statement.
        """
        with postgres.translated(self._url):
            self._connection.execute("SHOW transaction_isolation")

    @contextmanager
    def borrowed_connection(self) -> Iterator[Connection]:
        """
        The lock's own connection, for one statement; without a snapshot again at the end. Raises UnavailableError.

        Rarely, while a runner works: a concurrent build that begins to wait for snapshots in these milliseconds waits
        for ours until the lock is given back.
        """
        with postgres.translated(self._url):
            # Within a transaction pg_stat_activity shows again what it showed first.
            self._connection.execute("SELECT pg_stat_clear_snapshot()")
            yield self._connection
        self.keep_alive()

    def end_runners(self) -> list[int]:
        """
        End the sessions in which a runner is at work, and return those that are still there.

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
        """Whether the server has no other session of our role, from where ours comes: behind a pooler, its pool."""
        with self.borrowed_connection() as connection:
            return bool(postgres.scalar(
                connection,
                "SELECT count(*) = 1 FROM pg_stat_activity a JOIN pg_stat_activity ours"
                " ON (a.datname, a.usename) = (ours.datname, ours.usename)"
                " AND a.client_addr IS NOT DISTINCT FROM ours.client_addr"
                " WHERE ours.pid = pg_backend_pid() AND a.backend_type = 'client backend'",
            ))  # fmt: skip

    def _prepare(self) -> LockIdentity:
        rows = self._connection.execute(
            "SELECT name, set_config(name, wanted.value, true)"
            " FROM pg_settings JOIN unnest(%s::text[], %s::text[]) AS wanted(key, value) ON name = key",
            (list(_OWN_SETTINGS), list(_OWN_SETTINGS.values())),
        )
        for name, value in rows.fetchall():
            if name in _MUST_BE_OFF and value not in ("0", "0ms"):
                raise UnavailableError(str(self._url), f"{name} cannot be turned off for the migration lock ({value})")
        row = self._connection.execute(
            f"SELECT pid, virtualtransaction, {SERVER}, current_database()::text"  # noqa: S608
            f" FROM pg_locks JOIN ({_HOLDERS}) AS holders USING (pid)"
            " WHERE pid = pg_backend_pid() AND locktype = 'virtualxid'",
            (LOCK_CLASS, MIGRATION),
        ).fetchone()
        assert row is not None
        return LockIdentity(int(str(row[0])), str(row[1]), str(row[2]), str(row[3]))


def holder(connection: Connection) -> Holder | None:
    """Who holds the migration lock of this database now."""
    row = connection.execute(
        "SELECT pid, coalesce(application_name, ''), CASE WHEN state IS NULL THEN 'an address hidden from this role'"  # noqa: S608
        " ELSE coalesce(host(client_addr), 'the server itself') END,"
        " coalesce(to_char(xact_start, 'YYYY-MM-DD\"T\"HH24:MI:SSOF'), 'unknown')"
        f" FROM ({_HOLDERS}) AS holders LEFT JOIN pg_stat_activity USING (pid)",
        (LOCK_CLASS, MIGRATION),
    ).fetchone()
    return Holder(int(str(row[0])), str(row[1]), str(row[2]), str(row[3])) if row else None


@contextmanager
def hold(url: PostgresUrl, deadline: Deadline, report_wait: Callable[[str], None]) -> Iterator[MigrationLock]:
    """
    Take the lock, polling with short statements until the deadline, and give it back at the end.

    `report_wait` hears, steadily, whom we wait for, as the log does. When the block begins, no transaction of an
    earlier runner is open and no statement of one is running.

    Raises BusyError at the deadline, PoolTooSmallError where the lock has the pooler's only connection,
    UnavailableError and RefusedError of the server.
    """

    def say(what: str) -> None:
        logger.info("%s", what)
        report_wait(what)

    with postgres.connect(url, "migration-lock", autocommit=False, answer_timeout=LOST_AFTER) as connection:
        # Whatever the role's default: in REPEATABLE READ an idle transaction would hold a snapshot.
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        if postgres.scalar(connection, "SELECT pg_is_in_recovery()"):
            raise UnavailableError(str(url), "it is a standby, in recovery, until it is promoted")
        connection.rollback()
        _take(connection, deadline, say)
        lock = MigrationLock(url, connection)
        _end_earlier_runner(lock, deadline, say)
        _want_second_connection(url, lock)
        yield lock
        # Ends the transaction, and with it the lock. A pooler may have done so, now that nobody keeps it alive: what
        # was done under the lock has proven it at each commit.
        with suppress(psycopg.OperationalError):
            connection.rollback()


def _take(connection: Connection, deadline: Deadline, report_wait: Callable[[str], None]) -> None:
    said: Deadline | None = None
    attempt = 0
    while True:
        if postgres.scalar(connection, "SELECT pg_try_advisory_xact_lock(%s, %s)", LOCK_CLASS, MIGRATION):
            return
        who = holder(connection)
        connection.rollback()
        if deadline.passed:
            raise BusyError("the migration lock", str(who or "a session that has just ended"))
        if said is None or said.passed:
            said = Deadline(LOG_INTERVAL)
            report_wait(f"waiting for the migration lock, held by {who}" if who else "waiting for the migration lock")
        attempt += 1
        deadline.pause(attempt, first=0.1, longest=TRY_PAUSE)


def _end_earlier_runner(lock: MigrationLock, deadline: Deadline, report_wait: Callable[[str], None]) -> None:
    attempt = 0
    while left := lock.end_runners():
        what = f"what an earlier runner has left in the server (pid {', '.join(map(str, left))})"
        if deadline.passed:
            raise BusyError("the database", what)
        attempt += 1
        if attempt == 1:
            report_wait(f"ending {what}")
        deadline.pause(attempt, first=0.05, longest=TRY_PAUSE)


def _want_second_connection(url: PostgresUrl, lock: MigrationLock) -> None:
    """The runner needs one beside the lock's. Asked in a thread, since the lock is to be kept alive meanwhile."""

    def look() -> None:
        with postgres.connect(url, "migration-start", answer_timeout=SECOND_CONNECTION_TIMEOUT) as connection:
            postgres.scalar(connection, "SELECT 1")

    with ThreadPoolExecutor(1) as threads:
        looking = threads.submit(look)
        while wait([looking], timeout=KEEP_ALIVE).not_done:
            lock.keep_alive()
    try:
        looking.result()
    except UnavailableError as error:
        # A pooler without a free connection says nothing, or that its own timeout has passed.
        waited = isinstance(error.__cause__, postgres.NoAnswer) or "query_wait_timeout" in str(error)
        if waited and lock.has_only_session():
            raise PoolTooSmallError(str(url), SECOND_CONNECTION_TIMEOUT) from error
        raise
