"""M3: PgBouncer in transaction pooling mode, in which each transaction may get another session."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Literal

import psycopg
import pytest

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.migrate.lock import hold
from bifrost_bootstrap.urls import parse_postgres
from tests.servers import Database, PgbouncerServer
from tests.servers.process import wait_until
from tests.setups.migration import (
    Barrier,
    Outcome,
    StartMigrate,
    StartPool,
    Tree,
    applied,
    barrier,
    concurrent_index,
    index_states,
    lock_sessions,
    outcome,
    recorded,
)

#: Longer than any timer of these tests, by several times.
LONG = 'op.execute("SELECT pg_sleep(5)")'
#: What PgBouncer itself keeps in step with its clients.
TRACKED = ["application_name", "client_encoding", "DateStyle", "standard_conforming_strings", "TimeZone"]


def left_behind(pool: PgbouncerServer, database: Database) -> list[tuple[object, ...]]:
    """Session settings, locks and prepared statements on the pool's server connections, each looked at once."""
    with psycopg.connect(pool.url("pgbouncer", user="console"), autocommit=True) as console:
        console.execute("SET idle_transaction_timeout = 0")
    servers = [server for server in pool.show("SERVERS") if server["database"] == database.name]
    found: list[tuple[object, ...]] = []
    seen = set()
    with contextlib.ExitStack() as clients:
        for _ in servers:
            client = clients.enter_context(psycopg.connect(pool.url(database.name), prepare_threshold=None))
            found += client.execute(
                "SELECT 'setting', name, setting FROM pg_settings WHERE source = 'session' AND NOT name = ANY(%s)"
                " UNION ALL SELECT 'lock', locktype, objid::text FROM pg_locks WHERE pid = pg_backend_pid()"
                " AND locktype = 'advisory'"
                " UNION ALL SELECT 'statement', name, statement FROM pg_prepared_statements",
                (TRACKED,),
            ).fetchall()
            # Its open transaction keeps this server connection from the next client.
            client.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            seen.add(client.execute("SELECT pg_backend_pid()").fetchone())
    assert len(seen) == len(servers) > 0
    return found


@pytest.mark.race
@pytest.mark.parametrize(
    ("pool_size", "kind", "replicas"), [(2, "plain", 3), (20, "plain", 5), (20, "asynchronous", 3)]
)
def test_m03_replicas_through_a_pooler(
    database: Database,
    tmp_path: Path,
    start_migrate: StartMigrate,
    start_pool: StartPool,
    pool_size: int,
    kind: Literal["plain", "asynchronous"],
    replicas: int,
) -> None:
    """Replicas behind a pool apply each revision once, also a long one (and with psycopg a concurrent build),
    although role and pooler end idle transactions soon. They leave no setting in the sessions of the pool.
    """
    tree = Tree(tmp_path / kind, kind).revision("one").revision("two", LONG)
    tree.revision("three", concurrent_index("ix_three") if kind == "plain" else "").revision("four")
    pool = start_pool(pool_size)
    done = migrate_at_once(start_migrate, pool.url(database.name), tree, replicas)
    assert not any("trying again" in one.log for one in done)
    assert applied(database) == {"one": 1, "two": 1, "three": 1, "four": 1}
    assert index_states(database) == ({"ix_three": True} if kind == "plain" else {})
    assert left_behind(pool, database) == []


@pytest.mark.race
def test_m03_asyncpg_outside_a_transaction(
    database: Database, tmp_path: Path, start_migrate: StartMigrate, start_pool: StartPool
) -> None:
    """Outside a transaction, asyncpg prepares and executes in two round trips, and another client may get the
    session in between. The runner uses one round trip, succeeds at the first attempt, and leaves nothing
    behind.
    """
    tree = Tree(tmp_path / "asynchronous", "asynchronous").revision("one")
    tree.revision("two", concurrent_index("ix_two")).revision("three").revision("four", concurrent_index("ix_four"))
    pool = start_pool(20)
    done = migrate_at_once(start_migrate, pool.url(database.name), tree, 4)
    assert [line for one in done for line in one.log.splitlines() if "trying again" in line] == []
    assert applied(database) == {"one": 1, "two": 1, "three": 1, "four": 1}
    assert index_states(database) == {"ix_two": True, "ix_four": True}
    assert left_behind(pool, database) == []


