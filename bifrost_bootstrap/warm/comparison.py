"""The one comparison of rows and cache."""

from __future__ import annotations

from typing import Any

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.warm.cache import COLLIDING_PATH, ENTRY_END, CacheStates, ModuleCache, fingerprint
from bifrost_bootstrap.warm.diff import CacheDiff, Entries
from bifrost_bootstrap.warm.rows import OpenWriters, RowReader, Snapshot, row_reader

#: `content_hash` is trusted if it consists of this many of these. (A regular expression in the query would take longer
#: than the rest of a comparison.)
_HASH_DIGITS = 64
_DIGITS = b"0123456789abcdef"


def parse_sha256(stored_hash: bytes | None) -> bytes | None:
    """The `content_hash` of a row as its entry has it, in lower case; None if it is not a sha-256 in hex."""
    if stored_hash is None or len(stored_hash) != _HASH_DIGITS:
        return None
    digits = stored_hash.lower()
    return None if digits.translate(None, _DIGITS) else digits


def compare(states: CacheStates, rows: Snapshot, *, full: bool = False) -> CacheDiff:
    """
    Compare the cache with a snapshot that was taken **after** the states were read.

    full: every entry counts as changed.
    """
    diff = CacheDiff(indexed=len(states.fingerprints), index_expires=states.index_expires)
    if states.has_requirements:
        diff.requirements = "present"
    elif rows.requirements():
        diff.requirements = "missing"
    if rows.source.table:
        _compare_rows(diff, states, rows, full=full)
    else:
        # BIFROST_MODULE_SOURCE=none: no row says what the cache should hold, so a warm leaves all of it alone.
        diff.modules = diff.indexed
    return diff


def _compare_rows(diff: CacheDiff, states: CacheStates, rows: Snapshot, *, full: bool) -> None:
    """Fill the difference from the rows of a table."""
    fingerprints = states.fingerprints
    wrong_ttl = states.wrong_ttl
    unchanged = 0
    others = 0
    unindexed = 0
    #: Entries that do not match the stored hash of their row. If that hash is wrong or missing, only content can tell.
    doubtful: Entries = {}
    for path, stored_hash in rows.hashes():
        found = fingerprints.get(path)  # type: ignore[arg-type]
        # Nearly all rows end here, without a call, which would take five times as long.
        if (
            found
            and stored_hash
            and len(stored_hash) == _HASH_DIGITS
            and found == stored_hash + ENTRY_END
            and not (stored_hash.translate(None, _DIGITS) or full or path in wrong_ttl)
        ):
            unchanged += 1
            continue
        if path is None or path == COLLIDING_PATH:
            reason = "its entry would be the index itself" if path else "a module without a path"
            diff.rejected.append((path.decode() if path else "", reason))
            continue
        others += 1
        if found is None:
            unindexed += 1
            found = states.unindexed.get(path, b"")
        same = False if full or not found else _matches(found, stored_hash, trusts_hash=rows.source.trusts_hash)
        if same is None:
            doubtful[path] = found
        else:
            _sort(diff, states, path, found, same=same)
    for path, computed in rows.computed_hashes(doubtful):
        _sort(diff, states, path, doubtful[path], same=doubtful[path] == fingerprint(computed))
    diff.modules = unchanged + others
    diff.private = rows.source.count_private(fingerprints)
    # Fewer rows than indexed paths: only then some path has no row, and the rows are read again to find it.
    if diff.modules - unindexed + diff.private < diff.indexed:
        diff.removed = _without_row(fingerprints, rows)


def _matches(found: bytes, stored_hash: bytes | None, *, trusts_hash: bool) -> bool | None:
    """Whether the fingerprint of an entry is that of its row; None if only the content of the row can tell."""
    expected = parse_sha256(stored_hash)
    if expected is not None and found == fingerprint(expected):
        return True
    return False if expected is not None and trusts_hash else None


def _sort(diff: CacheDiff, states: CacheStates, path: bytes, found: bytes, *, same: bool) -> None:
    """Put the path of a row into the difference, if it belongs there. same: its entry has the content of the row."""
    indexed = path in states.fingerprints
    if not same:
        (diff.changed if indexed else diff.added)[path] = found
    elif not indexed or path in states.wrong_ttl:
        diff.ttl_only[path] = found


def _without_row(fingerprints: Entries, rows: Snapshot) -> Entries:
    """The entries whose path no row has, except the platform's own."""
    present = {path for path, _ in rows.hashes() if path != COLLIDING_PATH}
    private = rows.source.is_private
    return {path: found for path, found in fingerprints.items() if path not in present and not private(path)}


def compare_now(client: Any, settings: Settings, *, answer_timeout: float, writer_wait: float = 0.0) -> CacheDiff:
    """
    Compare without changing anything. answer_timeout: seconds that PostgreSQL may be silent.

    writer_wait: transactions that have written modules and are still open may have set entries already. Wait for them
    for up to so many seconds, then compare again.
    """
    with row_reader(settings, answer_timeout=answer_timeout) as reader:
        cache = ModuleCache(client, reader.source.ttl(settings))
        diff, writers = _compare_once(cache, reader)
        if writers and writer_wait:
            reader.await_writers(writers, Deadline(writer_wait))
            diff, _ = _compare_once(cache, reader)
        return diff


def _compare_once(cache: ModuleCache, reader: RowReader) -> tuple[CacheDiff, OpenWriters]:
    states = cache.states()
    writers = reader.open_writers()
    with reader.snapshot() as rows:
        return compare(states, rows), writers


def confirm(first: CacheDiff, client: Any, settings: Settings, *, delay: float, answer_timeout: float) -> CacheDiff:
    """
    The part of a difference that a second comparison finds unchanged, after `delay` seconds.

    A live writer commits a moment before or after it writes its entry; the second comparison finds its work complete.
    """
    Deadline(delay).sleep(delay)
    return first.confirmed_by(compare_now(client, settings, answer_timeout=answer_timeout))
