"""M8: a failed revision is reported with what an operator needs, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from tests.migration.conftest import StartMigrate
from tests.migration.steps import Tree, applied, outcome, recorded
from tests.servers import Database
from tests.servers.leaks import leaks_in

#: Raises an error of the server with a hint and a detail.
STATEMENT = (
    "DO $$ BEGIN RAISE EXCEPTION 'no such region' USING DETAIL = 'region 7', HINT = 'load the regions first'; END $$"
)


@pytest.mark.parametrize(("kind", "kept"), [("plain", ["one", "two"]), ("asynchronous", [])])
def test_m08_failure_report(
    database: Database,
    start_migrate: StartMigrate,
    tmp_path: Path,
    kind: Literal["plain", "asynchronous"],
    kept: list[str],
) -> None:
    """Revision, title, statement, the server's message and hint, and what stays applied (nothing, where the tree runs
    all in one transaction): one error, exit code 1, no traceback, no password.
    """
    tree = (
        Tree(tmp_path / kind, kind)
        .revision("one")
        .revision("two")
        .revision("three", f'op.execute("{STATEMENT}")', title="Sort by region")
    )
    done = outcome(start_migrate(BIFROST_ALEMBIC_CONFIG=str(tree.config)))
    assert (done.code, done.facts["error"]) == (1, "MigrationError")
    assert done.facts["message"].splitlines() == [
        "revision three (Sort by region) failed: no such region (region 7)",
        "  hint: load the regions first",
        f"  statement: {STATEMENT}",
        f"  applied before it: {', '.join(kept) or 'none'}",
    ]
    assert "Traceback" not in done.log
    assert not leaks_in(done.log + str(done.facts))
    if kept:
        assert (applied(database), recorded(database)) == ({"one": 1, "two": 1}, ["two"])
    else:
        assert database.execute("SELECT to_regclass('applied')::text") == [(None,)]


def test_m08_applied_counts_earlier_attempts(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """What an attempt committed before it had to be repeated is reported with what the next one applied."""
    once = (
        "import pathlib; flag = pathlib.Path(__file__).with_suffix('.flag'); seen = flag.exists(); flag.touch()\n"
        "    if not seen: op.execute(\"DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$\")"
    )
    tree.revision("one").revision("two", once)
    done = outcome(start_migrate())
    assert (done.code, done.applied) == (0, ["one", "two"])
    assert applied(database) == {"one": 1, "two": 1}
