"""`check`: ready or not, what is missing, and `--wait`."""

from __future__ import annotations

import json
import re

import psycopg
import pytest
import redis
from psycopg import sql

from tests.conftest import BOOTSTRAP, RunBootstrap, StartCommand, StartServer
from tests.servers import Command, Database, RedisServer, RunFolder
from tests.setups.state import MODULES, insert_modules


def test_check_waits_for_a_database_that_is_not_there_yet(
    start_command: StartCommand, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str], database: Database
) -> None:
    """`check --wait` that starts before the database exists exits 0 after the init."""
    database.server.drop_database(database)
    check = start_command([*BOOTSTRAP, "check", "--wait", "50s"], env=bifrost_env)
    check.wait_for(f'not ready: .* rejected the connection: .*"{database.name}" does not exist')
    with database.server.admin() as admin:
        name, owner = sql.Identifier(database.name), sql.Identifier(database.server.app_role)
        admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, owner))
    check.wait_for("not ready: schema is empty, 2 pending")
    assert run_bootstrap("init", "--with-worker").returncode == 0
    assert check.wait().returncode == 0


def test_check_that_waits_is_ended_by_a_signal(start_command: StartCommand, bifrost_env: dict[str, str]) -> None:
    """SIGTERM ends `check --wait` with 143."""
    check = start_command([*BOOTSTRAP, "check", "--wait", "5m"], env=bifrost_env)
    check.wait_for("not ready: schema is empty")
    assert check.terminate(10).returncode == 143


def test_check_of_a_table_that_is_gone(run_bootstrap: RunBootstrap, database: Database) -> None:
    """If the schema is at head and the table is missing, the result is not ready (3), with the reason."""
    assert run_bootstrap("init", "--with-worker").returncode == 0
    database.execute("DROP TABLE workspace_files")
    done = run_bootstrap("check", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 3
    assert found["message"].startswith("module cache cannot be compared: ")
    assert "has neither table workspace_files nor file_index" in found["message"]
    assert found["remedy"] == "fix what it says, then run `bifrost-bootstrap init`"
    assert f"what to do: {found['remedy']} (exit 3)" in done.stderr.splitlines()[-1]


def test_check_beside_a_live_api(run_bootstrap: RunBootstrap, database: Database, redis_url: str) -> None:
    """An entry of the API with another TTL does not make `check` fail. An init would still update the TTL."""
    assert run_bootstrap("init", "--with-worker").returncode == 0
    insert_modules(database, MODULES)
    assert run_bootstrap("init", "--with-worker").returncode == 0
    with redis.Redis.from_url(redis_url) as client:
        client.expire("bifrost:module:acceptance_demo/answer.py", 24 * 3600)
        found = json.loads(run_bootstrap("check", "--json").stdout)
        assert (found["exit_code"], found["module_cache"]["expiring"]) == (0, 1)
        assert re.match(r"no bootstrap worker on \S+; `init --with-worker` needs none", found["surroundings"]["worker"])
        assert run_bootstrap("init", "--with-worker").returncode == 0
        assert client.ttl("bifrost:module:acceptance_demo/answer.py") == -1


def test_check_shows_diagnostics(
    run_bootstrap: RunBootstrap,
    bifrost_env: dict[str, str],
    database: Database,
    run_folder: RunFolder,
    start_server: StartServer,
) -> None:
    """`check` shows a Redis that may evict entries, and an INVALID index with the statement that repairs it."""
    server = start_server(RedisServer(run_folder, {"maxmemory": "100000000", "maxmemory-policy": "allkeys-lru"}))
    env = bifrost_env | {"BIFROST_REDIS_URL": server.url()}
    assert run_bootstrap("init", "--with-worker", env=env).returncode == 0
    database.execute("CREATE TABLE doubled AS SELECT 1 AS n FROM generate_series(1, 2)")
    with pytest.raises(psycopg.errors.UniqueViolation):
        database.execute("CREATE UNIQUE INDEX CONCURRENTLY broken ON doubled (n)")
    done = run_bootstrap("check", env=env)
    assert done.returncode == 0
    assert re.search(r"redis +\d+ MB used of 100 MB, policy allkeys-lru: may evict entries and index", done.stdout)
    assert "broken is INVALID; repair it with: REINDEX INDEX CONCURRENTLY broken" in done.stdout


def test_check_needs_no_broker(
    bootstrap_worker: Command, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """A malformed RabbitMQ URL is reported beside the result and does not change the result."""
    assert run_bootstrap("init").returncode == 0
    rest = {name: value for name, value in bifrost_env.items() if name != "BIFROST_RABBITMQ_URL"}
    for faulty in ({"BIFROST_RABBITMQ_URL": "mysql://h"}, {"BIFROST_RABBITMQ_URL_FILE": "/absent"}):
        done = run_bootstrap("check", "--json", env=rest | faulty)
        found = json.loads(done.stdout)
        assert done.returncode == found["exit_code"] == 0
        assert found["surroundings"]["worker"].startswith(next(iter(faulty)))
