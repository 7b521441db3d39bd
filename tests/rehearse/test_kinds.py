"""Every kind of statement: what the rehearsal forecasts, what PostgreSQL's manual says, and what happens for real."""

from __future__ import annotations

import threading

import pytest

from bifrost_bootstrap import settings as environment
from bifrost_bootstrap.migrate import tree_loading
from bifrost_bootstrap.rehearse.forecast import LOCKS, TableForecast
from bifrost_bootstrap.rehearse.rehearsal import Rehearsal, rehearse
from tests.rehearse.kinds import KINDS, TABLE, VIEW, Kind
from tests.servers import Database, Postgres
from tests.servers.process import wait_until
from tests.setups.migration import Tree

Seen = tuple[str, bool, bool, bool]


def table_of(kind: Kind) -> str:
    """The name of the table of a kind."""
    return f"k_{kind.name}"


def expected(kind: Kind) -> Seen:
    """Lock, rewritten, scanned, index built: by the manual."""
    return kind.lock, kind.rewritten, kind.scanned, kind.index


def make_tables(database: Database) -> None:
    """Make the tables of all kinds, with what each statement needs."""
    with database.connect() as connection:
        for kind in KINDS:
            connection.execute((TABLE + kind.before).format(t=table_of(kind)).encode())


def forecasts(found: Rehearsal, kind: Kind) -> dict[str, TableForecast]:
    """The forecast of each table of a kind, by the end of its name behind that of the first ("")."""
    revision = next(one for one in found.revisions if one.revision == kind.name)
    prefix = f"public.{table_of(kind)}"
    return {one.table.removeprefix(prefix): one for one in revision.tables if one.table.startswith(prefix)}


@pytest.mark.slow
@pytest.mark.parametrize("server", ["embedded", "own"])
def test_each_forecast_is_what_the_manual_says(
    database: Database, postgres: Postgres, tree: Tree, clean_env: dict[str, str], server: str
) -> None:
    """One revision for each kind, all rehearsed at once: on the embedded PostgreSQL and on one of the live version."""
    tree.revision("first")
    with database.connect() as connection:
        connection.execute("CREATE TABLE applied (revision text NOT NULL, pid int DEFAULT pg_backend_pid())")
        connection.execute("CREATE TABLE alembic_version (version_num varchar(64) PRIMARY KEY)")
        connection.execute("INSERT INTO alembic_version VALUES ('first')")
    make_tables(database)
    for kind in KINDS:
        statement = kind.statement.format(t=table_of(kind))
        block = "with op.get_context().autocommit_block():\n        " if kind.alone else ""
        tree.revision(kind.name, f"{block}op.execute({statement!r})")
    variables = {"BIFROST_DATABASE_URL": database.url, "BIFROST_ALEMBIC_CONFIG": str(tree.config)}
    if server == "own":
        variables["BIFROST_REHEARSAL_DATABASE_URL"] = postgres.create_database().url
    settings = environment.load(("database", "tree"), clean_env | variables)
    found = rehearse(settings, tree_loading.load(settings))
    seen = {}
    others = {}
    for kind in KINDS:
        tables = forecasts(found, kind)
        own = tables.pop("", TableForecast(""))
        seen[kind.name] = (own.lock, own.rewritten, own.scanned, bool(own.indexes))
        others[kind.name] = {name: table.lock for name, table in tables.items()}
    assert seen == {kind.name: expected(kind) for kind in KINDS}
    assert others == {kind.name: dict(kind.others) for kind in KINDS}
    assert [check.result for check in found.checks] == ["holds"] * len(found.checks)


def test_each_statement_takes_the_forecast_lock_for_real(database: Database) -> None:
    """On tables with rows; of a statement outside a transaction the lock that it waits for is seen."""
    make_tables(database)
    seen = {}
    for kind in KINDS:
        seen[kind.name] = lock_waited_for(database, kind) if kind.alone else lock_held(database, kind)
    assert seen == {kind.name: (kind.lock, None if kind.alone else kind.rewritten) for kind in KINDS}


def lock_held(database: Database, kind: Kind) -> tuple[str, bool]:
    """The strongest lock on the table behind the statement, and whether the file of the table changed."""
    table = table_of(kind)
    with database.connect() as connection, connection.transaction(force_rollback=True):
        query = f"SELECT '{table}'::regclass::oid, pg_relation_filenode('{table}')"
        oid, file = connection.execute(query.encode()).fetchone() or (0, 0)
        connection.execute(kind.statement.format(t=table).encode())
        rows = connection.execute(
            "SELECT mode FROM pg_locks WHERE pid = pg_backend_pid() AND relation = %s", (oid,)
        ).fetchall()
        strongest = max((str(mode) for (mode,) in rows), key=list(LOCKS).index, default="AccessShareLock")
        now = connection.execute("SELECT pg_relation_filenode(%s::oid::regclass)", (oid,)).fetchone()
        rewritten = bool(now and now[0] and now[0] != file) and not kind.statement.startswith("TRUNCATE")
    lock = LOCKS[strongest][0]
    return "" if lock == "ACCESS SHARE" else lock, rewritten


def lock_waited_for(database: Database, kind: Kind) -> tuple[str, None]:
    """The lock that the statement asks for while somebody else has a lock on the table."""
    table = table_of(kind)
    statement = kind.statement.format(t=table)

    def run() -> None:
        with database.connect() as connection:
            connection.execute(statement.encode())

    waiting = threading.Thread(target=run)
    with database.connect() as holder, database.connect() as watcher:
        holder.execute("BEGIN")
        # The weakest that all wait for: VACUUM first takes ACCESS SHARE. LOCK TABLE takes no view, refreshing it does.
        locks = (
            "REFRESH MATERIALIZED VIEW {}" if kind.before == VIEW else "LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE"
        )
        holder.execute(locks.format(table).encode())
        waiting.start()

        modes: list[str] = []

        def asks_for_lock() -> bool:
            rows = watcher.execute(
                "SELECT mode FROM pg_locks WHERE NOT granted AND relation = %s::regclass::oid", (table,)
            ).fetchall()
            modes.extend(str(mode) for (mode,) in rows)
            return bool(modes)

        wait_until(asks_for_lock, f"{statement} waits for its lock")
        holder.execute("ROLLBACK")
        waiting.join()
    return LOCKS[modes[0]][0], None