#: What a revision may do outside a transaction, and look at afterwards.
PREPARE = """
    op.execute("CREATE TABLE many AS SELECT n, false AS done FROM generate_series(1, 25) AS n")
    op.execute(
        "CREATE PROCEDURE add() LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO many VALUES (28, true); COMMIT; INSERT INTO many VALUES (29, true); END $$"
    )
"""
BACKFILL = """
    from sqlalchemy import text
    bind = op.get_bind()
    with op.get_context().autocommit_block():
        batch = text("UPDATE many SET done = true WHERE n IN (SELECT n FROM many WHERE NOT done LIMIT 10)")
        assert [bind.execute(batch).rowcount for _ in range(4)] == [10, 10, 5, 0]
        assert bind.execute(text("SELECT count(*) FROM many WHERE done")).scalar() == 25
        bind.execute(text("INSERT INTO many VALUES (:n, true)"), [{"n": 26}, {"n": 27}])
        assert bind.execute(text("SELECT n FROM many WHERE n > :n ORDER BY n"), {"n": 25}).scalars().all() == [26, 27]
        op.execute("VACUUM many")
        op.execute("CALL add()")
        assert bind.execute(text("SELECT n FROM many WHERE n > 27 ORDER BY n")).scalars().all() == [28, 29]
"""


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
def test_m03_results_outside_a_transaction(
    database: Database,
    tmp_path: Path,
    start_migrate: StartMigrate,
    start_pool: StartPool,
    pooled: bool,
    kind: Literal["plain", "asynchronous"],
) -> None:
    """A backfill in batches outside a transaction gets row counts and query results, with and without
    parameters. So do statements that must not run in a transaction.
    """
    tree = Tree(tmp_path / kind, kind).revision("one", PREPARE).revision("two", BACKFILL)
    pool = start_pool(20) if pooled else None
    url = pool.url(database.name) if pool else database.url
    done = outcome(start_migrate(BIFROST_DATABASE_URL=url, BIFROST_ALEMBIC_CONFIG=str(tree.config)))
    assert (done.code, done.applied) == (0, ["one", "two"]), done.log
    assert database.execute("SELECT count(*) FROM many WHERE done") == [(29,)]
    assert pool is None or left_behind(pool, database) == []


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
def test_m03_statement_cache_of_the_url(
    database: Database, tmp_path: Path, start_migrate: StartMigrate, start_pool: StartPool, pooled: bool
) -> None:
    """If the URL sets a statement cache of asyncpg, repeated statements succeed at the first attempt, and no
    prepared statement is left.
    """
    pool = start_pool(20) if pooled else None
    url = f"{pool.url(database.name) if pool else database.url}?prepared_statement_cache_size=500"
    batch = 'op.execute("UPDATE applied SET pid = pid")'
    body = f"with op.get_context().autocommit_block():\n        for _ in range(3):\n            {batch}"
    tree = Tree(tmp_path / "asynchronous", "asynchronous").revision("one").revision("two", body)
    done = outcome(start_migrate(deadline=20, BIFROST_DATABASE_URL=url, BIFROST_ALEMBIC_CONFIG=str(tree.config)))
    assert (done.code, done.applied) == (0, ["one", "two"]), done.facts
    assert "trying again" not in done.log
    assert pool is None or left_behind(pool, database) == []


def test_m03_tree_with_connections_of_its_own(database: Database, tmp_path: Path, start_migrate: StartMigrate) -> None:
    """An engine with an `async_creator` keeps its prepared statements from one transaction to the next."""
    batch = 'op.execute("UPDATE applied SET pid = pid")'
    loose = f"with op.get_context().autocommit_block():\n        {batch}"
    tree = Tree(tmp_path / "asynchronous", "asynchronous").revision("one", batch).revision("two", loose)
    tree.revision("three", batch)
    env = tree.folder / "env.py"
    ours = "create_async_engine(DATABASE_URL)"
    create = 'lambda: __import__("asyncpg").connect(DATABASE_URL.replace("+asyncpg", ""))'
    assert ours in env.read_text()
    env.write_text(
        env.read_text().replace(ours, f'create_async_engine("postgresql+asyncpg://", async_creator={create})')
    )
    done = outcome(start_migrate(deadline=20, BIFROST_ALEMBIC_CONFIG=str(tree.config)))
    assert (done.code, done.applied) == (0, ["one", "two", "three"]), done.facts
    assert "trying again" not in done.log
    assert applied(database) == {"one": 1, "two": 1, "three": 1}


#: The server refuses it at COMMIT.
DEFERRED = """
    op.execute("CREATE TABLE parent (n int PRIMARY KEY)")
    op.execute("CREATE TABLE child (n int CONSTRAINT no REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
    op.execute("INSERT INTO child VALUES (1)")
"""


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('op.execute("SELECT count(*) FROM applied")\n    raise ValueError("no")', "ValueError: no"),
        (DEFERRED, 'insert or update on table "child" violates foreign key constraint "no"'),
    ],
    ids=["raised", "at COMMIT"],
)
def test_m03_failed_revision_leaves_nothing(
    database: Database, tmp_path: Path, start_migrate: StartMigrate, start_pool: StartPool, body: str, why: str
) -> None:
    """Prepared statements of a failed transaction are removed."""
    tree = Tree(tmp_path / "asynchronous", "asynchronous").revision("one").revision("two", body)
    pool = start_pool(20)
    done = outcome(start_migrate(BIFROST_DATABASE_URL=pool.url(database.name), BIFROST_ALEMBIC_CONFIG=str(tree.config)))
    assert (done.code, f"revision two (Revision two) failed: {why}" in done.facts["message"]) == (1, True), done.facts
    assert left_behind(pool, database) == []


