"""The one comparison of rows and cache: what warm, check, plan, guard and the end of init go by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, LiteralString

import psycopg
from psycopg.types.string import ByteaBinaryLoader

from bifrost_bootstrap.errors import WarmError
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.servers.postgres import Connection
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.urls import PostgresUrl
from bifrost_bootstrap.warm import cache as module_cache, source as module_source
from bifrost_bootstrap.warm.cache import CacheStates, ModuleCache
from bifrost_bootstrap.warm.source import ModuleSource, OpenWriter

_COMPUTED_HASH: LiteralString = "encode(sha256(convert_to(content, 'UTF8')), 'hex')"
#: `content_hash` is trusted where it is this many of these. (A regular expression in the query would take longer
#: than all the rest of a comparison.)
_HASH_DIGITS, _DIGITS = 64, b"0123456789abcdef"
#: The kinds of difference, each a list of paths in `CacheDiff`.
KINDS = ("added", "changed", "removed", "expiring")
#: Paths of each kind that a report names.
NAMED_PATHS = 10
#: Rows fetched at once, and paths asked for in one query.
_ROWS_A_FETCH, _PATHS_A_QUERY = 5000, 1000
#: The shrink limit: a warm that removes more entries than this, and more than this share of the index, stops.
SHRINK_ENTRIES, SHRINK_SHARE = 20, 0.5


#: Path, content and `content_hash` of a row.
Content = tuple[str, str, bytes | None]


@dataclass
class CacheDiff:
    """
    What a warm would do. Paths are UTF-8 bytes, as in Redis.

    added: rows that are not in the index. changed: entries that differ from their row. removed: indexed paths
    without a row. expiring: equal entries whose time to live is not what the TTL policy wants, or that the index
    does not name. odd: rows that cannot be cached, with the reason. modules: rows that can. private: paths in the index
    that are the platform's own. indexed: paths in the index. compared: the tail of every path of the first four.
    index_expires: the index has a time to live. requirements: how the requirements entry stands, "present", "missing"
    (a warm makes it), or "none" (there is no row to make it from).
    """

    added: list[bytes] = field(default_factory=list)
    changed: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    expiring: list[bytes] = field(default_factory=list)
    odd: list[tuple[str, str]] = field(default_factory=list)
    modules: int = 0
    private: int = 0
    indexed: int = 0
    compared: dict[bytes, bytes] = field(default_factory=dict)
    index_expires: bool = False
    requirements: str = "none"

    @property
    def empty(self) -> bool:
        """Whether a warm has nothing to do."""
        return self.complete and not (self.expiring or self.index_expires or self.requirements == "missing")

    @property
    def complete(self) -> bool:
        """Whether the cache holds what the rows say; entries may still have another time to live than they should."""
        return not (self.added or self.changed or self.removed)

    @property
    def shrinks(self) -> bool:
        """Whether it looks like the wrong database: most of the cache would go."""
        return len(self.removed) > max(SHRINK_ENTRIES, SHRINK_SHARE * self.indexed)

    def confirmed_by(self, second: CacheDiff) -> CacheDiff:
        """
        The part of this difference that a second comparison finds unchanged.

        What only one of the two saw is a live writer between its commit and its cache entry.
        """
        paths = {path for path, tail in self.compared.items() if second.compared.get(path) == tail}
        kinds: dict[str, Any] = {kind: [path for path in getattr(second, kind) if path in paths] for kind in KINDS}
        return replace(second, **kinds, compared={path: second.compared[path] for path in paths})

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: counts, the first paths of each kind, and all rows that cannot be cached."""
        facts: dict[str, Any] = {}
        for kind in KINDS:
            paths = getattr(self, kind)
            facts[kind] = len(paths)
            facts[f"{kind}_paths"] = [path.decode(errors="replace") for path in paths[:NAMED_PATHS]]
        facts |= {"index_expires": self.index_expires, "requirements": self.requirements}
        return facts | {"odd": [{"path": path, "reason": reason} for path, reason in self.odd]}

    def summary(self) -> str:
        """`3 added, 1 removed`; "no difference" where it is empty."""
        counts = {kind: len(getattr(self, kind)) for kind in KINDS}
        parts = [f"{count} {kind}" for kind, count in counts.items() if count]
        parts += ["the index expires"] if self.index_expires else []
        parts += ["the requirements entry is missing"] if self.requirements == "missing" else []
        return ", ".join(parts) or "no difference"


#: SQLSTATE of bytes that are no text in the encoding of the connection.
_NOT_IN_ENCODING = "22021"
#: For the transaction: rows that a policy would hide are an error, and a role's limit is not meant for a warm.
_FOR_ALL_ROWS: LiteralString = (
    "SELECT set_config('row_security', 'off', true), set_config('statement_timeout', '0', true)"
)


