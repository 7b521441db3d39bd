"""What a warm writes before its switch: new entries, where no reader looks, and the plan of the switch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.warm import cache as module_cache
from bifrost_bootstrap.warm.cache import Command, ModuleCache, plan_key, stage_prefix
from bifrost_bootstrap.warm.comparison import parse_sha256
from bifrost_bootstrap.warm.diff import CacheDiff, Entries
from bifrost_bootstrap.warm.rows import Content, Snapshot

#: Seconds that staged entries outlive a warm that died; renewed while the warm runs.
STAGE_TTL = 300
#: Seconds that the plan, and entries written in place, outlive a warm that died. Never renewed, because a live writer's
#: entry may be in the same place; so it has to be longer than any fill takes.
FILL_TTL = 3600
#: Characters of content in one batch: enough to make a system call worth it, and few enough that neither PostgreSQL nor
#: Redis waits while we are busy with the other.
BATCH_SIZE = 1_000_000
#: Batches sent before the replies to the first are read: Redis and we seldom wait for each other, and its input buffer
#: stays bounded.
WRITE_AHEAD = 8
#: If more entries than this are new, they are written in place: no index names them before the switch, and the switch
#: then has half as much to do.
LARGE_FILL = 5000
#: Bytes that an entry takes in Redis beside its content.
ENTRY_BYTES = 300

#: One step of the plan: what the switch does ("set", "keep", "remove"), the path, and the fingerprint that its entry
#: must have then.
Step = tuple[str, bytes, bytes]


def stage(
    cache: ModuleCache, warm_id: str, diff: CacheDiff, rows: Snapshot, report: Callable[[int], None], *, full: bool
) -> tuple[Entries, int]:
    """
    Write the added and changed entries, batch by batch, and plan the switch of all that differs.

    Redis stores one batch while we make the next. report: receives the number of entries written so far. full: do not
    trust the stored hash of a row. Returns the fingerprints of all entries that the switch will leave at the planned
    paths, and the bytes written.
    """
    trusts_hash = rows.source.trusts_hash or not full
    # If an entry exists without an index, the index was lost or a fill died: the switch has to replace this entry.
    fresh = {path for path, found in diff.added.items() if not found}
    in_place = fresh if len(fresh) > LARGE_FILL else set()
    paths = diff.added | diff.changed
    fingerprints: Entries = {}
    size = 0
    renew = ("EVAL", module_cache.RENEW, 2, stage_prefix(warm_id), plan_key(warm_id), STAGE_TTL)
    renewal = Deadline(STAGE_TTL / 3)
    with cache.pipelined(WRITE_AHEAD) as connection, module_cache.rights_named(module_cache.RENEW):
        for batch in _batches(rows.contents(paths, all_rows=len(paths) > diff.modules / 2)):
            entries = dict(_entry(*row, trusts_hash=trusts_hash) for row in batch)
            connection.send(_write(warm_id, entries, paths, in_place))
            fingerprints |= {path: value[-module_cache.FINGERPRINT_BYTES :] for path, value in entries.items()}
            size += sum(map(len, entries.values()))
            report(len(fingerprints))
            if renewal.passed:
                connection.send([renew])
                renewal = Deadline(STAGE_TTL / 3)
        for operation, found in (("remove", diff.removed), ("keep", diff.ttl_only)):
            for part in module_cache.slices(list(found.items())):
                connection.send(_plan(warm_id, [(operation, *item) for item in part]))
        connection.read_replies()
    return fingerprints | diff.ttl_only, size


def _write(warm_id: str, entries: Entries, found: Entries, in_place: set[bytes]) -> list[Command]:
    """
    Write these values by path, and plan to publish them. found: the fingerprints that they replace.

    in_place: paths to write at the final key, which nobody reads before the index names it. If somebody else has
    written an entry there, it stays, and the switch finds it.
    """
    prefix = stage_prefix(warm_id)
    commands: list[Command] = []
    steps: list[Step] = []
    for path, value in entries.items():
        if path in in_place:
            commands.append(("SET", module_cache.ENTRY + path, value, "EX", FILL_TTL, "NX"))
            steps.append(("keep", path, value[-module_cache.FINGERPRINT_BYTES :]))
        else:
            commands.append(("SET", prefix + path, value, "EX", STAGE_TTL))
            steps.append(("set", path, found[path]))
    return commands + _plan(warm_id, steps)


def _plan(warm_id: str, steps: list[Step]) -> list[Command]:
    """Add steps to the plan of the switch."""
    key = plan_key(warm_id)
    return [("RPUSH", key, *chain.from_iterable(steps)), ("EXPIRE", key, FILL_TTL)]


def _entry(path: str, content: str, stored_hash: bytes | None, *, trusts_hash: bool) -> tuple[bytes, bytes]:
    trusted = parse_sha256(stored_hash) if trusts_hash else None
    digest = trusted.decode() if trusted else hashlib.sha256(content.encode()).hexdigest()
    return path.encode(), module_cache.entry(path, content, digest)


def _batches(contents: Iterable[Content]) -> Iterator[list[Content]]:
    batch: list[Content] = []
    size = 0
    for row in contents:
        batch.append(row)
        size += len(row[1]) + ENTRY_BYTES
        if size >= BATCH_SIZE:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch
