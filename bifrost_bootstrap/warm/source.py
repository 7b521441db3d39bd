"""Where the platform keeps its modules: one description for each table that it has had, and the choice between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Set as AbstractSet
from dataclasses import dataclass
from typing import LiteralString

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import WarmError
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.servers.postgres import Connection
from bifrost_bootstrap.settings import Settings

logger = logging.getLogger(__name__)

#: Seconds to wait for open writers. A request of the platform ends within a few; a session that somebody forgot must
#: not keep a deployment from starting.
WRITER_WAIT = 30.0
#: Seconds between two looks at whether open writers have ended.
WRITER_POLL = 0.05
#: Seconds after which a log line says whom we wait for.
WRITER_PATIENCE = 1.0
#: Seconds that the platform's own writers let an entry live in the age of `file_index`.
PLATFORM_TTL = 24 * 3600.0


@dataclass(frozen=True)
class ModuleSource:
    """
    One table of modules.

    table: its name; "" is no table (`BIFROST_MODULE_SOURCE=none`). modules, requirements: the conditions for a row
    that is a module, and for the row that is `requirements.txt`. default_ttl: seconds that an entry lives unless
    BIFROST_MODULE_CACHE_TTL is set; 0 is for ever. trusts_hash: entries have the row's `content_hash` even where it
    is not the hash of the row's content. has_private_paths: see `is_private`.
    """

    table: LiteralString
    modules: LiteralString = "false"
    requirements: LiteralString = "false"
    default_ttl: float = 0.0
    trusts_hash: bool = False
    has_private_paths: bool = False

    def is_private(self, path: bytes) -> bool:
        """Whether the path lies below a top folder whose name begins with `_`: the platform's own, left alone."""
        return self.has_private_paths and path.startswith(b"_") and b"/" in path

    def count_private(self, paths: Iterable[bytes]) -> int:
        """How many of the paths are the platform's own."""
        return sum(map(self.is_private, paths)) if self.has_private_paths else 0

    def ttl(self, settings: Settings) -> float:
        """Seconds that an entry lives; 0 is for ever."""
        return self.default_ttl if settings.module_cache_ttl is None else settings.module_cache_ttl

    @property
    def from_where(self) -> LiteralString:
        """`FROM … WHERE …` of the modules."""
        return f" FROM {self.table} WHERE {self.modules}"


#: The platform from 2026-01-08 to 2026-02-10, and the builtin tree.
WORKSPACE_FILES = ModuleSource(
    "workspace_files",
    modules="entity_type = 'module' AND NOT is_deleted AND content IS NOT NULL",
    requirements="path = 'requirements.txt' AND entity_type = 'requirements' AND NOT is_deleted",
)
#: The platform since 2026-02-10: every tagged release from v0.5.0 on. Its `content_hash` is that of the file's bytes,
#: and the content is decoded with replacement, so the two differ for a file that is not UTF-8.
FILE_INDEX = ModuleSource(
    "file_index",
    # Without a percent sign, which psycopg takes for a parameter.
    modules="right(path, 3) = '.py' AND content IS NOT NULL AND NOT (left(path, 1) = '_' AND strpos(path, '/') > 0)",
    requirements="path = 'requirements.txt'",
    default_ttl=PLATFORM_TTL,
    trusts_hash=True,
    has_private_paths=True,
)
NO_SOURCE = ModuleSource("")

_BY_NAME = {"workspace_files": WORKSPACE_FILES, "file_index": FILE_INDEX, "none": NO_SOURCE}


def find_source(connection: Connection, settings: Settings) -> ModuleSource:
    """
    The source that BIFROST_MODULE_SOURCE names; with `auto` the first of the two tables that is there.

    Raises WarmError where neither is there, with the heads that the database records.
    """
    if settings.module_source != "auto":
        return _BY_NAME[settings.module_source]
    with connection.transaction():
        for source in (WORKSPACE_FILES, FILE_INDEX):
            if postgres.scalar(connection, "SELECT to_regclass(%s)", source.table) is not None:
                return source
        elsewhere = postgres.other_table(connection, "workspace_files") or postgres.other_table(
            connection, "file_index"
        )
        heads = postgres.database_heads(connection, settings.alembic_version_table)
    raise WarmError(_no_table(str(settings.database), elsewhere, heads))


def _no_table(server: str, elsewhere: str, heads: tuple[str, ...]) -> str:
    text = (
        f"{server} has neither table workspace_files nor file_index (database heads: {', '.join(heads) or 'none'}):"
        " it is not migrated, or not the platform's database"
    )
    if elsewhere:
        schema = elsewhere.rpartition(".")[0]
        return f"{text}; there is {elsewhere}, name its schema in the URL: options=-csearch_path%3D{schema}"
    return f"{text}; if the platform keeps no modules in PostgreSQL, set BIFROST_MODULE_SOURCE=none"


@dataclass(frozen=True)
class OpenWriter:
    """A transaction that has written to the table and is still open. name: whose session it is, for a log line."""

    transaction: str
    name: str


def open_writers(connection: Connection, source: ModuleSource) -> frozenset[OpenWriter]:
    """
    The transactions that hold a writer's lock on the table, seen by every role and through a pooler; empty without one.

    The platform's API sets a cache entry before it commits the row.
    """
    if not source.table:
        return frozenset()
    with connection.transaction():
        rows = connection.execute(
            "SELECT l.virtualtransaction, concat_ws(' ', a.usename, nullif(a.application_name, ''),"
            " '(pid ' || coalesce(l.pid::text, 'none') || ')')"
            " FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid"
            " WHERE l.locktype = 'relation' AND l.mode = 'RowExclusiveLock' AND l.granted"
            " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            " AND l.relation = to_regclass(%s) AND l.pid IS DISTINCT FROM pg_backend_pid()",
            (source.table,),
        ).fetchall()
    return frozenset(OpenWriter(str(row[0]), str(row[1])) for row in rows)


def await_writers(
    read_open: Callable[[], AbstractSet[OpenWriter]], writers: AbstractSet[OpenWriter], limit: Deadline
) -> bool:
    """
    Wait until these transactions have ended; at the limit a warning names those that have not, and the result is False.

    A comparison that begins afterwards sees what they committed.
    """
    left = writers
    told = Deadline(WRITER_PATIENCE)
    while left and (left := left & read_open()):
        names = ", ".join(sorted(writer.name for writer in left))
        if limit.passed:
            logger.warning("transactions that have written modules are still open, not waiting any longer: %s", names)
            return False
        if told.passed:
            told = Deadline(limit.remaining + WRITER_POLL)
            logger.info("waiting for transactions that have written modules: %s (up to %.0fs)", names, limit.remaining)
        limit.sleep(WRITER_POLL)
    return True


def read_requirements(connection: Connection, source: ModuleSource) -> str:
    """The text of `requirements.txt`; "" where there is no row, or only white space in it."""
    if not source.table:
        return ""
    query: LiteralString = f"SELECT content FROM {source.table} WHERE {source.requirements}"  # noqa: S608  (our words)
    content = postgres.scalar(connection, query)
    return str(content) if content and str(content).strip() else ""
