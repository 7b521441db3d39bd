"""
The cache monitor: after the warm, a standing bootstrap worker checks that the module cache is still complete.

Redis may be restarted, flushed or cleaned up at any time, and nobody else would notice. The monitor only reads. If the
cache differs, it sends the public warm task, as an operator would.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from threading import Thread
from typing import Any

from bifrost_bootstrap.errors import BootstrapError
from bifrost_bootstrap.migrate import lock, schema_state as schemas
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.progress import heartbeat_key
from bifrost_bootstrap.servers import postgres, redis_server
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.warm import comparison
from bifrost_bootstrap.warm.cache import OWN, Marker, ModuleCache
from bifrost_bootstrap.warm.diff import CacheDiff
from bifrost_bootstrap.warm.source import PLATFORM_TTL

logger = logging.getLogger(__name__)

#: Checks in one interval: a loss just after one check is still fixed within the interval.
CHECKS_PER_INTERVAL = 2
#: Every so many checks the entries are compared although counts and marker are right: eviction takes entries and leaves
#: the index. A comparison of 10,000 modules costs a tenth of a second.
FULL_EVERY = 10
#: Seconds from a first comparison that found a difference to the second. A live writer needs milliseconds from its
#: commit to its entry, and nobody waits for the monitor.
RECHECK_DELAY = 2.0
#: Held in Redis by the monitor that checks; all workers on this Redis share it.
MONITOR_LEASE_KEY = OWN + b"guard"
#: In place of a task's id: every worker that has a task sends heartbeats for this one too.
ANY_WORKER_BUSY = "any"


class CacheMonitor:
    """
    The cache monitor of one worker. Its timer calls `start_check`, which returns at once and keeps its loop free.

    rewarm: sends the public task.
    """

    def __init__(self, settings: Settings, tree: Tree, rewarm: Callable[[], None]) -> None:
        self._settings = settings
        self._tree = tree
        self._rewarm = rewarm
        self._thread: Thread | None = None
        self._checks = 0
        #: Marker, index size and heads for which a comparison found no difference.
        self._known: tuple[Marker | None, int, tuple[str, ...]] | None = None
        # Entries with a TTL are renewed in the second half of their life; two comparisons fall into that half.
        ttl = PLATFORM_TTL if settings.module_cache_ttl is None else settings.module_cache_ttl
        renewal = ttl / 4 or math.inf
        #: Seconds from one check to the next.
        self.interval = min(settings.cache_guard_interval, renewal) / CHECKS_PER_INTERVAL
        self._full_every = int(min(FULL_EVERY, renewal / self.interval)) if self.interval else FULL_EVERY
        # A little shorter than the interval, or the next check would find the lease of the last.
        self._lease_ms = max(1, round(900 * self.interval))

    def start_check(self) -> None:
        """Check in a thread, unless the last check is still running."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self.check, name="guard", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Check once, and send the task if the cache differs. Never raises."""
        try:
            diff = self._difference()
            if diff is None or diff.empty:
                return
            if diff.shrinks:
                logger.warning(
                    "guard: a warm would remove %d of %d entries; left as it is: check BIFROST_DATABASE_URL and "
                    "BIFROST_REDIS_URL, or call the warm with allow_shrink",
                    len(diff.removed),
                    diff.indexed,
                )
                return
            logger.warning("guard: the module cache differs (%s); warming it again", diff.summary())
            self._rewarm()
        except BootstrapError as error:
            # The next check asks that server again.
            logger.info("guard: %s", error)
        except Exception:
            logger.exception("guard: unexpected error")

    def _difference(self) -> CacheDiff | None:
        """The difference that two comparisons find; None if it is not due, another monitor checks, or others work."""
        settings = self._settings
        state = schemas.read_schema_state(settings.database, self._tree, settings)
        # Before the lease, which is not for a monitor that cannot use it: such a schema is left to its init.
        if not state.ready:
            return None
        with redis_server.connect(settings.redis) as client:
            if not client.set(MONITOR_LEASE_KEY, b"1", nx=True, px=self._lease_ms):
                return None
            cache = ModuleCache(client)
            marker = cache.marker()
            size = cache.size()
            self._checks += 1
            confirmed = marker is not None and marker.is_current_for(size, state.database_heads)
            seen = (marker, size, state.database_heads)
            if (confirmed or seen == self._known) and self._checks % self._full_every:
                return None
            diff = comparison.compare_now(client, settings, answer_timeout=postgres.WORK_TIMEOUT)
            # Live writers change the size. After a comparison it proves as much as the marker's.
            self._known = seen if diff.empty else None
            if not diff.empty:
                diff = self._confirm(diff, client)
            # Asked last, so that work that began meanwhile counts.
            return None if diff.empty or self._is_anybody_busy(client) else diff

    def _confirm(self, diff: CacheDiff, client: Any) -> CacheDiff:
        # Without a longer lease, a second monitor would begin meanwhile, and both would send the task.
        client.set(MONITOR_LEASE_KEY, b"1", px=self._lease_ms + round(1000 * (RECHECK_DELAY + postgres.WORK_TIMEOUT)))
        confirmed = comparison.confirm(
            diff, client, self._settings, delay=RECHECK_DELAY, answer_timeout=postgres.WORK_TIMEOUT
        )
        client.set(MONITOR_LEASE_KEY, b"1", px=self._lease_ms)
        return confirmed

    def _is_anybody_busy(self, client: Any) -> bool:
        """Whether a worker has a task, or a migration holds the lock."""
        if client.exists(heartbeat_key(ANY_WORKER_BUSY)):
            return True
        url = self._settings.migration_database
        with postgres.connect(url, "guard", answer_timeout=postgres.ANSWER_TIMEOUT) as connection:
            return bool(lock.read_holder(connection))
