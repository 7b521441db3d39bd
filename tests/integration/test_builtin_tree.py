"""The built-in tree, run by Alembic itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import bifrost_bootstrap
from bifrost_bootstrap.dev.embedded import EmbeddedServers, embedded_servers

TREE = Path(bifrost_bootstrap.__file__).parent / "migrations"
#: What a warm reads of the table.
MODULES = "entity_type = 'module' AND NOT is_deleted AND content IS NOT NULL"


@pytest.fixture(scope="module")
def servers() -> Iterator[EmbeddedServers]:
    """A private PostgreSQL."""
    with embedded_servers() as servers:
        yield servers


@pytest.fixture
def database_url(servers: EmbeddedServers) -> Iterator[str]:
    """The URL of an empty database."""
    with psycopg.connect(servers.database_url, autocommit=True) as session:
        session.execute("CREATE DATABASE builtin_tree")
        yield servers.database_url.removesuffix("/postgres") + "/builtin_tree"
        session.execute("DROP DATABASE builtin_tree WITH (FORCE)")


def alembic(*words: str, url: str | None = None, tree: Path = TREE) -> subprocess.CompletedProcess[str]:
    """Alembic's own command line with this URL in the environment; warnings are errors."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BIFROST_")}
    if url is not None:
        environment["BIFROST_DATABASE_URL"] = url
    # From another folder: nothing of the tree may depend on the working one.
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "alembic", "-c", str(tree / "alembic.ini"), *words],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def rows(url: str, query: str) -> list[tuple[object, ...]]:
    """What the query returns."""
    with psycopg.connect(url) as session:
        return session.execute(query).fetchall()


@pytest.fixture
def migrated_url(database_url: str) -> str:
    """The URL of a database at head."""
    done = alembic("upgrade", "head", url=database_url)
    assert done.returncode == 0, done.stderr
    return database_url


def test_upgrade_of_an_empty_database(migrated_url: str) -> None:
    """One upgrade from empty to head creates the table of the contract, with type, NULL and default of each column."""
    assert rows(migrated_url, "SELECT version_num FROM alembic_version") == [("0002",)]
    columns = rows(
        migrated_url,
        """SELECT attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid)
             FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
            WHERE attrelid = 'workspace_files'::regclass AND attnum > 0 ORDER BY attnum""",
    )
    assert columns == [
        ("id", "uuid", True, "gen_random_uuid()"),
        ("path", "character varying(1000)", True, None),
        ("content", "text", False, None),
        ("content_hash", "character varying(64)", False, None),
        ("entity_type", "character varying(50)", False, None),
        ("is_deleted", "boolean", True, "false"),
        ("size_bytes", "bigint", True, "0"),
        ("content_type", "character varying(255)", True, "'text/plain'::character varying"),
        ("created_at", "timestamp with time zone", True, "now()"),
        ("updated_at", "timestamp with time zone", True, "now()"),
    ]


def test_second_upgrade_does_nothing(migrated_url: str) -> None:
    """At head, an upgrade runs no revision."""
    done = alembic("upgrade", "head", url=migrated_url)
    assert done.returncode == 0, done.stderr
    assert rows(migrated_url, "SELECT version_num FROM alembic_version") == [("0002",)]


def test_path_is_unique_by_a_named_constraint(migrated_url: str) -> None:
    """`uq_workspace_files_path` rejects a second row with the same path. The primary key is named too."""
    with psycopg.connect(migrated_url) as session:
        session.execute("INSERT INTO workspace_files (path) VALUES ('a.py')")
        with pytest.raises(psycopg.errors.UniqueViolation) as refused:
            session.execute("INSERT INTO workspace_files (path) VALUES ('a.py')")
    assert refused.value.diag.constraint_name == "uq_workspace_files_path"
    primary = rows(migrated_url, "SELECT conname FROM pg_constraint WHERE contype = 'p' AND conname LIKE 'pk_work%'")
    assert primary == [("pk_workspace_files",)]


