"""M7: killed in the middle, the next run completes, and never beside what the dead one has left in the server."""

from __future__ import annotations

import pytest

from tests.migration.conftest import StartMigrate
from tests.migration.steps import (
    Barrier,
    Tree,
    applied,
    barrier,
    concurrent_index,
    index_states,
    is_alive,
    outcome,
    recorded,
    wait_for_statement,
)
from tests.servers import Database
from tests.servers.process import wait_until


@pytest.mark.race
@pytest.mark.parametrize("victim", ["holder", "runner", "both"])
def test_m07_killed_in_a_transaction(database: Database, tree: Tree, start_migrate: StartMigrate, victim: str) -> None:
    """SIGKILL while a statement of a revision runs: its session goes within seconds and the next run completes."""
    tree.revision("one").revision("two", barrier())
    with Barrier(database) as stop:
        step = start_migrate(BIFROST_MIGRATION_LOCK_TIMEOUT="10m")
        session = stop.reached()
        (runner,) = step.descendants()
        if victim == "holder":
            step.process.kill()
        elif victim == "runner":
            runner.kill()
        else:
            step.kill()
        # Nobody else has come: the server notices by itself, although the statement does nothing.
        wait_until(lambda: not is_alive(database, session), "the end of the dead runner's session", 20)
        stop.release()
        if victim == "runner":
            assert outcome(step).code == 0
        assert outcome(start_migrate()).code == 0
    assert (recorded(database), applied(database)) == (["two"], {"one": 1, "two": 1})


@pytest.mark.race
@pytest.mark.parametrize("if_not_exists", [False, True])
def test_m07_m13_killed_in_a_concurrent_build(
    database: Database, tree: Tree, start_migrate: StartMigrate, if_not_exists: bool
) -> None:
    """SIGKILL while an index is built: the build lives on in the server, the next holder ends it, drops what it left,
    and builds the index anew.
    """
    tree.revision("one").revision("two", concurrent_index("ix_two", if_not_exists=if_not_exists))
    assert outcome(start_migrate(), 60).code == 0  # both, so that the table is there
    with database.connect() as writer:
        # Back to before the second: the build will wait for this open transaction.
        writer.execute("DROP INDEX ix_two; DELETE FROM applied WHERE revision = 'two'")
        writer.execute("UPDATE alembic_version SET version_num = 'one'")
        writer.execute("BEGIN; INSERT INTO applied (revision) VALUES ('open')")
        step = start_migrate()
        session = wait_for_statement(database, "CREATE INDEX CONCURRENTLY")
        step.kill()
        assert is_alive(database, session)
        assert index_states(database) == {"ix_two": False}

        next_step = start_migrate()
        wait_until(lambda: not is_alive(database, session), "the end of the dead runner's build")
        assert recorded(database) == ["one"]
        writer.execute("ROLLBACK")
        done = outcome(next_step)
    assert (done.code, done.applied) == (0, ["two"])
    assert "dropped the INVALID index ix_two" in done.log
    assert index_states(database) == {"ix_two": True}
    assert (recorded(database), applied(database)) == (["two"], {"one": 1, "two": 1})
