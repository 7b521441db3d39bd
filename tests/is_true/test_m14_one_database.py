"""M14: the tree migrates the database that is locked, and records its version where we read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers import Database, Postgres
from tests.setups.migration import StartMigrate, Tree, applied, outcome

#: Shows what env.py is given, and where it did not come from.
LOOK = (
    'op.execute("CREATE TABLE seen (name text, value text)")\n'
    "    import sys\n"
    "    from sqlalchemy import text\n"
    "    seen = {'args': ' '.join(sys.argv)} | {name: os.environ[name] for name in"
    " ('BIFROST_DATABASE_URL', 'DATABASE_URL')}\n"
    "    seen['files'] = ' '.join(name for name in os.environ if name.endswith('DATABASE_URL_FILE'))\n"
    "    for name, value in seen.items():\n"
    '        op.get_bind().execute(text("INSERT INTO seen VALUES (:name, :value)"), dict(name=name, value=value))'
)


def test_m14_env_py_gets_the_url_in_its_environment(
    database: Database, tree: Tree, start_migrate: StartMigrate, tmp_path: Path
) -> None:
    """env.py gets the migration URL from a file as the operator wrote it, in both variables, although
    DATABASE_URL named another database. The URL is not an argument, and env.py gets no `…_FILE` variable of
    another URL.
    """
    tree.revision("one", LOOK)
    other = tmp_path / "other"
    other.write_text("postgresql://pooler.invalid/other")
    secret = tmp_path / "url"
    secret.write_text(database.url_for("asyncpg") + "?ssl=disable\n")
    written = secret.read_text().strip()
    done = outcome(
        start_migrate(
            BIFROST_DATABASE_URL="",
            BIFROST_DATABASE_URL_FILE=str(other),
            DATABASE_URL_FILE=str(other),
            DATABASE_URL="postgresql://nowhere.invalid/other",
            BIFROST_MIGRATION_DATABASE_URL_FILE=str(secret),
            BIFROST_ALEMBIC_CONFIG=str(dropping_ssl(tree)),
        )
    )
    assert done.code == 0, done.log
    seen = dict(database.execute("SELECT name, value FROM seen"))
    assert seen["BIFROST_DATABASE_URL"] == seen["DATABASE_URL"] == written
    assert "://" not in seen["args"]
    assert seen["files"] == "BIFROST_MIGRATION_DATABASE_URL_FILE"


def dropping_ssl(tree: Tree) -> Path:
    """The tree, whose env.py turns the URL into one for psycopg."""
    env = tree.folder / "env.py"
    env.write_text(env.read_text().replace("poolclass=", 'connect_args={}, poolclass=').replace(
        'drivername="postgresql+psycopg")', 'drivername="postgresql+psycopg", query={})'))  # fmt: skip
    return tree.config


@pytest.mark.parametrize("own_url", ["another database", "another server"])
def test_m14_another_database_is_refused(
    postgres: Postgres,
    database: Database,
    tree: Tree,
    start_migrate: StartMigrate,
    other_server: Postgres,
    own_url: str,
) -> None:
    """If env.py connects to another database or server, the step ends with 78 before the first revision, names
    both, and changes neither.
    """
    if own_url == "another database":
        other = postgres.create_database()
    else:
        with other_server.admin() as admin:
            admin.execute(f'CREATE DATABASE "{database.name}" OWNER bifrost'.encode())
        other = Database(other_server, database.name)
    tree.revision("one")
    env = tree.folder / "env.py"
    env.write_text(env.read_text().replace('os.environ["DATABASE_URL"]', 'os.environ["OWN_URL"]'))
    done = outcome(start_migrate(OWN_URL=other.url))
    tables = [each.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") for each in (database, other)]
    other.server.drop_database(other)
    assert (done.code, done.facts["error"]) == (78, "WrongDatabaseError")
    assert f"/{database.name}" in done.facts["message"]
    assert f"database {other.name} on " in done.facts["message"]
    assert tables == [[(0,)], [(0,)]]


@pytest.mark.parametrize("schema", [None, "app"])
def test_m14_another_version_table_is_named(
    database: Database, tree: Tree, start_migrate: StartMigrate, schema: str | None
) -> None:
    """A tree with another version table ends with 78 before its first revision. With the variable in the
    message it is at head.
    """
    tree.revision("one")
    database.execute("CREATE SCHEMA app")
    env = tree.folder / "env.py"
    words = f"version_table='versions', version_table_schema={schema!r}"
    env.write_text(env.read_text().replace("configure(", f"configure({words}, "))
    done = outcome(start_migrate())
    table = f"{schema}.versions" if schema else "versions"
    assert (done.code, done.facts["error"]) == (78, "VersionTableError")
    assert done.facts["remedy"] == f"set BIFROST_ALEMBIC_VERSION_TABLE={table}"
    assert database.execute("SELECT to_regclass('applied')::text") == [(None,)]

    done = outcome(start_migrate(BIFROST_ALEMBIC_VERSION_TABLE=table))
    assert (done.code, done.applied) == (0, ["one"])
    done = outcome(start_migrate(BIFROST_ALEMBIC_VERSION_TABLE=table))
    assert (done.code, done.facts["verdict"], done.applied) == (0, "at_head", [])
    assert applied(database) == {"one": 1}


def test_m14_version_table_that_is_none_of_alembics(
    database: Database, tree: Tree, start_migrate: StartMigrate
) -> None:
    """If the variable names a table of the platform, the step ends with 78 and changes nothing."""
    tree.revision("one")
    assert outcome(start_migrate()).code == 0
    tree.revision("two")
    done = outcome(start_migrate(BIFROST_ALEMBIC_VERSION_TABLE="workspace_files"))
    assert (done.code, done.facts["error"]) == (78, "SettingsError")
    assert "BIFROST_ALEMBIC_VERSION_TABLE: workspace_files is no version table of Alembic" in done.facts["message"]
    assert 'column "version_num" does not exist' in done.facts["message"]
    assert applied(database) == {"one": 1}


def test_m14_version_table_of_the_same_name(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """A tree that names the schema of its version table is accepted if we find the table there, on an empty
    database too. One that names another schema is not.
    """
    tree.revision("one")
    database.execute("CREATE SCHEMA app")
    env, plain = tree.folder / "env.py", (tree.folder / "env.py").read_text()
    for revision in ("two", "three"):
        env.write_text(plain.replace("configure(", "configure(version_table_schema='public', "))
        done = outcome(start_migrate())
        assert (done.code, done.facts.get("verdict")) == (0, "at_head"), done.facts
        assert outcome(start_migrate()).applied == []
        tree.revision(revision)
    env.write_text(plain.replace("configure(", "configure(version_table_schema='app', "))
    done = outcome(start_migrate())
    assert (done.code, done.facts["error"]) == (78, "VersionTableError")
    assert done.facts["remedy"] == "set BIFROST_ALEMBIC_VERSION_TABLE=app.alembic_version"
    assert applied(database) == {"one": 1, "two": 1}


def test_m14_version_recorded_where_we_do_not_look(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """A tree that records its version in another schema, by its search path, ends with 78. The error names
    that table.
    """
    tree.revision("one")
    database.execute("CREATE SCHEMA app")
    env = tree.folder / "env.py"
    line = "    context.configure("
    env.write_text(
        env.read_text().replace(
            line, f'    connection.exec_driver_sql("SET search_path = app")\n    connection.commit()\n{line}'
        )
    )
    done = outcome(start_migrate())
    assert (done.code, done.facts["error"]) == (78, "VersionTableError")
    assert done.facts["remedy"] == "set BIFROST_ALEMBIC_VERSION_TABLE=app.alembic_version"
    tree.revision("two")
    done = outcome(start_migrate(BIFROST_ALEMBIC_VERSION_TABLE="app.alembic_version"))
    assert (done.code, done.applied) == (0, ["two"])


def test_m14_env_py_that_runs_nothing(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """An env.py that runs no revision is no success: 78, with the variable to check."""
    tree.revision("one")
    (tree.folder / "env.py").write_text("")
    done = outcome(start_migrate())
    assert (done.code, done.facts["error"]) == (78, "SettingsError")
    assert "BIFROST_ALEMBIC_VERSION_TABLE: alembic_version is not at head" in done.facts["message"]
    assert database.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]
