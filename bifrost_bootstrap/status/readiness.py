"""Whether the deployment may start, read from the database and the cache themselves."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from bifrost_bootstrap.deadline import LOG_INTERVAL, Deadline, Interval, RejectionTimer
from bifrost_bootstrap.errors import RefusedError, UnavailableError, WarmError
from bifrost_bootstrap.migrate import schema_state as schemas
from bifrost_bootstrap.migrate.schema_state import SchemaState
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.servers import postgres, redis_server
from bifrost_bootstrap.servers.waiting import PROBE_TIMEOUT
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.warm import comparison
from bifrost_bootstrap.warm.cache import Marker, ModuleCache
from bifrost_bootstrap.warm.diff import CacheDiff
from bifrost_bootstrap.warm.rows import WRITER_WAIT

logger = logging.getLogger(__name__)

#: Seconds from a first comparison that found a difference to the second. Short, because somebody waits for the answer.
RECHECK_DELAY = 0.2
#: Seconds between two reads of `wait_until_ready`.
POLL_INTERVAL = 1.0


@dataclass(frozen=True)
class Readiness:
    """
    Schema and cache as they are.

    diff: None if the schema is not ready (the rows of another schema prove nothing), if the marker sufficed, or if rows
    and cache cannot be compared; then `obstacle` says why. marker: what the last warm left. modules: paths in the
    index. warmed: the marker confirms the cache.
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
        Whether every module has its entry, and nothing else has.

        Entries with correct content but another TTL (the API sets 24 h) do not block startup.
        """
        return self.schema.ready and (self.warmed or (self.diff is not None and self.diff.complete))

    @property
    def nothing_to_do(self) -> bool:
        """Whether it is ready, and a warm would not set a TTL either."""
        return self.ready and (self.diff is None or self.diff.empty)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        cache = {"modules": self.modules} | (self.diff.to_dict() if self.diff else {})
        return {"ready": self.ready, "schema_state": self.schema.to_dict(), "module_cache": cache}

    def missing(self) -> str:
        """What is not ready, in one sentence; "" if everything is."""
        if not self.schema.ready:
            text = f"schema is {self.schema.verdict.replace('_', ' ')}"
            if self.schema.pending:
                text += f", {len(self.schema.pending)} pending"
            if self.schema.verdict == "unknown_revision":
                text += f" ({', '.join(self.schema.database_heads)})"
            return text
        if self.ready:
            return ""
        if self.obstacle:
            return f"module cache cannot be compared: {self.obstacle}"
        return f"module cache differs: {self.diff.summary()}" if self.diff else "module cache was not warmed"

    @property
    def remedy(self) -> str:
        """What the operator does next; "" if everything is ready."""
        if self.ready:
            return ""
        if refusal := self.schema.refusal():
            return refusal.remedy
        if self.obstacle:
            return "fix what it says, then run `bifrost-bootstrap init`"
        return "run `bifrost-bootstrap init`" + (", or `rewarm`" if self.schema.ready else "")


def read_readiness(
    settings: Settings, tree: Tree, *, compare: float, before: Readiness | None = None, await_open: bool = False
) -> Readiness:
    """
    Read schema and cache, changing nothing.

    before: an earlier readiness. A warm that settled since then, from the database as it is now, is believed by its
    marker: its own last comparison found no difference. compare: otherwise compare, and let PostgreSQL be silent for so
    many seconds; 0 does not compare, and a cache that no marker confirms is not ready. await_open: wait for open
    transactions that have written modules, see `comparison.compare_now`.

    Raises UnavailableError, also for a silent server, and RefusedError.
    """
    found = Readiness(schemas.read_schema_state(settings.database, tree, settings))
    try:
        with redis_server.connect(settings.redis, answer_timeout=PROBE_TIMEOUT) as client:
            redis_server.require_primary(client, settings.redis)
            cache = ModuleCache(client)
            found = replace(found, marker=cache.marker(), modules=cache.size())
            if not found.schema.ready:
                return found
            if before and _is_confirmed(found, before):
                return replace(found, warmed=True)
            return replace(found, diff=_difference(settings, client, compare, await_open)) if compare else found
    except WarmError as error:
        # A table is missing, or Redis refuses to be read: the warm will report the same error.
        return replace(found, obstacle=str(error.args[0]))


def _is_confirmed(found: Readiness, before: Readiness) -> bool:
    """Whether a warm since `before` confirms the cache by its marker."""
    marker = found.marker
    if marker is None or (before.marker and before.marker.warm_id == marker.warm_id):
        return False
    return marker.is_current_for(found.modules, found.schema.database_heads)


def compare_timeout(deadline: Deadline) -> float:
    """
    Seconds that PostgreSQL may be silent in a comparison with this deadline.

    Never below `PROBE_TIMEOUT`: the last read, after the deadline, decides the result.
    """
    return min(postgres.WORK_TIMEOUT, max(PROBE_TIMEOUT, deadline.remaining))


def _difference(settings: Settings, client: Any, answer_timeout: float, await_open: bool) -> CacheDiff:
    """The difference that two comparisons find."""
    writer_wait = min(WRITER_WAIT, answer_timeout) if await_open else 0
    diff = comparison.compare_now(client, settings, answer_timeout=answer_timeout, writer_wait=writer_wait)
    if diff.empty:
        return diff
    return comparison.confirm(diff, client, settings, delay=RECHECK_DELAY, answer_timeout=answer_timeout)


def wait_until_ready(settings: Settings, tree: Tree, deadline: Deadline) -> Readiness:
    """
    Read again until the deployment is ready or the deadline has passed; return the last readiness.

    Waits for unreachable servers, and for a server that rejects us until `RejectionTimer` expires. Then raises their
    error; a CertificateError at once.
    """
    rejections = RejectionTimer()
    log_line = Interval(LOG_INTERVAL)
    while True:
        try:
            found = read_readiness(settings, tree, compare=postgres.WORK_TIMEOUT)
            if found.ready or deadline.passed:
                return found
            missing = found.missing()
            rejections.expired_by(None)
        except (UnavailableError, RefusedError) as error:
            if rejections.expired_by(error) or deadline.passed:
                raise
            missing = str(error)
        if log_line.due():
            logger.info("not ready: %s (%.0fs of %.0fs)", missing, deadline.elapsed, deadline.seconds)
        deadline.sleep(POLL_INTERVAL)
