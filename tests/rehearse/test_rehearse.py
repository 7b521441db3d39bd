"""The command `rehearse`: its verdicts, what it prints, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from bifrost_bootstrap.rehearse import live as live_module
from bifrost_bootstrap.servers import postgres as postgres_module
from bifrost_bootstrap.urls import parse_postgres
from tests.conftest import BOOTSTRAP, StartCommand, StartServer
from tests.rehearse.conftest import Live
from tests.servers import Database, PgbouncerServer, Postgres, PostgresServer, RunFolder
from tests.servers.leaks import leaks_in
from tests.servers.process import find_program, wait_until
from tests.setups.migration import Tree

#: A case that `make test` leaves to `make test-faults`: another tests the same path.
slow = partial(pytest.param, marks=pytest.mark.slow)
#: Every table is large.
LARGE = {"BIFROST_REHEARSAL_LARGE": "1"}
REWRITE = "ALTER TABLE file ALTER COLUMN size TYPE bigint"


def schema_of(database: Database) -> list[tuple[str, str, str]]:
    """Each column of the database, and the recorded revision: what a migration would change."""
    return database.execute(
        "SELECT table_name::text, column_name::text, data_type::text FROM information_schema.columns"
        " WHERE table_schema = 'public' UNION ALL SELECT 'alembic_version', version_num, '' FROM alembic_version"
        " ORDER BY 1, 2"
    )


def test_it_says_what_each_revision_does(live: Live) -> None:
    """Lock, what it blocks, the work under it, and the live table's rows and size; nothing is written to it."""
    live.revision("second", REWRITE)
    live.revision("third", "CREATE INDEX ON file (region)", "CREATE TABLE other (id int)")
    before = schema_of(live.database)
    code, facts = live.rehearse()
    assert (code, facts["verdict"], facts["warnings"]) == (0, "rehearsed", [])
    assert facts["message"] == "2 revisions apply to this schema; 0 warnings"
    second, third = facts["revisions"]
    assert (second["revision"], second["title"], second["statements"]) == ("second", "Revision second", 1)
    (file,) = second["tables"]
    assert (file["table"], file["lock"], file["blocks"]) == ("public.file", "ACCESS EXCLUSIVE", "reads and writes")
    assert (file["rewritten"], file["rows"]) == (True, 1000)
    assert file["size"] > 8192
    (file,) = third["tables"]
    assert (file["lock"], file["blocks"], file["indexes"]) == ("SHARE", "writes", ["public.file_region_idx"])
    assert schema_of(live.database) == before


def test_it_warns_of_locks_that_last_on_large_tables(live: Live) -> None:
    """The largest harm first, each with the way to do it without; with --strict a warning is exit code 3."""
    live.revision("second", "CREATE INDEX ON region (name)")
    live.revision("third", REWRITE, "ALTER TABLE file ALTER COLUMN region SET NOT NULL")
    code, facts = live.rehearse(**LARGE)
    assert code == 0
    first, second = facts["warnings"]
    assert first.startswith(
        "revision third: public.file: ACCESS EXCLUSIVE blocks reads and writes while it is rewritten"
    )
    assert "fill it in batches" in first
    assert "index public.region_name_idx is built, not concurrently. To avoid it: CREATE INDEX CONCURRENTLY" in second
    make_empty(live)
    code, facts = live.rehearse("--strict", **LARGE)
    assert (code, facts["verdict"], len(facts["warnings"])) == (3, "not_ready", 2)
    make_empty(live)
    assert live.rehearse("--strict")[0] == 0


def make_empty(live: Live) -> None:
    """Make the rehearsal database empty again."""
    live.rehearsal.execute("DROP SCHEMA public CASCADE")
    live.rehearsal.execute("CREATE SCHEMA public")


def test_rows_written_under_a_blocking_lock_are_a_warning(live: Live) -> None:
    """ADD COLUMN is quick, but its lock lasts while the same transaction fills the column."""
    live.revision("second", "ALTER TABLE file ADD COLUMN kind text", "UPDATE file SET kind = 'a'")
    _, facts = live.rehearse(**LARGE)
    (warning,) = facts["warnings"]
    assert "ACCESS EXCLUSIVE blocks reads and writes while rows are written" in warning
    assert facts["revisions"][0]["data"] == ["UPDATE file SET kind = 'a'"]
    assert any("revision second writes rows" in note for note in facts["notes"])


