"""W9: after a warm, the guard of a standing worker notices what Redis has lost and publishes a warm.

It publishes nothing if nothing is lost.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import redis
from kombu.asynchronous.timer import Timer

from bifrost_bootstrap.celery import WARM
from bifrost_bootstrap.errors import UnavailableError
from bifrost_bootstrap.migrate import lock, tree_loading
from bifrost_bootstrap.progress import heartbeat_key
from bifrost_bootstrap.warm import comparison
from bifrost_bootstrap.warm.cache import MARKER
from bifrost_bootstrap.warm.diff import CacheDiff
from bifrost_bootstrap.worker import cache_monitor as guards
from bifrost_bootstrap.worker.cache_monitor import FULL_EVERY, MONITOR_LEASE_KEY, CacheMonitor
from tests.conftest import RunBootstrap, RunCommand, StartWorker
from tests.servers.process import wait_until
from tests.setups.module_store import ENTRY, INDEX, MakeStore, ModuleStore

PLAIN_TREE = Path(__file__).parents[1] / "trees" / "plain" / "alembic.ini"
MODULES = {f"m{n}.py": f"x = {n}" for n in range(10)}
#: How long a real worker may take to repair the cache (seconds); it checks once per second.
TIMEOUT = 60.0


class Watch:
    """A guard that is looked through by hand: every look has its turn, and what it would send is counted."""

    def __init__(self, store: ModuleStore) -> None:
        self.store = store
        self.sent = 0
        self.guard = CacheMonitor(store.settings, tree_loading.load(store.settings), self._send)

    def _send(self) -> None:
        self.sent += 1

    def look(self, times: int = 1) -> int:
        """Look so often, each time in a turn of its own; how often the task was sent."""
        before = self.sent
        for _ in range(times):
            self.store.client.delete(MONITOR_LEASE_KEY)
            self.guard.check()
        return self.sent - before


@pytest.fixture
def watch(store: ModuleStore, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """The guard of a warm cache with ten modules."""
    monkeypatch.setattr(guards, "RECHECK_DELAY", 0.01)
    store.put(MODULES)
    store.warm()
    return Watch(store)


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list with one item for each comparison of rows and cache."""
    seen: list[str] = []
    compare_now = comparison.compare_now

    def counted(*arguments: Any, **options: Any) -> CacheDiff:
        seen.append("compared")
        return compare_now(*arguments, **options)

    monkeypatch.setattr(comparison, "compare_now", counted)
    return seen


def test_w09_unchanged_cache_is_not_warmed(watch: Watch, comparisons: list[str]) -> None:
    """An unchanged cache is not warmed, and is compared only sometimes."""
    assert watch.look(2 * FULL_EVERY) == 0
    assert len(comparisons) == 2


@pytest.mark.parametrize("loss", [lambda client: client.flushdb(), lambda client: client.delete(INDEX)])
def test_w09_loss_of_all_is_seen_at_once(watch: Watch, loss: Callable[[redis.Redis], object]) -> None:
    """If Redis was flushed or the index deleted, the next check publishes the task."""
    loss(watch.store.client)
    assert watch.look() == 1


def test_w09_partial_loss_is_seen_in_time(watch: Watch) -> None:
    """No count shows a lost entry whose path is still in the index. The full comparison finds it."""
    watch.store.client.delete(ENTRY + b"m3.py")
    assert watch.look(FULL_EVERY) == 1


def test_w09_live_writers_are_no_loss(watch: Watch, comparisons: list[str]) -> None:
    """A new module of a writer changes the count. It is compared once, and accepted."""
    watch.store.api_write("new.py", "y")
    watch.store.client.persist(ENTRY + b"new.py")
    assert watch.look(4) == 0
    assert len(comparisons) == 1


