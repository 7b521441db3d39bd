"""The one comparison of rows and cache: what warm, check, plan, guard and the end of init go by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, LiteralString

import psycopg
from psycopg.types.string import ByteaBinaryLoader

from bifrost_bootstrap import module_cache, postgres
from bifrost_bootstrap.errors import WarmError
from bifrost_bootstrap.module_cache import CacheStates, ModuleCache
from bifrost_bootstrap.postgres import Connection
from bifrost_bootstrap.urls import PostgresUrl

#: A row is a module.
_MODULES: LiteralString = (
    " FROM workspace_files WHERE entity_type = 'module' AND NOT is_deleted AND content IS NOT NULL"
)
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
#: The brake: a warm that removes more entries than this, and more than this share of the index, stops.
SHRINK_ENTRIES, SHRINK_SHARE = 20, 0.5


#: Path, content and `content_hash` of a row.
Content = tuple[str, str, bytes | None]


@dataclass
class CacheDiff:
    """
    What a warm would do. Paths are UTF-8 bytes, as in Redis.

    added: rows that are not in the index. changed: entries that differ from their row. removed: indexed paths
    without a row. expiring: equal entries whose time to live is not what the TTL policy wants, or that the index
    does not name. odd: rows that cannot be cached, with the reason. modules: rows that can. indexed: paths in the
    index. compared: the tail of every path of the first four.
    """

    added: list[bytes] = field(default_factory=list)
    changed: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    expiring: list[bytes] = field(default_factory=list)
    odd: list[tuple[str, str]] = field(default_factory=list)
    modules: int = 0
    indexed: int = 0
    compared: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return self.complete and not self.expiring

    @property
    def complete(self) -> bool:
        """Whether the cache holds what the rows say; entries may still have another time to live than they should."""
        return not (self.added or self.changed or self.removed)

    @property
    def shrinks(self) -> bool:
        """Whether it looks like the wrong database: most of the cache would go."""
        return len(self.removed) > max(SHRINK_ENTRIES, SHRINK_SHARE * self.indexed)

    def same_as(self, other: CacheDiff) -> set[bytes]:
        """Paths that differ in both in the same way: what was seen twice is not a writer in the middle of his work."""
        return {path for path, tail in self.compared.items() if other.compared.get(path) == tail}

    def only(self, paths: set[bytes]) -> CacheDiff:
        """The part of the difference that is about these paths."""
        kinds: dict[str, Any] = {kind: [path for path in getattr(self, kind) if path in paths] for kind in KINDS}
        return replace(self, **kinds, compared={path: self.compared[path] for path in paths})

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: counts, the first paths of each kind, and all rows that cannot be cached."""
        facts: dict[str, Any] = {}
        for kind in KINDS:
            paths = getattr(self, kind)
            facts[kind] = len(paths)
            facts[f"{kind}_paths"] = [path.decode(errors="replace") for path in paths[:NAMED_PATHS]]
        return facts | {"odd": [{"path": path, "reason": reason} for path, reason in self.odd]}

    def summary(self) -> str:
        """`3 added, 1 removed`; "no difference" where it is empty."""
        counts = {kind: len(getattr(self, kind)) for kind in KINDS}
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "no difference"


