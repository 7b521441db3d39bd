"""W3: wherever a warm fails, the previous cache is unchanged, nothing stays behind, and the next warm completes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import redis as redis_package

import bifrost_bootstrap
from bifrost_bootstrap.errors import BootstrapError, RefusedError, UnavailableError, WarmError
from bifrost_bootstrap.progress import Progress
from bifrost_bootstrap.servers import redis_server
from bifrost_bootstrap.warm import cache as module_cache, staging
from bifrost_bootstrap.warm.step import COMPARING, READING, STAGING, SWITCHING
from tests.servers import Proxy, RedisServer, RunFolder
from tests.servers.process import free_port, wait_until
from tests.setups.module_store import ENTRY, INDEX, MakeStore, ModuleStore, at

ROOT = Path(bifrost_bootstrap.__file__).parent.parent
StartRedis = Callable[[RedisServer], RedisServer]

BEFORE = {f"m{n}.py": f"x = {n}" for n in range(10)}
AFTER = {f"m{n}.py": f"x = {n}  # changed" for n in range(5)} | {f"new{n}.py": f"y = {n}" for n in range(5)}


def change(store: ModuleStore) -> dict[bytes, bytes | None]:
    """Warm the previous cache, then change, add and remove rows. Returns the previous cache."""
    store.put(BEFORE)
    store.warm()
    store.put(AFTER)
    store.remove("m8.py", "m9.py")
    return store.module_keys()


def assert_untouched(store: ModuleStore, before: dict[bytes, bytes | None]) -> None:
    """The previous cache is there to the byte; what else there is expires by itself."""
    after = store.module_keys()
    assert {key: after[key] for key in before} == before
    left = [*(after.keys() - before.keys()), *store.own_keys()]
    assert all(0 < store.client.pttl(key) <= 1000 * staging.FILL_TTL for key in left)


def assert_completes(store: ModuleStore) -> None:
    """The next warm does all of it."""
    store.warm()
    store.assert_exact()


def kill_at(store: ModuleStore, point: str, number: int, large_fill: int = staging.LARGE_FILL) -> None:
    """Run a warm in a process of its own that SIGKILLs itself at the point."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "BIFROST_DATABASE_URL": store.database.url,
        "BIFROST_REDIS_URL": store.settings.redis,
    }
    program = [sys.executable, "-m", "tests.never_half_warm.killed", point, str(number), str(large_fill)]
    ended = subprocess.run(program, env=environment, cwd=ROOT, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("point", "number"), [(READING, 1), (COMPARING, 1), (STAGING, 1), (STAGING, 7), (SWITCHING, 1)]
)
def test_w03_killed_before_the_switch(store: ModuleStore, point: str, number: int) -> None:
    """After a kill before the switch, no key of the cache is new or changed, and the staged entries have a TTL."""
    before = change(store)
    kill_at(store, point, number)
    assert store.module_keys() == before
    assert_untouched(store, before)
    assert (len(store.own_keys()) > 0) == (point in (STAGING, SWITCHING))
    assert_completes(store)


@pytest.mark.parametrize(("point", "number"), [(STAGING, 3), (STAGING, 8), (SWITCHING, 1)])
def test_w03_killed_in_a_large_fill(store: ModuleStore, point: str, number: int) -> None:
    """Entries that were written directly are in no index and expire. The previous cache is unchanged."""
    before = change(store)
    kill_at(store, point, number, large_fill=0)
    assert_untouched(store, before)
    assert_completes(store)


@pytest.mark.parametrize("point", [READING, COMPARING, SWITCHING])
def test_w03_killed_after_the_switch(store: ModuleStore, point: str) -> None:
    """After a kill in the comparison that follows the switch, the new cache is complete and nothing in it expires."""
    change(store)
    kill_at(store, point, 2)
    store.assert_exact()
    assert {store.client.ttl(key) for key in store.module_keys()} == {-1}
    assert store.own_keys() == []
    assert_completes(store)