def test_w09_failed_comparison_is_repeated(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a server is down during the comparison after a loss, the next check compares again and publishes the task."""
    watch.store.client.flushdb()
    with monkeypatch.context() as patched:
        patched.setattr(
            comparison, "compare_now", lambda *_, **__: (_ for _ in ()).throw(UnavailableError("PostgreSQL", "gone"))
        )
        assert watch.look() == 0
    assert watch.look() == 1


def test_w09_entries_that_live_for_a_time_are_compared_in_it(make_store: MakeStore, redis_url: str) -> None:
    """With a TTL, entries are compared often enough to renew them, however long the interval is."""
    store = make_store(redis_url, module_cache_ttl=120, cache_guard_interval=60)
    store.put(MODULES)
    store.warm()
    for path in MODULES:
        store.client.expire(ENTRY + path.encode(), 50)
    watch = Watch(store)
    assert watch.guard.interval == 15
    assert watch.look(2) == 1


@pytest.mark.parametrize(
    ("guard_interval", "ttl", "interval"),
    [(60, 0, 30), (60, 24 * 3600, 30), (60, 40, 5), (3600, 3600, 450), (0, 40, 0)],
)
def test_w09_two_checks_per_interval_and_eight_per_ttl(
    make_store: MakeStore, redis_url: str, guard_interval: int, ttl: int, interval: int
) -> None:
    """A loss is fixed within the interval even if a check has just missed it. A short TTL is checked before
    its half.
    """
    guard = Watch(make_store(redis_url, cache_guard_interval=guard_interval, module_cache_ttl=ttl)).guard
    assert guard.interval == interval


def test_w09_writer_between_commit_and_entry(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference that the second check does not find was a writer between commit and entry."""
    store = watch.store
    store.put({"new.py": "y"})
    store.client.srem(INDEX, "m1.py")  # the count differs, so that it is compared
    store.put({"m1.py": MODULES["m1.py"]})
    compare_now = comparison.compare_now
    looks: list[CacheDiff] = []

    def then_write(*arguments: Any, **options: Any) -> CacheDiff:
        found = compare_now(*arguments, **options)
        looks.append(found)
        store.api_set("new.py", "y")
        store.client.persist(ENTRY + b"new.py")
        store.client.sadd(INDEX, "m1.py")
        return found

    monkeypatch.setattr(comparison, "compare_now", then_write)
    assert watch.look() == 0
    assert len(looks) == 2
    assert not looks[0].empty


def test_w09_silent_while_somebody_works(watch: Watch) -> None:
    """While a worker has a task, or a migration has its lock, no task is published. Afterwards it is."""
    store = watch.store
    store.client.flushdb()
    store.client.set(heartbeat_key(guards.ANY_WORKER_BUSY), "1")
    assert watch.look() == 0
    store.client.delete(heartbeat_key(guards.ANY_WORKER_BUSY))
    with psycopg.connect(store.database.url) as runner:
        runner.execute("SELECT pg_advisory_xact_lock(%s, %s)", (lock.LOCK_CLASS, lock.MIGRATION))
        assert watch.look() == 0
    assert watch.look() == 1


def test_w09_silent_before_the_schema_is_ready(watch: Watch) -> None:
    """If the schema is behind, no task is published: that is the job of the init container."""
    watch.store.client.flushdb()
    watch.store.database.execute("UPDATE alembic_version SET version_num = '0001'")
    assert watch.look() == 0


def test_w09_one_guard_at_a_time(watch: Watch) -> None:
    """Of two guards on one Redis, only one checks. If it dies, the other one takes over."""
    client = watch.store.client
    client.flushdb()
    other = Watch(watch.store)
    watch.guard.check()
    other.guard.check()
    assert (watch.sent, other.sent) == (1, 0)
    assert 0 < client.pttl(MONITOR_LEASE_KEY) <= 1000 * watch.guard.interval


def test_w09_turn_is_left_to_who_can_use_it(watch: Watch, make_store: MakeStore) -> None:
    """A guard of another tree, or without PostgreSQL, leaves the lease to the guard that can publish the task."""
    store = watch.store
    away = "postgresql://nobody@127.0.0.1:1/none"
    others = [
        Watch(make_store(store.settings.redis, store.database, **settings))
        for settings in ({"alembic_config": str(PLAIN_TREE)}, {"database_url": away})
    ]
    store.client.flushdb()
    for other in others:
        other.guard.check()
    watch.guard.check()
    assert [one.sent for one in (*others, watch)] == [0, 0, 1]


def test_w09_never_past_the_brake(
    store: ModuleStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If most of the cache would be removed, no task is published, and the log has the counts."""
    monkeypatch.setattr(guards, "RECHECK_DELAY", 0.01)
    store.put({f"{n}.py": "" for n in range(30)})
    store.warm()
    store.database.execute("DELETE FROM workspace_files")
    watch = Watch(store)
    store.client.delete("bifrost:bootstrap:marker")
    assert watch.look() == 0
    assert "guard: a warm would remove 30 of 30 entries; left as it is: check BIFROST_DATABASE_URL" in caplog.text


@pytest.mark.parametrize("said", [{"settled": False}, {"heads": ["0001"]}, {"modules": 9}])
def test_w09_marker_that_does_not_vouch(watch: Watch, said: dict[str, object]) -> None:
    """If the last warm did not settle, or had another schema or count, its cache is compared at once."""
    client = watch.store.client
    marker = json.loads(str(client.get(MARKER).decode()))  # type: ignore[union-attr]
    client.set(MARKER, json.dumps(marker | said))
    client.delete(ENTRY + b"m3.py")
    assert watch.look() == 1


def test_w09_checks_do_not_overlap(watch: Watch) -> None:
    """A check that takes longer than the interval does not overlap with the next."""
    store = watch.store
    store.client.flushdb()
    sending, go_on = Event(), Event()
    sent: list[str] = []

    def send() -> None:
        sent.append("sent")
        sending.set()
        go_on.wait(TIMEOUT)

    guard = CacheMonitor(store.settings, tree_loading.load(store.settings), send)
    guard.start_check()
    assert sending.wait(TIMEOUT)
    store.client.delete(MONITOR_LEASE_KEY)
    guard.start_check()
    looking = [thread for thread in threading.enumerate() if thread.name == "guard"]
    go_on.set()
    for thread in looking:
        thread.join(TIMEOUT)
    assert len(looking) == 1
    assert sent == ["sent"]


def test_w09_bug_ends_one_check_only(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception is logged, and the worker continues."""

    def send() -> None:
        raise RuntimeError("a bug")

    watch.store.client.flushdb()
    guard = CacheMonitor(watch.store.settings, tree_loading.load(watch.store.settings), send)
    guard.check()
    assert "guard: unexpected error" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value", "enabled"),
    [("BIFROST_CACHE_GUARD_INTERVAL", "60s", True), ("BIFROST_CACHE_GUARD_INTERVAL", "0", False),
     ("BIFROST_RUN_QUEUE", "bifrost.bootstrap.one.run", False)],
)  # fmt: skip
def test_w09_whose_worker_has_a_guard(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, enabled: bool
) -> None:
    """A standing worker has a guard unless the interval is 0. The worker of `init --with-worker` has none."""
    from bifrost_bootstrap.worker.program import CacheMonitorStep

    set_urls(monkeypatch)
    monkeypatch.setenv(variable, value)
    assert CacheMonitorStep(None).include_if(None) is enabled


def set_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that a worker's parts can be made in, without a server."""
    for name, url in (("DATABASE", "postgresql://u@h/d"), ("REDIS", "redis://h/0"), ("RABBITMQ", "amqp://h//")):
        monkeypatch.setenv(f"BIFROST_{name}_URL", url)
    monkeypatch.setenv("BIFROST_ALEMBIC_CONFIG", "builtin")


def test_w09_worker_looks_at_the_guards_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer of the worker calls the guard at the guard's interval while the worker lives."""
    from bifrost_bootstrap.worker.program import CacheMonitorStep

    set_urls(monkeypatch)
    monkeypatch.setenv("BIFROST_CACHE_GUARD_INTERVAL", "600s")
    looked: list[float] = []
    monkeypatch.setattr(CacheMonitor, "start_check", lambda guard: looked.append(guard.interval))
    timer, step, now = Timer(), CacheMonitorStep(None), time.monotonic()
    step.start(SimpleNamespace(timer=timer))
    ((eta, _, entry),) = timer.queue
    assert 300 <= eta - now < 300 + TIMEOUT
    entry()
    assert looked == [300]
    step.stop(None)
    assert entry.canceled


def test_w09_servers_that_are_away(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    """An unreachable server ends one check, not the guard."""
    settings = watch.store.settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    guard = CacheMonitor(settings, tree_loading.load(settings), lambda: pytest.fail("sent without having looked"))
    caplog.set_level("INFO")
    guard.check()
    assert "guard: Redis 127.0.0.1:1/0" in caplog.text
    assert watch.look() == 0


def test_w09_standing_worker_repairs_a_flush(
    store: ModuleStore,
    bifrost_env: Mapping[str, str],
    start_worker: StartWorker,
    run_bootstrap: RunBootstrap,
    run_command: RunCommand,
) -> None:
    """A real worker with an interval of 1 s: after a flush the cache is complete again, and `check` reported
    the loss.
    """
    environment = {
        **bifrost_env,
        "BIFROST_DATABASE_URL": store.database.url,
        "BIFROST_REDIS_URL": store.settings.redis,
        "BIFROST_CACHE_GUARD_INTERVAL": "1s",
    }
    store.put(MODULES)
    store.warm()
    client = store.client
    assert run_bootstrap("check", env=environment).returncode == 0
    client.delete(ENTRY + b"m3.py")
    partial = run_bootstrap("check", env=environment)
    assert (partial.returncode, "1 changed" in partial.stdout) == (3, True)
    client.flushdb()
    assert run_bootstrap("check", env=environment).returncode == 3
    worker = start_worker(env=environment)
    with psycopg.connect(store.database.url) as writer:
        # Nobody gets on, neither the guard nor the task of an operator, which the worker tells every guard of.
        writer.execute("LOCK TABLE workspace_files")
        call = [sys.executable, "-m", "celery", "-A", "bifrost_bootstrap", "call", WARM]
        assert run_command(call, env=environment).returncode == 0
        wait_until(
            lambda: bool(client.exists(heartbeat_key(guards.ANY_WORKER_BUSY))),
            "the worker to say that it works",
            TIMEOUT,
        )
        client.flushdb()
    for _ in range(2):
        wait_until(lambda: client.scard(INDEX) == len(MODULES), "the cache to be complete", TIMEOUT)
        wait_until(lambda: not client.exists(heartbeat_key(guards.ANY_WORKER_BUSY)), "the task to be let go", TIMEOUT)
        store.assert_exact()
        client.flushdb()
    wait_until(lambda: client.scard(INDEX) == len(MODULES), "the cache to be complete", TIMEOUT)
    assert "guard: the module cache differs (10 added)" in worker.stderr.read_text()
