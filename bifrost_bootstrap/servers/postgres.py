"""PostgreSQL: connections of our own, their errors in our words, and the one read that tells where the schema is."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import CertificateError, RefusedError, SettingsError, UnavailableError
from bifrost_bootstrap.redaction import masked
from bifrost_bootstrap.urls import PostgresUrl

Connection = psycopg.Connection[tuple[object, ...]]

#: Seconds for one connection attempt.
CONNECT_TIMEOUT = 5
#: Seconds for a short read; a pooler whose connections are all in use may take some of them.
ANSWER_TIMEOUT = 10.0
#: Seconds of silence in the midst of a comparison of rows; PostgreSQL is asked about 1,000 modules at a time.
WORK_TIMEOUT = 30.0
#: Client side: notice within 10 s that a server vanished without a FIN (values in seconds; the last in ms).
KEEPALIVES = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
#: Text is sent to us as it is in Redis, whatever the encoding of the database.
ENCODING = {"client_encoding": "UTF8"}
#: Words by which servers and poolers refuse a login; libpq gives no SQLSTATE for it.
REFUSALS = (
    "authentication failed", "auth failed", "no password supplied", "does not exist", "no such database",
    "no such user", "no pg_hba.conf entry", "pg_hba.conf rejects", "not permitted", "permission denied",
    "not currently accepting", "invalid sslmode", "unsupported startup parameter",
    "bouncer config error",
)  # fmt: skip


#: Of each target the host and port that this process was connected to last.
_answered: dict[str, tuple[str, str]] = {}


class NoAnswer(psycopg.OperationalError):
    """The server was silent for longer than it was given."""


def application_name(role: str) -> str:
    """What `pg_stat_activity` shows of us; PostgreSQL keeps 63 bytes of it."""
    return f"bifrost-bootstrap {role} {socket.gethostname()}/{os.getpid()}"[:63]


class BoundedConnection(psycopg.Connection[tuple[object, ...]]):
    """
    A connection whose server may be silent for `answer_timeout` seconds while we wait for it; None is no limit.

    Then NoAnswer is raised, and the connection is closed. A server that is frozen, or a pooler without a free
    connection, acknowledges what we send and never answers.
    """

    answer_timeout: float | None = None

    def wait(self, gen: Any, *options: Any, **named: Any) -> Any:
        return super().wait(self._bounded(gen) if self.answer_timeout else gen, *options, **named)

    def _bounded(self, exchange: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """The exchange; psycopg resumes it when data comes, and with 0 where none has come for a moment."""
        assert self.answer_timeout
        silence = Deadline(self.answer_timeout)
        ready = None
        while True:
            try:
                wanted = exchange.send(ready)
            except StopIteration as done:
                return done.value
            ready = yield wanted
            if ready:
                silence = Deadline(self.answer_timeout)
            elif silence.passed:
                self.close()
                raise NoAnswer(f"no answer within {self.answer_timeout:.0f}s")


@contextmanager
def connect(
    url: PostgresUrl, role: str, *, autocommit: bool = True, answer_timeout: float | None = None
) -> Iterator[Connection]:
    """
    A connection that leaves nothing behind at a pooler: no prepared statement, no session setting.

    answer_timeout: seconds of silence of the server, see `BoundedConnection`. Errors inside the block are raised in
    our words (see `translated`). Closed at the end.
    """
    with translated(url):
        # Ours wins over the URL's: by this name a waiter says whom it waits for.
        ours = {**ENCODING, "application_name": application_name(role)}
        connection = BoundedConnection.connect(
            **{"connect_timeout": CONNECT_TIMEOUT, **KEEPALIVES, **at_last_host(url).parameters, **ours},  # type: ignore[arg-type]
            autocommit=autocommit,
            prepare_threshold=None,
        )
        _answered[url.target] = (connection.info.host, str(connection.info.port))
        connection.answer_timeout = answer_timeout
        try:
            yield connection
        finally:
            connection.close()


def at_last_host(url: PostgresUrl) -> PostgresUrl:
    """The URL; of several hosts, first the one that answered last: a frozen one takes `CONNECT_TIMEOUT`."""
    last = _answered.get(url.target)
    return url.beginning_at(*last) if last else url


@contextmanager
def translated(url: PostgresUrl) -> Iterator[None]:
    """Raise RefusedError for a login, right or database, CertificateError, UnavailableError for what is away."""
    try:
        yield
    except psycopg.OperationalError as error:
        raise _login_error(url, error) from error
    except psycopg.InterfaceError as error:
        raise UnavailableError(str(url), masked(str(error))) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise RefusedError(str(url), masked(str(error).strip())) from error


def _login_error(url: PostgresUrl, error: psycopg.OperationalError) -> RefusedError | UnavailableError:
    # libpq prefixes each line with the address; the last line is the one that counts, but for what libpq asks us.
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith("?")]
    refusing = next((line for line in lines if any(word in line for word in REFUSALS)), "")
    text = masked(refusing or (lines[-1] if lines else type(error).__name__))
    if error.sqlstate is None and "certificate" in str(error):
        # libpq's advice is its last line, and says less.
        return CertificateError(str(url), next((masked(line) for line in lines if "certificate" in line), text))
    if error.sqlstate is None and refusing:
        return RefusedError(str(url), text)
    return UnavailableError(str(url), text)


def database_heads(connection: Connection, version_table: str) -> tuple[str, ...]:
    """
    The revisions that the database records; empty where the version table is absent or empty.

    One statement and no lock beyond that of a read. Inside a transaction, a savepoint keeps it usable.

    Raises SettingsError where that table is none of Alembic's.
    """
    query = sql.SQL("SELECT version_num FROM {}").format(sql.Identifier(*version_table.split(".")))
    try:
        with nullcontext() if connection.autocommit else connection.transaction():
            return tuple(str(row[0]) for row in connection.execute(query))
    except psycopg.errors.UndefinedTable:
        return ()
    except psycopg.errors.UndefinedColumn as error:
        fault = f"BIFROST_ALEMBIC_VERSION_TABLE: {version_table} is no version table of Alembic"
        raise SettingsError([f"{fault} ({error.diag.message_primary})"]) from error


def other_table(connection: Connection, table: str) -> str:
    """A table of the same name in another schema than the one where `table` is found, `schema.table`; else ""."""
    found = scalar(
        connection,
        "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relname = %s AND c.relkind IN ('r', 'p') AND c.oid IS DISTINCT FROM to_regclass(%s)"
        " ORDER BY c.oid DESC LIMIT 1",
        table.rsplit(".", maxsplit=1)[-1], table,
    )  # fmt: skip
    return str(found or "")


#: Of `pg_index i`: INVALID, and no session is building it. Which index a session of another role builds is hidden; that
#: it holds a lock on the table is not.
LEFTOVER: LiteralString = """
    NOT i.indisvalid AND NOT EXISTS (
      SELECT FROM pg_stat_progress_create_index p WHERE p.datname = current_database() AND coalesce(
        p.index_relid = i.indexrelid,
        EXISTS (SELECT FROM pg_locks l WHERE l.pid = p.pid AND l.database = p.datid AND l.relation = i.indrelid)))
"""


def invalid_indexes(connection: Connection) -> dict[str, str]:
    """
    INVALID indexes that no session is building, each with the statement that repairs it.

    An interrupted concurrent build or rebuild left them: every write keeps them up, no query uses them.
    """
    rows = connection.execute(
        "SELECT i.indexrelid::regclass::text, c.relname ~ '_cc(new|old)[0-9]*$' FROM pg_index i"  # noqa: S608
        f" JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relkind = 'i' AND {LEFTOVER} ORDER BY 1"
    )
    # What a REINDEX left beside the index that still serves is of no use.
    return {str(name): f"{'DROP' if left else 'REINDEX'} INDEX CONCURRENTLY {name}" for name, left in rows}


def scalar(connection: Connection, query: LiteralString, *parameters: object) -> object:
    """First column of the first row, or None where there is no row."""
    row = connection.execute(query, parameters).fetchone()
    return row[0] if row else None
