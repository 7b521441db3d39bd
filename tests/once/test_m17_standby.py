"""M17: a server in recovery is retried like an unavailable one, and a standby takes over during a revision."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.conftest import StartServer
from tests.servers import Database, PostgresServer, RunFolder
from tests.servers.postgres import StandbyServer
from tests.servers.process import wait_until
from tests.setups.migration import Barrier, StartMigrate, Tree, applied, barrier, outcome

StartPair = Callable[[], tuple[Database, StandbyServer]]


@pytest.fixture
def pair(run_folder: RunFolder, start_server: StartServer) -> tuple[Database, StandbyServer]:
    """A database on a primary, and its standby."""
    primary = start_server(PostgresServer(run_folder))
    standby = start_server(StandbyServer(run_folder, primary))
    database = primary.create_database()
    wait_until(standby.caught_up, "the standby")
    return database, standby


def test_m17_promoted_later(pair: tuple[Database, StandbyServer], tree: Tree, start_migrate: StartMigrate) -> None:
    """The URL leads to a standby that becomes the primary some seconds later."""
    database, standby = pair
    tree.revision("one")
    step = start_migrate(BIFROST_DATABASE_URL=standby.url(database.name))
    step.wait_for("standby, in recovery")
    standby.primary.kill()
    threading.Timer(3, standby.promote).start()
    done = outcome(step)
    assert (done.code, done.applied) == (0, ["one"]), done.facts


def test_m17_never_promoted(pair: tuple[Database, StandbyServer], tree: Tree, start_migrate: StartMigrate) -> None:
    """At the deadline the server is unavailable, and no revision is reported as failed."""
    database, standby = pair
    tree.revision("one")
    done = outcome(start_migrate(deadline=4, BIFROST_DATABASE_URL=standby.url(database.name)))
    assert done.code == 69
    assert "standby" in done.facts["message"]
    assert "revision" not in done.facts["remedy"]


@pytest.mark.parametrize("form", ["libpq", "SQLAlchemy", pytest.param("keywords", marks=pytest.mark.slow)])
def test_m17_standby_takes_over(
    pair: tuple[Database, StandbyServer], tree: Tree, start_migrate: StartMigrate, form: str
) -> None:
    """The primary dies during a revision. Each revision is applied once, and the exit code is 0."""
    database, standby = pair
    tree.revision("one").revision("two", barrier()).revision("three")
    primary = standby.primary
    login = primary.url().partition("://")[2].partition("@")[0]
    hosts = f"127.0.0.1:{standby.port},127.0.0.1:{primary.port}"
    url = {
        "libpq": f"postgresql://{login}@{hosts}/{database.name}",
        "SQLAlchemy": f"postgresql+psycopg://{login}@/{database.name}?"
        + "&".join(f"host={host}" for host in hosts.split(",")),
        "keywords": f"host=127.0.0.1,127.0.0.1 port={standby.port},{primary.port} dbname={database.name} "
        f"user={primary.app_role} password='{primary.app_password}'",
    }[form]
    with Barrier(database) as stop:
        step = start_migrate(BIFROST_DATABASE_URL=url, BIFROST_MIGRATION_LOCK_TIMEOUT="2s")
        stop.reached()
        wait_until(standby.caught_up, "the standby")
        primary.kill()
    standby.promote()
    done = outcome(step)
    assert done.code == 0, done.facts
    assert applied(Database(standby, database.name)) == {"one": 1, "two": 1, "three": 1}


def test_m17_several_hosts_and_the_builtin_tree(
    pair: tuple[Database, StandbyServer], start_migrate: StartMigrate
) -> None:
    """A libpq URL with several hosts, the first of which is a standby, works with the built-in tree."""
    database, standby = pair
    login = standby.url().partition("://")[2].partition("@")[0]
    url = f"postgresql://{login}@127.0.0.1:{standby.port},127.0.0.1:{standby.primary.port}/{database.name}"
    done = outcome(start_migrate(BIFROST_DATABASE_URL=url, BIFROST_ALEMBIC_CONFIG="builtin"))
    assert (done.code, done.applied) == (0, ["0001", "0002"]), done.facts
