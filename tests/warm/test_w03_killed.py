"""W3: whatever ends a warm, wherever: the previous cache is untouched, nothing stays, the next warm completes."""

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
from bifrost_bootstrap.warm import cache as module_cache, step as warm_step
from bifrost_bootstrap.warm.step import COMPARING, READING, STAGING, SWITCHING
from tests.servers import Proxy, RedisServer, RunFolder
from tests.servers.process import free_port, wait_until
from tests.warm.conftest import NewDeployment
from tests.warm.deployment import ENTRY, INDEX, Deployment, at

ROOT = Path(bifrost_bootstrap.__file__).parent.parent
StartRedis = Callable[[RedisServer], RedisServer]

BEFORE = {f"m{n}.py": f"x = {n}" for n in range(10)}
AFTER = {f"m{n}.py": f"x = {n}  # changed" for n in range(5)} | {f"new{n}.py": f"y = {n}" for n in range(5)}


def change(deployment: Deployment) -> dict[bytes, bytes | None]:
    """Warm the previous cache, then change, add and remove rows. Returns the previous cache."""
    deployment.put(BEFORE)
    deployment.warm()
    deployment.put(AFTER)
    deployment.remove("m8.py", "m9.py")
    return deployment.module_keys()


def assert_untouched(deployment: Deployment, before: dict[bytes, bytes | None]) -> None:
    """The previous cache is there to the byte; what else there is expires by itself."""
    after = deployment.module_keys()
    assert {key: after[key] for key in before} == before
    left = [*(after.keys() - before.keys()), *deployment.own_keys()]
    assert all(0 < deployment.client.pttl(key) <= 1000 * module_cache.FILL_TTL for key in left)


def assert_completes(deployment: Deployment) -> None:
    """The next warm does all of it."""
    deployment.warm()
    deployment.assert_exact()


def kill_at(deployment: Deployment, point: str, number: int, large_fill: int = warm_step.LARGE_FILL) -> None:
    """Run a warm in a process of its own that SIGKILLs itself at the point."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "BIFROST_DATABASE_URL": deployment.database.url,
        "BIFROST_REDIS_URL": deployment.settings.redis,
    }
    program = [sys.executable, "-m", "tests.warm.killed", point, str(number), str(large_fill)]
    ended = subprocess.run(program, env=environment, cwd=ROOT, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("point", "number"), [(READING, 1), (COMPARING, 1), (STAGING, 1), (STAGING, 7), (SWITCHING, 1)]
)
def test_w03_killed_before_the_switch(deployment: Deployment, point: str, number: int) -> None:
    """Killed at any point before the switch: not one key of the cache is touched or new, staged ones have a TTL."""
    before = change(deployment)
    kill_at(deployment, point, number)
    assert deployment.module_keys() == before
    assert_untouched(deployment, before)
    assert (len(deployment.own_keys()) > 0) == (point in (STAGING, SWITCHING))
    assert_completes(deployment)


@pytest.mark.parametrize(("point", "number"), [(STAGING, 3), (STAGING, 8), (SWITCHING, 1)])
def test_w03_killed_in_a_large_fill(deployment: Deployment, point: str, number: int) -> None:
    """Entries that were written into their places are in no index and expire; the previous cache is untouched."""
    before = change(deployment)
    kill_at(deployment, point, number, large_fill=0)
    assert_untouched(deployment, before)
    assert_completes(deployment)


@pytest.mark.parametrize("point", [READING, COMPARING, SWITCHING])
def test_w03_killed_after_the_switch(deployment: Deployment, point: str) -> None:
    """Killed in the comparison that follows the switch: the new cache is there, and nothing that expires."""
    change(deployment)
    kill_at(deployment, point, 2)
    deployment.assert_exact()
    assert {deployment.client.ttl(key) for key in deployment.module_keys()} == {-1}
    assert deployment.own_keys() == []
    assert_completes(deployment)


def test_w03_staged_entries_live_as_long_as_the_warm(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A staging that takes longer than a third of the TTL renews it, so that no entry is gone at the switch."""
    monkeypatch.setattr(module_cache, "STAGE_TTL", 3)
    monkeypatch.setattr(warm_step, "BATCH_SIZE", 1)
    deployment.put(BEFORE)
    first: list[bytes] = []
    lowest: list[int] = []

    def wait_for_the_renewal(progress: Progress) -> None:
        if progress.note != STAGING:
            return
        if not first:
            wait_until(lambda: bool(deployment.own_keys()), "a staged entry")
            first.extend(key for key in deployment.own_keys() if b":stage:" in key)
            wait_until(lambda: deployment.client.pttl(first[0]) < 1800, "two thirds of its time")
        lowest.append(int(str(deployment.client.pttl(first[0]))))

    deployment.warm(wait_for_the_renewal)
    assert lowest[0] < 1800 < lowest[-1]
    deployment.assert_exact()


