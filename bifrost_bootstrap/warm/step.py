"""The step `warm`: make the module cache equal to the database, in one visible step, beside live writers."""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import ShrinkError, UnsettledError
from bifrost_bootstrap.progress import Facts, Progress, Report
from bifrost_bootstrap.servers import postgres, redis_server
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.warm import cache as module_cache, diff as cache_diff
from bifrost_bootstrap.warm.cache import TAIL, CacheStates, Marker, ModuleCache, Stage, Switched
from bifrost_bootstrap.warm.diff import CacheDiff, Content, RowReader, Snapshot
from bifrost_bootstrap.warm.source import WRITER_WAIT, OpenWriter, await_writers

logger = logging.getLogger(__name__)

#: Comparisons until no difference is left; each after the first meets only what was written meanwhile.
MAX_PASSES = 20
#: From this pass on, differences that live writers keep making do not keep a warm from ending (see `_is_in_flight`).
#: Before it only a comparison without any difference does: it proves more, and a cache that is at rest gets there.
SETTLING_PASS = 4
#: Pauses between passes, seconds: a live writer needs a moment from its commit to its entry.
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
#: Characters of content sent in one go: large enough to amortise a system call, small enough that neither
#: PostgreSQL nor Redis waits while we are busy with the other.
BATCH_SIZE = 1_000_000
#: More added entries than this are written where they belong at once: no index names them before the switch, and
#: it then has half as much to do.
LARGE_FILL = 5000
#: Seconds that Redis needs to switch one entry (1.4 for 100,000 on the slowest machine seen), and how long a switch may
#: take without a warning.
SWITCH_SECONDS, LONG_SWITCH = 0.000014, 1.0
#: What an entry takes in Redis beside its content (bytes), and what JSON and the allocator add to that (measured).
ENTRY_BYTES, ENTRY_GROWTH = 300, 1.3
#: Why a pass that found no difference is not the last.
ANOTHER_WARM = "another warm has switched meanwhile"
#: Paths named in a log line.
NAMED_PATHS = 5

# What is reported before each part of a pass: the points at which the tests stop a warm, or kill it.
READING, COMPARING, STAGING, SWITCHING = "reading the cache", "comparing", "staging", "switching"


@dataclass(frozen=True)
class WarmResult(Facts):
    """
    What a warm did. Counts of entries; `bytes` of the entries written; `heads` of the database that was warmed from.

    odd: rows that cannot be cached, as (path, reason). source: the table, "none" without one. requirements: "made",
    "present" (left as it was) or "none" (there is no row to make it from).
    """

    warm_id: str
    modules: int
    heads: list[str]
    added: int = 0
    changed: int = 0
    removed: int = 0
    expiring: int = 0
    bytes: int = 0
    passes: int = 1
    seconds: float = 0.0
    odd: list[tuple[str, str]] = field(default_factory=list)
    source: str = ""
    requirements: str = "none"


def warm(
    settings: Settings, deadline: Deadline, report: Report, *, full: bool = False, allow_shrink: bool = False
) -> WarmResult:
    """
    Compare, stage what differs, switch, and compare again until nothing differs.

    full: trust no hash and rewrite every entry. allow_shrink: remove however many entries. Safe to be run by
    several processes at once, and to be killed at any instant: the previous cache stands until the switch.

    Raises WarmError, ShrinkError, UnavailableError, RefusedError; in each case nothing was changed by the pass
    that failed, unless its switch was carried out and Redis vanished before it could answer.
    """
    with (
        redis_server.connect(settings.redis) as client,
        cache_diff.row_reader(settings, answer_timeout=postgres.WORK_TIMEOUT) as reader,
    ):
        room = redis_server.room_for_writing(client, settings.redis)
        ttl = reader.source.ttl(settings)
        if reader.source.table:
            life = f"{ttl:.0f}s" if ttl else "for ever"
            logger.info("modules come from table %s; entries live %s", reader.source.table, life)
        else:
            logger.info("BIFROST_MODULE_SOURCE=none: the module cache is left as it is")
        return _Warm(settings, ModuleCache(client, ttl), reader, room, report, allow_shrink).run(deadline, full)


@dataclass(frozen=True)
class _Pass:
    """One comparison and the switch of what it found. verified: nothing is left that a further pass would change."""

    diff: CacheDiff
    heads: list[str]
    switched: Switched
    in_flight: bool

    @property
    def verified(self) -> bool:
        return self.switched.as_planned and (self.diff.complete or self.in_flight)


