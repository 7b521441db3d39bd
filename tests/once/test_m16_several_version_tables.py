"""M16: an env.py that runs its revisions for several schemas is at head when all of its version tables are."""

from __future__ import annotations

from pathlib import Path

import pytest

import bifrost_bootstrap
from bifrost_bootstrap.migrate.tree_source import may_run_several_times
from tests.conftest import RunBootstrap
from tests.servers import Database
from tests.setups.migration import StartMigrate, Tree, outcome

TENANTS = ("public", "acme", "globex")
#: One engine, a version table in each schema, by its name.
BY_NAME = """
import os
from alembic import context
from sqlalchemy import create_engine, make_url, text

url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg")

def run_for(schema):
    with create_engine(url).begin() as connection:
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
        connection.execute(text(f"SET LOCAL search_path TO {schema}"))
        context.configure(connection=connection, version_table_schema=schema)
        with context.begin_transaction():
            context.run_migrations()

for schema in ("public", "acme", "globex"):
    run_for(schema)
"""
#: The way of Alembic's own cookbook: the search path leads to the table.
BY_SEARCH_PATH = BY_NAME.replace(", version_table_schema=schema", "")
#: Names of tables in one schema.
BY_TABLE = BY_NAME.replace(
    "version_table_schema=schema", "version_table=f'versions_{schema}', version_table_schema='public'"
)
ASYNCHRONOUS = """
import asyncio, os
from alembic import context
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

def migrate(connection, schema):
    context.configure(connection=connection, version_table_schema=schema)
    with context.begin_transaction():
        context.run_migrations()

async def main():
    engine = create_async_engine(make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+asyncpg"))
    async with engine.connect() as connection:
        for schema in ("public", "acme", "globex"):
            await connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
            await connection.execute(text(f"SET search_path TO {schema}"))
            await connection.commit()
            await connection.run_sync(migrate, schema)
            await connection.commit()

asyncio.run(main())
"""
#: Fails for the last one, until `allowed` is there.
FAILS_FOR_ONE = """
    schema = op.get_bind().exec_driver_sql("SELECT current_schema()").scalar()
    if schema == "globex":
        op.execute("SELECT * FROM public.allowed")
"""


@pytest.mark.parametrize(
    "env",
    [
        pytest.param(BY_NAME, id="name", marks=pytest.mark.slow),
        pytest.param(BY_SEARCH_PATH, id="path"),
        pytest.param(BY_TABLE, id="table", marks=pytest.mark.slow),
        pytest.param(ASYNCHRONOUS, id="async", marks=pytest.mark.slow),
    ],
)
def test_m16_one_tenant_fails(
    database: Database,
    tree: Tree,
    start_migrate: StartMigrate,
    run_bootstrap: RunBootstrap,
    bifrost_env: dict[str, str],
    env: str,
) -> None:
    """Every run fails until the cause is fixed, and `check` is not ready. Then all tables are at head."""
    tree.revision("one").revision("two", FAILS_FOR_ONE)
    (tree.folder / "env.py").write_text(env)
    table = {"BIFROST_ALEMBIC_VERSION_TABLE": "versions_public"} if env == BY_TABLE else {}
    for _ in range(2):
        failed = outcome(start_migrate(env=table))
        assert failed.code == 1
        assert "revision two" in failed.facts["message"]
    check = bifrost_env | table | {"BIFROST_ALEMBIC_CONFIG": str(tree.config)}
    assert run_bootstrap("check", env=check).returncode == 3
    database.execute("CREATE TABLE allowed (n int)")
    assert outcome(start_migrate(env=table)).code == 0
    for schema in TENANTS:
        versions = f"public.versions_{schema}" if env == BY_TABLE else f"{schema}.alembic_version"
        assert database.execute(f"SELECT version_num FROM {versions}") == [("two",)]
    again = outcome(start_migrate(env=table))
    assert (again.code, again.applied, again.facts["verdict"]) == (0, [], "at_head")


