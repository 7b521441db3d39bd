"""One run of the tree in its child process, under the migration lock: events in, revisions applied or an error out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bifrost_bootstrap import errors
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.migrate import lock, process as children, schema_state
from bifrost_bootstrap.migrate.blockers import BlockerWatch
from bifrost_bootstrap.migrate.lock import MigrationLock
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.progress import Progress, Report
from bifrost_bootstrap.redaction import masked
from bifrost_bootstrap.servers.postgres import LEFTOVER, REFUSALS, at_last_host
from bifrost_bootstrap.settings import Settings

logger = logging.getLogger(__name__)

_LOCK_TIMEOUT, _NO_RIGHT = "55P03", "42501"
#: SQLSTATEs of a login that is refused: password, role, database.
_REFUSED = ("28", "3D000")
#: SQLSTATEs after which the same revision may succeed: deadlock, serialization, a statement that asyncpg prepared on
#: another connection of a pooler (26000), a server that is a standby for now (25006), and the classes of connection
#: errors, shutdown and lack of resources.
_TRANSIENT = ("40P01", "40001", "26000", "25006", "08", "57P", "53")
#: Seconds that one wait for a lock must have lasted, at least, before the deadline ends it: work has short ones too.
SHORTEST_BLOCK = 5.0


@dataclass(frozen=True)
class Applied:
    """A revision that this run applied, and how long it took (seconds)."""

    revision: str
    title: str
    seconds: float


def upgrade(
    settings: Settings, tree: Tree, held: MigrationLock, deadline: Deadline, applied: list[Applied], report: Report
) -> None:
    """
    Run the tree in its child process while the lock is held; appends to `applied` what was applied and committed.

    The deadline ends a statement that waits for somebody else's lock, and none that works. At the end no process is
    left that the tree has started in its process group.

    Raises BusyError, RefusedError, UnavailableError and, if the tree's process ended without a report,
    OwnProcessError, after which another attempt may succeed;
    MigrationError, WrongDatabaseError, VersionTableError, SettingsError of the tree's interpreter.
    """
    request = {
        "mode": "upgrade",
        # Where it has several, they are read when it is done.
        "version_table": "" if tree.several else settings.alembic_version_table,
        "lock_timeout_ms": round(settings.migration_lock_timeout * 1000),
        "tag": lock.TAG, "leftover": LEFTOVER, "server_query": lock.SERVER,
        "lock": asdict(held.proof) | {"class": lock.LOCK_CLASS, "migration": lock.MIGRATION, "runner": lock.RUNNER},
    }  # fmt: skip
    url = settings.migration_database
    # The tree reads its URL from the environment; an argument would show in the process list. Its driver may wait for a
    # frozen host for minutes.
    as_written = at_last_host(url).as_written
    child = children.Child(tree.alembic, request, BIFROST_DATABASE_URL=as_written, DATABASE_URL=as_written)
    watch = BlockerWatch(url)
    run = _Run(settings, tree, watch, report, child.output)
    longest_block = max(settings.migration_lock_timeout, SHORTEST_BLOCK)
    look = Deadline(settings.migration_lock_timeout / 2)
    try:
        with child, watch:
            for event in child.events(lock.KEEP_ALIVE):
                if event:
                    run.on_event(event)
                    look = Deadline(settings.migration_lock_timeout / 2)
                    continue
                held.keep_alive()
                if watch.blind and look.passed:
                    # Once a revision, to name the blocking sessions; and after the deadline, to end what waits.
                    with held.borrowed_connection() as connection:
                        watch.read_blockers(connection)
                    look = Deadline(max(deadline.remaining, SHORTEST_BLOCK))
                if deadline.passed and watch.blocked > longest_block:
                    held.end_runners()
                    raise _busy(run.revision, watch)
    finally:
        applied += run.committed()
    if not run.ended:
        # What fails after the lock is lost, or in a server that has restarted since, is tried again.
        held.keep_alive()
    if outcome := run.error(child.returncode, applied):
        raise outcome


class _Run:
    """What one child told us so far."""

    def __init__(
        self, settings: Settings, tree: Tree, watch: BlockerWatch, report: Report, output: Sequence[str]
    ) -> None:
        self.settings, self.tree, self.watch, self.report, self.output = settings, tree, watch, report, output
        self.applied: list[Applied] = []
        #: Applied, and perhaps still to be committed.
        self.last: Applied | None = None
        self.failure: dict[str, Any] | None = None
        self.revision = ""
        self.title = ""
        self.total = 0
        self.ended = False

    def on_event(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "plan":
                self.total = len(event["revisions"])
            case "begin":
                self.take_last()
                self.revision = event["revision"]
                self.title = event["title"]
                logger.info("revision %s begins: %s", event["revision"], event["title"])
                note = f"{event['revision']} {event['title']}"
                self.report(Progress("migrate", len(self.applied), self.total, "revisions", note))
            case "applied":
                self.last = Applied(event["revision"], self.title, event["seconds"])
            case "healed":
                logger.warning("dropped the INVALID index %s that an interrupted build had left", event["index"])
            case "done":
                self.take_last()
                self.ended = True
            case "error":
                self.failure = self._add_revision(event)

    def _add_revision(self, error: dict[str, Any]) -> dict[str, Any]:
        """Say of an error which revision was running; once it is recorded, only its commit can fail."""
        unreachable = not self.revision and error.get("unreachable", False)
        return {
            **error,
            "revision": self.revision,
            "title": self.title,
            "statement": "COMMIT" if self.last else error.get("statement", ""),
            "disconnected": error.get("disconnected", False) or unreachable,
        }

    def take_last(self) -> None:
        """Something came after it: where each revision has a transaction of its own, it is committed."""
        if self.last is None:
            return
        self.applied.append(self.last)
        logger.info("revision %s applied in %.2fs: %s", self.last.revision, self.last.seconds, self.last.title)
        self.report(Progress("migrate", len(self.applied), self.total, "revisions", self.last.title))
        self.last = None

    def committed(self) -> list[Applied]:
        """What was applied, without what the failure took back: a tree may run all revisions in one transaction."""
        applied = self.applied + ([self.last] if self.last else [])
        if self.ended or not applied:
            return applied
        try:
            state = schema_state.read_schema_state(self.settings.migration_database, self.tree, self.settings)
        except errors.BootstrapError as error:
            logger.warning("cannot see which revisions were recorded: %s", error)
            return []
        return [one for one in applied if one.revision in self.tree.upto(state.database_heads)]

    def error(self, returncode: int | None, applied: list[Applied]) -> Exception | None:
        """What the run ended in; None where it succeeded."""
        if self.ended:
            return None
        if self.failure is None:
            last = self.output[-1] if self.output else "no output"
            return errors.OwnProcessError("the tree's process", masked(f"it ended with code {returncode}: {last}"))
        if self.failure["kind"] == "no_alembic":
            return children.unfit(self.tree.alembic, self.failure["message"])
        return self._error_of(self.failure, [one.revision for one in applied])

    def _error_of(self, event: dict[str, Any], applied: list[str]) -> Exception:
        url = self.settings.migration_database
        match event["kind"]:
            case "wrong_database":
                return errors.WrongDatabaseError(str(url), event["migrated"])
            case "version_table":
                return errors.VersionTableError(self.settings.alembic_version_table, event["written"])
            case "lock_lost" | "disconnected":
                lost = "the migration lock was lost while a revision ran"
                return errors.UnavailableError(str(url), masked(event.get("message", lost)))
        message = masked(event["message"])
        refused = event["disconnected"] and any(word in message for word in REFUSALS)
        if not event["revision"] and (refused or event["sqlstate"].startswith(_REFUSED)):
            return errors.RefusedError("the database that env.py of the tree names", message)
        if event["sqlstate"] == _LOCK_TIMEOUT:
            return _busy(event["revision"], self.watch)
        if event["disconnected"] or event["sqlstate"].startswith(_TRANSIENT):
            return errors.UnavailableError(str(url), message)
        if event["sqlstate"] == _NO_RIGHT and not event["revision"]:
            # The version table could not be made: no revision is at fault.
            return errors.RefusedError(str(url), message)
        return _tree_error(event, applied, message)


def _tree_error(event: dict[str, Any], applied: list[str], message: str) -> errors.TreeError | errors.MigrationError:
    """What the tree itself is at fault for, before its first revision, in one, or after the last."""
    if event["by_tree"] and not event["revision"] and not event["sqlstate"]:
        return errors.TreeError(message)
    # What fails after its last one is no revision's fault.
    revision, title, statement = (
        ("", "", "") if event["revision"] in applied else (event["revision"], event["title"], event["statement"])
    )
    return errors.MigrationError(revision, title, masked(statement), message, masked(event["hint"]), applied)


def _busy(revision: str, watch: BlockerWatch) -> errors.BusyError:
    return errors.BusyError(f"a table lock for revision {revision}", watch.last or "a session that was not seen")
