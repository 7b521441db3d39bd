"""M11: a revision that waits for a table lock does not block the site, and the error names the blocking session.
lock.
"""

from __future__ import annotations

import contextlib
import re
from functools import partial

import pytest

from tests.servers import Database
from tests.servers.process import wait_until
from tests.setups.migration import (
    Barrier,
    StartMigrate,
    StartPool,
    Tree,
    applied,
    barrier,
    concurrent_index,
    index_states,
    outcome,
    recorded,
    wait_for_statement,
)

ALTER = 'op.execute("ALTER TABLE applied ADD COLUMN more text")'
#: A short lock timeout, but longer than the interval of 1 s at which the step looks for the blocking session.
LOCK_TIMEOUT = {"BIFROST_MIGRATION_LOCK_TIMEOUT": "2500ms"}


def prepare(database: Database, tree: Tree, start_migrate: StartMigrate, body: str) -> None:
    """A database at the first of two revisions."""
    tree.revision("one")
    assert outcome(start_migrate()).code == 0
    tree.revision("two", body)


def test_m11_busy_names_the_blocking_session(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """A session locks the table until the deadline: exit 75 with its PID, user and application, and no change."""
    prepare(database, tree, start_migrate, ALTER)
    with database.connect() as report:
        report.execute("SET application_name = 'quarterly report'")
        report.execute("BEGIN; SELECT * FROM applied")
        done = outcome(start_migrate(deadline=4, env=LOCK_TIMEOUT))
        pid = report.info.backend_pid
    assert (done.code, done.facts["error"]) == (75, "BusyError")
    assert "table lock for revision two" in done.facts["message"]
    assert (
        f"pid {pid} (user bifrost, application 'quarterly report', idle in transaction since" in done.facts["message"]
    )
    assert recorded(database) == ["one"]


def test_m11_readers_continue_and_the_revision_is_retried(
    database: Database, tree: Tree, start_migrate: StartMigrate
) -> None:
    """A reader behind our ALTER continues while the other session still holds its lock. Later the revision is
    applied.
    """
    prepare(database, tree, start_migrate, ALTER)
    with database.connect() as report, database.connect() as reader:
        report.execute("BEGIN; SELECT * FROM applied")
        step = start_migrate(env=LOCK_TIMEOUT)
        wait_for_statement(database, "ALTER TABLE applied")
        reader.execute("SET lock_timeout = '20s'")
        assert reader.execute("SELECT count(*) FROM applied").fetchone() == (1,)
        step.wait_for("trying again")
        report.execute("ROLLBACK")
        done = outcome(step)
    assert (done.code, done.applied, applied(database)) == (0, ["two"], {"one": 1, "two": 1})


def test_m11_busy_names_the_blocking_session_behind_a_pool_of_two(
    database: Database, tree: Tree, start_migrate: StartMigrate, start_pool: StartPool
) -> None:
    """If lock and runner use all connections of the pool, the error names the blocking session all the same."""
    prepare(database, tree, start_migrate, ALTER)
    pool = start_pool(2)
    with database.connect() as report:
        report.execute("SET application_name = 'quarterly report'; SET idle_in_transaction_session_timeout = 0")
        report.execute("BEGIN; SELECT * FROM applied")
        done = outcome(start_migrate(deadline=4, BIFROST_DATABASE_URL=pool.url(database.name)))
        pid = report.info.backend_pid
    assert (done.code, done.facts["error"]) == (75, "BusyError")
    assert f"pid {pid} (user bifrost, application 'quarterly report', idle" in done.facts["message"]
    assert recorded(database) == ["one"]


def test_m11_concurrent_build_has_no_lock_timeout(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """A concurrent index build waits longer than the lock timeout for a writer, and its index is valid."""
    prepare(database, tree, start_migrate, concurrent_index("ix_two"))
    with database.connect() as writer:
        writer.execute("BEGIN; INSERT INTO applied (revision) VALUES ('open')")
        step = start_migrate(BIFROST_MIGRATION_LOCK_TIMEOUT="100ms")
        build = wait_for_statement(database, "CREATE INDEX CONCURRENTLY")
        wait_until(lambda: waited_for(database, build) > 1.5, "a wait of fifteen lock timeouts")
        writer.execute("ROLLBACK")
        done = outcome(step)
    assert (done.code, done.applied) == (0, ["two"])
    assert index_states(database) == {"ix_two": True}
    assert "trying again" not in done.log


@pytest.mark.parametrize("pool_size", [0, pytest.param(2, marks=pytest.mark.slow)], ids=["direct", "pool of two"])
def test_m11_deadline_ends_a_build_that_waits(
    request: pytest.FixtureRequest, database: Database, tree: Tree, start_migrate: StartMigrate, pool_size: int
) -> None:
    """If a concurrent index build still waits at the deadline, it ends with 75, names the writer, and is
    cancelled in the server, also if lock and runner use all connections of a pool. The next run repairs the
    index.
    """
    prepare(database, tree, start_migrate, concurrent_index("ix_two"))
    url = request.getfixturevalue("start_pool")(pool_size).url(database.name) if pool_size else database.url
    with database.connect() as writer:
        writer.execute("SET application_name = 'forgotten'; SET idle_in_transaction_session_timeout = 0")
        writer.execute("BEGIN; INSERT INTO applied (revision) VALUES ('open')")
        done = outcome(start_migrate(deadline=3, BIFROST_DATABASE_URL=url))
        assert (done.code, done.facts["error"]) == (75, "BusyError")
        assert re.search(r"pid \d+ \(user bifrost, application 'forgotten', idle in transaction", done.facts["message"])
        wait_until(lambda: not builds(database), "the end of the build")
        assert recorded(database) == ["one"]
        writer.execute("ROLLBACK")
    assert outcome(start_migrate()).code == 0
    assert index_states(database) == {"ix_two": True}


def test_m11_deadline_does_not_cancel_a_working_revision(
    database: Database, tree: Tree, start_migrate: StartMigrate
) -> None:
    """After the deadline, a revision that waits only shortly for each of many locks continues."""
    stops = range(1, 5)
    prepare(database, tree, start_migrate, "\n    ".join(barrier(number) for number in stops))
    with contextlib.ExitStack() as barriers:
        stop = {number: barriers.enter_context(Barrier(database, number)) for number in stops}
        step = start_migrate(deadline=0.5, BIFROST_MIGRATION_LOCK_TIMEOUT="5s")
        for number in stops:
            runner = stop[number].reached()
            # Longer than the interval at which the step looks for the blocking session.
            wait_until(partial(waits_longer_than, database, runner, 2.0), "a wait for a lock")
            stop[number].release()
        done = outcome(step)
    assert (done.code, done.applied, applied(database)) == (0, ["two"], {"one": 1, "two": 1}), done.log


def waits_longer_than(database: Database, pid: int, seconds: float) -> bool:
    """Whether the statement of this server process began so long ago."""
    return waited_for(database, pid) > seconds


def waited_for(database: Database, pid: int) -> float:
    """Seconds since the statement of this server process began."""
    rows = database.execute(
        "SELECT extract(epoch FROM clock_timestamp() - query_start)::float FROM pg_stat_activity WHERE pid = %s", (pid,)
    )
    return float(rows[0][0])


def builds(database: Database) -> int:
    """Concurrent builds that go on."""
    return len(database.execute("SELECT 1 FROM pg_stat_progress_create_index WHERE datname = current_database()"))
