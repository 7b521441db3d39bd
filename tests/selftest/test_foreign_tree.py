"""Selftest of the foreign Alembic tree, run as its platform runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import CompletedProcess

from tests.conftest import RunCommand
from tests.servers import Database

REVISIONS = ["4f1c0a9d27b3", "8b26e5f3d014", "c93d71ae6f58"]


def alembic(
    run_command: RunCommand, tree: Path, clean_env: dict[str, str], database: Database, *words: str
) -> CompletedProcess[str]:
    """Run Alembic's own command from the folder of the tree."""
    env = clean_env | {"DATABASE_URL": database.url}
    done = run_command([sys.executable, "-m", "alembic", *words], env=env, cwd=tree.parent)
    assert done.returncode == 0, done.stderr
    return done


def test_it_goes_up_counts_its_revisions_and_goes_down(
    run_command: RunCommand, foreign_tree: Path, clean_env: dict[str, str], database: Database
) -> None:
    """Each revision inserts one row, in order, and a second upgrade none. The table has the contract of the
    module cache. A downgrade leaves only alembic_version.
    """
    alembic(run_command, foreign_tree, clean_env, database, "upgrade", "head")
    alembic(run_command, foreign_tree, clean_env, database, "upgrade", "head")
    assert database.execute("SELECT revision FROM applied_revisions ORDER BY at") == [(each,) for each in REVISIONS]
    assert database.execute("SELECT version_num FROM alembic_version") == [(REVISIONS[-1],)]

    columns = database.execute(
        "SELECT column_name, data_type, character_maximum_length, is_nullable FROM information_schema.columns "
        "WHERE table_name = 'workspace_files'"
    )
    assert {
        ("path", "character varying", 1000, "NO"),
        ("content", "text", None, "YES"),
        ("content_hash", "character varying", 64, "YES"),
        ("is_deleted", "boolean", None, "NO"),
    } <= set(columns)
    assert database.execute(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'uq_workspace_files_path'"
    ) == [("UNIQUE (path)",)]

    alembic(run_command, foreign_tree, clean_env, database, "downgrade", "base")
    assert database.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == [("alembic_version",)]


def test_it_writes_sql_without_a_database(
    run_command: RunCommand, foreign_tree: Path, clean_env: dict[str, str], database: Database
) -> None:
    """`--sql` names every revision, and does not connect."""
    done = alembic(run_command, foreign_tree, clean_env, database, "upgrade", "head", "--sql")
    assert all(revision in done.stdout for revision in REVISIONS)
    assert database.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []


def test_it_disables_the_loggers_of_others(
    run_command: RunCommand, foreign_tree: Path, clean_env: dict[str, str], database: Database
) -> None:
    """Run in a process that logs, env.py disables the loggers of that process."""
    program = (
        "import logging; from alembic import command, config\n"
        "logger = logging.getLogger('somebody.else')\n"
        f"command.upgrade(config.Config({str(foreign_tree)!r}), 'head')\n"
        "print(logger.disabled)"
    )
    env = clean_env | {"DATABASE_URL": database.url}
    done = run_command([sys.executable, "-c", program], env=env, cwd=foreign_tree.parent)
    assert done.stdout == "True\n", done.stderr
