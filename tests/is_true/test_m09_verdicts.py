"""M9: the schema is judged before any DDL, in words, and with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import RunBootstrap
from tests.servers import Database
from tests.setups.migration import StartMigrate, Tree, applied, outcome, recorded


def record(database: Database, *revisions: str) -> None:
    """Make the database say that it is at these revisions."""
    database.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
    for revision in revisions:
        database.execute("INSERT INTO alembic_version VALUES (%s)", (revision,))


def one_two(tree: Tree) -> None:
    """A plain tree."""
    tree.revision("one").revision("two")


def forked(tree: Tree) -> None:
    """Two heads that nobody meant; the label of the trunk does not tell them apart."""
    tree.revision("one", labels="trunk").revision("two").revision("three", down="one")


def circle(tree: Tree) -> None:
    """A tree that cannot be climbed."""
    tree.revision("one").revision("two", down=("one", "three")).revision("three", down="two")


@pytest.mark.parametrize(
    ("make", "at", "verdict", "words", "todo"),
    [
        (
            one_two,
            "later",
            "unknown_revision",
            "the database is at later, which this image does not have",
            "ALLOW_AHEAD=1",
        ),
        (forked, "", "several_heads", "the tree has the heads three, two and not each", "alembic merge"),
        (lambda tree: None, "", "empty_tree", "the tree has no revision", "BIFROST_ALEMBIC_CONFIG"),
        (circle, "", None, "cannot be read: Cycle is detected", "fix the revision"),
    ],
    ids=["unknown revision", "several heads", "empty tree", "circle"],
)
def test_m09_refused_before_any_ddl(  # noqa: PLR0917  (fixtures)
    database: Database,
    tree: Tree,
    start_migrate: StartMigrate,
    bifrost_env: dict[str, str],
    run_bootstrap: RunBootstrap,
    make: Callable[[Tree], None],
    at: str,
    verdict: str | None,
    words: str,
    todo: str,
) -> None:
    """A schema that no migration can fix ends with 1 and what to do, also in `init --json`. The database does
    not change.
    """
    make(tree)
    if at:
        record(database, at)
    before = objects(database)
    done = outcome(start_migrate())
    init = run_bootstrap("init", "--json", env=bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(tree.config)})
    for code, facts in ((done.code, done.facts), (init.returncode, json.loads(init.stdout))):
        assert (code, facts["error"]) == (1, "SchemaError" if verdict else "MigrationError")
        assert words in facts["message"]
        assert todo in facts["remedy"]
    assert json.loads(init.stdout).get("schema_verdict") == verdict
    assert objects(database) == before


@pytest.mark.parametrize(
    ("at", "verdict", "pending"), [("", "empty", ["one", "two"]), ("one", "behind", ["two"]), ("two", "at_head", [])]
)
def test_m09_check_says_where_the_schema_stands(
    bifrost_env: dict[str, str],
    database: Database,
    tree: Tree,
    run_bootstrap: RunBootstrap,
    at: str,
    verdict: str,
    pending: list[str],
) -> None:
    """`check --json` has verdict, heads and pending revisions with titles, and changes nothing."""
    one_two(tree)
    if at:
        record(database, at)
    database.execute(
        "CREATE TABLE workspace_files (path text, content text, content_hash text, entity_type text, is_deleted bool)"
    )
    before = objects(database)
    done = run_bootstrap("check", "--json", env=bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(tree.config)})
    state = json.loads(done.stdout)["schema_state"]
    assert state["verdict"] == verdict
    assert state["heads"] == ["two"]
    assert state["pending"] == [{"revision": name, "title": f"Revision {name}"} for name in pending]
    assert objects(database) == before


def test_m09_allowed_to_be_ahead(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """With BIFROST_ALLOW_AHEAD=1 the schema of a newer image is not changed, and the result says so."""
    one_two(tree)
    record(database, "later")
    before = objects(database)
    done = outcome(start_migrate(BIFROST_ALLOW_AHEAD="1"))
    assert done.code == 0
    assert done.facts["verdict"] == "unknown_revision"
    assert (done.applied, done.facts["revision_to"]) == ([], ["later"])
    assert objects(database) == before


def test_m09_several_labelled_heads(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """A tree with labelled branches, one of which depends on the other, is upgraded to all its heads, and is
    at head with the rows that Alembic records for them.
    """
    tree.revision("one").revision("data1", labels="data").revision("data2")
    tree.revision("site1", down="one", labels="site", depends_on="data1").revision("site2")
    done = outcome(start_migrate())
    assert done.code == 0, done.facts
    assert sorted(done.applied) == ["data1", "data2", "one", "site1", "site2"]
    assert recorded(database) == ["data2", "site2"]
    again = outcome(start_migrate())
    assert (again.facts["verdict"], again.applied) == ("at_head", [])
    tree.revision("site3", depends_on="data2")
    done = outcome(start_migrate())
    assert (done.code, done.applied, applied(database)["site3"]) == (0, ["site3"], 1)
    assert outcome(start_migrate()).facts["verdict"] == "at_head"


def objects(database: Database) -> list[tuple[Any, ...]]:
    """Every table of the database, with its columns, and the versions."""
    tables = database.execute(
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2"
    )
    versions = recorded(database) if any(table == "alembic_version" for table, _ in tables) else []
    return [*tables, *[(version,) for version in versions]]


def test_m09_revision_and_its_own_ancestor(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """A version table with a revision and its ancestor ends with 1 before any DDL. The error names the surplus row."""
    tree.revision("one").revision("two")
    assert outcome(start_migrate()).code == 0
    tree.revision("three")
    database.execute("INSERT INTO alembic_version VALUES ('one')")
    done = outcome(start_migrate())
    assert (done.code, done.facts["error"]) == (1, "SchemaError")
    assert "at one, two, of which one builds on another" in done.facts["message"]
    assert "rows of the version table" in done.facts["remedy"]