class _Warm:
    """One warm, pass by pass. `room`: bytes that Redis has left, None without a limit."""

    def __init__(
        self, settings: Settings, cache: ModuleCache, reader: RowReader, room: int | None, report: Report,
        allow_shrink: bool,
    ) -> None:  # fmt: skip
        self.settings, self.cache, self.reader, self.room = settings, cache, reader, room
        self.report, self.allow_shrink = report, allow_shrink
        self.warm_id = uuid.uuid4().hex[:16]
        self.counts = {"added": 0, "changed": 0, "removed": 0, "expiring": 0, "bytes": 0}
        #: By the last switch, because somebody else had written them. Perhaps the index does not name them.
        self.conflicts: list[bytes] = []
        #: What the last switch has left, where nothing came in between.
        self.known: CacheStates | None = None
        #: By path, for the last switch: the tail that it found and the tail that it left.
        self.switched_fingerprints: dict[bytes, tuple[bytes, bytes]] = {}
        #: Transactions that were open while the rows of the last switch were read: their rows may be newer.
        self.writers: frozenset[OpenWriter] = frozenset()
        self.requirements = ""

    def run(self, deadline: Deadline, full: bool) -> WarmResult:
        started = time.monotonic()
        writer_wait = Deadline(min(WRITER_WAIT, deadline.remaining))
        number = 0
        while True:
            number += 1
            await_writers(self.reader.open_writers, self.writers, writer_wait)
            done = self._pass(number, full=full and number == 1)
            if done.verified:
                return self._result(done, number, round(time.monotonic() - started, 3))
            # Not before one comparison has followed a switch: the first finds what there was to do.
            if number == MAX_PASSES or (deadline.passed and number > 1):
                raise UnsettledError(number, ANOTHER_WARM if done.diff.empty else done.diff.summary())
            # As large as the cache perhaps, and the next pass makes its own.
            del done
            if number > 1:
                deadline.pause(number - 1, first=FIRST_PAUSE, longest=LONGEST_PAUSE)

    def _result(self, last: _Pass, passes: int, seconds: float) -> WarmResult:
        for path, why in last.diff.odd:
            logger.warning("row %r is not cached: %s", path, why)
        if self.requirements == "made":
            logger.info("made the requirements entry, which was absent")
        requirements = self.requirements or last.diff.requirements
        return WarmResult(
            self.warm_id, last.diff.modules, last.heads, **self.counts, passes=passes, seconds=seconds,
            odd=last.diff.odd, source=self.reader.source.table or "none", requirements=requirements,
        )  # fmt: skip

    def _pass(self, number: int, *, full: bool) -> _Pass:
        """One comparison and one switch of what it found. Where that is no content, the switch confirms the cache."""
        self.report(Progress("warm", note=READING))
        known, self.known = self.known, None
        # The cache first: what is written between the two reads is then found to differ, and left alone.
        states = known or self.cache.states(self.conflicts)
        # Between the two reads: a writer that had set an entry before the first, and commits after the second, is open.
        writers = self.reader.open_writers()
        self.report(Progress("warm", note=COMPARING))
        with ThreadPoolExecutor(1) as beside, self.reader.snapshot() as rows:
            # What we know was so before these rows were. Whether it still is may be asked while we compare.
            still = beside.submit(self.cache.is_still, known) if known else None
            diff = cache_diff.compare(states, rows, full=full)
            is_so = still is None or still.result()
            in_flight = number >= SETTLING_PASS and self._is_in_flight(diff)
            planned = self._stage(diff, rows, states, full=full) if is_so and not in_flight else 0
            heads = list(rows.heads)
        if not is_so:
            # Each as large as the cache, and the next reading makes its own.
            del known, states, diff
            return self._pass(number, full=full)
        self.writers = writers if planned else frozenset()
        verified = diff.complete or in_flight
        marker = Marker(self.warm_id, diff.modules + diff.private, heads, settled=verified)
        switched = self._switch(planned, marker, states.marker)
        if switched.as_planned and not in_flight:
            states.marker = marker.to_json().encode()
            self.known = states
        if switched.no_other_warm or not diff.complete:
            for kind in cache_diff.KINDS:
                self.counts[kind] += 0 if in_flight else len(getattr(diff, kind))
        return _Pass(diff, heads, switched, in_flight)

    def _is_in_flight(self, diff: CacheDiff) -> bool:
        """
        Whether all differences are live writers' work: nobody but a writer can have made them, and they come and go.

        A path that differed before, and whose entry is as the last switch found or left it, is for us to write again.
        Any other has been written since, or its row changed after the last comparison began.
        """
        return not any(tail in self.switched_fingerprints.get(path, ()) for path, tail in diff.compared.items())

    def _warn_of_little_room(self, diff: CacheDiff, rows: Snapshot) -> None:
        moved = diff.added + diff.changed
        if self.room is None or not moved:
            return
        needed = rows.bytes_of(moved) * ENTRY_GROWTH + ENTRY_BYTES * len(moved)
        if needed > self.room:
            logger.warning(
                "this warm needs about %.1f MB in %s, which has %.1f MB left below maxmemory",
                needed / 1e6, redis_server.display_name(self.settings.redis), self.room / 1e6,
            )  # fmt: skip

    def _stage(self, diff: CacheDiff, rows: Snapshot, states: CacheStates, *, full: bool) -> int:
        """
        Write new and changed entries where no reader looks, and plan the switch. Returns how much is planned.

        `states` becomes what the switch will leave. Raises ShrinkError, with nothing written.
        """
        if diff.shrinks and not self.allow_shrink:
            raise ShrinkError(len(diff.removed), diff.indexed, str(self.settings.database))
        self._warn_of_little_room(diff, rows)
        # Where an entry lies already, an index was lost or a fill died: it has to be replaced, not written in place.
        fresh = [path for path in diff.added if not diff.compared[path]]
        in_place = fresh if len(fresh) > LARGE_FILL else []
        staged = diff.changed + [path for path in diff.added if not in_place or diff.compared[path]]
        with self.cache.stage(self.warm_id) as stage:
            self._write(stage, in_place, rows, diff, states, full=full, in_place=True)
            self._write(stage, staged, rows, diff, states, full=full)
            stage.plan("remove", ((path, diff.compared[path]) for path in diff.removed))
            stage.plan("keep", ((path, diff.compared[path]) for path in diff.expiring))
            planned = stage.planned
        if diff.requirements == "missing":
            self.requirements = "made" if self.cache.add_requirements(rows.requirements()) else "present"
        self._remember(diff, states)
        return planned

    def _remember(self, diff: CacheDiff, states: CacheStates) -> None:
        """Let `states` become what the switch will leave."""
        for path in diff.removed:
            del states.fingerprints[path]
        states.fingerprints |= {path: diff.compared[path] for path in diff.expiring}
        states.unindexed, states.wrong_ttl = {}, set()
        states.index_expires = False
        states.has_requirements = states.has_requirements or diff.requirements == "missing"
        self.switched_fingerprints = {
            path: (found, states.fingerprints.get(path, b"")) for path, found in diff.compared.items()
        }

    def _write(
        self, stage: Stage, paths: list[bytes], rows: Snapshot, diff: CacheDiff, states: CacheStates, *,
        full: bool, in_place: bool = False,
    ) -> None:  # fmt: skip
        """Read these modules and write their entries, batch by batch."""
        if not paths:
            return
        trusts_hash = not full or rows.source.trusts_hash
        renewal = Deadline(module_cache.STAGE_TTL / 3)
        for batch in _batches(rows.contents(paths, all_rows=len(paths) > diff.modules / 2)):
            entries = [_entry(*row, trusts_hash=trusts_hash) for row in batch]
            stage.write(((path, value, diff.compared[path]) for path, value in entries), in_place=in_place)
            states.fingerprints.update((path, value[-TAIL:]) for path, value in entries)
            self.counts["bytes"] += sum(len(value) for _, value in entries)
            self.report(Progress("warm", stage.planned, len(diff.added) + len(diff.changed), "modules", STAGING))
            if renewal.passed:
                self.cache.renew(self.warm_id)
                renewal = Deadline(module_cache.STAGE_TTL / 3)

    def _switch(self, planned: int, marker: Marker, since: bytes) -> Switched:
        if (seconds := planned * SWITCH_SECONDS) > LONG_SWITCH:
            logger.warning("the switch of %d entries will block Redis for about %.1fs", planned, seconds)
        self.report(Progress("warm", note=SWITCHING))
        switched = self.cache.switch(marker, planned, since)
        self.conflicts = switched.conflicts
        if self.conflicts:
            named = ", ".join(repr(path.decode(errors="replace")) for path in self.conflicts[:NAMED_PATHS])
            logger.info("%d entries were written by somebody else and left alone: %s", len(self.conflicts), named)
        return switched


def _entry(path: str, content: str, said: bytes | None, *, trusts_hash: bool) -> tuple[bytes, bytes]:
    known = cache_diff.parse_sha256(said) if trusts_hash else None
    digest = known.decode() if known else hashlib.sha256(content.encode()).hexdigest()
    return path.encode(), module_cache.entry(path, content, digest)


def _batches(contents: Iterable[Content]) -> Iterator[list[Content]]:
    batch: list[Content] = []
    size = 0
    for row in contents:
        batch.append(row)
        size += len(row[1]) + ENTRY_BYTES
        if size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
