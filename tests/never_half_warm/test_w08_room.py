"""W8: a Redis that may evict entries, or has too little memory, is warned about before the warm writes."""

from __future__ import annotations

import inspect
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bifrost_bootstrap.errors import WarmError
from bifrost_bootstrap.warm import step as warm_step
from bifrost_bootstrap.warm.step import COMPARING, SWITCHING
from tests.servers import PLANTED_PASSWORD, RedisServer, RunFolder
from tests.servers.leaks import PLANTED_PASSWORD_QUOTED
from tests.setups.module_store import MakeStore, ModuleStore, at

StartRedis = Callable[[RedisServer], RedisServer]


@pytest.fixture
def server(run_folder: RunFolder, start_server: StartRedis) -> RedisServer:
    """A Redis with maxmemory 100 MB."""
    return start_server(RedisServer(run_folder, {"maxmemory": "100mb"}))


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """A function that returns the log so far."""
    caplog.set_level(logging.INFO)
    return lambda: caplog.text


@pytest.mark.parametrize(
    ("policy", "words"), [("allkeys-lru", "entries and index"), ("volatile-ttl", "staged entries and those")]
)
def test_w08_policy_that_evicts(
    make_store: MakeStore, server: RedisServer, logged: Callable[[], str], policy: str, words: str
) -> None:
    """The warning names server, policy and what may be evicted, and comes before the first write."""
    store = make_store(server.url())
    store.client.config_set("maxmemory-policy", policy)
    store.put({"a.py": "x"})
    before: list[str] = []
    store.warm(at(COMPARING, lambda: before.append(logged())))
    assert f"may evict {words}" in before[0]
    assert policy in before[0]
    assert f"127.0.0.1:{server.port}" in before[0]


def test_w08_no_warning_without_reason(make_store: MakeStore, server: RedisServer, logged: Callable[[], str]) -> None:
    """Sufficient maxmemory with noeviction gives no warning."""
    store = make_store(server.url())
    store.put({f"{n}.py": "x" * 1000 for n in range(100)})
    store.warm()
    assert "evict" not in logged()
    assert "maxmemory" not in logged()


def test_w08_too_little_room(
    make_store: MakeStore, server: RedisServer, logged: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the warm needs more memory than is left, a warning has both numbers. Then the error of Redis ends the warm."""
    store = make_store(server.url())
    store.put({f"{n}.py": chr(97 + n % 26) * 3_000_000 for n in range(40)})
    there: list[list[bytes]] = []

    def look(record: logging.LogRecord) -> bool:
        if record.levelno == logging.WARNING:
            there.append([*store.own_keys(), *store.module_keys()])
        return True

    monkeypatch.setattr(warm_step.logger, "filters", [look])
    with pytest.raises(WarmError, match="maxmemory"):
        store.warm()
    assert "this warm needs about 156.0 MB" in logged()
    assert "left below maxmemory" in logged()
    assert there == [[]], "nothing was written before"


def test_w08_estimate_is_no_less_than_what_is_used(make_store: MakeStore, server: RedisServer) -> None:
    """With small and with large modules, the warm uses at most the memory that the warning is based on."""
    from bifrost_bootstrap.warm.staging import ENTRY_BYTES
    from bifrost_bootstrap.warm.step import ENTRY_GROWTH

    store = make_store(server.url())
    lines = Path(inspect.getfile(subprocess)).read_text().splitlines(keepends=True)
    modules = {f"pkg/module_{n}.py": "".join(lines[: n % 400]) for n in range(3000)}
    store.put(modules)
    used = store.client.info("memory")["used_memory_dataset"]
    store.warm()
    used = store.client.info("memory")["used_memory_dataset"] - used
    estimate = sum(map(len, modules.values())) * ENTRY_GROWTH + ENTRY_BYTES * len(modules)
    assert 0.6 * estimate < used <= estimate


def test_w08_user_without_info(make_store: MakeStore, server: RedisServer, logged: Callable[[], str]) -> None:
    """A user without the right to INFO can warm. The log says that the memory is unknown."""
    with server.client() as admin:
        admin.acl_setuser(
            "few",
            enabled=True,
            passwords=[f"+{PLANTED_PASSWORD}"],
            keys=["*"],
            categories=["+@all"],
            commands=["-info"],
        )
    store = make_store(server.url().replace(f":{PLANTED_PASSWORD_QUOTED}@", f"few:{PLANTED_PASSWORD_QUOTED}@"))
    store.put({"a.py": "x"})
    store.warm()
    store.assert_exact()
    assert "does not show its memory" in logged()


@pytest.mark.parametrize("end", [b":3.py", b"bifrost:bootstrap:plan:"])
def test_w08_staged_entry_evicted(store: ModuleStore, end: bytes) -> None:
    """If a staged entry or the plan is missing at the switch, no entry is changed, and the error says why."""
    store.put({f"{n}.py": "1" for n in range(5)})
    store.warm()
    before = store.module_keys()
    store.put({f"{n}.py": "2" for n in range(5)})

    def evict() -> None:
        gone = next(key for key in store.own_keys() if key.endswith(end) or key.startswith(end))
        store.client.delete(gone)

    with pytest.raises(WarmError, match=rf"evicted before the switch.*{end.decode()}"):
        store.warm(at(SWITCHING, evict))
    assert store.module_keys() == before
    store.warm()
    store.assert_exact()
