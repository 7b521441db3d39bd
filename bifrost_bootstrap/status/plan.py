"""What an init would do, read and never done: pending revisions, their SQL, and what a warm would change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bifrost_bootstrap.errors import ExitCode, WarmError
from bifrost_bootstrap.migrate import process, schema_state as schemas
from bifrost_bootstrap.migrate.schema_state import SchemaState
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.servers import postgres, redis_server
from bifrost_bootstrap.servers.waiting import PROBE_TIMEOUT
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.warm.cache import ModuleCache
from bifrost_bootstrap.warm.comparison import compare
from bifrost_bootstrap.warm.diff import CacheDiff
from bifrost_bootstrap.warm.rows import row_reader


@dataclass(frozen=True)
class Plan:
    """
    diff: None if the rows cannot be compared; then `no_diff` says why. bytes: of the content that a warm would write.

    sql: of the pending revisions, if it was requested; "" if it is not known, then `no_sql` says why.
    """

    schema: SchemaState
    diff: CacheDiff | None = None
    no_diff: str = ""
    bytes: int = 0
    sql: str = ""
    no_sql: str = ""

    @property
    def headline(self) -> str:
        """In one line."""
        if refusal := self.schema.refusal():
            return f"init would end with {refusal.exit_code}: {refusal}"
        todo = [f"apply {len(self.schema.pending)} revisions"] if self.schema.pending else []
        if self.diff and self.diff.shrinks:
            todo.append(f"end with {ExitCode.WARM}: it removes {len(self.diff.removed)} of {self.diff.indexed} entries")
        elif self.diff is None and not todo:
            todo.append(f"end with {ExitCode.WARM}: {self.no_diff}")
        elif self.diff is None or not self.diff.empty:
            todo.append("warm the module cache")
        return f"init would {' and '.join(todo)}" if todo else "nothing to do"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        cache: dict[str, Any] = {"bytes": self.bytes, "unknown": self.no_diff}
        if self.diff is not None:
            cache |= {"would_shrink": self.diff.shrinks, **self.diff.to_dict()}
        return {
            "schema_state": self.schema.to_dict(),
            "module_cache": cache,
            "sql": self.sql,
            "sql_unknown": self.no_sql,
        }


def plan(settings: Settings, tree: Tree, *, with_sql: bool) -> Plan:
    """
    Read, changing nothing; a role that may only read suffices. with_sql: ask the tree's Alembic for the SQL too.

    Raises UnavailableError, RefusedError, and the configuration errors of the tree.
    """
    state = schemas.read_schema_state(settings.database, tree, settings)
    found = _with_diff(Plan(state), settings)
    return _with_sql(found, settings, tree) if with_sql and state.pending else found


def _with_diff(found: Plan, settings: Settings) -> Plan:
    try:
        with (
            redis_server.connect(settings.redis, answer_timeout=PROBE_TIMEOUT) as client,
            row_reader(settings, answer_timeout=postgres.WORK_TIMEOUT) as reader,
        ):
            states = ModuleCache(client, reader.source.ttl(settings)).states()
            with reader.snapshot() as rows:
                diff = compare(states, rows)
                return replace(found, diff=diff, bytes=rows.size_of([*diff.added, *diff.changed]))
    except WarmError as error:
        when = "unknown before the migration: " if found.schema.pending else ""
        return replace(found, no_diff=f"{when}{error.args[0]}")


def _with_sql(found: Plan, settings: Settings, tree: Tree) -> Plan:
    url = settings.database.as_written
    request = {"mode": "sql", "heads": found.schema.database_heads}
    answer = process.ask(tree.alembic, request, BIFROST_DATABASE_URL=url, DATABASE_URL=url)
    if "sql" in answer:
        return replace(found, sql=answer["sql"])
    return replace(found, no_sql=f"the tree cannot be written as SQL without running it: {answer['message']}")
