"""Whether the deployment may start, read from the database and the cache themselves."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from bifrost_bootstrap.deadline import Deadline, RejectionTimer
from bifrost_bootstrap.errors import RefusedError, UnavailableError, WarmError
from bifrost_bootstrap.migrate import schema_state as schemas
from bifrost_bootstrap.migrate.schema_state import SchemaState
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.servers import postgres, redis_server
from bifrost_bootstrap.servers.waiting import PROBE_TIMEOUT
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.warm import diff as cache_diff
from bifrost_bootstrap.warm.cache import Marker, ModuleCache
from bifrost_bootstrap.warm.diff import CacheDiff
from bifrost_bootstrap.warm.source import WRITER_WAIT, await_writers

logger = logging.getLogger(__name__)

#: Seconds from a first comparison that found a difference to the second, and between looks that wait.
RECHECK_DELAY, POLL_INTERVAL = 0.2, 1.0
#: Seconds between two log lines that say the same.
LOG_INTERVAL = 10.0


@dataclass(frozen=True)
class Readiness:
    """
    Schema and cache as they stand.

    diff: None where the schema is not ready (the rows of another schema say nothing), where the marker told enough,
    or where rows and cache cannot be compared: `obstacle` says why then. marker: what the last warm left. modules:
    paths in the index. warmed: the marker confirms the cache.
    """

    schema: SchemaState
    diff: CacheDiff | None = None
    marker: Marker | None = None
    modules: int = 0
    warmed: bool = False
    obstacle: str = ""

    @property
    def ready(self) -> bool:
        """
        Every module has its entry, and nothing else has.

        An entry that is right and off the TTL policy, as the API writes them, keeps nobody from starting.
        """
        return self.schema.ready and (self.warmed or (self.diff is not None and self.diff.complete))

    @property
    def nothing_to_do(self) -> bool:
        """Ready, and a warm would not find an entry to put on the TTL policy either."""
        return self.ready and (self.diff is None or self.diff.empty)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        cache = {"modules": self.modules} | (self.diff.to_dict() if self.diff else {})
        return {"ready": self.ready, "schema_state": self.schema.to_dict(), "module_cache": cache}

    def missing(self) -> str:
        """What is not ready, in one sentence; empty where everything is."""
        if not self.schema.ready:
            pending = len(self.schema.pending)
            stands = f"schema is {self.schema.verdict.replace('_', ' ')}" + (f", {pending} pending" if pending else "")
            unknown = self.schema.verdict == "unknown_revision"
            return f"{stands} ({', '.join(self.schema.database_heads)})" if unknown else stands
        if self.ready:
            return ""
        if self.obstacle:
            return f"module cache cannot be compared: {self.obstacle}"
        return f"module cache differs: {self.diff.summary()}" if self.diff else "module cache was not warmed"

    @property
    def remedy(self) -> str:
        """What the operator does next; empty where everything is ready."""
        if self.ready:
            return ""
        if refusal := self.schema.refusal():
            return refusal.remedy
        if self.obstacle:
            return "fix what it says, then run `bifrost-bootstrap init`"
        return "run `bifrost-bootstrap init`" + (", or `rewarm`" if self.schema.ready else "")


def read_readiness(
    settings: Settings,
    tree: Tree,
    *,
    compare: float,
    since: Marker | None = None,
    marker_suffices: bool = False,
    await_open: bool = False,
) -> Readiness:
    """
    Read where schema and cache stand, changing nothing. A silent server ends it.

    With `marker_suffices`, a warm that settled after the marker `since` was read, from the database as it is now,
    is believed without comparing again: its own last comparison found no difference. compare: otherwise compare, and
    let PostgreSQL be silent for so many seconds; with 0, what no marker tells is not ready. await_open: open
    transactions that have written modules may have set entries already; compare again when they have ended, or after
    `WRITER_WAIT`.

    Raises UnavailableError, RefusedError.
    """
    schema = schemas.read_schema_state(settings.database, tree, settings)
    found = Readiness(schema)
    try:
        with redis_server.connect(settings.redis, answer_timeout=PROBE_TIMEOUT) as client:
            redis_server.require_primary(client, settings.redis)
            cache = ModuleCache(client)
            marker, modules = cache.marker(), cache.size()
            found = Readiness(schema, None, marker, modules)
            if not schema.ready:
                return found
            newer = marker is not None and (since is None or marker.warm_id != since.warm_id)
            if marker_suffices and newer and marker and marker.is_current_for(modules, schema.database_heads):
                return replace(found, warmed=True)
            return replace(found, diff=_difference(settings, client, compare, await_open)) if compare else found
    except WarmError as error:
        # No such table, or what Redis says against being read: the warm will end in it.
        return replace(found, obstacle=str(error.args[0]))


def compare_timeout(deadline: Deadline) -> float:
    """How long PostgreSQL may be silent in a comparison with a deadline; past it briefly, for the last look decides."""
    return min(postgres.WORK_TIMEOUT, max(PROBE_TIMEOUT, deadline.remaining))


def _difference(settings: Settings, client: Any, answer_timeout: float, await_open: bool) -> CacheDiff:
    """What differs for certain, seen twice: a live writer commits a moment before or after it writes its entry."""
    first = cache_diff.compare_now(client, settings, answer_timeout=answer_timeout)
    if await_open and first.open_writers:
        with cache_diff.row_reader(settings, answer_timeout=answer_timeout) as reader:
            limit = Deadline(min(WRITER_WAIT, answer_timeout))
            await_writers(reader.open_writers, first.open_writers, limit)
        first = cache_diff.compare_now(client, settings, answer_timeout=answer_timeout)
    if first.diff.empty:
        return first.diff
    Deadline(RECHECK_DELAY).sleep(RECHECK_DELAY)
    again = cache_diff.compare_now(client, settings, answer_timeout=answer_timeout).diff
    return first.diff.confirmed_by(again)


def wait_until_ready(settings: Settings, tree: Tree, deadline: Deadline) -> Readiness:
    """
    Read again until the deployment is ready or the deadline has passed; return the last readiness.

    Waits for unreachable servers, and for a server that rejects us until `RejectionTimer` expires. Then raises their
    error; a CertificateError at once.
    """
    rejections = RejectionTimer()
    said: Deadline | None = None
    while True:
        try:
            found = read_readiness(settings, tree, compare=postgres.WORK_TIMEOUT)
            if found.ready or deadline.passed:
                return found
            missing, rejections = found.missing(), RejectionTimer()
        except (UnavailableError, RefusedError) as error:
            if rejections.expired_by(error) or deadline.passed:
                raise
            missing = str(error)
        if said is None or said.passed:
            said = Deadline(LOG_INTERVAL)
            logger.info("not ready: %s (%.0fs of %.0fs)", missing, deadline.elapsed, deadline.seconds)
        deadline.sleep(POLL_INTERVAL)
