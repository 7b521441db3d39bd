"""The verdict about a schema, as a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from bifrost_bootstrap.errors import ExitCode
from bifrost_bootstrap.migrate.schema_state import SchemaState, judge
from bifrost_bootstrap.migrate.tree import Alembic, Revision, Tree


def tree_of(*revisions: Revision) -> Tree:
    """A tree of these revisions."""
    return Tree(Alembic("python", Path(), Path("alembic.ini")), "", {one.revision: one for one in revisions})


LINEAR = tree_of(Revision("1", "first"), Revision("2", "second", ("1",)))
FORKED = tree_of(Revision("1", ""), Revision("2", "", ("1",)), Revision("3", "", ("1",)))
BRANCHED = tree_of(Revision("a", "", labels=("a",)), Revision("b", "", labels=("b",)))
EMPTY = tree_of()


@pytest.mark.parametrize(
    ("tree", "database", "allow_ahead", "verdict", "pending", "ready"),
    [
        (LINEAR, [], False, "empty", ["1", "2"], False),
        (LINEAR, ["1"], False, "behind", ["2"], False),
        (LINEAR, ["2"], False, "at_head", [], True),
        (LINEAR, ["1", "2"], False, "at_head", [], True),
        (LINEAR, ["9"], False, "unknown_revision", [], False),
        (LINEAR, ["9"], True, "unknown_revision", [], True),
        (LINEAR, ["1", "9"], False, "unknown_revision", [], False),
        (LINEAR, ["1"], True, "behind", ["2"], False),
        (FORKED, [], False, "several_heads", [], False),
        (FORKED, ["2", "3"], False, "several_heads", [], False),
        (FORKED, ["9"], False, "unknown_revision", [], False),
        (BRANCHED, ["a"], False, "behind", ["b"], False),
        (BRANCHED, ["b", "a"], False, "at_head", [], True),
        (EMPTY, [], False, "empty_tree", [], False),
        (EMPTY, ["1"], True, "empty_tree", [], False),
    ],
)
def test_verdict(
    tree: Tree, database: list[str], allow_ahead: bool, verdict: str, pending: list[str], ready: bool
) -> None:
    """Tree, database and permission to be ahead decide verdict, pending revisions and readiness."""
    state = judge(tree, database, allow_ahead=allow_ahead)
    assert (state.verdict, [one.revision for one in state.pending], state.ready) == (verdict, pending, ready)
    assert state.database_heads == tuple(sorted(database))
    assert state.heads == tree.heads


@pytest.mark.parametrize(
    ("state", "words", "todo"),
    [
        (judge(LINEAR, ["9"], allow_ahead=False), ["9", "does not have", "up to 2"], "BIFROST_ALLOW_AHEAD=1"),
        (judge(FORKED, [], allow_ahead=False), ["2, 3"], "alembic merge -m 'merge heads' 2 3"),
        (judge(EMPTY, [], allow_ahead=False), ["no revision"], "BIFROST_ALEMBIC_CONFIG"),
    ],
)
def test_refusal(state: SchemaState, words: list[str], todo: str) -> None:
    """Where no migration helps, the error ends in 1, says what is wrong and what to do."""
    refusal = state.refusal()
    assert refusal is not None
    assert refusal.exit_code is ExitCode.MIGRATION
    assert all(word in str(refusal) for word in words)
    assert todo in refusal.remedy


@pytest.mark.parametrize(
    "state",
    [
        judge(LINEAR, [], allow_ahead=False),
        judge(LINEAR, ["1"], allow_ahead=False),
        judge(LINEAR, ["2"], allow_ahead=False),
        judge(LINEAR, ["9"], allow_ahead=True),
    ],
)
def test_no_refusal(state: SchemaState) -> None:
    """Where a migration helps, or nothing is to do, nothing is refused."""
    assert state.refusal() is None