class Snapshot:
    """The rows as they stood at one moment. `heads`: the revisions that the database recorded then."""

    def __init__(self, connection: Connection, version_table: str) -> None:
        self._connection = connection
        self.heads = postgres.database_heads(connection, version_table)

    def hashes(self) -> Iterator[tuple[bytes | None, bytes | None]]:
        """Path and `content_hash` of every module."""
        with self._connection.cursor("modules", binary=True) as cursor:
            _take_bytes(cursor)
            cursor.execute(f"SELECT path, content_hash{_MODULES}")
            while rows := cursor.fetchmany(_ROWS_A_FETCH):
                yield from rows  # type: ignore[misc]

    def computed_hashes(self, paths: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Path and the hash of what is in the row; slow, as PostgreSQL reads all of the content."""
        query: LiteralString = f"SELECT path, {_COMPUTED_HASH}{_MODULES} AND path = ANY(%s)"
        with self._connection.cursor(binary=True) as cursor:
            _take_bytes(cursor)
            for part in _parts(paths):
                yield from cursor.execute(query, (part,))

    def bytes_of(self, paths: list[bytes]) -> int:
        """Bytes of the content of these modules, without reading it."""
        query: LiteralString = f"SELECT coalesce(sum(octet_length(content)), 0){_MODULES} AND path = ANY(%s)"
        return sum(int(str(postgres.scalar(self._connection, query, part))) for part in _parts(paths))

    def contents(self, paths: list[bytes], *, all_rows: bool) -> Iterator[Content]:
        """These modules; `all_rows` reads all, which is faster for most of them."""
        query: LiteralString = f"COPY (SELECT path, content, content_hash{_MODULES}"
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


@contextmanager
def snapshots(
    url: PostgresUrl, version_table: str, *, answer_timeout: float | None = None
) -> Iterator[Callable[[], AbstractContextManager[Snapshot]]]:
    """
    One connection for any number of snapshots: `with take() as rows:` is a read-only transaction in which every
    query sees the same rows. Raises WarmError where the table is missing.

    answer_timeout: seconds that the whole block may take; None is no limit.
    """
    with postgres.connect(url, "warm", autocommit=False, answer_timeout=answer_timeout) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True

        @contextmanager
        def take() -> Iterator[Snapshot]:
            with connection.transaction():
                yield Snapshot(connection, version_table)

        try:
            yield take
        except psycopg.errors.UndefinedTable as error:
            raise WarmError(
                f"{url} has no table workspace_files: not migrated, or not the platform's database"
            ) from error
        except (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.InsufficientPrivilege):
            raise
        except psycopg.Error as error:
            raise WarmError(f"table workspace_files of {url}: {error.diag.message_primary or error}") from error


def trusted(said: bytes | None) -> bytes | None:
    """This `content_hash` as an entry has it, or None where it is no sha-256 in hex."""
    if said is None or len(said) != _HASH_DIGITS:
        return None
    digits = said.lower()
    return None if digits.translate(None, _DIGITS) else digits


def compare(states: CacheStates, rows: Snapshot, *, full: bool = False) -> CacheDiff:
    """
    Compare the cache with a snapshot that was taken **after** the states were true.

    `full`: every entry counts as changed.
    """
    diff = CacheDiff(indexed=len(states.tails))
    tails, loose, off_policy = states.tails, states.loose, states.off_policy
    matched = unmatched = 0

    def sort(path: bytes, found: bytes, *, indexed: bool, same: bool) -> None:
        if not same:
            (diff.changed if indexed else diff.added).append(path)
        elif not indexed or path in off_policy:
            diff.expiring.append(path)
        else:
            return
        diff.compared[path] = found

    # Entries that are not as their row says, but perhaps as its content is: `content_hash` lies, or is none.
    doubtful: dict[bytes, bytes] = {}
    for path, said in rows.hashes():
        indexed = tails.get(path)  # type: ignore[arg-type]
        # So it is for nearly all of them, and what follows would take five times as long.
        if (
            indexed
            and said
            and len(said) == _HASH_DIGITS
            and indexed == said + module_cache.TAIL_END
            and not (said.translate(None, _DIGITS) or full or path in off_policy)
        ):
            matched += 1
            continue
        if path is None or path == module_cache.COLLIDING_PATH:
            why = "its entry would be the index itself" if path else "a module without a path"
            diff.odd.append((path.decode() if path else "", why))
            continue
        if indexed is not None:
            matched += 1
        else:
            unmatched += 1
            # And so for all of them in a first fill.
            if path not in loose:
                diff.added.append(path)
                diff.compared[path] = b""
                continue
        found = loose[path] if indexed is None else indexed
        wanted = trusted(said)
        same = not full and wanted is not None and found == module_cache.tail(wanted)
        if same or full or not found:
            sort(path, found, indexed=indexed is not None, same=same)
        else:
            doubtful[path] = found
    diff.modules = matched + unmatched
    for path, computed in rows.computed_hashes(list(doubtful)):
        found = doubtful[path]
        sort(path, found, indexed=path in tails, same=found == module_cache.tail(computed))
    if matched < len(tails):
        present = {path for path, _ in rows.hashes() if path != module_cache.COLLIDING_PATH}
        diff.removed = [path for path in tails if path not in present]
        diff.compared |= {path: tails[path] for path in diff.removed}
    return diff


def look(cache: ModuleCache, url: PostgresUrl, version_table: str, *, answer_timeout: float | None = None) -> CacheDiff:
    """Compare now, without changing anything. answer_timeout: seconds that PostgreSQL may take for all of it."""
    states = cache.states()
    with snapshots(url, version_table, answer_timeout=answer_timeout) as take, take() as rows:
        return compare(states, rows)
