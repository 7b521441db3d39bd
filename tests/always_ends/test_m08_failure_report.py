"""M8: the report of a failed revision has what an operator needs, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit, urlunsplit

import pytest
from psycopg import sql

from tests.servers import Database, Postgres
from tests.servers.leaks import leaks_in
from tests.setups.migration import StartMigrate, Tree, applied, outcome, recorded

#: Raises an error of the server with a hint and a detail.
STATEMENT = (
    "DO $$ BEGIN RAISE EXCEPTION 'no such region' USING DETAIL = 'region 7', HINT = 'load the regions first'; END $$"
)

DEFERRED = """
    op.execute("CREATE TABLE parent (id int PRIMARY KEY)")
    op.execute("CREATE TABLE child (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
    op.execute("INSERT INTO child VALUES (1)")
"""


@pytest.mark.parametrize(("kind", "kept"), [("plain", ["one", "two"]), ("asynchronous", [])])
def test_m08_failure_report(
    database: Database,
    start_migrate: StartMigrate,
    tmp_path: Path,
    kind: Literal["plain", "asynchronous"],
    kept: list[str],
) -> None:
    """The report has revision, title, statement, message and hint of the server, and what stays applied
    (nothing, if the tree runs in one transaction). Exit code 1, no traceback, no password.
    """
    tree = (
        Tree(tmp_path / kind, kind)
        .revision("one")
        .revision("two")
        .revision("three", f'op.execute("{STATEMENT}")', title="Sort by region")
    )
    done = outcome(start_migrate(BIFROST_ALEMBIC_CONFIG=str(tree.config)))
    assert (done.code, done.facts["error"]) == (1, "MigrationError")
    assert done.facts["message"].splitlines() == [
        "revision three (Sort by region) failed: no such region (region 7)",
        "  hint: load the regions first",
        f"  statement: {STATEMENT}",
        f"  applied before it: {', '.join(kept) or 'none'}",
    ]
    assert "Traceback" not in done.log
    assert not leaks_in(done.log + str(done.facts))
    if kept:
        assert (applied(database), recorded(database)) == ({"one": 1, "two": 1}, ["two"])
    else:
        assert database.execute("SELECT to_regclass('applied')::text") == [(None,)]


@pytest.mark.parametrize(("kind", "kept"), [("plain", ["one"]), ("asynchronous", [])])
def test_m08_failure_at_commit(
    database: Database,
    start_migrate: StartMigrate,
    tmp_path: Path,
    kind: Literal["plain", "asynchronous"],
    kept: list[str],
) -> None:
    """A deferred constraint fails at COMMIT: the last revision of the transaction has failed, and is not
    reported as applied.
    """
    tree = Tree(tmp_path / kind, kind).revision("one").revision("two", DEFERRED)
    done = outcome(start_migrate(BIFROST_ALEMBIC_CONFIG=str(tree.config)))
    assert (done.code, done.facts["error"]) == (1, "MigrationError")
    first, *others = done.facts["message"].splitlines()
    assert first.startswith("revision two (Revision two) failed: insert or update on table")
    assert others == ["  statement: COMMIT", f"  applied before it: {', '.join(kept) or 'none'}"]
    assert "revision two applied" not in done.log


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', 1))", "ConnectionRefusedError: [Errno 111]"),
        ("raise TimeoutError('the registry does not answer')", "TimeoutError: the registry does not answer"),
        ("import sqlalchemy; sqlalchemy.create_engine('sqlite://').connect().exec_driver_sql('SELECT x')",
         "OperationalError: no such column: x"),
    ],
    ids=["connection", "timeout", "another database"],
)  # fmt: skip
def test_m08_own_call_of_a_revision(tree: Tree, start_migrate: StartMigrate, body: str, message: str) -> None:
    """If a revision calls another service and that fails, the revision has failed; PostgreSQL is not reported
    as down.
    """
    tree.revision("one", body)
    done = outcome(start_migrate())
    assert (done.code, done.facts["error"]) == (1, "MigrationError")
    assert f"revision one (Revision one) failed: {message}" in done.facts["message"]
    assert "trying again" not in done.log


def test_m08_failure_after_the_last_revision(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """If env.py fails after its revisions, the last revision is reported as applied."""
    tree.revision("one")
    env = tree.folder / "env.py"
    env.write_text(env.read_text() + "\nraise RuntimeError('no mail was sent')\n")
    done = outcome(start_migrate())
    assert (done.code, recorded(database)) == (1, ["one"])
    assert done.facts["message"].splitlines() == [
        f"the tree failed: RuntimeError: no mail was sent ({env}, line {len(env.read_text().splitlines())})",
        "  applied before it: one",
    ]


def test_m08_process_that_dies_every_time(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """If the process of the tree exits silently, it is tried three times. Then the exit code is 1, with that
    of the process.
    """
    tree.revision("one").revision("two", "import signal; os.kill(os.getpid(), signal.SIGSEGV)")
    done = outcome(start_migrate(deadline=600))
    assert (done.code, done.facts["error"]) == (1, "MigrateGivenUpError")
    assert "after 3 attempts" in done.facts["message"]
    assert "ended with code -11" in done.facts["message"]
    assert (recorded(database), applied(database)) == (["one"], {"one": 1})


@pytest.mark.timeout(120)
@pytest.mark.slow  # 30 s each: the rejection timeout
@pytest.mark.parametrize(("kind", "wrong"), [("plain", "password"), ("asynchronous", "database")])
def test_m08_rejected_login_of_env_py(
    database: Database,
    start_migrate: StartMigrate,
    tmp_path: Path,
    kind: Literal["plain", "asynchronous"],
    wrong: str,
) -> None:
    """A rejected login of env.py is retried for 30 s. Then it is a configuration error: 78."""
    tree = Tree(tmp_path / kind, kind).revision("one")
    for file in tree.folder.glob("*.py"):
        file.write_text(file.read_text().replace('os.environ["DATABASE_URL"]', 'os.environ["OWN_URL"]'))
    parts = urlsplit(database.url)
    own_url = urlunsplit(
        parts._replace(path="/nowhere")
        if wrong == "database"
        else parts._replace(netloc=f"{parts.username}:wrong@{parts.hostname}:{parts.port}")
    )
    done = outcome(start_migrate(deadline=600, OWN_URL=own_url, BIFROST_ALEMBIC_CONFIG=str(tree.config)))
    assert (done.code, done.facts["error"]) == (78, "RefusedError")
    assert ("does not exist" if wrong == "database" else "authentication failed") in done.facts["message"]
    assert done.log.count("trying again") > 1


def test_m08_login_that_comes_later(
    postgres: Postgres, database: Database, tree: Tree, start_migrate: StartMigrate
) -> None:
    """If the server creates the migration role later, the login is retried and the migration succeeds."""
    tree.revision("one")
    parts = urlsplit(database.url)
    role, password = f"late_{database.name}", unquote(parts.password or "")
    url = urlunsplit(parts._replace(netloc=f"{role}:{parts.netloc.partition(':')[2]}"))
    migrating = start_migrate(BIFROST_MIGRATION_DATABASE_URL=url)
    migrating.wait_for(r"rejected the connection: .*trying again")
    create = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {} IN ROLE {}")
    with postgres.admin() as admin:
        admin.execute(create.format(sql.Identifier(role), sql.Literal(password), sql.Identifier(parts.username or "")))
    try:
        done = outcome(migrating)
    finally:
        with postgres.admin(database.name) as admin:
            admin.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(sql.Identifier(role)))
    assert (done.code, done.applied) == (0, ["one"])


def test_m08_applied_counts_earlier_attempts(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """The report counts the revisions of earlier attempts too."""
    once = (
        "import pathlib; flag = pathlib.Path(__file__).with_suffix('.flag'); seen = flag.exists(); flag.touch()\n"
        "    if not seen: op.execute(\"DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$\")"
    )
    tree.revision("one").revision("two", once)
    done = outcome(start_migrate())
    assert (done.code, done.applied) == (0, ["one", "two"])
    assert applied(database) == {"one": 1, "two": 1}
