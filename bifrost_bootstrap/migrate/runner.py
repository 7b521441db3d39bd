"""One run of the tree in its own process, under the migration lock: events in, a result out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from bifrost_bootstrap import errors
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.migrate import lock, schema_state
from bifrost_bootstrap.migrate.blockers import BlockerWatch
from bifrost_bootstrap.migrate.lock import MigrationLock
from bifrost_bootstrap.migrate.process import Child, unfit
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.progress import Progress, Report
from bifrost_bootstrap.redaction import masked
from bifrost_bootstrap.servers.postgres import LEFTOVER, REFUSALS, at_last_host
from bifrost_bootstrap.settings import Settings

logger = logging.getLogger(__name__)

_LOCK_TIMEOUT = "55P03"
_NO_RIGHT = "42501"
#: SQLSTATEs of a login that is refused: password, role, database.
_REFUSED = ("28", "3D000")
#: SQLSTATEs after which the same revision may succeed: deadlock, serialization, a statement that asyncpg prepared on
#: another connection of a pooler (26000), a server that is a standby for now (25006), and the classes of connection
#: errors, shutdown and lack of resources.
_TRANSIENT = ("40P01", "40001", "26000", "25006", "08", "57P", "53")


@dataclass(frozen=True)
class Applied:
    """A revision that this run applied, and how long it took (seconds)."""

    revision: str
    title: str
    seconds: float


@dataclass(frozen=True)
class RunResult:
    """
    How a run ended.

    applied: the revisions that it applied and committed. error: why it stopped before the heads, or None. events: all
    that the runner sent.
    """

    applied: list[Applied]
    error: errors.BootstrapError | None
    events: list[dict[str, Any]]


def upgrade(
    settings: Settings, tree: Tree, held: MigrationLock, deadline: Deadline, report: Report, **request: Any
) -> RunResult:
    """
    Run the tree to its heads in its own process while the lock is held.

    The deadline ends a statement only while it waits for a lock of another session. At the end no process is
    left that the tree has started in its process group. request: fields that the runner's request gets beside the
    usual ones.

    The error of the result: after BusyError, RefusedError, UnavailableError and OwnProcessError (the process ended
    without a report) another attempt may succeed. MigrationError, TreeError, WrongDatabaseError, VersionTableError and
    SettingsError (of the tree's interpreter) come again with every attempt.

    Raises SettingsError if the interpreter does not start.
    """
    # The tree reads its URL from the environment; an argument would show in the process list. Its driver may wait for a
    # frozen host for minutes.
    url = at_last_host(settings.migration_database).as_written
    request = _request(settings, tree, held) | request
    child = Child(tree.alembic, request, BIFROST_DATABASE_URL=url, DATABASE_URL=url)
    watch = BlockerWatch(settings.migration_database, held, settings.migration_lock_timeout)
    run = _Run(report)
    error: errors.BootstrapError | None = None
    try:
        with child, watch:
            for event in child.events(lock.KEEP_ALIVE):
                if event:
                    watch.note_progress()
                    run.note_event(event)
                    continue
                held.keep_alive()
                if watch.must_end_wait(deadline):
                    held.end_runners()
                    raise _busy(run, watch)
        if not run.done:
            # What fails after the lock is lost, or in a server that has restarted since, is tried again.
            held.keep_alive()
    except errors.BootstrapError as stopped:
        error = stopped
    applied = run.applied if run.done else _read_committed(settings, tree, run)
    if not run.done and not error:
        error = _error_of(run, child, settings, tree, watch, [one.revision for one in applied])
    return RunResult(applied, error, run.events)


def _request(settings: Settings, tree: Tree, held: MigrationLock) -> dict[str, Any]:
    return {
        "mode": "upgrade",
        # If the tree has several version tables, they are read after the run.
        "version_table": "" if tree.several else settings.alembic_version_table,
        "lock_timeout_ms": round(settings.migration_lock_timeout * 1000),
        "tag": lock.TAG,
        "leftover": LEFTOVER,
        "server_query": lock.SERVER,
        "lock": held.identity,
    }


class _Run:
    """
    The events of one run so far, and what they say.

    revision, title: of the revision that began last, "" before the first. recorded: that revision once its version is
    recorded; its commit may still fail. applied: the revisions before it. failure: the event `error`.
    """

    def __init__(self, report: Report) -> None:
        self.events: list[dict[str, Any]] = []
        self.applied: list[Applied] = []
        self.recorded: Applied | None = None
        self.revision = ""
        self.title = ""
        self.failure: dict[str, Any] = {}
        self.done = False
        self._total = 0
        self._report = report

    def note_event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        match event["event"]:
            case "plan":
                self._total = len(event["revisions"])
            case "begin":
                self._note_committed()
                self.revision = event["revision"]
                self.title = event["title"]
                logger.info("revision %s begins: %s", self.revision, self.title)
                self._report_progress(f"{self.revision} {self.title}")
            case "applied":
                self.recorded = Applied(event["revision"], self.title, event["seconds"])
            case "healed":
                logger.warning("dropped the INVALID index %s that an interrupted build had left", event["index"])
            case "done":
                self._note_committed()
                self.done = True
            case "error":
                self.failure = event

    def _note_committed(self) -> None:
        """Another event follows: a tree with a transaction for each revision has committed the last one."""
        if one := self.recorded:
            self.applied.append(one)
            self.recorded = None
            logger.info("revision %s applied in %.2fs: %s", one.revision, one.seconds, one.title)
            self._report_progress(one.title)

    def _report_progress(self, note: str) -> None:
        self._report(Progress("migrate", len(self.applied), self._total, "revisions", note))


def _read_committed(settings: Settings, tree: Tree, run: _Run) -> list[Applied]:
    """What a failed run applied and did not take back: a tree may run all revisions in one transaction."""
    applied = [*run.applied, *([run.recorded] if run.recorded else [])]
    if not applied:
        return []
    try:
        state = schema_state.read_schema_state(settings.migration_database, tree, settings)
    except errors.BootstrapError as error:
        logger.warning("cannot read which revisions were recorded: %s", error)
        return []
    recorded = tree.upto(state.database_heads)
    return [one for one in applied if one.revision in recorded]


def _error_of(
    run: _Run, child: Child, settings: Settings, tree: Tree, watch: BlockerWatch, applied: list[str]
) -> errors.BootstrapError:
    """Why the run did not reach the heads."""
    server = str(settings.migration_database)
    failure = run.failure
    match failure.get("kind"):
        case None:
            reason = f"it ended with code {child.returncode}: {child.last_line or 'no output'}"
            return errors.OwnProcessError("the tree's process", masked(reason))
        case "no_alembic":
            return unfit(tree.alembic, failure["message"])
        case "wrong_database":
            return errors.WrongDatabaseError(server, failure["migrated"])
        case "version_table":
            return errors.VersionTableError(settings.alembic_version_table, failure["written"])
        case "unavailable":
            return errors.UnavailableError(server, masked(failure["message"]))
    if failure["sqlstate"] == _LOCK_TIMEOUT:
        return _busy(run, watch)
    return _server_error(run, server) or _tree_error(run, applied)


def _server_error(run: _Run, server: str) -> errors.RefusedError | errors.UnavailableError | None:
    """The error if the server is at fault, and another attempt may succeed."""
    message = masked(run.failure["message"])
    sqlstate = run.failure["sqlstate"]
    # A revision's calls of other services fail by the same classes as a server that is away.
    disconnected = run.failure["disconnected"] or (run.failure["unreachable"] and not run.revision)
    rejected = sqlstate.startswith(_REFUSED) or (disconnected and any(word in message for word in REFUSALS))
    if rejected and not run.revision:
        return errors.RefusedError("the database that env.py of the tree names", message)
    if sqlstate == _NO_RIGHT and not run.revision:
        # The version table could not be made: no revision is at fault.
        return errors.RefusedError(server, message)
    if disconnected or sqlstate.startswith(_TRANSIENT):
        return errors.UnavailableError(server, message)
    return None


def _tree_error(run: _Run, applied: list[str]) -> errors.TreeError | errors.MigrationError:
    """The error if the tree is at fault: before its first revision, in one, or after the last."""
    failure = run.failure
    message = masked(failure["message"])
    if failure["by_tree"] and not run.revision and not failure["sqlstate"]:
        return errors.TreeError(message)
    hint = masked(failure["hint"])
    if run.revision in applied:
        return errors.MigrationError("", "", "", message, hint, applied)
    # Once the version is recorded, only the commit can fail.
    statement = "COMMIT" if run.recorded else masked(failure["statement"])
    return errors.MigrationError(run.revision, run.title, statement, message, hint, applied)


def _busy(run: _Run, watch: BlockerWatch) -> errors.BusyError:
    return errors.BusyError(
        f"a table lock for revision {run.revision}", watch.sessions or "a session that was not seen"
    )
