"""M1: any number of replicas start at once. Every revision is applied once, and every init succeeds."""

from __future__ import annotations

import json

import pytest

from tests.conftest import BOOTSTRAP, StartCommand, StartWorker
from tests.servers import Database
from tests.setups.migration import (
    Barrier,
    StartMigrate,
    Tree,
    applied,
    barrier,
    concurrent_index,
    lock_sessions,
    outcome,
    recorded,
)

REPLICAS = 20


@pytest.mark.race
@pytest.mark.timeout(300)
def test_m01_twenty_inits_at_once(
    database: Database,
    tree: Tree,
    bifrost_env: dict[str, str],
    start_command: StartCommand,
    start_worker: StartWorker,
) -> None:
    """Twenty inits and two workers on an empty database: each revision has one row, and all inits exit 0."""
    tree.revision("one").revision("two").revision("three", concurrent_index("ix_three")).revision("four")
    env = bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(tree.config)}
    for _ in range(2):
        start_worker(env=env)
    inits = [start_command([*BOOTSTRAP, "init", "--json"], env=env) for _ in range(REPLICAS)]
    done = [init.wait(240) for init in inits]
    assert [one.returncode for one in done] == [0] * REPLICAS, [one.stderr[-2000:] for one in done if one.returncode]
    assert {json.loads(one.stdout)["schema_state"]["verdict"] for one in done} == {"at_head"}
    assert applied(database) == {"one": 1, "two": 1, "three": 1, "four": 1}
    assert recorded(database) == ["four"]


def test_m01_waiter_logs_whom_it_waits_for(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """The log of a waiting worker has the holder of the lock, its address, and since when it holds the lock."""
    tree.revision("one").revision("two", barrier())
    with Barrier(database) as stop:
        first = start_migrate(BIFROST_MIGRATION_LOCK_TIMEOUT="10m")
        stop.reached()
        (holder,) = lock_sessions(database)
        second = start_migrate()
        second.wait_for(
            r"INFO +waiting for the migration lock, held by bifrost-bootstrap migration-lock \S+"
            rf" \(pid {holder} from \S+\) since \d{{4}}-\d\d-\d\dT"
        )
        stop.release()
        done = [outcome(first), outcome(second)]
    assert [one.code for one in done] == [0, 0]
    assert applied(database) == {"one": 1, "two": 1}
