"""M7: after a kill, the next run completes, and never runs beside what the killed run left in the server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from tests.servers import Database, PgbouncerServer, Postgres, PostgresServer, RunFolder
from tests.servers.process import wait_until
from tests.setups.migration import (
    Barrier,
    StartMigrate,
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


@pytest.mark.race
@pytest.mark.parametrize("victim", ["holder", "runner", "both"])
def test_m07_killed_in_a_transaction(database: Database, tree: Tree, start_migrate: StartMigrate, victim: str) -> None:
    """SIGKILL while a statement runs: its session ends within seconds, and the next run completes."""
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
@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
def test_m07_killed_outside_a_transaction(
    run_folder: RunFolder,
    start_server: Callable[[PgbouncerServer], PgbouncerServer],
    database: Database,
    tmp_path: Path,
    start_migrate: StartMigrate,
    pooled: bool,
    kind: Literal["plain", "asynchronous"],
) -> None:
    """SIGKILL of the holder while a statement runs outside a transaction: its runner cancels the statement
    before the next holder starts, also behind a pooler.
    """
    block = f"with op.get_context().autocommit_block():\n        {barrier()}"
    tree = Tree(tmp_path / kind, kind).revision("one").revision("two", block)
    url = database.url
    if pooled:
        if not isinstance(database.server, PostgresServer):
            pytest.skip("PgBouncer stands before a server of our own")
        url = start_server(PgbouncerServer(run_folder, database.server)).url(database.name)
    env = {"BIFROST_DATABASE_URL": url, "BIFROST_ALEMBIC_CONFIG": str(tree.config)}
    with Barrier(database) as stop:
        step = start_migrate(env=env)
        stop.reached()
        step.process.kill()
        wait_until(lambda: not stop.waiting(), "the end of the statement", 20)
        assert recorded(database) == ["one"]
    assert outcome(start_migrate(env=env)).code == 0
    assert (recorded(database), applied(database)) == (["two"], {"one": 1, "two": 1})


@pytest.mark.race
def test_m07_all_killed_outside_a_transaction(database: Database, tmp_path: Path, start_migrate: StartMigrate) -> None:
    """SIGKILL of holder and runner while asyncpg runs a statement in an `autocommit_block`: the server notices
    the closed connection, as it does in a transaction.
    """
    block = f"with op.get_context().autocommit_block():\n        {barrier()}"
    tree = Tree(tmp_path / "asynchronous", "asynchronous").revision("one").revision("two", block)
    with Barrier(database) as stop:
        step = start_migrate(BIFROST_ALEMBIC_CONFIG=str(tree.config))
        session = stop.reached()
        step.kill()
        wait_until(lambda: not is_alive(database, session), "the end of the dead runner's session", 20)
    assert outcome(start_migrate(BIFROST_ALEMBIC_CONFIG=str(tree.config))).code == 0
    assert (recorded(database), applied(database)) == (["two"], {"one": 1, "two": 1})


@pytest.mark.parametrize(
    ("version", "interval"),
    [
        (None, "1s"),
        ("PostgreSQL 14.9 on aarch64-apple-darwin22.6.0, compiled by Apple clang version 14.0.3, 64-bit", "0"),
    ],
    ids=["Linux", "macOS"],
)
def test_m07_server_that_cannot_check_its_connections(
    database: Database, tree: Tree, start_migrate: StartMigrate, version: str | None, interval: str
) -> None:
    """client_connection_check_interval is set only for servers on Linux, because others reject it."""
    if version:
        # There is no such server here; this one gives itself out for it.
        database.execute(f'ALTER DATABASE "{database.name}" SET search_path = public, pg_catalog')
        database.execute(f"CREATE FUNCTION public.version() RETURNS text LANGUAGE sql AS $$ SELECT '{version}' $$")
    setting = "current_setting('client_connection_check_interval')"
    tree.revision("one", f'op.execute("CREATE TABLE seen AS SELECT {setting} AS interval")')
    assert outcome(start_migrate()).code == 0
    assert database.execute("SELECT interval FROM seen") == [(interval,)]


@pytest.mark.race
def test_m07_build_that_another_role_has_left(
    postgres: Postgres, database: Database, tree: Tree, start_migrate: StartMigrate
) -> None:
    """If the role may not see the statement of a concurrent build, the holder waits until the build ends."""
    other = f"other_{database.name}"
    with postgres.admin(database.name) as admin:
        admin.execute(f"CREATE ROLE {other} LOGIN PASSWORD '{postgres.app_password}'".encode())
        admin.execute(f"GRANT ALL ON SCHEMA public TO {other}".encode())
    tree.revision("one")
    database.execute("CREATE TABLE large (n int)")
    with database.connect() as builder, database.connect() as writer:
        writer.execute("BEGIN; INSERT INTO large VALUES (1)")
        build = threading.Thread(target=builder.execute, args=(b"CREATE INDEX CONCURRENTLY ix_large ON large (n)",))
        build.start()
        wait_for_statement(database, "CREATE INDEX CONCURRENTLY ix_large")
        step = start_migrate(BIFROST_DATABASE_URL=postgres.url(database.name, user=other))
        step.wait_for(rf"what an earlier runner has left in the server \(pid {builder.info.backend_pid}\)")
        writer.execute("ROLLBACK")
        build.join()
        done = outcome(step)
    with postgres.admin(database.name) as admin:
        admin.execute(f"DROP OWNED BY {other}".encode())
        admin.execute(f"DROP ROLE {other}".encode())
    assert (done.code, done.applied) == (0, ["one"])


@pytest.mark.race
@pytest.mark.parametrize("if_not_exists", [False, True])
def test_m07_m13_killed_in_a_concurrent_build(
    database: Database, tree: Tree, start_migrate: StartMigrate, if_not_exists: bool
) -> None:
    """SIGKILL while an index is built: the build continues in the server. The next holder ends it, drops the
    INVALID index and builds it again.
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
