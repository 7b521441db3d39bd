"""Copy the live schema, run the pending revisions on the copy, and put the live tables beside what they did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg

from bifrost_bootstrap.deadline import Deadline, DeadlineExceeded
from bifrost_bootstrap.dev import embedded
from bifrost_bootstrap.errors import OwnProcessError
from bifrost_bootstrap.migrate import lock, runner, schema_state, tree_loading
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.rehearse import live as live_database, schema_copy
from bifrost_bootstrap.rehearse.forecast import Statement, TableForecast, forecast_tables
from bifrost_bootstrap.rehearse.live import DataCheck, OpenTransaction
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.servers.postgres import Connection
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.urls import PostgresUrl, parse_postgres


@dataclass
class RevisionForecast:
    """
    What one revision did on the copy. seconds: of its statements, on tables without rows. statements: how many.

    data: the statements that write rows (on the copy there are none). tables: what it does to the live tables.
    """

    revision: str
    title: str
    seconds: float = 0.0
    statements: int = 0
    data: list[str] = field(default_factory=list)
    tables: list[TableForecast] = field(default_factory=list)


@dataclass(frozen=True)
class Rehearsal:
    """
    The forecast. revisions: the pending ones, in their order; empty if the schema is at head.

    one_transaction: env.py runs all revisions in one transaction, so each lock is held until the last is committed.
    large: the size (bytes) of a table from which on a lock that lasts is a warning.
    """

    revisions: list[RevisionForecast]
    checks: list[DataCheck]
    open_transactions: list[OpenTransaction]
    one_transaction: bool
    large: int

    @property
    def tables(self) -> list[tuple[RevisionForecast, TableForecast]]:
        """Each table with the revision that locks it, the largest harm first."""
        pairs = [(revision, table) for revision in self.revisions for table in revision.tables]
        return sorted(pairs, key=lambda pair: pair[1].harm, reverse=True)

    @property
    def warnings(self) -> list[str]:
        """Each lock that lasts on a large table, the largest harm first, and how to avoid it."""
        found = [(revision, table.warning(self.large)) for revision, table in self.tables]
        return [f"revision {revision.revision}: {warning}" for revision, warning in found if warning]

    @property
    def violations(self) -> list[DataCheck]:
        """The demands that the live rows do not meet. The revision would fail on them."""
        return [check for check in self.checks if check.result == "violated"]

    @property
    def notes(self) -> list[str]:
        """What this rehearsal cannot see, and which open transactions would block the revisions now."""
        notes = ["the copy has no rows: seconds are those of empty tables"] if self.revisions else []
        for revision in self.revisions:
            if revision.data:
                text = f"revision {revision.revision} writes rows: its time, and its failures on rows, are not seen"
                notes.append(f"{text} ({len(revision.data)} statements)")
        if self.one_transaction and len(self.revisions) > 1:
            notes.append("env.py runs all revisions in one transaction: each lock is held until the last is committed")
        return notes + [str(one) for one in self.open_transactions]

    @property
    def headline(self) -> str:
        """In one line."""
        if not self.revisions:
            return "nothing to rehearse: the schema is at head"
        if self.violations:
            first = self.violations[0]
            return f"revision {first.revision} would fail on the rows of {first.table}, which violate: {first.demand}"
        return f"{len(self.revisions)} revisions apply to this schema; {len(self.warnings)} warnings"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        revisions = [
            {**vars(revision), "tables": [table.to_dict() for table in revision.tables]} for revision in self.revisions
        ]
        return {
            "revisions": revisions,
            "warnings": self.warnings,
            "notes": self.notes,
            "data_checks": [vars(check) for check in self.checks],
            "open_transactions": [vars(one) for one in self.open_transactions],
            "one_transaction": self.one_transaction,
        }


class _Observed:
    """
    What the runner reports, in the order of its events. A tree may run the same revision several times, for schemas.

    original: the tables that were there before the first revision: names by oid. statements: of each revision.
    """

    def __init__(self) -> None:
        self.original: dict[str, str] = {}
        self.one_transaction = False
        self.revisions: list[RevisionForecast] = []
        self.statements: list[list[Statement]] = []

    def on_event(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "original" if not self.revisions:
                self.original = event["tables"]
                self.one_transaction = event["one_transaction"]
            case "begin":
                self.revisions.append(RevisionForecast(event["revision"], event["title"]))
                self.statements.append([])
            case "statement":
                locks = [(oid, mode) for oid, mode in event["locks"]]
                statement = Statement(event["text"], event["changes"], locks, event["in_transaction"])
                revision = self.revisions[-1]
                revision.seconds = round(revision.seconds + event["seconds"], 3)
                revision.statements += 1
                revision.data += [statement.text] if statement.writes_rows else []
                self.statements[-1].append(statement)

    def forecast(self) -> list[RevisionForecast]:
        """The revisions with the tables that their statements touched."""
        for revision, statements in zip(self.revisions, self.statements, strict=True):
            revision.tables = forecast_tables(statements, self.original)
        return self.revisions


def rehearse(settings: Settings, tree: Tree, *, schema: Path | None = None, data_checks: bool = True) -> Rehearsal:
    """
    Run the pending revisions on a copy of the live schema. Nothing is written to the live database.

    schema: a dump in place of the live database. data_checks: read of the live rows whether they meet what the
    revisions demand of them; each read takes at most `live.CHECK_TIMEOUT`.

    Raises RehearsalError if no copy can be made, SchemaError and MigrationError as migrate does, UnavailableError,
    RefusedError, BusyError, the configuration errors of the tree, and OwnProcessError after `settings.init_timeout`.
    """
    deadline = Deadline(settings.init_timeout)
    try:
        # pg_dump waits for ever for a server that is frozen, and a revision may sleep.
        with deadline.interrupt_after(0):
            return _rehearse(settings, tree, deadline, schema, data_checks=data_checks)
    except DeadlineExceeded:
        reason = f"it did not end within {deadline.seconds:.0f}s (BIFROST_INIT_TIMEOUT)"
        raise OwnProcessError("the rehearsal", reason) from None


def _rehearse(
    settings: Settings, tree: Tree, deadline: Deadline, schema: Path | None, *, data_checks: bool
) -> Rehearsal:
    observed = _Observed()
    with ExitStack() as stack:
        live = None if schema else stack.enter_context(_live(settings))
        text = schema_copy.read_file(schema) if schema else ""
        roles: frozenset[str] = frozenset()
        versions: dict[str, tuple[str, ...]] = {}
        if live:
            with live.transaction():
                roles = frozenset(str(row[0]) for row in live.execute(_ROLES))
                versions = {table: postgres.database_heads(live, table) for table in _version_tables(settings, tree)}
                text = schema_copy.dump(live, settings.migration_database, settings.migration_lock_timeout)
        url = _for_env_py(settings.rehearsal_database_url or _embedded(stack), settings)
        schema_copy.restore(text, url, roles, versions)
        _upgrade(settings, tree, url, observed, deadline)
        revisions = observed.forecast()
        checks: list[DataCheck] = []
        open_transactions: list[OpenTransaction] = []
        if live:
            live_database.add_sizes(live, [table for revision in revisions for table in revision.tables])
            open_transactions = live_database.old_transactions(live)
            checks = list(_check_rows(live, observed)) if data_checks else []
    return Rehearsal(revisions, checks, open_transactions, observed.one_transaction, settings.rehearsal_large)


#: The roles that a revision may name; those of PostgreSQL itself are everywhere.
_ROLES = "SELECT rolname FROM pg_roles WHERE rolname !~ '^pg_'"


@contextmanager
def _live(settings: Settings) -> Iterator[Connection]:
    """The live database. Each transaction sees one state of it, and only reads."""
    url = settings.migration_database
    with postgres.connect(url, "rehearse", answer_timeout=postgres.WORK_TIMEOUT) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        yield connection


def _embedded(stack: ExitStack) -> PostgresUrl:
    return parse_postgres(stack.enter_context(embedded.embedded_servers()).database_url)


def _for_env_py(copy: PostgresUrl, settings: Settings) -> PostgresUrl:
    """The URL of the copy with the driver suffix of the live URL, which env.py may need, unless it has its own."""
    scheme, _, rest = copy.as_written.partition("://")
    if not settings.database_url or "+" in scheme:
        return copy
    live_scheme = settings.migration_database.as_written.partition("://")[0]
    return replace(copy, as_written=f"{live_scheme}://{rest}")


def _version_tables(settings: Settings, tree: Tree) -> tuple[str, ...]:
    if not tree.several:
        return (settings.alembic_version_table,)
    return tree_loading.version_tables(tree.alembic, postgres.at_last_host(settings.migration_database).as_written)


def _upgrade(settings: Settings, tree: Tree, url: PostgresUrl, observed: _Observed, deadline: Deadline) -> None:
    """Run what migrate runs, on the copy."""
    copied = settings.model_copy(update={"database_url": url, "migration_database_url": None})
    state = schema_state.read_schema_state(url, tree, copied)
    if refusal := state.refusal():
        raise refusal
    if state.ready:
        return
    with lock.hold(url, deadline, lambda _note: None) as held:
        done = runner.upgrade(copied, tree, held, deadline, lambda _progress: None, observe=True)
    if done.error:
        raise done.error
    for event in done.events:
        observed.on_event(event)


def _check_rows(live: Connection, observed: _Observed) -> Iterator[DataCheck]:
    """Read whether the live rows meet what each statement demands of them."""
    written: set[str] = set()
    for revision, statements in zip(observed.revisions, observed.statements, strict=True):
        for statement in statements:
            for demand in live_database.demands(statement, observed.original):
                yield live_database.check(live, revision.revision, demand, written)
            locked = {oid for oid, mode in statement.locks if mode == "RowExclusiveLock"}
            written |= {name for oid, name in observed.original.items() if oid in locked}
