"""The live database, only read: sizes of tables, transactions that block, and whether its rows meet the demands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg

from bifrost_bootstrap.rehearse.forecast import Statement, TableForecast
from bifrost_bootstrap.servers.postgres import Connection

#: Milliseconds for one read of rows: what takes longer is reported as unknown.
CHECK_TIMEOUT = 10_000
#: Seconds from which on an open transaction is worth a word: it may hold its locks for as long again.
OLD_TRANSACTION = 60
_SIZES = """
    SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname), c.reltuples, pg_total_relation_size(c.oid)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE quote_ident(n.nspname) || '.' || quote_ident(c.relname) = ANY(%s)
"""
_OLD_TRANSACTIONS = """
    SELECT a.pid, coalesce(a.usename, ''), coalesce(a.application_name, ''), coalesce(a.state, 'unknown'),
      extract(epoch FROM now() - a.xact_start)::int,
      ARRAY(SELECT DISTINCT l.relation::regclass::text FROM pg_locks l
            WHERE l.pid = a.pid AND l.relation >= 16384 AND l.locktype = 'relation' AND l.database = a.datid)
    FROM pg_stat_activity a
    WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.backend_type = 'client backend'
      AND a.xact_start < now() - make_interval(secs => %s)
    ORDER BY a.xact_start
"""


@dataclass(frozen=True)
class OpenTransaction:
    """A transaction that has been open for `seconds`. tables: those it has locked, in any mode."""

    pid: int
    user: str
    application: str
    state: str
    seconds: int
    tables: list[str]

    def __str__(self) -> str:
        who = f"{self.application or 'a session'} of {self.user} (pid {self.pid}, {self.state})"
        has = f" and has locked {', '.join(self.tables)}" if self.tables else ""
        return f"{who} has a transaction open for {self.seconds}s{has}"


@dataclass(frozen=True)
class DataCheck:
    """What a statement demands of rows. result: "holds", "violated", or "unknown", and then why."""

    revision: str
    table: str
    demand: str
    result: str
    reason: str = ""


@dataclass(frozen=True)
class Demand:
    """A demand of a statement on the rows of a table. violation: a query that has a row where it is not met."""

    table: str
    text: str
    violation: str


def add_sizes(live: Connection, tables: Iterable[TableForecast]) -> None:
    """Put the live rows (estimated) and bytes beside each table."""
    by_name: dict[str, list[TableForecast]] = {}
    for table in tables:
        by_name.setdefault(table.table, []).append(table)
    for name, rows, size in live.execute(_SIZES, (list(by_name),)):
        for table in by_name[str(name)]:
            # -1: the table was never analyzed.
            table.rows = max(0, int(float(str(rows))))
            table.size = int(str(size))


def old_transactions(live: Connection) -> list[OpenTransaction]:
    """The open transactions of other sessions that are older than `OLD_TRANSACTION`, the oldest first."""
    rows: Any = live.execute(_OLD_TRANSACTIONS, (OLD_TRANSACTION,))
    return [OpenTransaction(*row) for row in rows]


def demands(statement: Statement, original: Mapping[str, str]) -> Iterator[Demand]:
    """What a statement demands of the rows of the tables that were there before. original: their names by oid."""
    for _, before, after in statement.changed("columns"):
        table = original.get(after["table"]) if after else None
        if table is None or not after["not_null"]:
            continue
        if before is None and not after["filled"]:
            yield Demand(
                table, f"no rows: column {after['name']} is NOT NULL without a default", f"SELECT FROM {table}"
            )
        elif before and not before["not_null"]:
            name = after["name"]
            yield Demand(table, f"{name} is not NULL", f"SELECT FROM {table} WHERE {name} IS NULL")
    for _, before, after in statement.changed("indexes"):
        table = original.get(after["table"]) if after else None
        if table and before is None and after["unique"]:
            yield _unique(table, after)
    for constraint in statement.validated_constraints():
        if table := original.get(constraint["table"]):
            yield from _constraint(table, constraint, original)


def _unique(table: str, index: Mapping[str, Any]) -> Demand:
    keys = ", ".join(index["keys"])
    conditions = [f"({index['where']})"] if index["where"] else []
    conditions += [] if index["nulls_equal"] else [f"({key}) IS NOT NULL" for key in index["keys"]]
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    return Demand(table, f"{keys} is unique", f"SELECT FROM {table}{where} GROUP BY {keys} HAVING count(*) > 1")


def _constraint(table: str, constraint: Mapping[str, Any], original: Mapping[str, str]) -> Iterator[Demand]:
    if constraint["type"] == "c":
        check = constraint["check"]
        yield Demand(table, f"CHECK {check}", f"SELECT FROM {table} WHERE NOT ({check})")
    elif constraint["type"] == "f" and (other := original.get(constraint["other"])):
        columns = constraint["columns"]
        pairs = zip(columns, constraint["other_columns"], strict=True)
        match = " AND ".join(f"b.{there} = a.{here}" for here, there in pairs)
        known = " AND ".join(f"a.{column} IS NOT NULL" for column in columns)
        yield Demand(
            table,
            f"each ({', '.join(columns)}) is in {other}",
            f"SELECT FROM {table} a WHERE {known} AND NOT EXISTS (SELECT FROM {other} b WHERE {match})",  # noqa: S608
        )


def check(live: Connection, revision: str, demand: Demand, written: set[str]) -> DataCheck:
    """Read whether the live rows meet a demand. written: tables whose rows the revisions have changed before."""
    if demand.table in written:
        return DataCheck(revision, demand.table, demand.text, "unknown", "a revision changes the rows before")
    try:
        with live.transaction():
            live.execute(f"SET LOCAL statement_timeout = {CHECK_TIMEOUT}")
            row = live.execute(f"SELECT EXISTS ({demand.violation})".encode()).fetchone()
    except psycopg.errors.QueryCanceled:
        return DataCheck(revision, demand.table, demand.text, "unknown", f"no answer within {CHECK_TIMEOUT // 1000}s")
    except psycopg.errors.ProgrammingError as error:
        # A column or type that an earlier revision makes.
        return DataCheck(revision, demand.table, demand.text, "unknown", str(error.diag.message_primary))
    return DataCheck(revision, demand.table, demand.text, "violated" if row and row[0] else "holds")
