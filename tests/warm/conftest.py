"""Fixtures of the tests of the warm: a migrated database and an empty cache for each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

import bifrost_bootstrap
from bifrost_bootstrap.settings import Settings
from tests.servers import Database, Postgres
from tests.warm.deployment import Deployment

TREE = Path(bifrost_bootstrap.__file__).parent / "migrations" / "alembic.ini"

NewDeployment = Callable[..., Deployment]


@pytest.fixture(scope="session")
def migrated(postgres: Postgres) -> Iterator[Database]:
    """A database at head that the tests' own are copied from."""
    database = postgres.create_database(prefix="template")
    migrate(database)
    yield database
    postgres.drop_database(database)


def migrate(database: Database) -> None:
    """Bring a database to the head of the tree that we ship."""
    environment = {**os.environ, "BIFROST_DATABASE_URL": database.url}
    subprocess.run([sys.executable, "-m", "alembic", "-c", TREE, "upgrade", "head"], check=True, env=environment)


@pytest.fixture
def deploy(postgres: Postgres, migrated: Database) -> Iterator[NewDeployment]:
    """Make a deployment: `deploy(redis_url)`, with settings by name; its database is copied unless one is given."""
    made: list[tuple[Deployment, bool]] = []

    def make(redis_url: str, database: Database | None = None, **settings: object) -> Deployment:
        ours = database is None
        database = database or postgres.create_database(template=migrated.name)
        values = {"database_url": database.url, "redis_url": redis_url, "alembic_config": "builtin"} | settings
        client = redis.Redis.from_url(redis_url, socket_timeout=20)
        made.append((Deployment(database, client, Settings.model_validate(values)), ours))
        return made[-1][0]

    yield make
    for deployment, ours in made:
        deployment.client.close()
        if ours:
            postgres.drop_database(deployment.database)


@pytest.fixture
def deployment(deploy: NewDeployment, redis_url: str) -> Deployment:
    """A migrated database and an empty cache, on the shared servers."""
    return deploy(redis_url)
