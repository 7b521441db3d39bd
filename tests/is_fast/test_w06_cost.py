"""W6: a warm costs what has changed."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.servers import PostgresServer, RedisServer, RunFolder, Server
from tests.setups.module_store import MakeStore, migrate

StartServer = Callable[[Server], Server]
#: Bytes of all modules together, far more than paths and hashes need.
MODULES, SIZE = 200, 20_000


def test_w06_nothing_changed_reads_and_writes_no_content(
    make_store: MakeStore, run_folder: RunFolder, start_server: StartServer
) -> None:
    """In the log of PostgreSQL and the counters of Redis, a second warm reads no content, and with 1 of 200
    changed only that one.
    """
    postgres = PostgresServer(run_folder, {"log_statement": "all"})
    redis = RedisServer(run_folder)
    start_server(postgres)
    start_server(redis)
    database = postgres.create_database()
    migrate(database)
    store = make_store(redis.url(), database)
    store.put({f"{n}.py": f"# {n}".ljust(SIZE, "x") for n in range(MODULES)})
    store.warm()

    def cost(number: int) -> tuple[list[str], int, dict[str, int]]:
        """Statements that read content, bytes that Redis was sent, and the writing commands it ran."""
        logged = len(postgres.log.read_text())
        store.client.config_resetstat()
        result = store.warm()
        assert result.changed == number
        received = store.client.info("stats")["total_net_input_bytes"]
        stats = store.client.info("commandstats")
        writes = {
            name: facts["calls"] for name, facts in stats.items() if re.search("_(set|rename|sadd|persist)$", name)
        }
        statements = re.findall(r"(?:statement|execute [^:]*): (.*)", postgres.log.read_text()[logged:])
        assert any("content_hash" in statement for statement in statements)
        # The column itself of modules: neither its hash nor whether it is null.
        statements = [line for line in statements if "requirements.txt" not in line]
        return [line for line in statements if re.search(r"\bcontent\b(?! IS NOT NULL)", line)], received, writes

    statements, received, writes = cost(0)
    assert statements == []
    assert received < MODULES * SIZE / 50
    assert writes == {"cmdstat_set": 1}, "the marker alone"

    store.put({"7.py": "changed".ljust(SIZE, "y")})
    statements, received, writes = cost(1)
    # One statement asks for the hash of what is there, one for the content: both for this path alone.
    assert statements
    assert all("7.py" in line or "$1" in line for line in statements)
    assert received < SIZE + MODULES * SIZE / 25
    # One more proves beforehand that this user may.
    assert writes["cmdstat_rename"] == 2
    store.assert_exact()


def test_w06_cache_is_read_once(make_store: MakeStore, run_folder: RunFolder, start_server: StartServer) -> None:
    """The comparison after the switch reads digests from Redis, and does not read the fingerprints again."""
    redis = RedisServer(run_folder)
    start_server(redis)
    store = make_store(redis.url())
    store.put({f"{n}.py": f"# {n}" for n in range(MODULES)})
    store.warm()

    def read() -> int:
        """Bytes that one warm is sent by Redis."""
        store.client.config_resetstat()
        store.warm()
        return int(store.client.info("stats")["total_net_output_bytes"])

    nothing_changed = read()
    store.put({"7.py": "changed"})
    assert read() < 1.5 * nothing_changed
