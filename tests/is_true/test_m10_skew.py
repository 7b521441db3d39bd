"""M10: a worker of another image does not run the chain of this image, and cannot make init report success."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import BOOTSTRAP, StartCommand, StartWorker
from tests.servers import Database
from tests.setups.migration import Tree, applied, recorded

#: For a chain whose worker has just become ready: it takes two, and a message that was given up 45.
WITHIN_SECONDS = 15


@pytest.mark.race
@pytest.mark.timeout(240)
def test_m10_worker_of_the_previous_image(
    tmp_path: Path,
    database: Database,
    tree: Tree,
    bifrost_env: dict[str, str],
    start_command: StartCommand,
    start_worker: StartWorker,
) -> None:
    """With an idle worker of tree A, an init of tree B = A + 1 says that its worker is missing. A's worker
    runs neither task. When a worker of B starts, init exits 0 at B's head.
    """
    tree.revision("one").revision("two")
    old = bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(tree.config)}
    new_tree = tree.copy(tmp_path / "new")
    new_tree.revision("three")
    new = bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(new_tree.config)}
    old_worker = start_worker(env=old)
    assert start_command([*BOOTSTRAP, "init"], env=old).wait().returncode == 0
    done_before = old_worker.stderr.read_text()

    init = start_command([*BOOTSTRAP, "init", "--json", "--timeout", "200s"], env=new)
    init.wait_for("no bootstrap worker of this tree and database consumes the queue")
    # It would have taken the chain by now: it is idle, and the message is at the broker.
    init.wait_for(r"chain enqueued .*[\s\S]*no bootstrap worker")
    assert init.running
    assert recorded(database) == ["two"]

    new_worker = start_worker(env=new)
    done = init.wait(WITHIN_SECONDS)
    assert done.returncode == 0, done.stderr
    # The worker found the message that was waiting for it.
    assert "enqueueing again" not in done.stderr
    state = json.loads(done.stdout)
    assert state["schema_state"]["database_heads"] == ["three"]
    assert [one["revision"] for one in state["migrate"]["applied"]] == ["three"]
    assert (recorded(database), applied(database)) == (["three"], {"one": 1, "two": 1, "three": 1})
    # A's worker is alive, entitled to calls by hand, and has not touched the chain.
    assert old_worker.running
    assert "revision three applied" in new_worker.stderr.read_text()
    assert old_worker.stderr.read_text() == done_before


@pytest.mark.race
@pytest.mark.timeout(180)
def test_m10_old_head_is_no_success(
    tmp_path: Path,
    database: Database,
    tree: Tree,
    bifrost_env: dict[str, str],
    start_command: StartCommand,
    start_worker: StartWorker,
) -> None:
    """A worker of A that consumes B's queue and reports success at A's head does not make an init of B exit 0."""
    tree.revision("one")
    new_tree = tree.copy(tmp_path / "new")
    new_tree.revision("two")
    new = bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(new_tree.config)}
    started = start_command([*BOOTSTRAP, "worker"], env=new)
    queue = started.wait_for(r"queue (bifrost\.bootstrap\.\w+)")[1]
    started.wait_for(r"ready\.")
    started.terminate()
    old = bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(tree.config), "BIFROST_RUN_QUEUE": queue}
    # The worker of one run ends with its stdin, which the shell keeps open.
    old_worker = start_command(["sh", "-c", 'sleep 600 | "$0" "$@"', *BOOTSTRAP, "worker"], env=old)
    old_worker.wait_for(r"ready\.")
    done = start_command([*BOOTSTRAP, "init", "--json", "--timeout", "60s"], env=new).wait(100)
    assert "revision one applied" in old_worker.stderr.read_text()
    assert (done.returncode, json.loads(done.stdout)["error"]) == (1, "MigrateGivenUpError"), done.stderr
    assert recorded(database) == ["one"]
