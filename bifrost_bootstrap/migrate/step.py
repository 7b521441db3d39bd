"""The step `migrate`: bring the schema to the tree's heads, once, however many processes try."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from bifrost_bootstrap import errors
from bifrost_bootstrap.deadline import Deadline, RejectionTimer
from bifrost_bootstrap.migrate import lock, runner, schema_state, tree_loading
from bifrost_bootstrap.migrate.runner import Applied
from bifrost_bootstrap.migrate.schema_state import SchemaState
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.progress import Facts, Progress, Report
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.settings import Settings

logger = logging.getLogger(__name__)

#: Pauses between two attempts, seconds: a deadlock is over at once, a server that restarts takes longer.
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 15.0
#: How often in a row the tree's process may end without a report: by a signal, or out of memory.
MAX_CRASHES = 3
#: Errors after which another attempt may succeed. One of them is OwnProcessError: the tree's process crashed.
_PASSING = (errors.BusyError, errors.RefusedError, errors.UnavailableError)
#: The error of a revision that ended without an error, but is not in the version table.
_UNRECORDED = (
    "it ran without an error, and its version was not recorded: the revision, or env.py, ends the transaction itself, "
    "for instance by connection.commit()"
)


@dataclass(frozen=True)
class MigrateResult(Facts):
    """What a migrate did. `applied` is empty if nothing was to do; `ahead` if it was not ours to do."""

    verdict: str
    revision_from: list[str]
    revision_to: list[str]
    applied: list[Applied] = field(default_factory=list)
    seconds: float = 0.0


def migrate(settings: Settings, deadline: Deadline, report: Report) -> MigrateResult:
    """
    Upgrade to the tree's heads, or find that nothing is to do (one read, no lock).

    The deadline bounds waiting: for the migration lock, for table locks, for a server that is away. It does not end a
    revision that works. Any number of processes may call it at any time.

    Raises SchemaError before any DDL if the head cannot be reached, MigrationError if a revision failed,
    MigrateGivenUpError if the tree's process crashed each time, BusyError and UnavailableError at the deadline,
    RefusedError if that lasts longer than `RejectionTimer`, and the configuration errors of the tree.
    """
    started = time.monotonic()
    tree = tree_loading.load(settings)
    logger.info("tree %s (%s), heads %s", tree.alembic.config, tree.why, ", ".join(tree.heads) or "none")
    before: SchemaState | None = None
    applied: list[Applied] = []
    rejections = RejectionTimer()
    attempt = 1
    crashes = 0
    while True:
        try:
            state = _read_state(settings, tree)
            before = before or state
            while not state.ready:
                _upgrade(settings, tree, deadline, applied, report)
                state = _read_state(settings, tree)
            seconds = round(time.monotonic() - started, 3)
            return MigrateResult(
                state.verdict, list(before.database_heads), list(state.database_heads), applied, seconds
            )
        except _PASSING as error:
            crashes = crashes + 1 if isinstance(error, errors.OwnProcessError) else 0
            if crashes == MAX_CRASHES:
                raise errors.MigrateGivenUpError(crashes, str(error)) from error
            if rejections.expired_by(error) or deadline.passed:
                raise
            logger.warning("migrate: %s; trying again (attempt %d, %.0fs left)", error, attempt + 1, deadline.remaining)
            report(Progress("migrate", note=f"attempt {attempt + 1}: {error}"))
            deadline.pause(attempt, first=FIRST_PAUSE, longest=LONGEST_PAUSE)
            if deadline.passed:
                # Do not start another attempt after the deadline: nobody would wait for it.
                raise
            attempt += 1


def _upgrade(settings: Settings, tree: Tree, deadline: Deadline, applied: list[Applied], report: Report) -> None:
    """Upgrade once under the migration lock. Adds to `applied` what was applied and committed, also before an error."""
    url = settings.migration_database
    with lock.hold(url, deadline, lambda note: report(Progress("migrate", note=note))) as held:
        if _read_state(settings, tree).ready:
            # Another process has migrated while this one waited for the lock.
            return
        result = runner.upgrade(settings, tree, held, deadline, report)
        applied += result.applied
        if result.error:
            raise result.error
        _check_result(settings, tree, applied)


def _read_state(settings: Settings, tree: Tree) -> SchemaState:
    """The state of the schema. Raises SchemaError if no migration leads from it to the tree's heads."""
    state = schema_state.read_schema_state(settings.migration_database, tree, settings)
    if refusal := state.refusal():
        raise refusal
    return state


def _check_result(settings: Settings, tree: Tree, applied: list[Applied]) -> None:
    """After an upgrade without an error: raise if it is not recorded where we read, and log what it left broken."""
    url = settings.migration_database
    table = settings.alembic_version_table
    state = schema_state.read_schema_state(url, tree, settings)
    with postgres.connect(url, "migration-result", answer_timeout=postgres.ANSWER_TIMEOUT) as connection:
        if not state.ready and not state.refusal():
            if written := postgres.other_table(connection, table):
                raise errors.VersionTableError(table, written)
            recorded = tree.upto(state.database_heads)
            for one in applied:
                if one.revision not in recorded:
                    raise errors.MigrationError(one.revision, one.title, "", _UNRECORDED, "", sorted(recorded))
            fault = f"BIFROST_ALEMBIC_VERSION_TABLE: {table} is not at head after an upgrade without an error"
            raise errors.SettingsError([f"{fault}; env.py of the tree runs no revisions, or records them elsewhere"])
        for index, repair in postgres.invalid_indexes(connection).items():
            logger.warning("index %s is INVALID, of use to no query; repair it with: %s", index, repair)