def test_a_revision_that_fails_on_the_live_schema_only(live: Live) -> None:
    """Somebody has added the column by hand: no file of the tree says so. The report is that of migrate."""
    live.database.execute("ALTER TABLE file ADD COLUMN kind text")
    live.revision("second", "CREATE TABLE other (id int)")
    live.revision("third", "ALTER TABLE file ADD COLUMN kind text")
    code, facts = live.rehearse()
    assert (code, facts["error"]) == (1, "MigrationError")
    assert facts["message"].splitlines() == [
        'revision third (Revision third) failed: column "kind" of relation "file" already exists',
        "  statement: ALTER TABLE file ADD COLUMN kind text",
        "  applied before it: second",
    ]


@pytest.mark.parametrize(
    ("statement", "demand"),
    [
        ("ALTER TABLE region ALTER COLUMN name SET NOT NULL", "name is not NULL"),
        slow("ALTER TABLE region ADD COLUMN x int NOT NULL", "no rows: column x is NOT NULL without a default"),
        slow("CREATE UNIQUE INDEX ON region (name)", "name is unique"),
        slow("ALTER TABLE file ADD CHECK (size > 1)", "CHECK (size > 1)"),
        ("ALTER TABLE file ADD FOREIGN KEY (size) REFERENCES region (id)", "each (size) is in public.region"),
    ],
)
def test_rows_that_would_break_a_revision_are_found(live: Live, statement: str, demand: str) -> None:
    """The copy has no rows, so the live ones are read; then the same revision fails for real."""
    live.revision("second", statement)
    code, facts = live.rehearse()
    (check,) = facts["data_checks"]
    assert (code, check["result"], check["demand"]) == (1, "violated", demand)
    assert facts["message"].endswith(demand)
    make_empty(live)
    assert live.rehearse("--no-data-checks")[0] == 0
    with live.database.connect() as connection, pytest.raises(Exception, match=r"null|unique|violate|duplicate"):
        connection.execute(statement.encode())


@pytest.mark.slow
def test_rows_that_meet_the_demand_hold_and_written_rows_are_unknown(live: Live) -> None:
    """A demand behind an UPDATE of the same table cannot be checked on the rows as they are now."""
    live.revision("second", "ALTER TABLE file ALTER COLUMN size SET NOT NULL")
    live.revision("third", "UPDATE region SET name = id", "ALTER TABLE region ALTER COLUMN name SET NOT NULL")
    live.revision("fourth", "ALTER TABLE file ADD COLUMN x int", "ALTER TABLE file ADD CHECK (x > 0)")
    code, facts = live.rehearse()
    results = [(check["revision"], check["result"]) for check in facts["data_checks"]]
    assert (code, results) == (0, [("second", "holds"), ("third", "unknown"), ("fourth", "unknown")])
    assert [check["reason"] for check in facts["data_checks"]] == [
        "",
        "a revision changes the rows before",
        'column "x" does not exist',
    ]


def test_an_empty_live_database(live: Live) -> None:
    """There is no version table yet: all revisions are pending."""
    live.database.execute("DROP SCHEMA public CASCADE")
    live.database.execute("CREATE SCHEMA public")
    live.revision("second", "CREATE TABLE file (id int)", REWRITE.replace("size", "id"))
    code, facts = live.rehearse(**LARGE)
    assert (code, facts["warnings"]) == (0, [])
    assert [revision["tables"] for revision in facts["revisions"]] == [[], []]


@pytest.mark.slow
def test_it_ends_at_its_deadline(live: Live) -> None:
    """A revision that sleeps, as a frozen server would, ends it with 69; nothing goes on in the server."""
    live.revision("second", "SELECT pg_sleep(600)")
    code, facts = live.rehearse(BIFROST_INIT_TIMEOUT="4s")
    assert (code, facts["message"]) == (69, "the rehearsal: it did not end within 4s (BIFROST_INIT_TIMEOUT)")
    sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND pid <> pg_backend_pid()"
    wait_until(lambda: live.rehearsal.execute(sleeping) == [(0,)], "the statement ends")


