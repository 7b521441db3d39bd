"""
The guard: after the warm, a standing bootstrap worker looks whether the module cache is still what it was.

Redis may be restarted, flushed or cleaned up at any time, and nobody else would notice. The guard only looks; what
it finds is fixed by the public task, as if an operator had called it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from threading import Thread
from typing import Any

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import BootstrapError
from bifrost_bootstrap.migrate import lock, schema_state as schemas
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.progress import heartbeat_key
from bifrost_bootstrap.servers import postgres, redis_server
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.warm import cache as module_cache, diff as cache_diff
from bifrost_bootstrap.warm.cache import Marker, ModuleCache
from bifrost_bootstrap.warm.diff import CacheDiff
from bifrost_bootstrap.warm.source import PLATFORM_TTL

logger = logging.getLogger(__name__)

#: Looks in one interval: a loss that a look has just missed is still fixed within the interval.
LOOKS = 2
#: Every so many looks the entries themselves are compared although counts and marker are right: eviction takes
#: entries and leaves the index, and a comparison costs a tenth of a second for 10,000 modules.
FULL_EVERY = 10
#: Seconds between the two looks that must find the same difference; a live writer needs milliseconds from its
#: commit to its entry.
RECHECK_DELAY = 2.0
#: The guard whose turn it is; any worker on this Redis.
MONITOR_LEASE_KEY = module_cache.OWN + b"guard"
#: In place of a task's id: every worker that has a task sends heartbeats for this one too.
ANY_WORKER_BUSY = "any"


#: Marker, index size and heads, as a cheap look sees them.
Seen = tuple[Marker | None, int, tuple[str, ...]]


class CacheMonitor:
    """
    One worker's guard. The worker's timer calls `start_look`, which returns at once: looking would block its loop.

    rewarm: sends the public task.
    """

    def __init__(self, settings: Settings, tree: Tree, rewarm: Callable[[], None]) -> None:
        self._settings, self._tree, self._rewarm = settings, tree, rewarm
        self._thread: Thread | None = None
        self._looks = 0
        #: Marker, index size and heads that a comparison has found to be right.
        self._known: Seen | None = None
        # Entries that live for a time are renewed in the second half of it, in which there are two comparisons.
        ttl = PLATFORM_TTL if settings.module_cache_ttl is None else settings.module_cache_ttl
        renewal = ttl / 4 or math.inf
        #: Seconds from one look to the next.
        self.interval = min(settings.cache_guard_interval, renewal) / LOOKS
        self._full_every = int(min(FULL_EVERY, renewal / self.interval)) if self.interval else FULL_EVERY

    def start_look(self) -> None:
        """Look in a thread, unless the last look is still going on."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self.look, name="guard", daemon=True)
            self._thread.start()

    def look(self) -> None:
        """Look once, and send the task where the cache differs. Never raises."""
        try:
            if (diff := self._difference()) is not None:
                logger.warning("guard: the module cache differs (%s); warming it again", diff.summary())
                self._rewarm()
        except BootstrapError as error:
            # The next look asks that server again.
            logger.info("guard: %s", error)
        except Exception:
            logger.exception("guard: unexpected error")

    def _difference(self) -> CacheDiff | None:
        """What differs for certain and may be fixed, or None."""
        settings = self._settings
        # A schema that is not ours to serve is left to its init. Before the turn: it is not for who cannot use it.
        state = schemas.read_schema_state(settings.database, self._tree, settings)
        if not state.ready:
            return None
        with redis_server.connect(settings.redis) as client:
            # A little shorter than the pause, or the next look would find the turn of the last.
            turn = max(1, round(900 * self.interval))
            if not client.set(MONITOR_LEASE_KEY, b"1", nx=True, px=turn):
                return None
            cache = ModuleCache(client)
            found = self._suspicious(cache, state.database_heads)
            if found is None:
                return None
            first = self._compared(client)
            if first.empty:
                # Live writers change the count; once compared it is as good as the marker's.
                self._known = found
                return None
            self._known = None
            # It may take longer than a short turn, and two guards would send two tasks.
            client.set(MONITOR_LEASE_KEY, b"1", px=turn + round(1000 * (RECHECK_DELAY + postgres.WORK_TIMEOUT)))
            Deadline(RECHECK_DELAY).sleep(RECHECK_DELAY)
            again = self._compared(client)
            client.set(MONITOR_LEASE_KEY, b"1", px=turn)
            diff = first.confirmed_by(again)
            # Asked last: what began meanwhile counts too, and a look that finds nothing need not ask.
            if diff.empty or self._busy(client.exists(heartbeat_key(ANY_WORKER_BUSY))):
                return None
        if diff.shrinks:
            logger.warning(
                "guard: a warm would remove %d of %d entries; left as it is: check BIFROST_DATABASE_URL and "
                "BIFROST_REDIS_URL, or call the warm with allow_shrink", len(diff.removed), diff.indexed,
            )  # fmt: skip
            return None
        return diff

    def _busy(self, held: object) -> bool:
        if held:
            return True
        with postgres.connect(
            self._settings.migration_database, "guard", answer_timeout=postgres.ANSWER_TIMEOUT
        ) as connection:
            return lock.holder(connection) is not None

    def _suspicious(self, cache: ModuleCache, heads: tuple[str, ...]) -> Seen | None:
        """What the cheap look saw, if it is to be compared."""
        marker, size = cache.marker(), cache.size()
        found = (marker, size, heads)
        self._looks += 1
        warmed = marker is not None and marker.is_current_for(size, heads)
        return None if (warmed or found == self._known) and self._looks % self._full_every else found

    def _compared(self, client: Any) -> CacheDiff:
        return cache_diff.compare_now(client, self._settings, answer_timeout=postgres.WORK_TIMEOUT).diff
