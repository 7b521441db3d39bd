"""`check`: ready or not, and what is missing; it waits where it is told to."""

from __future__ import annotations

import json

import redis
from psycopg import sql

from tests.acceptance.state import MODULES, insert_modules
from tests.conftest import BOOTSTRAP, RunBootstrap, StartCommand
from tests.servers import Command, Database


def test_check_waits_for_a_database_that_is_not_there_yet(
    start_command: StartCommand, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str], database: Database
) -> None:
    """Started before the database exists, as beside an image in its first start, it ends with 0 after the init."""
    database.server.drop_database(database)
    check = start_command([*BOOTSTRAP, "check", "--wait", "50s"], env=bifrost_env)
    check.wait_for(f'not ready: .* refuses us: .*"{database.name}" does not exist')
    with database.server.admin() as admin:
        name, owner = sql.Identifier(database.name), sql.Identifier(database.server.app_role)
        admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, owner))
    check.wait_for("not ready: schema is empty, 2 pending")
    assert run_bootstrap("init", "--with-worker").returncode == 0
    assert check.wait().returncode == 0


def test_check_that_waits_is_ended_by_a_signal(start_command: StartCommand, bifrost_env: dict[str, str]) -> None:
    """SIGTERM: 143, as for any Pod that is deleted while it waits."""
    check = start_command([*BOOTSTRAP, "check", "--wait", "5m"], env=bifrost_env)
    check.wait_for("not ready: schema is empty")
    assert check.terminate(10).returncode == 143


def test_check_of_a_table_that_is_gone(run_bootstrap: RunBootstrap, database: Database) -> None:
    """At head, and no table to compare with: not ready (3), and it says why."""
    assert run_bootstrap("init", "--with-worker").returncode == 0
    database.execute("DROP TABLE workspace_files")
    done = run_bootstrap("check", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 3
    assert found["message"].startswith("module cache cannot be compared: ")
    assert "has no table workspace_files" in found["message"]


def test_check_beside_a_live_api(run_bootstrap: RunBootstrap, database: Database, redis_url: str) -> None:
    """An entry that the API has written is right, whatever it has to live: ready; an init would still see to that."""
    assert run_bootstrap("init", "--with-worker").returncode == 0
    insert_modules(database, MODULES)
    assert run_bootstrap("init", "--with-worker").returncode == 0
    with redis.Redis.from_url(redis_url) as client:
        client.expire("bifrost:module:acceptance_demo/answer.py", 24 * 3600)
        found = json.loads(run_bootstrap("check", "--json").stdout)
        assert (found["exit_code"], found["module_cache"]["expiring"]) == (0, 1)
        assert run_bootstrap("init", "--with-worker").returncode == 0
        assert client.ttl("bifrost:module:acceptance_demo/answer.py") == -1


def test_check_needs_no_broker(
    bootstrap_worker: Command, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """A broker's URL that is malformed or cannot be read is told beside the result, and is no fault of the check."""
    assert run_bootstrap("init").returncode == 0
    rest = {name: value for name, value in bifrost_env.items() if name != "BIFROST_RABBITMQ_URL"}
    for faulty in ({"BIFROST_RABBITMQ_URL": "mysql://h"}, {"BIFROST_RABBITMQ_URL_FILE": "/absent"}):
        done = run_bootstrap("check", "--json", env=rest | faulty)
        found = json.loads(done.stdout)
        assert done.returncode == found["exit_code"] == 0
        assert found["surroundings"]["worker"].startswith(next(iter(faulty)))
