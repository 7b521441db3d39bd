"""The rows of the modules, read from PostgreSQL."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg.types.string import ByteaBinaryLoader

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import WarmError
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.servers.postgres import Connection
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.urls import PostgresUrl
from bifrost_bootstrap.warm import source as module_source
from bifrost_bootstrap.warm.source import ModuleSource

logger = logging.getLogger(__name__)

#: Rows fetched at once, and paths in one query: a few hundred kilobytes of either.
ROWS_PER_FETCH = 5000
PATHS_PER_QUERY = 1000
#: Seconds to wait for open writers. A request of the platform ends within a few; a forgotten session must not keep a
#: deployment from starting.
WRITER_WAIT = 30.0
#: Seconds between two reads of the open writers.
WRITER_POLL = 0.05
#: Seconds of waiting before a log line says for whom.
WRITER_SILENCE = 1.0
#: SQLSTATE of bytes that are not text in the encoding of the connection.
_NOT_IN_ENCODING = "22021"
#: For one transaction: fail instead of hiding rows by a policy, and lift the role's own time limit.
_FOR_ALL_ROWS: LiteralString = (
    "SELECT set_config('row_security', 'off', true), set_config('statement_timeout', '0', true)"
)
#: Transaction, and the session's user, application and pid, of each writer of a table.
_OPEN_WRITERS = """SELECT l.virtualtransaction, concat_ws(' ', a.usename, nullif(a.application_name, ''),
        '(pid ' || coalesce(l.pid::text, 'none') || ')')
    FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'relation' AND l.mode = 'RowExclusiveLock' AND l.granted
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND l.relation = to_regclass(%s) AND l.pid IS DISTINCT FROM pg_backend_pid()
"""
_COMPUTED_HASH: LiteralString = "encode(sha256(convert_to(content, 'UTF8')), 'hex')"

#: Path, content and `content_hash` of a row.
Content = tuple[str, str, bytes | None]
#: Transactions that have written to a table and are still open, each with the name of its session for a log line.
OpenWriters = dict[str, str]


@dataclass(frozen=True)
class Snapshot:
    """The rows of a source as they were at one moment. heads: the revisions that the database recorded then."""

    connection: Connection
    source: ModuleSource
    heads: tuple[str, ...]

    def requirements(self) -> str:
        """The text of `requirements.txt`; "" if there is no row, or only white space in it."""
        if not self.source.table:
            return ""
        query: LiteralString = f"SELECT content FROM {self.source.table} WHERE {self.source.requirements}"  # noqa: S608
        content = postgres.scalar(self.connection, query)
        return str(content) if content and str(content).strip() else ""

    def hashes(self) -> Iterator[tuple[bytes | None, bytes | None]]:
        """Path and `content_hash` of every module."""
        with self.connection.cursor("modules", binary=True) as cursor:
            _return_bytes(cursor)
            cursor.execute(f"SELECT path, content_hash{self.source.from_where}")
            while rows := cursor.fetchmany(ROWS_PER_FETCH):
                yield from rows  # type: ignore[misc]

    def computed_hashes(self, paths: Collection[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Path and the hash of the row's content. Slow: PostgreSQL reads all of the content."""
        query: LiteralString = f"SELECT path, {_COMPUTED_HASH}{self.source.from_where} AND path = ANY(%s)"
        with self.connection.cursor(binary=True) as cursor:
            _return_bytes(cursor)
            for part in _parts(paths):
                yield from cursor.execute(query, (part,))

    def size_of(self, paths: Collection[bytes]) -> int:
        """Bytes of the content of these modules, without reading it."""
        where = self.source.from_where
        query: LiteralString = f"SELECT coalesce(sum(octet_length(content)), 0){where} AND path = ANY(%s)"
        return sum(int(str(postgres.scalar(self.connection, query, part))) for part in _parts(paths))

    def contents(self, paths: Collection[bytes], *, all_rows: bool) -> Iterator[Content]:
        """These modules. all_rows: read all rows and drop the others, which is faster for most of them."""
        if all_rows:
            yield from (row for row in self._copy(" AND path IS NOT NULL") if row[0].encode() in paths)
        else:
            for part in _parts(paths):
                yield from self._copy(" AND path = ANY(%s)", part)

    def _copy(self, where: LiteralString, *parameters: list[str]) -> Iterator[Content]:
        query: LiteralString = f"COPY (SELECT path, content, content_hash{self.source.from_where}{where})"
        command: LiteralString = f"{query} TO STDOUT (FORMAT binary)"
        with self.connection.cursor() as cursor, cursor.copy(command, parameters or None) as copy:
            copy.set_types(("text", "text", "bytea"))
            yield from copy.rows()