def test_partial_index_serves_the_query_of_a_warm(migrated_url: str) -> None:
    """The index contains only modules, sorted by path, and PostgreSQL uses it for the query of a warm."""
    with psycopg.connect(migrated_url) as session:
        session.execute(
            """INSERT INTO workspace_files (path, content, entity_type)
               SELECT n || '.py', 'x', CASE WHEN n % 100 = 0 THEN 'module' ELSE 'file' END
                 FROM generate_series(1, 10000) n"""
        )
        session.execute("ANALYZE workspace_files")
        plan = session.execute(f"EXPLAIN SELECT path FROM workspace_files WHERE {MODULES} ORDER BY path").fetchall()
    text = "\n".join(line for (line,) in plan)
    assert "ix_workspace_files_modules" in text
    assert "Sort" not in text


def test_each_revision_has_a_transaction_of_its_own(database_url: str) -> None:
    """If the second revision fails, the first stays applied and recorded."""
    with psycopg.connect(database_url) as session:
        session.execute("CREATE TABLE ix_workspace_files_modules ()")
    failed = alembic("upgrade", "head", url=database_url)
    assert failed.returncode != 0
    assert "already exists" in failed.stderr
    assert rows(database_url, "SELECT version_num FROM alembic_version") == [("0001",)]


@pytest.mark.parametrize(
    ("driver", "query"),
    [
        ("postgresql", ""),
        ("postgres", "?application_name=x"),
        ("postgresql+asyncpg", "?ssl=disable&prepared_statement_cache_size=0&statement_cache_size=0"),
        ("postgresql+psycopg2", "?sslmode=disable&connect_timeout=5"),
    ],
)
def test_url_of_any_driver(database_url: str, driver: str, query: str) -> None:
    """A URL with the driver suffix and the parameters of another driver works."""
    url = database_url.replace("postgresql", driver, 1) + query
    done = alembic("upgrade", "head", url=url)
    assert done.returncode == 0, done.stderr
    assert rows(database_url, "SELECT version_num FROM alembic_version") == [("0002",)]


def test_ssl_is_read_as_sslmode(database_url: str) -> None:
    """`ssl=require` counts: a server without TLS is rejected."""
    failed = alembic("upgrade", "head", url=f"{database_url}?ssl=require")
    assert failed.returncode != 0
    assert "server does not support SSL" in failed.stderr


def test_downgrade_and_up_again(migrated_url: str) -> None:
    """A downgrade to base leaves only alembic_version, and an upgrade works again."""
    assert alembic("downgrade", "base", url=migrated_url).returncode == 0
    tables = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
    assert rows(migrated_url, tables) == [("alembic_version",)]
    assert alembic("upgrade", "head", url=migrated_url).returncode == 0


def test_sql_needs_no_database(database_url: str) -> None:
    """`--sql` prints a script without any URL, and the script creates the schema."""
    script = alembic("upgrade", "head", "--sql")
    assert script.returncode == 0, script.stderr
    with psycopg.connect(database_url, autocommit=True) as session:
        session.execute(script.stdout.encode())
    assert rows(database_url, "SELECT version_num FROM alembic_version") == [("0002",)]
    assert rows(database_url, "SELECT count(*) FROM workspace_files") == [(0,)]


def test_new_revision_from_the_template(tmp_path: Path, database_url: str) -> None:
    """`alembic revision` writes a revision that can be applied unchanged."""
    tree = shutil.copytree(TREE, tmp_path / "tree")
    made = alembic("revision", "-m", "Add a table", "--rev-id", "0003", tree=tree)
    assert made.returncode == 0, made.stderr
    done = alembic("upgrade", "head", url=database_url, tree=tree)
    assert done.returncode == 0, done.stderr
    assert rows(database_url, "SELECT version_num FROM alembic_version") == [("0003",)]