# -------------------------------------------------------------------------------------------- Redis says no


def fails(deployment: Deployment, before: dict[bytes, bytes | None], point: str, action: Callable[[], object],
          undo: Callable[[], object], error: type[BootstrapError], text: str) -> None:  # fmt: skip
    """Do something to a server at this point: the warm fails in these words; undone, the next completes."""
    with pytest.raises(error, match=text):
        deployment.warm(at(point, action))
    undo()
    assert_untouched(deployment, before)
    assert_completes(deployment)


@pytest.mark.parametrize("point", [STAGING, SWITCHING])
def test_w03_out_of_memory(
    deploy: NewDeployment, run_folder: RunFolder, start_server: StartRedis, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis runs out of memory while entries are staged, or just before the switch: refused as a whole."""
    monkeypatch.setattr(warm_step, "BATCH_SIZE", 1)
    deployment = deploy(start_server(RedisServer(run_folder)).url())
    set_limit = deployment.client.config_set
    before = change(deployment)
    fails(deployment, before, point, lambda: set_limit("maxmemory", 1), lambda: set_limit("maxmemory", 0),
          WarmError, "maxmemory")  # fmt: skip


def test_w03_out_of_memory_after_a_switch(
    deploy: NewDeployment, run_folder: RunFolder, start_server: StartRedis
) -> None:
    """What an earlier pass of the same warm has switched stands, and the error does not say that nothing changed."""
    deployment = deploy(start_server(RedisServer(run_folder)).url())
    change(deployment)
    write = at(SWITCHING, lambda: deployment.put({"new0.py": "y = 'again'"}))
    fill = at(SWITCHING, lambda: deployment.client.config_set("maxmemory", 1), number=2)

    def report(progress: Progress) -> None:
        write(progress)
        fill(progress)

    with pytest.raises(WarmError, match=r"the module cache stands as it was last switched: .*maxmemory"):
        deployment.warm(report)
    assert deployment.content("new0.py") == AFTER["new0.py"]
    assert deployment.content("m8.py") is None
    deployment.client.config_set("maxmemory", 0)
    assert_completes(deployment)


@pytest.mark.parametrize("point", [STAGING, SWITCHING])
def test_w03_cannot_persist(
    deploy: NewDeployment, run_folder: RunFolder, start_server: StartRedis, point: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Redis stops writes because its last snapshot failed (MISCONF): refused as a whole."""
    monkeypatch.setattr(warm_step, "BATCH_SIZE", 1)
    server = start_server(RedisServer(run_folder, {"save": "3600 1", "stop-writes-on-bgsave-error": "yes"}))
    deployment = deploy(server.url())
    before = change(deployment)
    in_its_way = server.data / "dump.rdb"

    def save(wanted: str) -> None:
        deployment.client.bgsave()
        wait_until(
            lambda: deployment.client.info("persistence")["rdb_last_bgsave_status"] == wanted, f"a snapshot: {wanted}"
        )

    def block() -> None:
        in_its_way.unlink(missing_ok=True)
        in_its_way.mkdir()
        save("err")

    def clear() -> None:
        in_its_way.rmdir()
        save("ok")

    fails(deployment, before, point, block, clear, WarmError, "MISCONF")


@pytest.mark.parametrize("point", [STAGING, SWITCHING])
def test_w03_becomes_a_replica(
    deploy: NewDeployment, run_folder: RunFolder, start_server: StartRedis, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis is made a replica under our hands: refused as a whole, and said so."""
    monkeypatch.setattr(warm_step, "BATCH_SIZE", 1)
    deployment = deploy(start_server(RedisServer(run_folder)).url())
    before = change(deployment)
    fails(deployment, before, point, lambda: deployment.client.replicaof("127.0.0.1", 1),
          lambda: deployment.client.replicaof("NO", "ONE"), WarmError, "read-only replica")  # fmt: skip


def test_w03_a_replica_is_named_before_anything_is_read(
    deploy: NewDeployment, run_folder: RunFolder, start_server: StartRedis
) -> None:
    """A URL that names a replica: the error says so, and names the primary."""
    deployment = deploy(start_server(RedisServer(run_folder)).url())
    deployment.client.replicaof("primary.example", 6390)
    with pytest.raises(WarmError, match=r"replica of primary\.example:6390.*BIFROST_REDIS_URL"):
        deployment.warm()


def test_w03_still_loading(deploy: NewDeployment, run_folder: RunFolder, start_server: StartRedis) -> None:
    """A Redis that still loads its data is not there yet: an error that is worth another try."""
    config = {"enable-debug-command": "yes", "loading-process-events-interval-bytes": "1024"}
    deployment = deploy(start_server(RedisServer(run_folder, config)).url())
    before = change(deployment)
    client = deployment.client
    for number in range(40):
        client.set(f"ballast{number}", os.urandom(2048))
    client.config_set("key-load-delay", 100_000)  # microseconds for each key: some five seconds in all

    def reload() -> None:
        with redis_package.Redis.from_url(deployment.settings.redis, socket_timeout=60) as other:
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
            deployment.warm()
    finally:
        loading.join()
    assert_untouched(deployment, before)
    assert_completes(deployment)


@pytest.mark.parametrize("program", ["redis-server", pytest.param("valkey-server", marks=pytest.mark.faults)])
@pytest.mark.parametrize(
    "command",
    ["getrange", "pttl", "type", "llen", "lrange", "rename", "persist", "pexpire", "sadd", "srem", "del", "exists"],
)
def test_w03_right_too_few(
    deploy: NewDeployment, run_folder: RunFolder, start_server: StartRedis, command: str, program: str
) -> None:
    """A user who may not run one of the scripts' commands is refused before the first write, and the command named."""
    server = start_server(RedisServer(run_folder, programs=[program]))
    deployment = deploy(server.url())
    before = change(deployment)
    deployment.client.acl_setuser(
        "warm", enabled=True, passwords=["+Tortoise7"], keys=["*"], categories=["+@all"], commands=[f"-{command}"]
    )
    user = deploy(f"redis://warm:Tortoise7@{server.host}:{server.port}", deployment.database)
    with pytest.raises(RefusedError, match=f"a script needs {command}|run the '{command}' command"):
        user.warm()
    assert_untouched(deployment, before)
    wait_until(lambda: deployment.module_keys() == before, "nothing of the attempt")
    assert_completes(deployment)


@pytest.mark.parametrize("slots", [True, False])
def test_w03_cluster(deploy: NewDeployment, run_folder: RunFolder, start_server: StartRedis, slots: bool) -> None:
    """Redis Cluster is refused by name, by a warm and by a look, also to a user who may not ask for its facts."""
    # Its own choice, ten thousand above the other port, may be an outgoing connection of anybody.
    config = {"cluster-enabled": "yes", "cluster-port": str(free_port())}
    server = start_server(RedisServer(run_folder, config))
    deployment = deploy(server.url())
    if slots:
        deployment.client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 100)  # type: ignore[no-untyped-call]
    with pytest.raises(WarmError, match="is a Redis Cluster"):
        deployment.warm()
    with pytest.raises(WarmError, match="is a Redis Cluster"), redis_server.connect(server.url()) as client:
        module_cache.ModuleCache(client, 0).states()


# ------------------------------------------------------------------------------------------ a server is gone


@pytest.mark.parametrize("point", [READING, STAGING, SWITCHING])
def test_w03_redis_is_cut_off(
    deploy: NewDeployment, run_folder: RunFolder, start_server: StartRedis, start_proxy: Callable[[int], Proxy],
    point: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every connection to Redis ends: the warm is refused as unavailable, the previous cache is untouched."""
    monkeypatch.setattr(warm_step, "BATCH_SIZE", 1)
    server = start_server(RedisServer(run_folder))
    proxy = start_proxy(server.port)
    deployment = deploy(proxy.through(server.url()))
    before = change(deployment)
    fails(deployment, before, point, proxy.refuse, proxy.heal, UnavailableError, "Redis")


def test_w03_redis_comes_back_empty(deploy: NewDeployment, run_folder: RunFolder, start_server: StartRedis) -> None:
    """Redis dies just before the switch and comes back without its data: the next warm fills it."""
    server = start_server(RedisServer(run_folder))
    deployment = deploy(server.url())
    change(deployment)
    with pytest.raises(UnavailableError, match="Redis"):
        deployment.warm(at(SWITCHING, server.kill))
    server.start()
    assert_completes(deployment)


@pytest.mark.parametrize("point", [COMPARING, STAGING])
def test_w03_database_is_cut_off(
    deploy: NewDeployment, deployment: Deployment, postgres: object, start_proxy: Callable[[int], Proxy], point: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every connection to PostgreSQL ends: the warm is refused as unavailable, the previous cache is untouched."""
    monkeypatch.setattr(warm_step, "BATCH_SIZE", 1)
    before = change(deployment)
    # More than the sockets hold, so that rows are still to come when the connection ends.
    deployment.put({f"large{n}.py": "x" * 2_000_000 for n in range(10)})
    port = int(deployment.settings.database.parameters["port"])
    proxy = start_proxy(port)
    url = proxy.through(deployment.database.url)
    behind = deploy(deployment.settings.redis, deployment.database, database_url=url)
    proxy_ends: Callable[[], object] = proxy.refuse
    fails(behind, before, point, proxy_ends, proxy.heal, UnavailableError, "PostgreSQL")


def test_w03_no_table(deployment: Deployment) -> None:
    """Without the table the warm says that a migration comes first, and changes nothing."""
    before = change(deployment)
    deployment.database.execute("DROP TABLE workspace_files")
    with pytest.raises(WarmError, match=r"neither table workspace_files nor file_index.*BIFROST_MODULE_SOURCE=none"):
        deployment.warm()
    assert deployment.module_keys() == before


def test_w03_table_of_another_kind(deployment: Deployment) -> None:
    """A table that cannot be read as the contract says is no bug of ours: the server's own words, code 2."""
    before = change(deployment)
    deployment.database.execute("CREATE TYPE kind AS ENUM ('script')")
    deployment.database.execute("DROP INDEX IF EXISTS ix_workspace_files_modules")
    deployment.database.execute("DELETE FROM workspace_files")
    deployment.database.execute("ALTER TABLE workspace_files DROP COLUMN entity_type, ADD COLUMN entity_type kind")
    with pytest.raises(WarmError, match=r"table workspace_files of .*invalid input value for enum kind"):
        deployment.warm()
    assert deployment.module_keys() == before


def test_w03_index_of_another_type(deployment: Deployment) -> None:
    """Something else under the name of the index is not destroyed; the error says what Redis said."""
    deployment.put(BEFORE)
    deployment.client.set(INDEX, "not a set")
    with pytest.raises(WarmError, match="WRONGTYPE"):
        deployment.warm()
    assert deployment.module_keys().keys() == {INDEX}
    assert ENTRY in INDEX


def test_w03_index_becomes_another_type(deployment: Deployment) -> None:
    """The same just before the switch: refused as a whole, since a SADD that fails would come after the entries."""
    before = change(deployment)

    def replace() -> None:
        deployment.client.set(INDEX, "not a set")

    with pytest.raises(WarmError, match="the index is a string"):
        deployment.warm(at(SWITCHING, replace))
    after = deployment.module_keys()
    assert {key: after[key] for key in before if key != INDEX} == {key: before[key] for key in before if key != INDEX}
    assert deployment.client.get(INDEX) == b"not a set"
    deployment.client.delete(INDEX)
    assert_completes(deployment)