def test_a_schema_at_head(live: Live) -> None:
    """There is nothing to rehearse."""
    assert live.rehearse()[1]["message"] == "nothing to rehearse: the schema is at head"


@pytest.mark.slow
def test_table_and_markdown(live: Live) -> None:
    """For a person on stdout, for the comment of a pull request with --markdown."""
    live.revision("second", "ALTER TABLE file DROP COLUMN size")
    done = live.run_bootstrap("rehearse", env=live.variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "1 revisions apply to this schema; 0 warnings",
        "  second  public.file: ACCESS EXCLUSIVE, blocks reads and writes; columns dropped: size; 1,000 rows, "
        + done.stdout.splitlines()[1].rpartition(", ")[2],
    ]
    make_empty(live)
    done = live.run_bootstrap("rehearse", "--markdown", env=live.variables)
    assert "| `second` | `public.file` | ACCESS EXCLUSIVE | reads and writes | columns dropped: size | 1,000 |" in (
        done.stdout
    )


def test_the_embedded_server_is_the_default(live: Live, clean_env: dict[str, str]) -> None:
    """Without BIFROST_REHEARSAL_DATABASE_URL the copy is in a private server; its roles are made there."""
    live.database.execute("ALTER TABLE file ENABLE ROW LEVEL SECURITY")
    with live.database.connect() as connection:
        connection.execute(f"CREATE POLICY own ON file TO {live.database.server.app_role} USING (true)".encode())
    live.database.execute("CREATE MATERIALIZED VIEW known AS SELECT id FROM region")
    live.revision("second", REWRITE, f"GRANT SELECT ON file TO {live.database.server.app_role}")
    env = {name: value for name, value in live.variables.items() if name != "BIFROST_REHEARSAL_DATABASE_URL"}
    done = live.run_bootstrap("rehearse", env=env)
    assert done.returncode == 0, done.stderr
    assert "it is rewritten" in done.stdout


def find_pg_dump() -> str:
    """The program of the installed server."""
    return find_program("pg_dump", "/usr/lib/postgresql/*/bin")


