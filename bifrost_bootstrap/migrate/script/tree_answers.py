"""What Alembic says of the tree without changing a database: its revisions, version tables, pending SQL."""

from __future__ import annotations

import io
import sys
from typing import Any

from alembic.config import CommandLine, Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from .drivers import ask, run
from .statements import quote_literal, writes


def load_tree(arguments: list[str], *, as_sql: bool) -> tuple[Config, ScriptDirectory]:
    """Configuration and script directory, as Alembic's own program makes them for this command line."""

    class ConfigOnly(CommandLine):
        def run_cmd(self, config: Config, options: Any) -> None:
            self.config = config

    arguments = [*arguments, "--sql"] if as_sql else arguments
    # env.py may read the command line.
    sys.argv = ["alembic", *arguments]
    command_line = ConfigOnly(prog="alembic")
    command_line.main(argv=arguments)
    return command_line.config, ScriptDirectory.from_config(command_line.config)


def describe_tree(script: ScriptDirectory) -> dict[str, Any]:
    """All revisions, and where env.py is. Raises CommandError if two files have the same revision id."""
    # Alembic takes the last of the files, and only warns.
    files: dict[str, str] = {}
    for revision in script._load_revisions():
        other = files.setdefault(revision.revision, revision.path)
        if other != revision.path:
            raise CommandError(f"revision {revision.revision} is in two files: {other} and {revision.path}")
    revisions = [describe_revision(revision) for revision in script.walk_revisions()]
    return {"revisions": revisions, "env": str(script.env_py_location)}


def describe_revision(revision: Any) -> dict[str, Any]:
    # A title of several lines continues in the next ones.
    lines = [line.strip() for line in (revision.doc or "").splitlines()]
    return {
        "revision": revision.revision,
        "title": next(filter(None, lines), ""),
        "down": list(revision._versioned_down_revisions),
        "depends_on": list(revision._resolved_dependencies),
        "labels": sorted(revision._orig_branch_labels),
    }


def find_version_tables(config: Config, script: ScriptDirectory) -> list[str]:
    """Where env.py keeps its versions, `schema.table` each. It runs as for `alembic current`; nothing is written."""

    def replace_writes(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> tuple[str, Any]:
        # env.py may create its table before it reads, in a transaction that may only read.
        return ("SELECT 1", ()) if writes(statement) else (statement, parameters)

    make_transactions_read_only()
    event.listen(Engine, "before_cursor_execute", replace_writes, retval=True)
    found: list[str] = []

    def note(_heads: Any, context: MigrationContext) -> Any:
        assert context.connection is not None
        table = context.version_table
        # A search path may lead to a schema that does not exist yet.
        schema = context.version_table_schema or find_schema(context.connection, table) or "(no schema)"
        found.append(f"{schema}.{table}")
        return ()

    with EnvironmentContext(config, script, fn=note, dont_mutate=True):
        script.run_env()
    return found


def render_pending_sql(config: Config, script: ScriptDirectory, heads: list[str]) -> str:
    """The SQL of an upgrade from these heads. Nothing is run, and if env.py connects, it cannot write."""
    make_transactions_read_only()
    config.output_buffer = io.StringIO()

    def pending(found: Any, _context: MigrationContext) -> Any:
        return script._upgrade_revs("heads", found)

    options: dict[str, Any] = {"as_sql": True, "starting_rev": heads or None, "destination_rev": "heads"}
    with EnvironmentContext(config, script, fn=pending, **options):
        script.run_env()
    return config.output_buffer.getvalue()


def make_transactions_read_only() -> None:
    """From now on each transaction of env.py may only read."""
    event.listen(Engine, "begin", lambda connection: run(connection, "SET TRANSACTION READ ONLY"))


def find_schema(connection: Connection, table: str) -> str:
    """The schema in which the search path finds this table, or would create it; "" if it leads to none."""
    name = quote_literal('"' + table.replace('"', '""') + '"')
    found = ask(
        connection,
        "SELECT coalesce((SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        f" WHERE c.oid = to_regclass({name})), current_schema())::text",
    )
    return found[0] or ""
