"""Fixtures of the migration's tests: a tree to write, and the step as a process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from tests.conftest import StartCommand
from tests.migration.steps import RUN_MIGRATE, Tree, migrate_environment
from tests.servers import Command, Database, PostgresServer, RunFolder


class StartMigrate(Protocol):
    """Type of `start_migrate`."""

    def __call__(self, *, deadline: float = 60, env: Mapping[str, str] | None = None, **variables: str) -> Command: ...


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


@pytest.fixture(scope="session")
def other_server(run_folder: RunFolder) -> Iterator[PostgresServer]:
    """A second PostgreSQL of the run."""
    server = PostgresServer(run_folder)
    with contextlib.closing(server):
        yield server.start()
