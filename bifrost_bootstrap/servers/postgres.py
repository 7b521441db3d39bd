"""PostgreSQL: connections, their errors as ours, and what several steps read from the catalog."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
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
#: Seconds for a short read, with the wait for a free connection of a pooler.
ANSWER_TIMEOUT = 10.0
#: Seconds for an answer during a comparison of rows. One query asks for 1,000 modules.
WORK_TIMEOUT = 30.0
#: TCP of the client: notice within 10 s that a server has vanished without a FIN. In seconds; the last in milliseconds.
KEEPALIVES = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 10_000}
#: How servers and poolers reject a login. libpq gives no SQLSTATE for it.
REFUSALS = (
    "authentication failed", "auth failed", "no password supplied", "does not exist", "no such database",
    "no such user", "no pg_hba.conf entry", "pg_hba.conf rejects", "not permitted", "permission denied",
    "not currently accepting", "invalid sslmode", "unsupported startup parameter",
    "bouncer config error",
)  # fmt: skip


#: The host and port of the last connection of this process, by `PostgresUrl.target`.
_answered: dict[str, tuple[str, str]] = {}


class NoAnswer(psycopg.OperationalError):
    """The server did not answer within the timeout."""


def application_name(role: str) -> str:
    """Our name in `pg_stat_activity`. PostgreSQL keeps 63 bytes of it."""
    return f"bifrost-bootstrap {role} {socket.gethostname()}/{os.getpid()}"[:63]


class BoundedConnection(psycopg.Connection[tuple[object, ...]]):
    """
    A connection that raises NoAnswer and is closed if the server sends nothing for `answer_timeout` seconds.

    None is no limit. A frozen server, or a pooler with no free connection, accepts our query and never replies.
    """

    answer_timeout: float | None = None

    def wait(self, gen: Any, *options: Any, **named: Any) -> Any:
        return super().wait(self._bounded(gen) if self.answer_timeout else gen, *options, **named)

    def _bounded(self, exchange: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """The exchange with the server. psycopg sends it 0 if the socket was not ready for a moment."""
        assert self.answer_timeout
        silence = Deadline(self.answer_timeout)
        ready = None
        while not silence.passed:
            try:
                ready = yield exchange.send(ready)
            except StopIteration as done:
                return done.value
            if ready:
                silence = Deadline(self.answer_timeout)
        self.close()
        raise NoAnswer(f"no answer within {self.answer_timeout:.0f}s")


@contextmanager
def connect(
    url: PostgresUrl, role: str, *, autocommit: bool = True, answer_timeout: float | None = None
) -> Iterator[Connection]:
    """
    A connection that leaves nothing at a pooler: no prepared statement, no session setting. Closed at the end.

    answer_timeout: see `BoundedConnection`. Errors inside the block are raised as ours (see `translated`).
    """
    parameters: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT,
        **KEEPALIVES,
        **at_last_host(url).parameters,
        # That of Redis, whatever the encoding of the database is.
        "client_encoding": "UTF8",
        # Not that of the URL: other sessions name the one that they wait for by it.
        "application_name": application_name(role),
    }
    with translated(url):
        connection = BoundedConnection.connect(**parameters, autocommit=autocommit, prepare_threshold=None)
        _answered[url.target] = (connection.info.host, str(connection.info.port))
        connection.answer_timeout = answer_timeout
        with closing(connection):
            yield connection


def at_last_host(url: PostgresUrl) -> PostgresUrl:
    """The URL with the host that answered last as the first of several: a frozen host takes `CONNECT_TIMEOUT`."""
    last = _answered.get(url.target)
    return url.beginning_at(*last) if last else url


@contextmanager
def translated(url: PostgresUrl) -> Iterator[None]:
    """Raise errors of psycopg as RefusedError (login, right, database), CertificateError or UnavailableError."""
    try:
        yield
    except psycopg.OperationalError as error:
        raise _login_error(url, error) from error
    except psycopg.InterfaceError as error:
        raise UnavailableError(str(url), masked(str(error))) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise RefusedError(str(url), masked(str(error).strip())) from error


def _login_error(url: PostgresUrl, error: psycopg.OperationalError) -> RefusedError | UnavailableError:
    # libpq may end with a question, such as "Is the server running on that host?".
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith("?")]
    certificate = next((line for line in lines if "certificate" in line), "")
    rejection = next((line for line in lines if any(words in line for words in REFUSALS)), "")
    if error.sqlstate is None and certificate:
        return CertificateError(str(url), masked(certificate))
    if error.sqlstate is None and rejection:
        return RefusedError(str(url), masked(rejection))
    return UnavailableError(str(url), masked(rejection or (lines[-1] if lines else type(error).__name__)))


def database_heads(connection: Connection, version_table: str) -> tuple[str, ...]:
    """
    The revisions that the database records; empty if the version table does not exist or is empty.

    One read. Inside a transaction it uses a savepoint, so that the transaction survives a missing table.

    Raises SettingsError if the table is not a version table of Alembic.
    """
    alone = connection.autocommit and connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
    query = sql.SQL("SELECT version_num FROM {}").format(sql.Identifier(*version_table.split(".")))
    try:
        with nullcontext() if alone else connection.transaction():
            return tuple(str(row[0]) for row in connection.execute(query))
    except psycopg.errors.UndefinedTable:
        return ()
    except psycopg.errors.UndefinedColumn as error:
        fault = f"BIFROST_ALEMBIC_VERSION_TABLE: {version_table} is no version table of Alembic"
        raise SettingsError([f"{fault} ({error.diag.message_primary})"]) from error


def other_table(connection: Connection, table: str) -> str:
    """The newest table with the name of `table` in another schema, as `schema.table`; "" if there is none."""
    query: LiteralString = (
        "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relname = %s AND c.relkind IN ('r', 'p') AND c.oid IS DISTINCT FROM to_regclass(%s)"
        " ORDER BY c.oid DESC LIMIT 1"
    )
    return str(scalar(connection, query, table.rsplit(".", maxsplit=1)[-1], table) or "")


#: A condition on `pg_index i`: the index is INVALID and no session builds it. PostgreSQL hides which index a session of
#: another role builds, but not its lock on the table.
LEFTOVER: LiteralString = """
    NOT i.indisvalid AND NOT EXISTS (
      SELECT FROM pg_stat_progress_create_index p WHERE p.datname = current_database() AND coalesce(
        p.index_relid = i.indexrelid,
        EXISTS (SELECT FROM pg_locks l WHERE l.pid = p.pid AND l.database = p.datid AND l.relation = i.indrelid)))
"""


def invalid_indexes(connection: Connection) -> dict[str, str]:
    """
    INVALID indexes that no session builds, each with the statement that repairs it.

    An interrupted concurrent build or rebuild left them. Every write maintains them, and no query uses them.
    """
    rows = connection.execute(
        "SELECT i.indexrelid::regclass::text, c.relname ~ '_cc(new|old)[0-9]*$' FROM pg_index i"  # noqa: S608
        f" JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relkind = 'i' AND {LEFTOVER} ORDER BY 1"
    )
    # An interrupted REINDEX leaves a useless copy beside the index that is in use.
    return {str(name): f"{'DROP' if copy else 'REINDEX'} INDEX CONCURRENTLY {name}" for name, copy in rows}


def scalar(connection: Connection, query: LiteralString, *parameters: object) -> object:
    """The first column of the first row; None if there is no row."""
    row = connection.execute(query, parameters).fetchone()
    return row[0] if row else None
