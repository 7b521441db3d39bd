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

#: Pauses between two attempts, seconds.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
#: What is said of a revision that has run and is not in the version table.
_UNRECORDED = (
    "it ran without an error, and its version was not recorded: the revision, or env.py, ends the transaction itself, "
    "for instance by connection.commit()"
)
#: How often in a row the tree's process may end without a report: by a signal, or out of memory.
MAX_CRASHES = 3


@dataclass(frozen=True)
class MigrateResult(Facts):
    """What a migrate did. `applied` is empty where nothing was to do; `ahead` where it was not ours to do."""

    verdict: str
    revision_from: list[str]
    revision_to: list[str]
    applied: list[Applied] = field(default_factory=list)
    seconds: float = 0.0


def migrate(settings: Settings, deadline: Deadline, report: Report) -> MigrateResult:
    """
    Upgrade to the tree's heads, or find that nothing is to do (one read, no lock).

    The deadline bounds waiting: for the migration lock, for table locks, for a server that is away. A revision
    that works is not ended by it. Safe to be called at any time by any number of processes.

    Raises SchemaError before any DDL where the head cannot be reached, MigrationError where a revision failed,
    MigrateGivenUpError where the tree's process died each time, BusyError and UnavailableError at the deadline,
    RefusedError where that lasts longer than `RejectionTimer`, and the configuration errors of the tree.
    """
    started = time.monotonic()
    tree = tree_loading.load(settings)
    logger.info("tree %s (%s), heads %s", tree.alembic.config, tree.why, ", ".join(tree.heads) or "none")
    url = settings.migration_database
    before: SchemaState | None = None
    applied: list[Applied] = []
    rejections = RejectionTimer()
    attempt = deaths = 0
    while True:
        attempt += 1
        try:
            state = schema_state.read_schema_state(url, tree, settings)
            before = before or state
            if refusal := state.refusal():
                raise refusal
            if state.ready:
                return MigrateResult(
                    state.verdict, list(before.database_heads), list(state.database_heads), applied,
                    round(time.monotonic() - started, 3),
                )  # fmt: skip
            with lock.hold(url, deadline, lambda note: report(Progress("migrate", note=note))) as held:
                # Somebody may have been faster while we waited.
                state = schema_state.read_schema_state(url, tree, settings)
                if not state.ready and not state.refusal():
                    runner.upgrade(settings, tree, held, deadline, applied, report)
                    _look_at_result(settings, tree, applied)
        except errors.OwnProcessError as died:
            error: errors.BootstrapError = died
            deaths += 1
            if deaths == MAX_CRASHES:
                raise errors.MigrateGivenUpError(deaths, str(error)) from died
        except (errors.BusyError, errors.RefusedError, errors.UnavailableError) as passing:
            error, deaths = passing, 0
        else:
            continue
        if rejections.expired_by(error):
            raise error
        if not deadline.passed:
            logger.warning("migrate: %s; trying again (attempt %d, %.0fs left)", error, attempt + 1, deadline.remaining)
            report(Progress("migrate", note=f"attempt {attempt + 1}: {error}"))
            deadline.pause(attempt, first=FIRST_PAUSE, longest=LONGEST_PAUSE)
        if deadline.passed:
            # Not one more attempt, which would end when who waits for us has gone.
            raise error


def _look_at_result(settings: Settings, tree: Tree, applied: list[Applied]) -> None:
    """After an upgrade without an error: is it recorded where we read, and did it leave something broken?"""
    url, table = settings.migration_database, settings.alembic_version_table
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