def pg_dump(database: Database, *options: str) -> str:
    """A dump as an operator writes it."""
    command = [find_pg_dump(), f"--dbname={database.url}", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_dump_in_place_of_a_live_database(live: Live, tmp_path: Path) -> None:
    """For a pipeline: no live database is named. A dump with rows is taken too; sizes are unknown, so all is large."""
    live.revision("second", REWRITE)
    file = tmp_path / "schema.sql"
    file.write_text(pg_dump(live.database))
    env = {name: value for name, value in live.variables.items() if name != "BIFROST_DATABASE_URL"}
    done = live.run_bootstrap("rehearse", "--schema", str(file), "--strict", env=env)
    assert done.returncode == 3, done.stderr
    assert "public.file: ACCESS EXCLUSIVE blocks reads and writes while it is rewritten" in done.stdout
    schema_only = pg_dump(live.database, "--schema-only")
    versions = pg_dump(live.database, "--data-only", "--inserts", "--table=alembic_version")
    file.write_text(schema_only + versions)
    make_empty(live)
    done = live.run_bootstrap("rehearse", "--schema", str(file), env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_option_that_only_the_server_sets(live: Live, tmp_path: Path) -> None:
    """PostgreSQL 17.12 keeps `pg_attver` among the options of a column; an older pg_dump writes it into the dump."""
    live.revision("second", REWRITE)
    file = tmp_path / "schema.sql"
    options = (
        "ALTER TABLE ONLY public.file ALTER COLUMN size SET (pg_attver=26677544);\n"
        "ALTER TABLE ONLY public.file ALTER COLUMN region SET (n_distinct=5, pg_attver=26677544);\n"
    )
    file.write_text(pg_dump(live.database) + options)
    assert live.rehearse("--schema", str(file))[0] == 0
    kept = live.rehearsal.execute("SELECT attname::text FROM pg_attribute WHERE 'n_distinct=5' = ANY (attoptions)")
    assert kept == [("region",)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PGDMP...", "pg_dump's own format"),
        ("-- Dumped from database version 99.1\n", "the schema is of PostgreSQL 99, and the rehearsal server is"),
        ("CREATE EXTENSION nowhere;", 'extension "nowhere" is not available'),
    ],
)
def test_a_dump_that_the_server_cannot_take(live: Live, tmp_path: Path, text: str, message: str) -> None:
    """A newer server, an extension, another format: 78, and the message names it."""
    file = tmp_path / "schema.sql"
    file.write_text(text)
    code, facts = live.rehearse("--schema", str(file))
    assert (code, facts["error"]) == (78, "RehearsalError")
    assert message in facts["message"]


def test_a_rehearsal_database_with_something_in_it(live: Live) -> None:
    """It is refused and left as it is: it may be somebody's."""
    live.rehearsal.execute("CREATE TABLE mine (id int)")
    code, facts = live.rehearse()
    assert (code, facts["error"]) == (78, "RehearsalError")
    assert "is not empty: it has table mine" in facts["message"]
    assert live.rehearsal.execute("SELECT count(*) FROM mine") == [(0,)]


@pytest.mark.slow
def test_a_role_with_few_rights(live: Live, postgres: Postgres) -> None:
    """The tables that it may not read are named. With pg_read_all_data it may rehearse, and writes nothing."""
    role = f"reader_{live.database.name}"
    with postgres.admin(live.database.name) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{postgres.app_password}'".encode())
        admin.execute(f"GRANT SELECT ON alembic_version, region TO {role}".encode())
    live.revision("second", REWRITE)
    reader = {"BIFROST_DATABASE_URL": postgres.url(live.database.name, user=role)}
    try:
        code, facts = live.rehearse(**reader)
        assert (code, facts["message"]) == (78, f"no rehearsal: role {role} may not read file")
        assert "pg_read_all_data" in facts["remedy"]
        with postgres.admin(live.database.name) as admin:
            admin.execute(f"GRANT pg_read_all_data TO {role}".encode())
        code, facts = live.rehearse(**reader)
        assert (code, facts["revisions"][0]["tables"][0]["rows"]) == (0, 1000)
    finally:
        with postgres.admin(live.database.name) as admin:
            admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def test_a_pooler_is_refused(live: Live, postgres: Postgres, run_folder: RunFolder, start_server: StartServer) -> None:
    """pg_dump would leave its search path to the pooler's next client. The direct URL is what is asked for."""
    if not isinstance(postgres, PostgresServer):
        pytest.skip("PgBouncer stands before a server of our own")
    pool = start_server(PgbouncerServer(run_folder, postgres, pool_size=2))
    code, facts = live.rehearse(BIFROST_DATABASE_URL=pool.url(live.database.name))
    assert (code, facts["error"]) == (78, "RehearsalError")
    assert "set BIFROST_MIGRATION_DATABASE_URL" in facts["remedy"]


def test_an_env_that_names_the_live_database_itself(live: Live) -> None:
    """The runner sees that it is not the copy: 78, and nothing is written, not even outside a transaction."""
    env = live.tree.folder / "env.py"
    text = env.read_text()
    assert "DATABASE_URL" in text
    env.write_text(f"import os\nos.environ['DATABASE_URL'] = {live.database.url!r}\n{text}")
    live.revision("second", REWRITE)
    before = schema_of(live.database)
    code, facts = live.rehearse()
    assert (code, facts["error"]) == (78, "WrongDatabaseError")
    assert schema_of(live.database) == before


def test_an_asynchronous_tree_with_its_own_interpreter(live: Live, tmp_path: Path) -> None:
    """asyncpg, and statements outside a transaction: those that can be in one are observed there."""
    tree = Tree(tmp_path / "asynchronous", "asynchronous")
    live.tree = tree
    live.write("first", "pass")
    live.write(
        "second",
        "with op.get_context().autocommit_block():\n"
        "        op.execute('CREATE INDEX CONCURRENTLY file_region ON file (region)')\n"
        "        op.execute('ALTER TABLE region ADD CHECK (id > 0) NOT VALID')\n"
        "    op.execute('ALTER TABLE file ALTER COLUMN size TYPE bigint')",
    )
    env = tree.folder / "env.py"
    env.write_text(f"import os\nassert '+asyncpg' in os.environ['DATABASE_URL']\n{env.read_text()}")
    code, facts = live.rehearse(
        BIFROST_ALEMBIC_CONFIG=str(tree.config),
        BIFROST_ALEMBIC_PYTHON=sys.executable,
        BIFROST_DATABASE_URL=live.database.url_for("asyncpg"),
    )
    assert code == 0, facts
    tables = {table["table"]: table for table in facts["revisions"][0]["tables"]}
    assert (tables["public.file"]["rewritten"], tables["public.file"]["indexes"]) == (True, [])
    assert tables["public.region"]["lock"] == "ACCESS EXCLUSIVE"
    assert facts["revisions"][0]["statements"] == 3


@pytest.mark.slow
def test_the_live_database_is_read_only_under_writers(
    live: Live, start_command: StartCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While writers work, our sessions hold no lock on a table of theirs but ACCESS SHARE, and no writer waits."""
    for number in range(30):
        live.database.execute(f"CREATE TABLE more_{number} (id int PRIMARY KEY, text text)")
    live.revision("second", REWRITE, "ALTER TABLE file ALTER COLUMN region SET NOT NULL")
    done = threading.Event()
    written = 0
    modes: set[tuple[str, bool]] = set()

    def write() -> None:
        nonlocal written
        with live.database.connect() as connection:
            connection.execute("SET lock_timeout = '500ms'")
            while not done.is_set():
                connection.execute("UPDATE file SET size = size + 1 WHERE id = 1")
                written += 1

    writer = threading.Thread(target=write)
    with live.database.server.admin(live.database.name) as watcher:
        writer.start()
        command = start_command([*BOOTSTRAP, "rehearse"], env=live.variables)
        while command.running:
            rows = watcher.execute(
                "SELECT l.mode, l.granted FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
                " WHERE l.relation >= 16384 AND (a.application_name LIKE 'bifrost-bootstrap%%'"
                " OR a.application_name = 'pg_dump') AND a.datname = current_database()"
            ).fetchall()
            modes.update((str(mode), bool(granted)) for mode, granted in rows)
        done.set()
        writer.join()
    assert command.wait(60).returncode == 0
    assert modes == {("AccessShareLock", True)}
    assert written > 10


def test_old_transactions_are_named(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has a transaction open, for how long, and what it has locked."""
    monkeypatch.setattr(live_module, "OLD_TRANSACTION", 0)
    with live.database.connect() as other, postgres_module.connect(parse_postgres(live.database.url), "test") as reader:
        other.execute("SET application_name = 'report'")
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM region")
        (found,) = live_module.old_transactions(reader)
    assert (found.application, found.state, found.tables) == (
        "report",
        "idle in transaction",
        ["region", "region_pkey"],
    )
    assert str(found).startswith("report of ")


def test_no_password_is_shown(live: Live, tmp_path: Path) -> None:
    """Neither in the output nor in the arguments of pg_dump, which every user of the machine can read."""
    live.revision("second", REWRITE)
    arguments = tmp_path / "arguments"
    program = tmp_path / "bin" / "pg_dump"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {arguments}\nexec {find_pg_dump()} "$@"\n')
    program.chmod(0o755)
    done = live.run_bootstrap(
        "rehearse",
        env=live.variables
        | {
            "PATH": f"{program.parent}{os.pathsep}{live.variables['PATH']}",
            "BIFROST_DATABASE_URL": f"{live.database.url}?sslpassword=planted-key-phrase",
            "BIFROST_LOG_LEVEL": "DEBUG",
        },
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr + arguments.read_text()
    assert "--snapshot=" in shown
    assert not leaks_in(shown)
    assert "planted-key-phrase" not in shown
