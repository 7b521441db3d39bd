"""Where the database stands, seen from this image's tree: the verdict before any DDL."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bifrost_bootstrap.errors import SchemaError, TreeError, VersionTableError
from bifrost_bootstrap.migrate.tree import Revision, Tree
from bifrost_bootstrap.migrate.tree_loading import version_tables
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.urls import PostgresUrl

#: Of each verdict that no migration changes: why, and what to do.
_REFUSALS = {
    "unknown_revision": (
        "the database is at {database_heads}, which this image does not have; it knows up to {heads}",
        (
            "deploy the image that has it; for a rollback that keeps the schema set BIFROST_ALLOW_AHEAD=1; "
            "if another application recorded it, name the tree's own table in BIFROST_ALEMBIC_VERSION_TABLE"
        ),
    ),
    "several_heads": (
        "the tree has the heads {heads} and not each is a branch with a label of its own",
        "merge them: alembic merge -m 'merge heads' {all_heads}",
    ),
    "overlapping_heads": (
        "the database is at {database_heads}, of which one builds on another; Alembic upgrades from no such state",
        "delete the rows of the version table that others build on",
    ),
    "empty_tree": ("the tree has no revision", "check BIFROST_ALEMBIC_CONFIG and what the image holds"),
}


@dataclass(frozen=True)
class SchemaState:
    """
    Where the database stands, seen from this tree.

    verdict: "at_head", "empty" (no version is recorded), "behind", "unknown_revision" (a newer image was here,
    or a foreign one), "several_heads", "overlapping_heads" (a revision and its ancestor), "empty_tree". `ready` also
    where the operator allows to be ahead.
    """

    verdict: str
    heads: tuple[str, ...]
    database_heads: tuple[str, ...]
    pending: tuple[Revision, ...] = ()
    ready: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "verdict": self.verdict,
            "heads": list(self.heads),
            "database_heads": list(self.database_heads),
            "pending": [{"revision": item.revision, "title": item.title} for item in self.pending],
        }

    def refusal(self) -> SchemaError | None:
        """Why no migration can bring this database to this tree's head, or None."""
        if self.ready or self.verdict not in _REFUSALS:
            return None
        heads = {"heads": ", ".join(self.heads), "database_heads": ", ".join(self.database_heads)}
        why, todo = _REFUSALS[self.verdict]
        return SchemaError(self.verdict, why.format(**heads), todo.format(all_heads=" ".join(self.heads)))


def judge(tree: Tree, database_heads: Iterable[str], *, allow_ahead: bool) -> SchemaState:
    """Compare the tree with the revisions that the database records."""
    database = tuple(sorted(database_heads))
    if not tree.revisions:
        return SchemaState("empty_tree", (), database)
    if any(revision not in tree.revisions for revision in database):
        return SchemaState("unknown_revision", tree.heads, database, ready=allow_ahead)
    if tree.forked:
        return SchemaState("several_heads", tree.heads, database)
    pending = tuple(tree.pending(database))
    if not pending:
        return SchemaState("at_head", tree.heads, database, ready=True)
    if any(one in tree.upto({*database} - {one}, depends=False) for one in database):
        return SchemaState("overlapping_heads", tree.heads, database)
    return SchemaState("behind" if database else "empty", tree.heads, database, pending)


def read_schema_state(url: PostgresUrl, tree: Tree, settings: Settings) -> SchemaState:
    """
    One read: where the database stands. Of a tree with several version tables: the first that is not at head.

    Raises UnavailableError, RefusedError; VersionTableError where the table that is read is not the tree's; of a tree
    with several version tables TreeError.
    """
    table = settings.alembic_version_table
    state = _states(url, tree, settings, table)[0]
    if state.verdict == "unknown_revision":
        # Another application may have recorded it. If the tree cannot name its table, only the revision is reported.
        with suppress(TreeError):
            written = version_tables(tree.alembic, postgres.at_last_host(url).as_written)
            if written and not any(_same_table(table, one) for one in written):
                raise VersionTableError(table, written[0])
    elif state.ready and tree.several:
        states = _states(url, tree, settings, *version_tables(tree.alembic, postgres.at_last_host(url).as_written))
        return next((one for one in states if not one.ready), state)
    return state


def _states(url: PostgresUrl, tree: Tree, settings: Settings, *tables: str) -> list[SchemaState]:
    """Where the database stands, by each of these version tables."""
    with postgres.connect(url, "schema", answer_timeout=postgres.ANSWER_TIMEOUT) as connection:
        heads = [postgres.database_heads(connection, table) for table in tables]
    return [judge(tree, one, allow_ahead=settings.allow_ahead) for one in heads]


def _same_table(configured: str, written: str) -> bool:
    """Whether `table` or `schema.table` may mean this `schema.table`."""
    return f".{written}".endswith(f".{configured}")