def test_w03_staged_entries_live_as_long_as_the_warm(store: ModuleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the staging takes longer than a third of the TTL, it renews the TTL, so that no entry is missing at
    the switch.
    """
    monkeypatch.setattr(staging, "STAGE_TTL", 3)
    monkeypatch.setattr(staging, "BATCH_SIZE", 1)
    store.put(BEFORE)
    first: list[bytes] = []
    lowest: list[int] = []

    def wait_for_the_renewal(progress: Progress) -> None:
        if progress.note != STAGING:
            return
        if not first:
            wait_until(lambda: bool(store.own_keys()), "a staged entry")
            first.extend(key for key in store.own_keys() if b":stage:" in key)
            wait_until(lambda: store.client.pttl(first[0]) < 1800, "two thirds of its time")
        lowest.append(int(str(store.client.pttl(first[0]))))

    store.warm(wait_for_the_renewal)
    assert lowest[0] < 1800 < lowest[-1]
    store.assert_exact()


# -------------------------------------------------------------------------------------------- Redis says no


def fails(store: ModuleStore, before: dict[bytes, bytes | None], point: str, action: Callable[[], object],
          undo: Callable[[], object], error: type[BootstrapError], text: str) -> None:  # fmt: skip
    """Do something to a server at this point: the warm fails in these words; undone, the next completes."""
    with pytest.raises(error, match=text):
        store.warm(at(point, action))
    undo()
    assert_untouched(store, before)
    assert_completes(store)


@pytest.mark.parametrize("point", [STAGING, SWITCHING])
def test_w03_out_of_memory(
    make_store: MakeStore, run_folder: RunFolder, start_server: StartRedis, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis runs out of memory while entries are staged, or before the switch: no entry is changed."""
    monkeypatch.setattr(staging, "BATCH_SIZE", 1)
    store = make_store(start_server(RedisServer(run_folder)).url())
    set_limit = store.client.config_set
    before = change(store)
    fails(store, before, point, lambda: set_limit("maxmemory", 1), lambda: set_limit("maxmemory", 0),
          WarmError, "maxmemory")  # fmt: skip


def test_w03_out_of_memory_after_a_switch(
    make_store: MakeStore, run_folder: RunFolder, start_server: StartRedis
) -> None:
    """The switch of an earlier pass stays, and the error does not say that nothing changed."""
    store = make_store(start_server(RedisServer(run_folder)).url())
    change(store)
    write = at(SWITCHING, lambda: store.put({"new0.py": "y = 'again'"}))
    fill = at(SWITCHING, lambda: store.client.config_set("maxmemory", 1), number=2)

    def report(progress: Progress) -> None:
        write(progress)
        fill(progress)

    with pytest.raises(WarmError, match=r"the module cache stands as it was last switched: .*maxmemory"):
        store.warm(report)
    assert store.content("new0.py") == AFTER["new0.py"]
    assert store.content("m8.py") is None
    store.client.config_set("maxmemory", 0)
    assert_completes(store)


@pytest.mark.parametrize("point", [STAGING, SWITCHING])
def test_w03_cannot_persist(
    make_store: MakeStore, run_folder: RunFolder, start_server: StartRedis, point: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Redis rejects writes because its last snapshot failed (MISCONF): no entry is changed."""
    monkeypatch.setattr(staging, "BATCH_SIZE", 1)
    server = start_server(RedisServer(run_folder, {"save": "3600 1", "stop-writes-on-bgsave-error": "yes"}))
    store = make_store(server.url())
    before = change(store)
    in_its_way = server.data / "dump.rdb"

    def save(wanted: str) -> None:
        store.client.bgsave()
        wait_until(
            lambda: store.client.info("persistence")["rdb_last_bgsave_status"] == wanted, f"a snapshot: {wanted}"
        )

    def block() -> None:
        in_its_way.unlink(missing_ok=True)
        in_its_way.mkdir()
        save("err")

    def clear() -> None:
        in_its_way.rmdir()
        save("ok")

    fails(store, before, point, block, clear, WarmError, "MISCONF")


@pytest.mark.parametrize("point", [STAGING, SWITCHING])
def test_w03_becomes_a_replica(
    make_store: MakeStore, run_folder: RunFolder, start_server: StartRedis, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis becomes a replica during the warm: no entry is changed, and the error says so."""
    monkeypatch.setattr(staging, "BATCH_SIZE", 1)
    store = make_store(start_server(RedisServer(run_folder)).url())
    before = change(store)
    fails(store, before, point, lambda: store.client.replicaof("127.0.0.1", 1),
          lambda: store.client.replicaof("NO", "ONE"), WarmError, "read-only replica")  # fmt: skip


def test_w03_a_replica_is_named_before_anything_is_read(
    make_store: MakeStore, run_folder: RunFolder, start_server: StartRedis
) -> None:
    """If the URL leads to a replica, the error says so and names the primary."""
    store = make_store(start_server(RedisServer(run_folder)).url())
    store.client.replicaof("primary.example", 6390)
    with pytest.raises(WarmError, match=r"replica of primary\.example:6390.*BIFROST_REDIS_URL"):
        store.warm()


def test_w03_still_loading(make_store: MakeStore, run_folder: RunFolder, start_server: StartRedis) -> None:
    """A Redis that still loads its data is unavailable: an error that is retried."""
    config = {"enable-debug-command": "yes", "loading-process-events-interval-bytes": "1024"}
    store = make_store(start_server(RedisServer(run_folder, config)).url())
    before = change(store)
    client = store.client
    for number in range(40):
        client.set(f"ballast{number}", os.urandom(2048))
    client.config_set("key-load-delay", 100_000)  # microseconds for each key: some five seconds in all

    def reload() -> None:
        with redis_package.Redis.from_url(store.settings.redis, socket_timeout=60) as other:
            other.execute_command("DEBUG", "RELOAD")

    loading = threading.Thread(target=reload)
    loading.start()
    try:

        def is_loading() -> bool:
            try:
                client.ping()
            except redis_package.exceptions.BusyLoadingError:
                return True
            return False

        wait_until(is_loading, "LOADING")
        with pytest.raises(UnavailableError, match="loading"):
            store.warm()
    finally:
        loading.join()
    assert_untouched(store, before)
    assert_completes(store)


@pytest.mark.parametrize("program", ["redis-server", pytest.param("valkey-server", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "command",
    ["getrange", "pttl", "type", "llen", "lrange", "rename", "persist", "pexpire", "sadd", "srem", "del", "exists"],
)
def test_w03_missing_permission(
    make_store: MakeStore, run_folder: RunFolder, start_server: StartRedis, command: str, program: str
) -> None:
    """Without the right to a command of the scripts, the warm fails before the first write and names the command."""
    server = start_server(RedisServer(run_folder, programs=[program]))
    store = make_store(server.url())
    before = change(store)
    store.client.acl_setuser(
        "warm", enabled=True, passwords=["+Tortoise7"], keys=["*"], categories=["+@all"], commands=[f"-{command}"]
    )
    user = make_store(f"redis://warm:Tortoise7@{server.host}:{server.port}", store.database)
    with pytest.raises(RefusedError, match=f"a script needs {command}|run the '{command}' command"):
        user.warm()
    assert_untouched(store, before)
    wait_until(lambda: store.module_keys() == before, "nothing of the attempt")
    assert_completes(store)


@pytest.mark.parametrize("slots", [True, False])
def test_w03_cluster(make_store: MakeStore, run_folder: RunFolder, start_server: StartRedis, slots: bool) -> None:
    """A warm and a comparison reject Redis Cluster by name, also for a user without the right to ask for it."""
    # Its own choice, ten thousand above the other port, may be an outgoing connection of anybody.
    config = {"cluster-enabled": "yes", "cluster-port": str(free_port())}
    server = start_server(RedisServer(run_folder, config))
    store = make_store(server.url())
    if slots:
        store.client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 100)  # type: ignore[no-untyped-call]
    with pytest.raises(WarmError, match="is a Redis Cluster"):
        store.warm()
    with pytest.raises(WarmError, match="is a Redis Cluster"), redis_server.connect(server.url()) as client:
        module_cache.ModuleCache(client, 0).states()


# ------------------------------------------------------------------------------------------ a server is gone


@pytest.mark.parametrize("point", [READING, STAGING, SWITCHING])
def test_w03_redis_is_cut_off(
    make_store: MakeStore, run_folder: RunFolder, start_server: StartRedis, start_proxy: Callable[[int], Proxy],
    point: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """If every connection to Redis ends, Redis is unavailable and the previous cache is unchanged."""
    monkeypatch.setattr(staging, "BATCH_SIZE", 1)
    server = start_server(RedisServer(run_folder))
    proxy = start_proxy(server.port)
    store = make_store(proxy.through(server.url()))
    before = change(store)
    fails(store, before, point, proxy.refuse, proxy.heal, UnavailableError, "Redis")


def test_w03_redis_comes_back_empty(make_store: MakeStore, run_folder: RunFolder, start_server: StartRedis) -> None:
    """Redis dies before the switch and restarts without data: the next warm fills it."""
    server = start_server(RedisServer(run_folder))
    store = make_store(server.url())
    change(store)
    with pytest.raises(UnavailableError, match="Redis"):
        store.warm(at(SWITCHING, server.kill))
    server.start()
    assert_completes(store)


@pytest.mark.parametrize("point", [COMPARING, STAGING])
def test_w03_database_is_cut_off(
    make_store: MakeStore, store: ModuleStore, postgres: object, start_proxy: Callable[[int], Proxy], point: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """If every connection to PostgreSQL ends, PostgreSQL is unavailable and the previous cache is unchanged."""
    monkeypatch.setattr(staging, "BATCH_SIZE", 1)
    before = change(store)
    # More than the sockets hold, so that rows are still to come when the connection ends.
    store.put({f"large{n}.py": "x" * 2_000_000 for n in range(10)})
    port = int(store.settings.database.parameters["port"])
    proxy = start_proxy(port)
    url = proxy.through(store.database.url)
    behind = make_store(store.settings.redis, store.database, database_url=url)
    proxy_ends: Callable[[], object] = proxy.refuse
    fails(behind, before, point, proxy_ends, proxy.heal, UnavailableError, "PostgreSQL")


def test_w03_no_table(store: ModuleStore) -> None:
    """Without the table, the warm says that a migration comes first, and changes nothing."""
    before = change(store)
    store.database.execute("DROP TABLE workspace_files")
    with pytest.raises(WarmError, match=r"neither table workspace_files nor file_index.*BIFROST_MODULE_SOURCE=none"):
        store.warm()
    assert store.module_keys() == before


def test_w03_table_of_another_kind(store: ModuleStore) -> None:
    """A table with other columns is exit 2 with the error of the server, not a bug."""
    before = change(store)
    store.database.execute("CREATE TYPE kind AS ENUM ('script')")
    store.database.execute("DROP INDEX IF EXISTS ix_workspace_files_modules")
    store.database.execute("DELETE FROM workspace_files")
    store.database.execute("ALTER TABLE workspace_files DROP COLUMN entity_type, ADD COLUMN entity_type kind")
    with pytest.raises(WarmError, match=r"table workspace_files of .*invalid input value for enum kind"):
        store.warm()
    assert store.module_keys() == before


def test_w03_index_of_another_type(store: ModuleStore) -> None:
    """If the key of the index has another type, it is not changed. The error has that of Redis."""
    store.put(BEFORE)
    store.client.set(INDEX, "not a set")
    with pytest.raises(WarmError, match="WRONGTYPE"):
        store.warm()
    assert store.module_keys().keys() == {INDEX}
    assert ENTRY in INDEX


def test_w03_index_becomes_another_type(store: ModuleStore) -> None:
    """The same before the switch: no entry is changed, although the failing SADD would come after the entries."""
    before = change(store)

    def replace() -> None:
        store.client.set(INDEX, "not a set")

    with pytest.raises(WarmError, match="the index is a string"):
        store.warm(at(SWITCHING, replace))
    after = store.module_keys()
    assert {key: after[key] for key in before if key != INDEX} == {key: before[key] for key in before if key != INDEX}
    assert store.client.get(INDEX) == b"not a set"
    store.client.delete(INDEX)
    assert_completes(store)