def _return_bytes(cursor: psycopg.Cursor[Any]) -> None:
    """Return text as bytes: the paths in Redis are bytes. (The server's own conversion is slow.)"""
    for name in ("text", "varchar"):
        cursor.adapters.register_loader(name, ByteaBinaryLoader)


def _parts(paths: Collection[bytes]) -> Iterator[list[str]]:
    decoded = [path.decode() for path in paths]
    for start in range(0, len(decoded), PATHS_PER_QUERY):
        yield decoded[start : start + PATHS_PER_QUERY]


@dataclass(frozen=True)
class RowReader:
    """One connection to the rows of one source, for any number of snapshots."""

    connection: Connection
    source: ModuleSource
    version_table: str

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """A read-only transaction in which every query sees the same rows."""
        with self.connection.transaction():
            self.connection.execute(_FOR_ALL_ROWS)
            yield Snapshot(self.connection, self.source, postgres.database_heads(self.connection, self.version_table))

    def open_writers(self) -> OpenWriters:
        """
        The transactions that hold a writer's lock on the table; every role sees them, and through a pooler too.

        The platform's API sets a cache entry before it commits the row.
        """
        if not self.source.table:
            return {}
        with self.connection.transaction():
            rows = self.connection.execute(_OPEN_WRITERS, (self.source.table,))
            return {str(transaction): str(name) for transaction, name in rows}

    def await_writers(self, writers: OpenWriters, limit: Deadline) -> None:
        """
        Wait until these transactions have ended. At the limit, a warning names those that have not.

        A comparison that begins afterwards sees what they committed.
        """
        left = writers
        silence = Deadline(WRITER_SILENCE)
        while left and (left := {one: name for one, name in self.open_writers().items() if one in left}):
            names = ", ".join(sorted(left.values()))
            if limit.passed:
                logger.warning(
                    "transactions that have written modules are still open, not waiting any longer: %s", names
                )
                return
            if silence.passed:
                silence = Deadline(limit.remaining + WRITER_POLL)
                logger.info(
                    "waiting for transactions that have written modules: %s (up to %.0fs)", names, limit.remaining
                )
            limit.sleep(WRITER_POLL)


@contextmanager
def row_reader(settings: Settings, *, answer_timeout: float) -> Iterator[RowReader]:
    """
    Connect to the rows of the source that is there now.

    answer_timeout: seconds that PostgreSQL may be silent. Raises WarmError if there is no source, or PostgreSQL
    refuses to read it.
    """
    url = settings.database
    source = module_source.NO_SOURCE
    with postgres.connect(url, "warm", autocommit=False, answer_timeout=answer_timeout) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        try:
            source = module_source.find_source(connection, settings)
            yield RowReader(connection, source, settings.alembic_version_table)
        except (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.InsufficientPrivilege):
            raise
        except psycopg.Error as error:
            row = f", row {_undecodable(url, source)!r}" if source.table and error.sqlstate == _NOT_IN_ENCODING else ""
            reason = error.diag.message_primary or error
            raise WarmError(f"table {source.table} of {url}{row}: {reason}") from error


def _undecodable(url: PostgresUrl, source: ModuleSource) -> str:
    """The path of the first module that is not UTF-8; a database with the encoding SQL_ASCII takes any bytes."""
    with postgres.connect(url, "warm") as connection, connection.cursor(binary=True) as cursor:
        _return_bytes(cursor)
        cursor.execute("SET client_encoding TO 'SQL_ASCII'")
        rows: Iterator[Any] = cursor.stream(f"SELECT path, content{source.from_where}")
        for path, content in rows:
            try:
                (path + content).decode()
            except UnicodeDecodeError:
                return str(path.decode(errors="replace"))
    return "that has gone meanwhile"
