"""The mode `upgrade`: run the tree to its heads under the migration lock, and report each revision."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from .events import Events, Refused
from .lock_guard import LockGuard
from .observation import Observation
from .tree_answers import describe_revision, find_schema


class Upgrade:
    """
    One upgrade of the tree.

    request: what `LockGuard` needs, and `version_table`: where the parent reads the version ("": wherever it is).
    `observe`: also report each statement, for a rehearsal.
    """

    def __init__(self, request: dict[str, Any], script: ScriptDirectory, events: Events) -> None:
        self._script = script
        self._events = events
        self._version_table: str = request["version_table"]
        self._guard = LockGuard(request, events)
        observed = request.get("observe", False)
        self._observation = Observation(self._guard.lock, request["tag"], events) if observed else None
        self._began = 0.0
        self._failure: BaseException | None = None

    def run(self, config: Config) -> None:
        self._guard.listen()
        if self._observation:
            self._observation.listen()
        with EnvironmentContext(config, self._script, fn=self.plan, destination_rev="heads"):
            self._script.run_env()
        if self._failure:
            # env.py has caught the error, and ended as if nothing had happened.
            raise self._failure

    def plan(self, heads: Any, context: MigrationContext) -> Any:
        """Called by Alembic after env.py has configured it, before the first revision. Returns the steps to run."""
        connection = context.connection
        assert connection is not None
        if other := self._guard.lock.find_other_database(connection):
            raise Refused("wrong_database", migrated=other)
        if self._version_table:
            self.check_version_table(context, connection)
        steps = list(self._script._upgrade_revs("heads", heads))
        self._events.send("plan", revisions=[describe_revision(step.revision) for step in steps])
        if self._observation:
            self._observation.send_original(connection, one_transaction=not context._transaction_per_migration)
        context.on_version_apply_callbacks += (self.on_applied,)
        for step in steps:
            step.migration_fn = self.observed(step, step.migration_fn, connection)
        return steps

    def check_version_table(self, context: MigrationContext, connection: Connection) -> None:
        """Raise Refused unless the tree keeps its version where the parent reads it."""
        schema = context.version_table_schema
        table = context.version_table
        read_schema, _, read_table = self._version_table.rpartition(".")
        # If the tree leaves the schema to its search path, only the result can tell.
        read_schema = read_schema or (find_schema(connection, read_table) if schema else "")
        if read_table != table or (schema and read_schema != schema):
            raise Refused("version_table", written=f"{schema}.{table}" if schema else table)

    def observed(self, step: Any, migrate: Callable[..., Any], connection: Connection) -> Callable[..., Any]:
        """The function of a revision, reported before it runs."""

        def migrate_observed(**arguments: Any) -> None:
            self._events.send("begin", **describe_revision(step.revision))
            self._began = time.monotonic()
            self._guard.transactions.on_next_revision(connection, apart=self._observation is not None)
            reporting = self._observation.running_revision() if self._observation else nullcontext()
            try:
                with reporting:
                    migrate(**arguments)
            except Exception as error:
                self._failure = error
                raise

        return migrate_observed

    def on_applied(self, *, step: Any, **_facts: Any) -> None:
        """The version is recorded. The transaction is still to be committed, which may fail."""
        seconds = round(time.monotonic() - self._began, 3)
        self._events.send("applied", revision=step.up_revision_id, seconds=seconds)
