"""M15: a revision ends its transaction itself. The next revision has a transaction again."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.servers import Command, Database
from tests.servers.pgbouncer import busy_clients
from tests.setups.migration import Barrier, StartMigrate, StartPool, Tree, applied, barrier, index_states, outcome

#: Runs all revisions in one transaction, as the platform's env.py does.
ENV = """
import os
from alembic import context
from sqlalchemy import NullPool, create_engine, make_url

url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+DRIVER")
with create_engine(url, poolclass=NullPool).connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""
#: The old way to add a value to an enum and use it in the same revision.
ADD_VALUE = """
    op.execute("ALTER TYPE kind ADD VALUE IF NOT EXISTS 'system'")
    op.execute("COMMIT")
    op.execute("INSERT INTO kinds VALUES ('system')")
"""
#: Revisions behind the raw COMMIT, each with two statements that belong together.
BEHIND = 12
KILLS = 6


def start(start_migrate: StartMigrate, tree: Tree, **variables: str) -> Command:
    """Start the step on this tree."""
    return start_migrate(env={"BIFROST_ALEMBIC_CONFIG": str(tree.config), **variables})


@pytest.fixture(params=["asyncpg", "psycopg", pytest.param("psycopg2", marks=pytest.mark.slow)])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Tree:
    """A tree for each driver. Its first revision creates an enum."""
    driver = request.param
    tree = Tree(tmp_path / "tree", "asynchronous" if driver == "asyncpg" else "plain")
    if driver != "asyncpg":
        (tree.folder / "env.py").write_text(ENV.replace("DRIVER", driver))
    first = "op.execute(\"CREATE TYPE kind AS ENUM ('user')\"); op.execute('CREATE TABLE kinds (kind kind)')"
    return tree.revision("first", first)