class Snapshot:
    """The rows of a source as they stood at one moment. `heads`: the revisions that the database recorded then."""

    def __init__(self, connection: Connection, source: ModuleSource, version_table: str) -> None:
        self._connection = connection
        self.source = source
        self.heads = postgres.database_heads(connection, version_table)

    def requirements(self) -> str:
        """The text of `requirements.txt`; "" where there is none."""
        return module_source.read_requirements(self._connection, self.source)

    def hashes(self) -> Iterator[tuple[bytes | None, bytes | None]]:
        """Path and `content_hash` of every module."""
        with self._connection.cursor("modules", binary=True) as cursor:
            _take_bytes(cursor)
            cursor.execute(f"SELECT path, content_hash{self.source.from_where}")
            while rows := cursor.fetchmany(_ROWS_A_FETCH):
                yield from rows  # type: ignore[misc]

    def computed_hashes(self, paths: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Path and the hash of what is in the row; slow, as PostgreSQL reads all of the content."""
        query: LiteralString = f"SELECT path, {_COMPUTED_HASH}{self.source.from_where} AND path = ANY(%s)"
        with self._connection.cursor(binary=True) as cursor:
            _take_bytes(cursor)
            for part in _parts(paths):
                yield from cursor.execute(query, (part,))

    def bytes_of(self, paths: list[bytes]) -> int:
        """Bytes of the content of these modules, without reading it."""
        where = self.source.from_where
        query: LiteralString = f"SELECT coalesce(sum(octet_length(content)), 0){where} AND path = ANY(%s)"
        return sum(int(str(postgres.scalar(self._connection, query, part))) for part in _parts(paths))

    def contents(self, paths: list[bytes], *, all_rows: bool) -> Iterator[Content]:
        """These modules; `all_rows` reads all, which is faster for most of them."""
        query: LiteralString = f"COPY (SELECT path, content, content_hash{self.source.from_where}"
        wanted = set(paths) if all_rows else set()
        with self._connection.cursor() as cursor:
            for part in [None] if all_rows else _parts(paths):
                where: LiteralString = " AND path = ANY(%s)" if part else ""
                with cursor.copy(f"{query}{where}) TO STDOUT (FORMAT binary)", (part,) if part else None) as copy:
                    copy.set_types(("text", "text", "bytea"))
                    for row in copy.rows():
                        if part or (row[0] is not None and row[0].encode() in wanted):
                            yield row


def _take_bytes(cursor: psycopg.Cursor[Any]) -> None:
    """Let this cursor make no text of text: the paths in Redis are bytes. (The server's own conversion is slow.)"""
    for name in ("text", "varchar"):
        cursor.adapters.register_loader(name, ByteaBinaryLoader)


def _parts(paths: list[bytes]) -> Iterator[list[str]]:
    for start in range(0, len(paths), _PATHS_A_QUERY):
        yield [path.decode() for path in paths[start : start + _PATHS_A_QUERY]]


class RowReader:
    """One connection to the rows of one source, for any number of snapshots."""

    def __init__(self, connection: Connection, source: ModuleSource, version_table: str) -> None:
        self._connection = connection
        self._version_table = version_table
        self.source = source

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """A read-only transaction in which every query sees the same rows."""
        with self._connection.transaction():
            self._connection.execute(_FOR_ALL_ROWS)
            yield Snapshot(self._connection, self.source, self._version_table)

    def open_writers(self) -> frozenset[OpenWriter]:
        """The transactions that have written to the table and are still open."""
        return module_source.open_writers(self._connection, self.source)


@contextmanager
def row_reader(settings: Settings, *, answer_timeout: float | None = None) -> Iterator[RowReader]:
    """
    Connect to the rows of the source that is there now.

    answer_timeout: seconds of silence of PostgreSQL; None is no limit. Raises WarmError where there is no source,
    or PostgreSQL refuses to read it.
    """
    url = settings.database
    source: ModuleSource | None = None
    with postgres.connect(url, "warm", autocommit=False, answer_timeout=answer_timeout) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        try:
            source = module_source.find_source(connection, settings)
            yield RowReader(connection, source, settings.alembic_version_table)
        except (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.InsufficientPrivilege):
            raise
        except psycopg.Error as error:
            odd = f", row {_undecodable(url, source)!r}" if source and error.sqlstate == _NOT_IN_ENCODING else ""
            table = source.table if source else ""
            raise WarmError(f"table {table} of {url}{odd}: {error.diag.message_primary or error}") from error


def _undecodable(url: PostgresUrl, source: ModuleSource) -> str:
    """The path of the first module that is not UTF-8; a database of the encoding SQL_ASCII takes anything."""
    with postgres.connect(url, "warm") as connection, connection.cursor(binary=True) as cursor:
        _take_bytes(cursor)
        cursor.execute("SET client_encoding TO 'SQL_ASCII'")
        rows: Iterator[Any] = cursor.stream(f"SELECT path, content{source.from_where}")
        for path, content in rows:
            try:
                (path + content).decode()
            except UnicodeDecodeError:
                return str(path.decode(errors="replace"))
    return "that has gone meanwhile"


def parse_sha256(stored_hash: bytes | None) -> bytes | None:
    """The `content_hash` of a row as an entry has it; None if it is no sha-256 in hex."""
    if stored_hash is None or len(stored_hash) != _HASH_DIGITS:
        return None
    digits = stored_hash.lower()
    return None if digits.translate(None, _DIGITS) else digits


def compare(states: CacheStates, rows: Snapshot, *, full: bool = False) -> CacheDiff:
    """
    Compare the cache with a snapshot that was taken **after** the states were true.

    `full`: every entry counts as changed.
    """
    diff = CacheDiff(indexed=len(states.fingerprints), index_expires=states.index_expires)
    diff.requirements = _requirements_state(states, rows)
    if rows.source.table:
        _compare_rows(diff, states, rows, full=full)
    else:
        # BIFROST_MODULE_SOURCE=none: nothing says what the cache should hold, so all of it is left alone.
        diff.modules = len(states.fingerprints)
    return diff


def _compare_rows(diff: CacheDiff, states: CacheStates, rows: Snapshot, *, full: bool) -> None:
    """Fill the difference with the rows of a table."""
    fingerprints = states.fingerprints
    wrong_ttl = states.wrong_ttl
    comparison = _RowComparison(diff, states, trusts_hash=rows.source.trusts_hash, full=full)
    unchanged = 0
    for path, stored_hash in rows.hashes():
        found = fingerprints.get(path)  # type: ignore[arg-type]
        # Nearly all rows end here, without a call: `add` takes five times as long.
        if (
            found
            and stored_hash
            and len(stored_hash) == _HASH_DIGITS
            and found == stored_hash + module_cache.TAIL_END
            and not (stored_hash.translate(None, _DIGITS) or full or path in wrong_ttl)
        ):
            unchanged += 1
        else:
            comparison.add(path, stored_hash)
    comparison.compare_contents(rows)
    indexed = unchanged + comparison.indexed
    diff.modules = indexed + comparison.unindexed
    diff.private = rows.source.count_private(fingerprints)
    if indexed + diff.private < len(fingerprints):
        diff.removed = _without_row(fingerprints, rows)
        diff.compared |= {path: fingerprints[path] for path in diff.removed}


class _RowComparison:
    """Sorts rows into a difference. indexed, unindexed: rows so far whose path the index has, and has not."""

    def __init__(self, diff: CacheDiff, states: CacheStates, *, trusts_hash: bool, full: bool) -> None:
        self._diff = diff
        self._states = states
        self._trusts_hash = trusts_hash
        self._full = full
        self.indexed = 0
        self.unindexed = 0
        #: Entries that do not match the stored hash of their row, but perhaps its content: the stored hash is wrong or
        #: missing. By path the fingerprint of the entry.
        self._doubtful: dict[bytes, bytes] = {}

    def add(self, path: bytes | None, stored_hash: bytes | None) -> None:
        """Sort one row; remember it if only its content can tell."""
        if path is None or path == module_cache.COLLIDING_PATH:
            reason = "its entry would be the index itself" if path else "a module without a path"
            self._diff.odd.append((path.decode() if path else "", reason))
            return
        found = self._states.fingerprints.get(path)
        indexed = found is not None
        if indexed:
            self.indexed += 1
        else:
            self.unindexed += 1
            found = self._states.unindexed.get(path, b"")
        if not found and not indexed:
            self._diff.added.append(path)
            self._diff.compared[path] = b""
            return
        assert found is not None
        wanted = parse_sha256(stored_hash)
        same = not self._full and wanted is not None and found == module_cache.tail(wanted)
        if same or self._full or not found or (wanted is not None and self._trusts_hash):
            self._sort(path, found, same=same)
        else:
            self._doubtful[path] = found

    def compare_contents(self, rows: Snapshot) -> None:
        """Sort the rows that only their content can tell."""
        for path, computed in rows.computed_hashes(list(self._doubtful)):
            found = self._doubtful[path]
            self._sort(path, found, same=found == module_cache.tail(computed))

    def _sort(self, path: bytes, found: bytes, *, same: bool) -> None:
        indexed = path in self._states.fingerprints
        if not same:
            (self._diff.changed if indexed else self._diff.added).append(path)
        elif not indexed or path in self._states.wrong_ttl:
            self._diff.expiring.append(path)
        else:
            return
        self._diff.compared[path] = found


def _requirements_state(states: CacheStates, rows: Snapshot) -> str:
    """As `CacheDiff.requirements`."""
    if states.has_requirements:
        return "present"
    return "missing" if rows.requirements() else "none"


def _without_row(paths: Iterable[bytes], rows: Snapshot) -> list[bytes]:
    """The paths that no row has, but for the platform's own."""
    present = {path for path, _ in rows.hashes() if path != module_cache.COLLIDING_PATH}
    return [path for path in paths if path not in present and not rows.source.is_private(path)]


@dataclass(frozen=True)
class Comparison:
    """A difference, and the transactions that had written rows and were open when it was taken."""

    diff: CacheDiff
    open_writers: frozenset[OpenWriter]


def compare_now(client: Any, settings: Settings, *, answer_timeout: float | None = None) -> Comparison:
    """Compare without changing anything. answer_timeout: seconds of silence of PostgreSQL."""
    with row_reader(settings, answer_timeout=answer_timeout) as reader:
        states = ModuleCache(client, reader.source.ttl(settings)).states()
        writers = reader.open_writers()
        with reader.snapshot() as rows:
            return Comparison(compare(states, rows), writers)
