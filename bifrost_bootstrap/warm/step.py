"""The step `warm`: make the module cache equal to the database, in one visible step, beside live writers."""

from __future__ import annotations

import logging
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import ShrinkError, UnsettledError
from bifrost_bootstrap.progress import Facts, Progress, Report
from bifrost_bootstrap.servers import postgres, redis_server
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.warm.cache import CacheStates, Marker, ModuleCache, SwitchResult
from bifrost_bootstrap.warm.comparison import compare
from bifrost_bootstrap.warm.diff import CacheDiff, Entries
from bifrost_bootstrap.warm.rows import WRITER_WAIT, OpenWriters, RowReader, Snapshot, row_reader
from bifrost_bootstrap.warm.staging import ENTRY_BYTES, stage

logger = logging.getLogger(__name__)

#: Comparisons until no difference is left. Each after the first meets only what was written meanwhile.
MAX_PASSES = 20
#: From this pass on, a warm may end although live writers keep making differences (see `_without_in_flight`). Before
#: it, only a comparison without any difference ends a warm. That proves more, and a cache at rest gets there.
SETTLING_PASS = 4
#: Pauses between passes, seconds: a live writer needs a moment from its commit to its entry.
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
#: Seconds that Redis needs to switch one entry (1.4 for 100,000 on the slowest machine seen), and seconds that a switch
#: may take without a warning.
SWITCH_SECONDS = 0.000014
LONG_SWITCH = 1.0
#: By how much content grows in Redis, from JSON and its allocator (measured).
ENTRY_GROWTH = 1.3
#: Why a pass that found no difference is not the last.
ANOTHER_WARM = "another warm has switched meanwhile"
#: Paths named in a log line.
NAMED_PATHS = 5

# What is reported before each part of a pass: the points at which the tests stop a warm, or kill it.
READING = "reading the cache"
COMPARING = "comparing"
STAGING = "staging"
SWITCHING = "switching"


