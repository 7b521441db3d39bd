"""M13: an INVALID index of an interrupted build is repaired."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import psycopg
import pytest

from bifrost_bootstrap.servers import postgres as ours
from bifrost_bootstrap.urls import parse_postgres
from tests.servers import Database, Postgres
from tests.servers.process import wait_until
from tests.setups.migration import (
    Barrier,
    StartMigrate,
    Tree,
    applied,
    barrier,
    concurrent_index,
    index_states,
    outcome,
    recorded,
    wait_for_statement,
)


def leave_invalid(database: Database, statement: str, before_cancel: Callable[[], object] = lambda: None) -> None:
    """Run the statement until it waits for a writer, and end it there."""
    # The writer last: should the test fail, it goes first, and lets the builder end.
    with database.connect() as builder, database.connect() as writer:
        writer.execute("BEGIN; INSERT INTO applied (revision) VALUES ('open')")

        def build() -> None:
            with pytest.raises(psycopg.errors.QueryCanceled):
                builder.execute(statement.encode())

        thread = threading.Thread(target=build)
        thread.start()
        pid = wait_for_statement(database, statement)
        before_cancel()
        database.execute("SELECT pg_cancel_backend(%s)", (pid,))
        thread.join()
        writer.execute("ROLLBACK")


@pytest.mark.parametrize("if_not_exists", [False, True])
def test_m13_revision_heals_its_own_index(
    database: Database, tree: Tree, start_migrate: StartMigrate, if_not_exists: bool
) -> None:
    """The INVALID index of the revision is dropped and built again, with and without IF NOT EXISTS."""
    tree.revision("one")
    assert outcome(start_migrate()).code == 0
    leave_invalid(database, "CREATE INDEX CONCURRENTLY ix_two ON applied (revision)")
    assert index_states(database) == {"ix_two": False}
    tree.revision("two", concurrent_index("ix_two", if_not_exists=if_not_exists))
    done = outcome(start_migrate())
    assert (done.code, done.applied) == (0, ["two"])
    assert "dropped the INVALID index ix_two" in done.log
    assert index_states(database) == {"ix_two": True}
    assert (recorded(database), applied(database)) == (["two"], {"one": 1, "two": 1})


@pytest.mark.parametrize("name", ['"a""b"', "ix$1"])
def test_m13_names(database: Database, tree: Tree, start_migrate: StartMigrate, name: str) -> None:
    """The same with special characters in the name of the index, and with comments in the statement."""
    tree.revision("one")
    assert outcome(start_migrate()).code == 0
    leave_invalid(database, f"CREATE INDEX CONCURRENTLY {name} ON applied (revision)")
    statement = f"CREATE INDEX /* big */ CONCURRENTLY {name} -- one\\n /* two */ON only public.applied (revision)"
    tree.revision("two", f"with op.get_context().autocommit_block():\n        op.execute('{statement}')")
    done = outcome(start_migrate())
    assert (done.code, done.applied) == (0, ["two"])
    assert "dropped the INVALID index" in done.log
    assert list(index_states(database).values()) == [True]


@pytest.mark.race
def test_m13_if_not_exists_behind_a_build_that_fails(
    database: Database, tree: Tree, start_migrate: StartMigrate
) -> None:
    """IF NOT EXISTS waits for a build of another session that is then cancelled. The INVALID index is not
    recorded as built.
    """
    tree.revision("one")
    assert outcome(start_migrate()).code == 0
    tree.revision("two", concurrent_index("ix_theirs", if_not_exists=True))
    statement = "CREATE INDEX CONCURRENTLY ix_theirs ON applied (revision)"
    steps = []
    with database.connect() as writer:
        writer.execute("BEGIN; INSERT INTO applied (revision) VALUES ('open')")

        def queue_behind() -> None:
            steps.append(start_migrate())
            wait_for_statement(database, "autocommit */ CREATE INDEX")

        leave_invalid(database, statement, before_cancel=queue_behind)
        writer.execute("ROLLBACK")
        done = outcome(steps[0])
    assert (done.code, done.applied) == (0, ["two"])
    assert "dropped the INVALID index ix_theirs" in done.log
    assert index_states(database) == {"ix_theirs": True}


@pytest.mark.race
def test_m13_hidden_build_of_another_table(
    postgres: Postgres, database: Database, tree: Tree, start_migrate: StartMigrate
) -> None:
    """While another role, whose progress is hidden, builds an index on its own table, the INVALID index of the
    revision is dropped and built again, and other ones are reported.
    """
    tree.revision("one")
    assert outcome(start_migrate()).code == 0
    leave_invalid(database, "CREATE INDEX CONCURRENTLY ix_two ON applied (revision)")
    leave_invalid(database, "CREATE INDEX CONCURRENTLY ix_left ON applied (pid)")
    tree.revision("two", concurrent_index("ix_two", if_not_exists=True, before=barrier()))
    with Barrier(database) as stop:
        step = start_migrate()
        # Earlier, the step would wait for the build's end.
        stop.reached()
        with hidden_build(postgres, database, "theirs"):
            stop.release()
            done = outcome(step)
    assert (done.code, done.applied) == (0, ["two"])
    assert "dropped the INVALID index ix_two" in done.log
    assert "index ix_left is INVALID" in done.log
    assert index_states(database) == {"ix_two": True, "ix_left": False}


@contextlib.contextmanager
def hidden_build(postgres: Postgres, database: Database, table: str) -> Iterator[None]:
    """The administrator builds an index on a table concurrently, which does not end before the block."""
    statement = f"CREATE INDEX CONCURRENTLY ix_hidden ON {table} (revision)"
    with postgres.admin(database.name) as builder, postgres.admin(database.name) as writer:
        writer.execute(f"CREATE TABLE IF NOT EXISTS {table} (revision text)".encode())
        writer.execute(f"BEGIN; INSERT INTO {table} VALUES ('open')".encode())
        thread = threading.Thread(target=builder.execute, args=(statement.encode(),))
        thread.start()
        try:
            wait_until(lambda: waits_for_writer(database, builder.info.backend_pid), "the build to wait")
            yield
        finally:
            writer.execute("ROLLBACK")
            thread.join()


def waits_for_writer(database: Database, pid: int) -> bool:
    """Whether this server process waits for the end of a transaction."""
    return bool(
        database.execute("SELECT 1 FROM pg_locks WHERE pid = %s AND locktype = 'virtualxid' AND NOT granted", (pid,))
    )


def test_m13_others_are_reported(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """INVALID indexes of no revision are not changed. They are reported with the statement that repairs them."""
    tree.revision("one", 'op.execute("CREATE INDEX ix_kept ON applied (pid)")')
    assert outcome(start_migrate()).code == 0
    leave_invalid(database, 'CREATE INDEX CONCURRENTLY "ix Other" ON applied (revision)')
    leave_invalid(database, "REINDEX INDEX CONCURRENTLY ix_kept")
    left = {"ix_kept": True, '"ix Other"': False, "ix_kept_ccnew": False}
    assert index_states(database) == left
    tree.revision("two", concurrent_index("ix_two"))
    done = outcome(start_migrate())
    assert index_states(database) == left | {"ix_two": True}
    repairs = ['REINDEX INDEX CONCURRENTLY "ix Other"', "DROP INDEX CONCURRENTLY ix_kept_ccnew"]
    for repair in repairs:
        assert f"repair it with: {repair}\n" in done.log
        with database.connect() as session:
            session.execute(repair.encode())
    assert index_states(database) == {"ix_kept": True, '"ix Other"': True, "ix_two": True}


@pytest.mark.race
def test_m13_hidden_build_of_the_same_table(
    postgres: Postgres, database: Database, tree: Tree, start_migrate: StartMigrate
) -> None:
    """An index that another role builds, whose progress is hidden, is neither dropped nor reported."""
    tree.revision("one")
    assert outcome(start_migrate()).code == 0
    tree.revision("two", concurrent_index("ix_hidden", before=barrier()))
    with Barrier(database) as stop:
        step = start_migrate()
        stop.reached()
        with hidden_build(postgres, database, "applied"):
            stop.release()
            # Its build queues behind theirs; a drop would, too, and take the finished index.
            wait_for_statement(database, "autocommit */ CREATE INDEX")
            with ours.connect(parse_postgres(database.url), "test") as connection:
                assert ours.invalid_indexes(connection) == {}
        done = outcome(step)
    assert (done.code, done.facts["error"]) == (1, "MigrationError")
    assert 'relation "ix_hidden" already exists' in done.facts["message"]
    assert index_states(database) == {"ix_hidden": True}


@pytest.mark.race
def test_m13_index_under_construction_is_not_dropped(
    database: Database, tree: Tree, start_migrate: StartMigrate
) -> None:
    """An INVALID index that another session is building is not dropped. That session finishes, and the
    revision fails with the error of the server.
    """
    tree.revision("one")
    assert outcome(start_migrate()).code == 0
    tree.revision("two", concurrent_index("ix_theirs"))
    statement = "CREATE INDEX CONCURRENTLY ix_theirs ON applied (revision)"
    # The writer last: should the test fail, it goes first, and lets the builder end.
    with database.connect() as builder, database.connect() as writer:
        writer.execute("BEGIN; INSERT INTO applied (revision) VALUES ('open')")
        thread = threading.Thread(target=builder.execute, args=(statement.encode(),))
        thread.start()
        wait_for_statement(database, statement)
        step = start_migrate()
        # Its build queues behind theirs; a drop would, too, and take the finished index.
        wait_for_statement(database, "autocommit */ CREATE INDEX")
        writer.execute("ROLLBACK")
        thread.join()
        done = outcome(step)
    assert (done.code, done.facts["error"]) == (1, "MigrationError")
    assert 'relation "ix_theirs" already exists' in done.facts["message"]
    assert index_states(database) == {"ix_theirs": True}
