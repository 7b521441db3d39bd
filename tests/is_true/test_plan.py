"""`plan`: what init would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis
from psycopg import sql

from tests.conftest import RunBootstrap
from tests.servers import Command, Database
from tests.setups.state import MODULES, cached, heads, insert_modules

READS_DATA = '''"""Copy what is there."""
from alembic import op
revision = "aaa2"
down_revision = "aaa1"


def upgrade():
    for row in op.get_bind().exec_driver_sql("SELECT 1").all():
        op.execute(f"SELECT {row[0]}")
'''
FIRST = '''"""Create the table."""
from alembic import op
revision = "aaa1"
down_revision = None


def upgrade():
    op.execute("CREATE TABLE anything (id int)")
'''
#: Without a branch for the offline mode: it connects, whatever it is asked for.
ENV = """import os
from alembic import context
from sqlalchemy import create_engine
url = os.environ['DATABASE_URL'].replace('postgresql://', 'postgresql+psycopg://')
with create_engine(url).connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The alembic.ini of a tree with one revision."""
    (tmp_path / "tree" / "versions").mkdir(parents=True)
    (tmp_path / "tree" / "env.py").write_text(ENV)
    (tmp_path / "tree" / "versions" / "aaa1.py").write_text(FIRST)
    config = tmp_path / "tree" / "alembic.ini"
    config.write_text("[alembic]\nscript_location = %(here)s\n")
    return config


def entries(redis_url: str) -> dict[bytes, bytes | None]:
    """Index, entries and whatever else lies beside them, and what is in them."""
    with redis.Redis.from_url(redis_url) as client:
        return {key: client.dump(key) for key in client.scan_iter("bifrost:module:*")}


def planned(run_bootstrap: RunBootstrap, *arguments: str, **variables: str) -> dict[str, Any]:
    """What `plan --json` says; it ends with 0."""
    done = run_bootstrap("plan", "--json", *arguments, env=variables or None)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["command"], found["verdict"], found["exit_code"]) == ("plan", "planned", 0)
    return found


def test_plan_of_an_empty_database(run_bootstrap: RunBootstrap, database: Database, redis_url: str) -> None:
    """All revisions are pending, with titles and SQL. The changes of the cache are unknown. Nothing is changed."""
    done = run_bootstrap("plan", "--sql")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("init would apply 2 revisions and warm the module cache\n")
    assert "pending 0001  Create workspace_files." in done.stdout
    assert "unknown before the migration" in done.stdout
    assert "CREATE TABLE workspace_files" in done.stdout
    assert "INSERT INTO alembic_version (version_num) VALUES ('0001')" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("(exit 0)")
    assert heads(database) == []
    assert database.execute("SELECT count(*) FROM pg_class WHERE relname = 'workspace_files'") == [(0,)]
    assert entries(redis_url) == {}


def test_plan_of_a_warm(
    bootstrap_worker: Command, run_bootstrap: RunBootstrap, database: Database, redis_url: str
) -> None:
    """`plan` has counts, bytes and first paths of what a warm would add, change and remove, and changes nothing."""
    assert run_bootstrap("init").returncode == 0
    assert planned(run_bootstrap, "--sql")["message"] == "nothing to do"
    insert_modules(database, MODULES)
    assert run_bootstrap("init").returncode == 0
    insert_modules(database, {"acceptance_demo/answer.py": "ANSWER = 43\n", "new.py": "x" * 1000})
    database.execute("UPDATE workspace_files SET is_deleted = true WHERE path LIKE 'odd%%'", ())
    before = entries(redis_url)
    found = planned(run_bootstrap)
    cache = found["module_cache"]
    assert found["message"] == "init would warm the module cache"
    assert {kind: cache[kind] for kind in ("added", "changed", "removed")} == {"added": 1, "changed": 1, "removed": 1}
    assert (cache["added_paths"], cache["changed_paths"]) == (["new.py"], ["acceptance_demo/answer.py"])
    assert (cache["bytes"], cache["would_shrink"], cache["unknown"]) == (1012, False, "")
    assert found["sql"] == ""
    text = run_bootstrap("plan").stdout
    assert "1 added, 1 changed, 1 removed, 1 kB to write" in text
    assert "removed 'odd names/a b*?[c].py'" in text
    assert entries(redis_url) == before
    assert cached(redis_url) != {}


def test_plan_says_that_the_brake_would_act(
    bootstrap_worker: Command, run_bootstrap: RunBootstrap, database: Database
) -> None:
    """If a warm would remove more than half of the cache and more than 20 entries, `plan` says that it would stop."""
    assert run_bootstrap("init").returncode == 0
    insert_modules(database, {f"{number}.py": "" for number in range(30)})
    assert run_bootstrap("init").returncode == 0
    database.execute("DELETE FROM workspace_files WHERE path <> '1.py'", ())
    assert planned(run_bootstrap)["module_cache"]["would_shrink"] is True
    assert "a warm would stop here (2)" in run_bootstrap("plan").stdout


def test_plan_with_rights_to_read_only(
    bootstrap_worker: Command,
    run_bootstrap: RunBootstrap,
    bifrost_env: dict[str, str],
    database: Database,
) -> None:
    """A role with read-only rights and read-only transactions suffices for plan and check."""
    assert run_bootstrap("init").returncode == 0
    insert_modules(database, MODULES)
    role = f"reader_{database.name}"
    password = sql.Literal(database.server.app_password)
    with database.server.admin(database.name) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), password))
        for statement in (
            "ALTER ROLE {} SET default_transaction_read_only = on",
            "GRANT SELECT ON workspace_files, alembic_version TO {}",
        ):
            admin.execute(sql.SQL(statement).format(sql.Identifier(role)))
        env = bifrost_env | {"BIFROST_DATABASE_URL": database.server.url(database.name, user=role)}
        try:
            found = planned(run_bootstrap, "--sql", **env)
            assert found["module_cache"]["added"] == len(MODULES)
            checked = run_bootstrap("check", env=env)
            assert checked.returncode == 3, checked.stderr
        finally:
            admin.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def test_sql_of_a_tree_that_connects(
    run_bootstrap: RunBootstrap, bifrost_env: dict[str, str], database: Database, tree: Path
) -> None:
    """`plan --sql` works for an env.py without offline mode, over a read-only connection."""
    found = planned(run_bootstrap, "--sql", **bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(tree)})
    assert "CREATE TABLE anything" in found["sql"]
    assert database.execute("SELECT count(*) FROM pg_class WHERE relname IN ('anything', 'alembic_version')") == [(0,)]


def test_sql_of_a_tree_that_reads(
    run_bootstrap: RunBootstrap, bifrost_env: dict[str, str], database: Database, tree: Path
) -> None:
    """If a revision reads data, `plan --sql` says that it has no SQL, and exits 0."""
    (tree.parent / "versions" / "aaa2.py").write_text(READS_DATA)
    found = planned(run_bootstrap, "--sql", **bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(tree)})
    assert found["sql"] == ""
    assert found["sql_unknown"].startswith("the tree cannot be written as SQL without running it: ")
    assert [item["revision"] for item in found["schema_state"]["pending"]] == ["aaa1", "aaa2"]
    assert heads(database) == []


def test_plan_of_a_schema_from_elsewhere(run_bootstrap: RunBootstrap, database: Database) -> None:
    """If this image cannot migrate the schema, `plan` says how init would end, and exits 0."""
    database.execute("CREATE TABLE alembic_version (version_num varchar(32))", ())
    database.execute("INSERT INTO alembic_version VALUES ('9999')", ())
    found = planned(run_bootstrap, "--sql")
    assert found["message"].startswith("init would end with 1: ")
    assert found["schema_state"]["verdict"] == "unknown_revision"
