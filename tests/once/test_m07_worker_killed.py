"""M7 with the worker: a part of the worker is killed during a migration, and the same init completes it."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.conftest import BOOTSTRAP, StartCommand, StartWorker
from tests.servers import Command, Database
from tests.servers.process import wait_until
from tests.setups.migration import Barrier, Tree, applied, barrier, is_alive, recorded


@pytest.mark.race
@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", ["task process", "worker", "container"])
def test_m07_worker_killed_in_the_middle(
    database: Database,
    tree: Tree,
    bifrost_env: dict[str, str],
    start_command: StartCommand,
    start_worker: StartWorker,
    victim: str,
) -> None:
    """SIGKILL of the task process, of the worker, or of both: no revision is applied in part, another worker
    completes the migration, and the same init exits 0.
    """
    tree.revision("one").revision("two", barrier())
    env = bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(tree.config), "BIFROST_MIGRATION_LOCK_TIMEOUT": "10m"}
    worker = start_worker(env=env)
    with Barrier(database) as stop:
        init = start_command([*BOOTSTRAP, "init", "--json"], env=env)
        session = stop.reached()
        kill(worker, victim)
        wait_until(lambda: not is_alive(database, session), "the end of the dead runner's session", 20)
        assert recorded(database) == ["one"]
        stop.release()
        if victim != "task process":
            start_worker(env=env)
        done = init.wait(120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema_state"]["verdict"] == "at_head"
    assert (recorded(database), applied(database)) == (["two"], {"one": 1, "two": 1})


def kill(worker: Command, victim: str) -> None:
    """SIGKILL to one process of the worker, or to all of them."""
    if victim == "container":
        worker.kill()
    elif victim == "worker":
        os.kill(worker.pid, signal.SIGKILL)
    else:
        (task_process,) = [child for child in worker.descendants() if child.ppid() == worker.pid and child.children()]
        task_process.kill()
