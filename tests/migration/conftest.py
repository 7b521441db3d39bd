"""Fixtures of the migration's tests: a tree to write, and the step as a process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from tests.conftest import StartCommand, StartServer
from tests.migration.steps import RUN_MIGRATE, Tree, migrate_environment
from tests.servers import Command, Database, PgbouncerServer, Postgres, PostgresServer, RunFolder


class StartMigrate(Protocol):
    """Type of `start_migrate`."""

    def __call__(self, *, deadline: float = 60, env: Mapping[str, str] | None = None, **variables: str) -> Command: ...


class StartPool(Protocol):
    """Type of `start_pool`."""

    def __call__(self, pool_size: int, **settings: str) -> PgbouncerServer: ...


#: Below the pause between two statements that keep the lock's connection alive: only turning it off helps.
ROLE_TIMEOUT = "500ms"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A synchronous tree without revisions."""
    return Tree(tmp_path / "tree")


@pytest.fixture
def start_migrate(
    start_command: StartCommand, clean_env: dict[str, str], database: Database, tree: Tree
) -> StartMigrate:
    """Start the step `migrate` on this test's database and tree, with more variables or others."""

    def start(*, deadline: float = 60, env: Mapping[str, str] | None = None, **variables: str) -> Command:
        env = {**migrate_environment(clean_env, database.url, tree), **(env or {}), **variables}
        return start_command([*RUN_MIGRATE, str(deadline)], env=env)

    return start


@pytest.fixture
def start_pool(run_folder: RunFolder, postgres: Postgres, database: Database, start_server: StartServer) -> StartPool:
    """Start a PgBouncer with pools of this size before a database that ends idle transactions soon."""
    if not isinstance(postgres, PostgresServer):
        pytest.skip("PgBouncer stands before a server of our own")
    database.execute(f"ALTER DATABASE \"{database.name}\" SET idle_in_transaction_session_timeout = '{ROLE_TIMEOUT}'")

    def start(pool_size: int, **settings: str) -> PgbouncerServer:
        timers = {"idle_transaction_timeout": "2", "query_wait_timeout": "60"}
        # A client's next transaction gets the session that has been idle longest, hardly ever the one it just had.
        settings = {**timers, "server_round_robin": "1", **settings}
        return start_server(PgbouncerServer(run_folder, postgres, pool_size=pool_size, settings=settings))

    return start


@pytest.fixture(scope="session")
def other_server(run_folder: RunFolder) -> Iterator[PostgresServer]:
    """A second PostgreSQL of the run."""
    server = PostgresServer(run_folder)
    with contextlib.closing(server):
        yield server.start()
