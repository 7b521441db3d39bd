"""M2: CREATE INDEX CONCURRENTLY waits for every older snapshot, so a process that waits for the lock must hold none."""

from __future__ import annotations

import pytest

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.migrate import lock
from bifrost_bootstrap.migrate.blockers import read_blockers
from bifrost_bootstrap.urls import parse_postgres
from tests.servers import Database
from tests.setups.migration import (
    Barrier,
    StartMigrate,
    Tree,
    applied,
    barrier,
    concurrent_index,
    index_states,
    outcome,
)


@pytest.mark.race
def test_m02_index_is_built_while_five_wait(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """A revision builds an index concurrently while five steps wait for the migration lock, with any default
    isolation level of the database.
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


def test_m02_session_of_the_lock_holds_no_snapshot(database: Database) -> None:
    """When the runner starts, and after each query for blocking sessions, the session of the lock holds no snapshot."""
    url = parse_postgres(database.url)

    def snapshot() -> object:
        query = "SELECT backend_xmin::text FROM pg_stat_activity WHERE pid = %s"
        return database.execute(query, (held.identity["pid"],))[0][0]

    with lock.hold(url, Deadline(10), lambda _what: None) as held:
        assert snapshot() is None
        with held.borrowed_connection() as connection:
            read_blockers(connection)
            assert snapshot() is not None  # the control
        assert snapshot() is None
        assert held.end_runners() == []
        assert snapshot() is None
