"""W5: memory does not grow with the number of modules, and Redis is blocked only for changed entries."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bifrost_bootstrap
from bifrost_bootstrap.progress import Progress
from bifrost_bootstrap.warm import step as warm_step
from bifrost_bootstrap.warm.cache import CacheStates
from bifrost_bootstrap.warm.diff import CacheDiff
from bifrost_bootstrap.warm.step import READING
from tests.servers import RedisServer, RunFolder
from tests.setups.module_store import MakeStore, ModuleStore

ROOT = Path(bifrost_bootstrap.__file__).parent.parent
StartRedis = Callable[[RedisServer], RedisServer]
#: One warm that prints its peak resident memory in megabytes (Linux counts in kilobytes, macOS in bytes).
WARM_ONCE = """
import resource, sys
from bifrost_bootstrap import settings
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.warm.step import warm
warm(settings.load(needs=("database", "redis")), Deadline(300), lambda progress: None, full="full" in sys.argv)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))
"""

EXPIRE_ALL = (
    "for _, path in ipairs(redis.call('SMEMBERS', KEYS[2])) do redis.call('EXPIRE', KEYS[1] .. path, 86400) end"
)


def fill(store: ModuleStore, count: int) -> None:
    """Replace the modules by `count` of about 300 bytes with paths of about 60."""
    store.database.execute("DELETE FROM workspace_files")
    store.database.execute(
        """INSERT INTO workspace_files (path, content, content_hash, entity_type)
           SELECT path, content, encode(sha256(convert_to(content, 'UTF8')), 'hex'), 'module'
             FROM (SELECT 'features/some_feature/workflows/module_number_' || n || '.py' AS path,
                          repeat('value = ' || n || E'\\n', 20) AS content FROM generate_series(1, %s) n) modules""",
        [count],
    )


def peak(store: ModuleStore, *arguments: str) -> float:
    """Megabytes that the process of one warm needs at most."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "BIFROST_DATABASE_URL": store.database.url,
        "BIFROST_REDIS_URL": store.settings.redis,
    }
    program = [sys.executable, "-c", WARM_ONCE, *arguments]
    return float(subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow  # 30 s of CPU
def test_w05_memory_of_100000_modules(store: ModuleStore) -> None:
    """A first fill and a full warm of 100,000 modules use at most 64 MB more than those of 1,000."""
    fill(store, 1000)
    first, full = peak(store), peak(store, "full")
    fill(store, 100_000)
    store.client.flushdb()
    assert peak(store) - first <= 64
    assert peak(store, "full") - full <= 64
    # As the platform's own API leaves them: every one is to be made persistent.
    store.client.eval(EXPIRE_ALL, 2, "bifrost:module:", "bifrost:module:index")
    assert peak(store) - first <= 64
    assert store.client.ttl("bifrost:module:features/some_feature/workflows/module_number_1.py") == -1
    assert store.client.scard("bifrost:module:index") == 100_000


def test_w05_one_image_of_the_cache_at_a_time(store: ModuleStore) -> None:
    """If the proof of a pass fails, its data are freed before the next pass reads the cache."""
    store.put({"a.py": "x"})

    def alive() -> list[object]:
        # Not isinstance, which asks Celery's proxies what they stand for.
        return [one for one in gc.get_objects() if type(one) in (CacheStates, CacheDiff)]

    before = alive()
    images: list[list[str]] = []

    def count(progress: Progress) -> None:
        if progress.note == READING:
            images.append([type(one).__name__ for one in alive() if all(one is not old for old in before)])
            if len(images) == 2:
                store.api_write("a.py", "y")

    store.warm(count)
    # The second reading is the proof of what the first switch has left, and fails.
    assert images[:3] == [[], ["CacheStates"], []]
    store.assert_exact()


def calls(store: ModuleStore) -> dict[str, int]:
    """How often each command ran since the counters were reset."""
    stats: dict[str, Any] = store.client.info("commandstats")
    return {name.removeprefix("cmdstat_"): int(facts["calls"]) for name, facts in stats.items()}


def test_w05_only_changed_entries_are_switched(
    make_store: MakeStore, run_folder: RunFolder, start_server: StartRedis
) -> None:
    """If 5 of 1,000 modules changed, the switch touches 5 entries."""
    store = make_store(start_server(RedisServer(run_folder)).url())
    fill(store, 1000)
    store.warm()
    store.put({f"features/some_feature/workflows/module_number_{n}.py": "changed" for n in range(1, 6)})
    store.client.config_resetstat()
    assert store.warm().changed == 5
    seen = calls(store)
    # One more of each proves beforehand that this user may.
    assert (seen["rename"], seen["persist"]) == (6, 6)


def test_w05_switch_time_in_redis(make_store: MakeStore, run_folder: RunFolder, start_server: StartRedis) -> None:
    """In the slow log of Redis, the switch of 10,000 entries takes at most five times as long as its commands alone."""
    store = make_store(start_server(RedisServer(run_folder, {"slowlog-log-slower-than": "1000"})).url())
    client = store.client
    fill(store, 10_000)
    store.warm()
    # The one proves beforehand that this user may.
    assert calls(store)["rename"] == 1, "a first fill is written where it belongs, before its switch"
    client.config_resetstat()
    store.warm()
    assert calls(store)["eval"] > 10, "the fingerprints are read in slices, each too short to be felt, then the switch"

    def longest(work: Callable[[], object]) -> int:
        """Microseconds of the longest script."""
        client.slowlog_reset()
        work()
        return max(int(entry["duration"]) for entry in client.slowlog_get(100))

    # A tail, a check, a rename, a TTL and the index for each: five commands an entry.
    commands = "for i = 1, 50000 do redis.call('GETRANGE', KEYS[1], -66, -1) end"
    # Alternate, and use the shortest run of each: that with the least disturbance.
    runs = [
        (
            longest(lambda: client.eval(commands, 1, "bifrost:bootstrap:marker")),
            longest(lambda: store.warm(full=True)),
        )
        for _ in range(6)
    ]
    alone, switch = (min(times) for times in zip(*runs, strict=True))
    assert switch <= 5 * alone


def test_w05_warning_before_a_long_switch(
    store: ModuleStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before a switch that blocks Redis for more than a second, a warning has its size."""
    assert 50_000 * warm_step.SWITCH_SECONDS < warm_step.LONG_SWITCH < 100_000 * warm_step.SWITCH_SECONDS, (
        "measured: 0.7 s and 1.4 s"
    )
    monkeypatch.setattr(warm_step, "LONG_SWITCH", 9 * warm_step.SWITCH_SECONDS)
    store.put({f"{n}.py": "" for n in range(9)})
    with caplog.at_level(logging.WARNING):
        store.warm()
        assert "block Redis" not in caplog.text
        store.put({f"{n}.py": "x" for n in range(10)})
        store.warm()
    assert "the switch of 10 entries will block Redis" in caplog.text
    assert json.loads(str(store.client.get("bifrost:bootstrap:marker").decode()))["modules"] == 10  # type: ignore[union-attr]
