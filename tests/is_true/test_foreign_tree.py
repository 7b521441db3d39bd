"""A foreign tree, unmodified: asynchronous, with its own settings, its own logging and relative paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import RunBootstrap, StartWorker
from tests.servers import Database
from tests.setups.state import MODULES, cached, heads, insert_modules

REVISIONS = ["4f1c0a9d27b3", "8b26e5f3d014", "c93d71ae6f58"]


@pytest.mark.parametrize("driver", [pytest.param("postgresql", marks=pytest.mark.slow), "postgresql+asyncpg"])
def test_foreign_tree_with_a_standing_worker(
    driver: str,
    foreign_tree: Path,
    bifrost_env: dict[str, str],
    start_worker: StartWorker,
    run_bootstrap: RunBootstrap,
    database: Database,
    redis_url: str,
) -> None:
    """Each revision is applied once, our logs continue after its fileConfig, and no module of it is imported by us."""
    url = bifrost_env["BIFROST_DATABASE_URL"].replace("postgresql", driver, 1)
    env = bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(foreign_tree), "BIFROST_DATABASE_URL": url}
    before = {file: file.read_bytes() for file in foreign_tree.parent.rglob("*") if file.suffix in {".py", ".ini"}}
    worker = start_worker(env=env)
    done = run_bootstrap("init", env=env)
    assert done.returncode == 0, done.stderr
    assert heads(database) == REVISIONS[-1:]
    applied = database.execute("SELECT revision, count(*) FROM applied_revisions GROUP BY 1 ORDER BY min(at)")
    assert applied == [(revision, 1) for revision in REVISIONS]
    for revision in REVISIONS:
        assert revision in done.stdout
    assert "record when a file changed" in done.stdout
    insert_modules(database, MODULES)
    done = run_bootstrap("init", "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["warm"]["added"] == len(MODULES)
    assert cached(redis_url) == MODULES
    log = worker.terminate().stderr
    # After the migration, whose fileConfig disables every logger of its process.
    assert "bifrost.bootstrap.warm_module_cache" in log[log.index(f"revision {REVISIONS[-1]} applied") :]
    after = {file: file.read_bytes() for file in foreign_tree.parent.rglob("*") if file.suffix in {".py", ".ini"}}
    assert after == before


def test_foreign_tree_of_the_working_folder(
    foreign_tree: Path, bifrost_env: dict[str, str], run_bootstrap: RunBootstrap, database: Database
) -> None:
    """Without a setting, init and its worker use the tree of the working folder."""
    env = {name: value for name, value in bifrost_env.items() if name != "BIFROST_ALEMBIC_CONFIG"}
    done = run_bootstrap("init", "--with-worker", env=env, cwd=foreign_tree.parent)
    assert done.returncode == 0, done.stderr
    assert heads(database) == REVISIONS[-1:]
    assert "(found in the working folder)" in done.stderr.splitlines()[0]
    again = run_bootstrap("init", env=env, cwd=foreign_tree.parent)
    assert "nothing to do" in again.stdout
