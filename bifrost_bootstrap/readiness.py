"""Whether the deployment may start, read from the database and the cache themselves."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from bifrost_bootstrap import cache_diff, redis_server, schema as schemas
from bifrost_bootstrap.cache_diff import CacheDiff
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import UnavailableError
from bifrost_bootstrap.module_cache import Marker, ModuleCache
from bifrost_bootstrap.schema import SchemaState
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.tree import Tree

logger = logging.getLogger(__name__)

#: Seconds from a first look that found a difference to the second, and between looks that wait.
SECOND_LOOK, LOOK_PAUSE = 0.2, 1.0
#: Seconds between two log lines that say the same.
SAY_AGAIN = 10.0


@dataclass(frozen=True)
class Readiness:
    """
    Schema and cache as they stand.

    diff: None where the schema is not ready (the rows of another schema say nothing) or where the marker told
    enough. marker: what the last warm left. modules: paths in the index.
    """

    schema: SchemaState
    diff: CacheDiff | None = None
    marker: Marker | None = None
    modules: int = 0
    warmed: bool = False

    @property
    def ready(self) -> bool:
        return self.schema.ready and (self.warmed or (self.diff is not None and self.diff.empty))

    def confirmed_by(self, later: Readiness) -> Readiness:
        """The later look, without differences that only one of the two saw."""
        if self.diff is None or later.diff is None:
            return later
        return replace(later, diff=later.diff.only(self.diff.same_as(later.diff)))

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        cache = {"modules": self.modules} | (self.diff.to_dict() if self.diff else {})
        return {"ready": self.ready, "schema_state": self.schema.to_dict(), "module_cache": cache}

    def missing(self) -> str:
        """What is not ready, in one sentence; empty where everything is."""
        if not self.schema.ready:
            pending = len(self.schema.pending)
            return f"schema is {self.schema.verdict.replace('_', ' ')}" + (f", {pending} pending" if pending else "")
        if self.ready:
            return ""
        return f"module cache differs: {self.diff.summary()}" if self.diff else "module cache was not warmed"


def look(
    settings: Settings,
    tree: Tree,
    *,
    since: Marker | None = None,
    marker_suffices: bool = False,
    compare: bool = True,
) -> Readiness:
    """
    Read where schema and cache stand, changing nothing.

    With `marker_suffices`, a warm that settled after the marker `since` was read, from the database as it is now,
    is believed without comparing again: its own last comparison found no difference. compare: otherwise compare;
    without, what no marker tells is not ready.

    Raises UnavailableError, RefusedError, WarmError (no such table).
    """
    schema = schemas.look(settings.database, tree, settings)
    with redis_server.connect(settings.redis) as client:
        cache = ModuleCache(client, settings.module_cache_ttl)
        marker, modules = cache.marker(), cache.size()
        if not schema.ready:
            return Readiness(schema, None, marker, modules)
        newer = marker is not None and (since is None or marker.warm_id != since.warm_id)
        if marker_suffices and newer and marker and marker.tells(modules, schema.database_heads):
            return Readiness(schema, None, marker, modules, warmed=True)
        if not compare:
            return Readiness(schema, None, marker, modules)
        diff = cache_diff.look(cache, settings.database, settings.alembic_version_table)
        return Readiness(schema, diff, marker, modules)


def wait_until_ready(settings: Settings, tree: Tree, deadline: Deadline) -> Readiness:
    """
    Look, and where it is not ready look again until the deadline; the last look is returned.

    A difference counts when it was seen twice: a live writer commits a moment before he writes his entry.
    Servers that are away are waited for. Raises their error at the deadline.
    """
    said: Deadline | None = None
    while True:
        try:
            found = look(settings, tree)
            if found.diff and not found.diff.empty and found.schema.ready:
                Deadline(SECOND_LOOK).sleep(SECOND_LOOK)
                found = found.confirmed_by(look(settings, tree))
            missing = found.missing()
        except UnavailableError as error:
            if deadline.passed:
                raise
            missing = str(error)
        else:
            if found.ready or deadline.passed:
                return found
        if said is None or said.passed:
            said = Deadline(SAY_AGAIN)
            logger.info("not ready: %s (%.0fs of %.0fs)", missing, deadline.elapsed, deadline.seconds)
        deadline.sleep(LOOK_PAUSE)