def migrate_at_once(start_migrate: StartMigrate, url: str, tree: Tree, replicas: int) -> list[Outcome]:
    """The step in so many processes; all succeed, and each revision is in the result of one of them."""
    steps = [start_migrate(BIFROST_DATABASE_URL=url, BIFROST_ALEMBIC_CONFIG=str(tree.config)) for _ in range(replicas)]
    done = [outcome(step, 90) for step in steps]
    assert [one.code for one in done] == [0] * replicas, [one.facts for one in done]
    names = [path.stem for path in tree.versions.glob("*.py")]
    assert sorted(revision for one in done for revision in one.applied) == sorted(names)
    return done


@pytest.mark.race
def test_m03_lock_of_a_killed_holder_is_released(
    database: Database, tree: Tree, start_migrate: StartMigrate, start_pool: StartPool
) -> None:
    """After SIGKILL of a holder behind the pool, its lock is free within seconds, and the next run completes."""
    tree.revision("one").revision("two", barrier())
    url = start_pool(20).url(database.name)
    with Barrier(database) as stop:
        step = start_migrate(BIFROST_DATABASE_URL=url, BIFROST_MIGRATION_LOCK_TIMEOUT="10m")
        stop.reached()
        assert len(lock_sessions(database)) == 1
        step.send_signal(signal.SIGKILL)
        wait_until(lambda: not lock_sessions(database), "the release of the lock", 10)
        wait_until(lambda: not stop.waiting(), "the end of the runner's session", 10)
    assert outcome(start_migrate(BIFROST_DATABASE_URL=url)).code == 0
    assert (recorded(database), applied(database)) == (["two"], {"one": 1, "two": 1})


@pytest.mark.parametrize("patience", [pytest.param("60", marks=pytest.mark.slow), "5"])
def test_m03_pool_of_one_is_named(
    database: Database, tree: Tree, start_migrate: StartMigrate, start_pool: StartPool, patience: str
) -> None:
    """A pool of one connection ends with 78 long before the deadline, with what to change, whether our timeout
    or that of the pooler ends first. Nothing is migrated.
    """
    tree.revision("one")
    pool = start_pool(1, query_wait_timeout=patience)
    done = outcome(start_migrate(deadline=600, BIFROST_DATABASE_URL=pool.url(database.name)))
    assert (done.code, done.facts["error"]) == (78, "PoolTooSmallError")
    assert "pool of one connection" in done.facts["message"]
    assert "BIFROST_MIGRATION_DATABASE_URL" in done.facts["remedy"]
    assert database.execute("SELECT to_regclass('alembic_version')::text") == [(None,)]


def test_m03_lock_dropped_by_the_pooler_after_the_run(database: Database, start_pool: StartPool) -> None:
    """The connection of the lock is idle between the end of the runner and the release. If the pooler closes
    it then, the step succeeds.
    """
    url = parse_postgres(start_pool(2).url(database.name))
    with hold(url, Deadline(60), print):
        assert len(lock_sessions(database)) == 1
        wait_until(lambda: not lock_sessions(database), "the end of the lock")
    with hold(url, Deadline(60), print):
        assert len(lock_sessions(database)) == 1
    assert lock_sessions(database) == []


@pytest.mark.timeout(120)
def test_m03_busy_pool_is_no_pool_of_one(
    database: Database, tree: Tree, start_migrate: StartMigrate, start_pool: StartPool
) -> None:
    """If another client has the second connection of the pool, the step waits for it and then uses it."""
    tree.revision("one")
    pool = start_pool(2, idle_transaction_timeout="0")
    with psycopg.connect(pool.url(database.name), prepare_threshold=None) as busy:
        busy.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        step = start_migrate(BIFROST_DATABASE_URL=pool.url(database.name))
        step.wait_for("no answer within .*trying again")
    done = outcome(step)
    assert (done.code, done.applied) == (0, ["one"])


def test_m03_migrations_past_the_pooler(
    database: Database, tree: Tree, start_migrate: StartMigrate, start_pool: StartPool
) -> None:
    """With a direct migration URL, the step does not use a pool of one connection, and completes."""
    tree.revision("one")
    pool = start_pool(1)
    done = outcome(
        start_migrate(BIFROST_DATABASE_URL=pool.url(database.name), BIFROST_MIGRATION_DATABASE_URL=database.url)
    )
    assert (done.code, done.applied) == (0, ["one"])
    assert [server for server in pool.show("SERVERS") if server["database"] == database.name] == []