@dataclass(frozen=True)
class WarmResult(Facts):
    """
    What a warm did. Counts of entries; `bytes` of the entries written; `heads` of the database that was warmed from.

    expiring: entries whose TTL alone was set. odd: rows that cannot be cached, as (path, reason). source: the table,
    "none" without one. requirements: "made", "present" (left as it was) or "none" (there is no row to make it from).
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
        row_reader(settings, answer_timeout=postgres.WORK_TIMEOUT) as reader,
    ):
        room = redis_server.room_for_writing(client, settings.redis)
        ttl = reader.source.ttl(settings)
        if reader.source.table:
            life = f"{ttl:.0f}s" if ttl else "for ever"
            logger.info("modules come from table %s; entries live %s", reader.source.table, life)
        else:
            logger.info("BIFROST_MODULE_SOURCE=none: the module cache is left as it is")
        cache = ModuleCache(client, ttl)
        one = _Warm(settings, cache, reader, room, report, uuid.uuid4().hex[:16], full=full, allow_shrink=allow_shrink)
        return one.run(deadline)


@dataclass(frozen=True)
class _Pass:
    """
    What one pass leaves: the result of the warm so far, and what the next pass has to know of its switch.

    verified: a further pass would find nothing to change. difference: what was found, in words. states: what the cache
    holds since the switch; None if it has to be read. conflicts: paths that the switch left alone; perhaps the index
    does not name them. switched: the entries of the last plan, as that switch found them and as it left them. writers:
    transactions that were open while the rows of the plan were read, so their rows may be newer.
    """

    result: WarmResult
    verified: bool = False
    difference: str = ""
    states: CacheStates | None = None
    conflicts: list[bytes] = field(default_factory=list)
    switched: tuple[Entries, Entries] = ({}, {})
    writers: OpenWriters = field(default_factory=dict)


@dataclass(frozen=True)
class _Warm:
    """What all passes of one warm share. room: bytes that Redis has left, None without a limit."""

    settings: Settings
    cache: ModuleCache
    reader: RowReader
    room: int | None
    report: Report
    warm_id: str
    full: bool
    allow_shrink: bool

    def run(self, deadline: Deadline) -> WarmResult:
        """Run passes until one is verified. Raises UnsettledError after the last one that is allowed."""
        started = time.monotonic()
        writer_wait = Deadline(min(WRITER_WAIT, deadline.remaining))
        last = _Pass(WarmResult(self.warm_id, 0, [], passes=0, source=self.reader.source.table or "none"))
        while True:
            self.reader.await_writers(last.writers, writer_wait)
            done = self._pass(last)
            if done is None:
                # Free the states before the cache is read again: they may take as much memory as the cache.
                last = replace(last, states=None, writers={})
                continue
            last = done
            number = last.result.passes
            if last.verified:
                break
            # The first pass only finds what there is to do. At least one comparison follows a switch.
            if number == MAX_PASSES or (deadline.passed and number > 1):
                raise UnsettledError(number, last.difference)
            if number > 1:
                deadline.pause(number - 1, first=FIRST_PAUSE, longest=LONGEST_PAUSE)
        for path, reason in last.result.odd:
            logger.warning("row %r is not cached: %s", path, reason)
        return replace(last.result, seconds=round(time.monotonic() - started, 3))

    def _pass(self, last: _Pass) -> _Pass | None:
        """
        Compare once and switch what differs. If no entry does, the switch only confirms the cache by its marker.

        Returns None, with nothing written, if the cache is no longer as the last switch left it.
        """
        number = last.result.passes + 1
        self.report(Progress("warm", note=READING))
        # Read the cache before the rows. An entry that is written in between then differs, and is left alone.
        states = last.states or self.cache.states(last.conflicts)
        # Read in between: a writer that set its entry before the first read and commits after the second is open now.
        writers = self.reader.open_writers()
        self.report(Progress("warm", note=COMPARING))
        with ThreadPoolExecutor(1) as beside, self.reader.snapshot() as rows:
            # The states were true before these rows were read. Ask Redis while we compare whether they still are.
            proof = beside.submit(self.cache.is_still, states) if last.states else None
            diff = _without_in_flight(compare(states, rows, full=self.full and number == 1), last)
            if proof and not proof.result():
                return None
            staged, size = self._stage(diff, rows)
            requirements = self._make_requirements(diff, rows, made=last.result.requirements == "made")
        planned = diff.entries
        marker = Marker(self.warm_id, diff.modules + diff.private, list(rows.heads), settled=diff.complete)
        switched = self._switch(len(planned), marker, states.marker)
        # If another warm has switched and no entry differs, our switch did nothing: it set no TTL either.
        ttl_only = len(diff.ttl_only) if switched.no_other_warm or not diff.complete else 0
        result = replace(
            last.result,
            modules=diff.modules,
            heads=marker.heads,
            added=last.result.added + len(diff.added),
            changed=last.result.changed + len(diff.changed),
            removed=last.result.removed + len(diff.removed),
            expiring=last.result.expiring + ttl_only,
            bytes=last.result.bytes + size,
            passes=number,
            odd=diff.rejected,
            requirements=requirements,
        )
        return _Pass(
            result,
            verified=diff.complete and switched.as_planned,
            difference=ANOTHER_WARM if diff.empty else diff.summary(),
            states=_states_after(states, diff, staged, marker) if switched.as_planned else None,
            conflicts=switched.conflicts,
            switched=(planned, staged) if planned else last.switched,
            writers=writers if planned else {},
        )

    def _stage(self, diff: CacheDiff, rows: Snapshot) -> tuple[Entries, int]:
        """As `staging.stage`. Raises ShrinkError, with nothing written, if it would shrink the cache."""
        if diff.shrinks and not self.allow_shrink:
            raise ShrinkError(len(diff.removed), diff.indexed, str(self.settings.database))
        self._warn_of_little_room(diff, rows)
        total = len(diff.added) + len(diff.changed)

        def report(done: int) -> None:
            self.report(Progress("warm", done, total, "modules", STAGING))

        return stage(self.cache, self.warm_id, diff, rows, report, full=self.full)

    def _warn_of_little_room(self, diff: CacheDiff, rows: Snapshot) -> None:
        paths = [*diff.added, *diff.changed]
        if self.room is None or not paths:
            return
        needed = rows.size_of(paths) * ENTRY_GROWTH + ENTRY_BYTES * len(paths)
        if needed > self.room:
            server = redis_server.display_name(self.settings.redis)
            text = "this warm needs about %.1f MB in %s, which has %.1f MB left below maxmemory"
            logger.warning(text, needed / 1e6, server, self.room / 1e6)

    def _make_requirements(self, diff: CacheDiff, rows: Snapshot, *, made: bool) -> str:
        """Make the requirements entry if it is missing; "made" also after an earlier pass, "present" or "none"."""
        if diff.requirements != "missing":
            return "made" if made else diff.requirements
        if not self.cache.add_requirements(rows.requirements()):
            return "present"
        logger.info("made the requirements entry, which was absent")
        return "made"

    def _switch(self, planned: int, marker: Marker, since: bytes) -> SwitchResult:
        seconds = planned * SWITCH_SECONDS
        if seconds > LONG_SWITCH:
            logger.warning("the switch of %d entries will block Redis for about %.1fs", planned, seconds)
        self.report(Progress("warm", note=SWITCHING))
        switched = self.cache.switch(marker, planned, since)
        if conflicts := switched.conflicts:
            named = ", ".join(repr(path.decode(errors="replace")) for path in conflicts[:NAMED_PATHS])
            logger.info("%d entries were written by somebody else and left alone: %s", len(conflicts), named)
        return switched


def _without_in_flight(diff: CacheDiff, last: _Pass) -> CacheDiff:
    """
    The difference. From `SETTLING_PASS` on it is empty if only live writers can have made it: their work never ends.

    A path that the last switch touched, and whose entry is as that switch found or left it, is for us to write again.
    An entry of any other path has been written since, or its row has changed since the last comparison began.
    """
    before, after = last.switched
    ours = any(path in before and found in (before[path], after.get(path, b"")) for path, found in diff.entries.items())
    if ours or last.result.passes + 1 < SETTLING_PASS:
        return diff
    return replace(diff, added={}, changed={}, removed={}, ttl_only={})


def _states_after(states: CacheStates, diff: CacheDiff, staged: Entries, marker: Marker) -> CacheStates:
    """What the cache holds after a switch that went as planned."""
    left = states.fingerprints | staged
    for path in diff.removed:
        del left[path]
    has_requirements = states.has_requirements or diff.requirements == "missing"
    return CacheStates(marker.to_json().encode(), left, has_requirements=has_requirements)