def test_m15_lock_and_transaction_come_back(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """The revision after the raw COMMIT has the shared lock and `lock_timeout`, and the one before is recorded."""
    tree.revision("commits", ADD_VALUE).revision("next", barrier())
    with Barrier(database) as stop:
        step = start(start_migrate, tree)
        pid = stop.reached()
        locks = database.execute(
            "SELECT count(*) FROM pg_locks WHERE pid = %s AND locktype = 'advisory' AND granted AND objid = 2", (pid,)
        )
        recorded = database.execute("SELECT version_num FROM alembic_version")
    assert outcome(step).applied == ["first", "commits", "next"]
    assert locks == [(1,)]
    assert recorded == [("commits",)]
    assert database.execute("SELECT kind::text FROM kinds") == [("system",)]


def test_m15_failure_in_the_next_revision(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """A revision after the raw COMMIT is applied completely or not at all, and the earlier ones stay applied."""
    tree.revision("commits", ADD_VALUE).revision(
        "half", 'op.execute("CREATE TABLE half (id int)")\n    op.execute("SELECT 1 / 0")'
    )
    failed = outcome(start(start_migrate, tree))
    assert failed.code == 1
    assert database.execute("SELECT to_regclass('half')") == [(None,)]
    assert database.execute("SELECT version_num FROM alembic_version") == [("commits",)]


@pytest.mark.parametrize(
    "end",
    [
        "-- now\nCOMMIT WORK",
        *(pytest.param(end, marks=pytest.mark.slow) for end in ("COMMIT", "commit;", "END TRANSACTION")),
    ],
)
def test_m15_concurrent_index_behind_it(database: Database, tree: Tree, start_migrate: StartMigrate, end: str) -> None:
    """The rest of the revision can build an index concurrently, as in an `autocommit_block`."""
    body = f"op.execute({end!r})\n    op.execute('CREATE INDEX CONCURRENTLY ix ON applied (revision)')"
    tree.revision("commits", body).revision("next")
    done = outcome(start(start_migrate, tree))
    assert done.code == 0
    assert index_states(database) == {"ix": True}
    assert applied(database) == {"first": 1, "commits": 1, "next": 1}


def test_m15_begin_by_hand_behind_it(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """BEGIN starts a transaction with the shared lock. If it fails, it is rolled back."""
    body = (
        ADD_VALUE
        + '    op.execute("BEGIN")\n    op.execute("CREATE TABLE half (id int)")\n    op.execute("SELECT 1 / 0")'
    )
    tree.revision("commits", body)
    assert outcome(start(start_migrate, tree)).code == 1
    assert database.execute("SELECT to_regclass('half')") == [(None,)]
    assert database.execute("SELECT version_num FROM alembic_version") == [("first",)]


@pytest.mark.race
def test_m15_several_at_once(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """Five steps at once: every revision is applied once, and all exit 0."""
    tree.revision("commits", ADD_VALUE)
    for number in range(BEHIND):
        tree.revision(f"r{number}", f"op.execute('CREATE TABLE t{number} (id int)')")
    done = [outcome(step) for step in [start(start_migrate, tree) for _ in range(5)]]
    assert [one.code for one in done] == [0] * 5
    assert set(applied(database).values()) == {1}


@pytest.mark.race
def test_m15_killed_behind_it(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """Killed at a random moment after the raw COMMIT: the next run completes."""
    tree.revision("commits", ADD_VALUE)
    for number in range(BEHIND * KILLS):
        tree.revision(
            f"r{number}", f"op.execute('CREATE TABLE t{number} (id int)')\n    op.execute('SELECT pg_sleep(0.05)')"
        )
    generator = random.Random(15)
    for _ in range(KILLS):
        step = start(start_migrate, tree)
        step.wait_for("revision r[0-9]+ begins")
        time.sleep(generator.random() * 0.3)
        step.kill()
    assert outcome(start(start_migrate, tree)).code == 0
    assert len(applied(database)) == BEHIND * KILLS + 2
    assert set(applied(database).values()) == {1}


@pytest.mark.race
def test_m15_behind_a_busy_pooler(
    database: Database, tree: Tree, start_migrate: StartMigrate, start_pool: StartPool
) -> None:
    """PgBouncer in transaction pooling mode with other clients in the same pool: applied once, exit 0."""
    pool = start_pool(4)
    url = pool.url(database.name)
    tree.revision("commits", ADD_VALUE)
    for number in range(BEHIND):
        tree.revision(f"r{number}", f"op.execute('CREATE TABLE t{number} (id int)')")
    with busy_clients(url):
        done = outcome(start(start_migrate, tree, BIFROST_DATABASE_URL=url))
    assert done.code == 0
    assert set(applied(database).values()) == {1}


def test_m15_rollback_by_hand(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """ROLLBACK undoes what was not committed. The rest of the revision runs, and the next ones are complete."""
    assert outcome(start(start_migrate, tree)).code == 0
    undone = 'op.execute("CREATE TABLE undone (id int)")\n    op.execute("ROLLBACK")'
    undone += '\n    op.execute("CREATE TABLE kept (id int)")'
    tree.revision("takes_back", undone).revision("next", "op.execute('CREATE TABLE t (id int)')")
    done = outcome(start(start_migrate, tree))
    assert (done.code, done.applied) == (0, ["takes_back", "next"]), done.facts
    found = database.execute("SELECT to_regclass('undone'), to_regclass('kept')::text, to_regclass('t')::text")
    assert found == [(None, "kept", "t")]


def test_m15_rollback_of_earlier_revisions(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """If ROLLBACK undoes earlier revisions of the same transaction, the run fails and records nothing."""
    tree.revision("takes_back", 'op.execute("ROLLBACK")')
    failed = outcome(start(start_migrate, tree))
    assert failed.code == 1
    assert database.execute("SELECT to_regclass('applied'), to_regclass('kinds')") == [(None, None)]


def test_m15_killed_in_the_rest_of_the_revision(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """The statements after the raw COMMIT are applied with the version, or not at all."""
    rest = 'op.execute("CREATE TABLE once (id int)")\n    ' + barrier()
    tree.revision("commits", ADD_VALUE + "    " + rest)
    with Barrier(database) as stop:
        step = start(start_migrate, tree)
        stop.reached()
        step.kill()
    assert database.execute("SELECT to_regclass('once')") == [(None,)]
    done = outcome(start(start_migrate, tree))
    assert (done.code, done.applied) == (0, ["commits"]), done.facts
    assert database.execute("SELECT kind::text FROM kinds") == [("system",)]


def test_m15_index_between_two_statements(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """After the raw COMMIT: a concurrent build, with transactions before and after it."""
    body = ADD_VALUE + (
        "    op.execute('CREATE INDEX CONCURRENTLY ix ON applied (revision)')\n"
        "    op.execute('CREATE TABLE after (id int)')\n    op.execute('SELECT 1 / 0')"
    )
    tree.revision("commits", body)
    failed = outcome(start(start_migrate, tree))
    assert failed.code == 1
    assert index_states(database) == {"ix": True}
    assert database.execute("SELECT to_regclass('after')") == [(None,)]
    assert database.execute("SELECT kind::text FROM kinds") == [("system",)]


def test_m15_autocommit_block_behind_it(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """Raw COMMIT and `autocommit_block` in one revision: autocommit in the block, a transaction after it."""
    body = ADD_VALUE + (
        "    with op.get_context().autocommit_block():\n"
        "        op.execute('CREATE TABLE inside (id int)')\n"
        "        op.execute('CREATE INDEX CONCURRENTLY ix ON inside (id)')\n"
        "    op.execute('CREATE TABLE behind (id int)')\n    op.execute('SELECT 1 / 0')"
    )
    tree.revision("commits", body)
    failed = outcome(start(start_migrate, tree))
    assert (failed.code, "division by zero" in failed.facts["message"]) == (1, True), failed.facts
    assert database.execute("SELECT kind::text FROM kinds") == [("system",)]
    assert database.execute("SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix'::regclass") == [(True,)]
    assert database.execute("SELECT to_regclass('inside')::text, to_regclass('behind')") == [("inside", None)]
