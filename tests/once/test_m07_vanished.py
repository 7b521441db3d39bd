"""M7 and M4: a holder that vanishes without a FIN, and a server that fails during a revision."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from tests.servers import Database, Postgres, PostgresServer, Proxy, RunFolder
from tests.servers.process import wait_until
from tests.setups.migration import Barrier, StartMigrate, Tree, applied, barrier, lock_sessions, outcome, recorded

#: A revision that waits for the test in its own code.
BETWEEN_TWO_STATEMENTS = """
    import pathlib, time
    here = pathlib.Path(__file__)
    with op.get_context().autocommit_block():
        here.with_suffix(".here").touch()
        while not here.with_suffix(".go").exists():
            time.sleep(0.05)
        op.execute("SELECT 1")
"""


@pytest.fixture
def host(postgres: Postgres) -> Iterator[Proxy]:
    """A proxy: the host of the step, as the server sees it."""
    if not isinstance(postgres, PostgresServer):
        pytest.skip("the host stands before a server of our own")
    if sys.platform != "linux":
        pytest.skip("elsewhere the kernel goes on to answer keepalives")
    with Proxy(postgres.port) as host:
        yield host


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("within_an_answer", [False, True])
def test_m07_holder_vanishes_without_a_word(
    database: Database, tree: Tree, start_migrate: StartMigrate, host: Proxy, within_an_answer: bool
) -> None:
    """The host of a holder vanishes between two packets, or before it acknowledges an answer: the server
    notices within the 60 s of the next run, which ends the old session and completes.
    """
    tree.revision("one").revision("two", barrier())
    with Barrier(database) as stop:
        url = host.through(database.url)
        step = start_migrate(BIFROST_DATABASE_URL=url, BIFROST_MIGRATION_LOCK_TIMEOUT="10m")
        dead = stop.reached()
        if within_an_answer:
            host.deafen()
            before = last_statement(database)
            wait_until(lambda: last_statement(database) != before, "one more statement on the lock's connection")
        host.strand()
        step.kill()
        assert len(lock_sessions(database)) == 1
        next_step = start_migrate(deadline=60, BIFROST_MIGRATION_LOCK_TIMEOUT="10m")
        next_step.wait_for("waiting for the migration lock, held by")
        stop.reached(besides=[dead], timeout=90)
        assert dead not in stop.waiting()
        stop.release()
        done = outcome(next_step)
    assert (done.code, done.applied) == (0, ["two"])
    assert (recorded(database), applied(database)) == (["two"], {"one": 1, "two": 1})


def last_statement(database: Database) -> object:
    """When the lock's session has begun its last statement."""
    (session,) = lock_sessions(database)
    return database.execute("SELECT query_start FROM pg_stat_activity WHERE pid = %s", (session,))


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
def test_m04_connection_breaks_between_two_statements(
    postgres: Postgres,
    database: Database,
    tmp_path: Path,
    start_migrate: StartMigrate,
    kind: Literal["plain", "asynchronous"],
) -> None:
    """Only the connection of the runner breaks, between two statements. The proof of the lock notices it, and
    the revision is retried.
    """
    if not isinstance(postgres, PostgresServer):
        pytest.skip("the proxy stands before a server of our own")
    tree = Tree(tmp_path / kind, kind).revision("one").revision("two", BETWEEN_TWO_STATEMENTS)
    for file in tree.folder.glob("*.py"):
        file.write_text(file.read_text().replace('os.environ["DATABASE_URL"]', 'os.environ["OWN_URL"]'))
    with Proxy(postgres.port) as proxy:
        step = start_migrate(OWN_URL=proxy.through(database.url), BIFROST_ALEMBIC_CONFIG=str(tree.config))
        wait_until((tree.versions / "two.here").exists, "the revision between its statements")
        proxy.refuse()
        proxy.heal()
        (tree.versions / "two.go").touch()
        done = outcome(step)
    assert (done.code, sorted(done.applied)) == (0, ["one", "two"]), done.facts
    assert "trying again" in done.log
    assert applied(database) == {"one": 1, "two": 1}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
def test_m04_server_restarts_in_the_middle(
    run_folder: RunFolder,
    start_server: Callable[[PostgresServer], PostgresServer],
    tmp_path: Path,
    start_migrate: StartMigrate,
    kind: Literal["plain", "asynchronous"],
) -> None:
    """PostgreSQL is killed during a revision and restarts: the step retries and applies each revision once,
    with every driver.
    """
    server = start_server(PostgresServer(run_folder))
    database = server.create_database()
    tree = Tree(tmp_path / kind, kind).revision("one")
    assert outcome(start_migrate(BIFROST_DATABASE_URL=database.url, BIFROST_ALEMBIC_CONFIG=str(tree.config))).code == 0
    tree.revision("two", barrier())
    stop = Barrier(database)
    step = start_migrate(
        BIFROST_DATABASE_URL=database.url,
        BIFROST_ALEMBIC_CONFIG=str(tree.config),
        BIFROST_MIGRATION_LOCK_TIMEOUT="10m",
    )
    stop.reached()
    server.kill()
    step.wait_for("trying again")
    server.start()
    stop.release()
    done = outcome(step)
    assert (done.code, done.applied) == (0, ["two"])
    assert (recorded(database), applied(database)) == (["two"], {"one": 1, "two": 1})


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
def test_m04_tree_without_connection_tries_again(
    postgres: Postgres,
    database: Database,
    tmp_path: Path,
    start_migrate: StartMigrate,
    kind: Literal["plain", "asynchronous"],
) -> None:
    """The lock has a connection and env.py gets none: the step retries until it gets one, and reports no
    failed revision.
    """
    if not isinstance(postgres, PostgresServer):
        pytest.skip("the proxy stands before a server of our own")
    tree = Tree(tmp_path / kind, kind).revision("one")
    for file in tree.folder.glob("*.py"):
        file.write_text(file.read_text().replace('os.environ["DATABASE_URL"]', 'os.environ["OWN_URL"]'))
    with Proxy(postgres.port) as proxy:
        own_url = proxy.through(database.url)
        proxy.refuse()
        step = start_migrate(OWN_URL=own_url, BIFROST_ALEMBIC_CONFIG=str(tree.config))
        step.wait_for("trying again")
        proxy.heal()
        done = outcome(step)
    assert (done.code, done.applied, applied(database)) == (0, ["one"], {"one": 1})


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_m04_server_freezes_in_the_middle(
    run_folder: RunFolder,
    start_server: Callable[[PostgresServer], PostgresServer],
    tree: Tree,
    start_migrate: StartMigrate,
) -> None:
    """A server freezes during a revision, accepts data and never replies: the step treats its lock as lost and
    ends with 69. Nothing of the revision is recorded when the server continues.
    """
    server = start_server(PostgresServer(run_folder))
    database = server.create_database()
    tree.revision("one").revision("two", barrier())
    with Barrier(database) as stop:
        step = start_migrate(deadline=5, BIFROST_DATABASE_URL=database.url, BIFROST_MIGRATION_LOCK_TIMEOUT="10m")
        stop.reached()
        server.pause()
        done = outcome(step, 120)
        server.resume()
        wait_until(lambda: not stop.waiting(), "the end of the runner's session")
    assert (done.code, done.facts["error"]) == (69, "UnavailableError")
    assert "no answer within" in done.facts["message"]
    assert (recorded(database), applied(database)) == (["one"], {"one": 1})
