"""Fixtures of the rehearsal's tests: a live database with a tree one step behind it, and the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunBootstrap
from tests.is_true.test_json import VALIDATOR
from tests.servers import Database, Postgres
from tests.setups.migration import Tree

#: The live schema: at revision `first`, with rows.
LIVE = """
    CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);
    INSERT INTO alembic_version VALUES ('first');
    CREATE TABLE region (id int PRIMARY KEY, name text);
    INSERT INTO region VALUES (1, 'north'), (2, NULL), (3, 'north');
    CREATE TABLE file (id int PRIMARY KEY, region int, size int);
    INSERT INTO file SELECT n, n % 3 + 1, n FROM generate_series(1, 1000) AS n;
    ANALYZE;
"""
REVISION = '''"""{title}"""
from alembic import op

revision = {name!r}
down_revision = {down!r}


def upgrade():
    {body}
'''


@dataclass
class Live:
    """The live database, its tree, and the command on both. `rehearsal` is the empty database for the copy."""

    database: Database
    rehearsal: Database
    tree: Tree
    variables: dict[str, str]
    run_bootstrap: RunBootstrap

    def revision(self, name: str, *statements: str) -> None:
        """Add a revision that runs these statements."""
        body = "\n    ".join(f"op.execute({statement!r})" for statement in statements)
        self.write(name, body)

    def write(self, name: str, body: str) -> None:
        """Add a revision with this body, its lines indented by four."""
        text = REVISION.format(title=f"Revision {name}", name=name, down=self.tree.last, body=body)
        (self.tree.versions / f"{name}.py").write_text(text, encoding="utf-8")
        self.tree.last = name

    def rehearse(self, *options: str, **variables: str) -> tuple[int, dict[str, Any]]:
        """Run `rehearse --json`; its exit code and its object, which is valid."""
        done = self.run_bootstrap("rehearse", "--json", *options, env=self.variables | variables)
        assert done.stdout, done.stderr
        found = json.loads(done.stdout)
        VALIDATOR.validate(found)
        return done.returncode, found


@pytest.fixture
def live(
    database: Database, postgres: Postgres, clean_env: dict[str, str], tmp_path: Path, run_bootstrap: RunBootstrap
) -> Iterator[Live]:
    """A live database at the first revision of a tree without further revisions."""
    with database.connect() as connection:
        connection.execute(LIVE.encode())
    tree = Tree(tmp_path / "tree")
    rehearsal = postgres.create_database()
    variables = clean_env | {
        "BIFROST_DATABASE_URL": database.url,
        "BIFROST_ALEMBIC_CONFIG": str(tree.config),
        "BIFROST_REHEARSAL_DATABASE_URL": rehearsal.url,
    }
    found = Live(database, rehearsal, tree, variables, run_bootstrap)
    found.write("first", "pass")
    yield found
    postgres.drop_database(rehearsal)
