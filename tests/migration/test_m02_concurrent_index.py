"""M2: a concurrent index build waits for every older snapshot, so nobody who waits for the lock may hold one."""

from __future__ import annotations

import pytest

from tests.migration.conftest import StartMigrate
from tests.migration.steps import Barrier, Tree, applied, barrier, concurrent_index, index_states, outcome
from tests.servers import Database


@pytest.mark.race
def test_m02_index_is_built_while_five_wait(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """A revision builds an index concurrently while five others wait for the migration lock, whatever the isolation
    level that the database has by default.
    """
    tree.revision("one").revision("two", concurrent_index("ix_two", before=barrier()))
    database.execute(f'ALTER DATABASE "{database.name}" SET default_transaction_isolation = "repeatable read"')
    with Barrier(database) as stop:
        first = start_migrate()
        stop.reached()
        others = [start_migrate() for _ in range(5)]
        for other in others:
            other.wait_for("waiting for the migration lock, held by bifrost-bootstrap migration-lock")
        stop.release()
        done = [outcome(step) for step in (first, *others)]

    assert [one.code for one in done] == [0] * 6
    assert done[0].applied == ["one", "two"]
    assert all(one.applied == [] for one in done[1:])
    assert applied(database) == {"one": 1, "two": 1}
    assert index_states(database) == {"ix_two": True}