def test_m16_one_tenant_is_behind(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """The first version table is at head, another one is behind: it is upgraded."""
    tree.revision("one").revision("two")
    (tree.folder / "env.py").write_text(BY_NAME)
    assert outcome(start_migrate()).code == 0
    database.execute("UPDATE acme.alembic_version SET version_num = 'one'")
    done = outcome(start_migrate())
    assert (done.code, done.applied) == (0, ["two"])
    assert database.execute("SELECT count(*) FROM acme.applied WHERE revision = 'two'") == [(2,)]


LOOP = "for schema in schemas:\n    run(schema)\n"
RUN = "def run(schema):\n    context.run_migrations()\n"


@pytest.mark.parametrize(
    ("source", "several"),
    [
        ("context.run_migrations()", False),
        (RUN + "run('public')", False),
        (RUN + LOOP, True),
        (RUN + "run('public')\nrun('acme')", True),
        (RUN + "[run(s) for s in schemas]", True),
        (RUN + "known = {one for one in names}\nrun('public')", False),
        (RUN + "again = run\nagain('public')", True),
        (RUN + "list(map(run, schemas))", True),
        (RUN + "for_each(run)", True),
        (RUN + "def main():\n    while more():\n        run('x')\nmain()", True),
        ("for s in names:\n    print(s)\n" + RUN + "run('public')", True),
        (
            "def do(c):\n    context.run_migrations()\nasync def run():\n    await c.run_sync(do)\nasyncio.run(run())",
            False,
        ),
        ("from elsewhere import run_all\nrun_all()", True),
        ("context.run_migrations(\n", True),
        ("connection.execute('SET search_path TO x')\ncontext.run_migrations()", True),
        ("if offline:\n    context.run_migrations()\nelse:\n    context.run_migrations()", False),
    ],
)
def test_m16_env_py_that_may_run_revisions_twice(source: str, several: bool, tmp_path: Path) -> None:
    """If env.py may run its revisions more than once, its version tables are asked for."""
    env = tmp_path / "env.py"
    env.write_text(source)
    assert may_run_several_times(env) is several


def test_m16_builtin_tree_runs_once() -> None:
    """An init on the builtin tree at head must not start the runner to ask for version tables (0.4 s)."""
    assert not may_run_several_times(Path(bifrost_bootstrap.__file__).parent / "migrations" / "env.py")


def test_m16_version_table_of_another_application(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """An unknown revision in a table that is not the tree's: the error names the table of the tree, and
    BIFROST_ALLOW_AHEAD does not skip the migration.
    """
    tree.revision("one")
    env = tree.folder / "env.py"
    env.write_text(env.read_text().replace("configure(", "configure(version_table='ours', "))
    database.execute("CREATE TABLE alembic_version (version_num text)")
    database.execute("INSERT INTO alembic_version VALUES ('theirs')")
    for ahead in ("0", "1"):
        done = outcome(start_migrate(BIFROST_ALLOW_AHEAD=ahead))
        assert (done.code, done.facts["error"]) == (78, "VersionTableError")
        assert "BIFROST_ALEMBIC_VERSION_TABLE=public.ours" in done.facts["remedy"]
    done = outcome(start_migrate(BIFROST_ALEMBIC_VERSION_TABLE="public.ours"))
    assert (done.code, done.applied) == (0, ["one"])


def test_m16_revision_that_nobody_knows(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """An unknown revision in the table of the tree: the error has both explanations, a newer image or another
    application.
    """
    tree.revision("one")
    database.execute("CREATE TABLE alembic_version (version_num text)")
    database.execute("INSERT INTO alembic_version VALUES ('theirs')")
    done = outcome(start_migrate())
    assert done.code == 1
    assert "BIFROST_ALLOW_AHEAD=1" in done.facts["remedy"]
    assert "BIFROST_ALEMBIC_VERSION_TABLE" in done.facts["remedy"]
