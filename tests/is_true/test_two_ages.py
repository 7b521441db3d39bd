"""W14 with init: from `workspace_files` to `file_index` in one upgrade, and back to the older image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from redis import Redis

from tests.conftest import RunBootstrap
from tests.servers import Database
from tests.setups.migration import Tree

#: What the platform's upgrade of 2026-02-10 does.
NEW_AGE = """
    op.execute("CREATE TABLE file_index (path varchar(1000) PRIMARY KEY, content text, content_hash varchar(64))")
    op.execute("INSERT INTO file_index SELECT path, content, content_hash FROM workspace_files")
    op.execute("DROP TABLE workspace_files")
"""


@pytest.mark.slow  # 30 s; test_w14_both_ages.py is the fast test
def test_w14_upgrade_and_rollback_by_init(
    database: Database, redis_url: str, bifrost_env: dict[str, str], run_bootstrap: RunBootstrap, tmp_path: Path
) -> None:
    """The init of each image exits 0, and the cache equals the table that exists."""
    older = Tree(tmp_path / "older").revision("one")
    newer = older.copy(tmp_path / "newer").revision("two", NEW_AGE)
    client = Redis.from_url(redis_url, decode_responses=True)

    def init(tree: Tree, **variables: str) -> dict[str, object]:
        env = {**bifrost_env, "BIFROST_ALEMBIC_CONFIG": str(tree.config), **variables}
        done = run_bootstrap("init", "--with-worker", "--json", env=env)
        assert done.returncode == 0, done.stderr
        result: dict[str, object] = json.loads(done.stdout)
        return result

    def put(table: str, path: str) -> None:
        extra, value = (", entity_type", ", 'module'") if table == "workspace_files" else ("", "")
        database.execute(f"INSERT INTO {table} (path, content{extra}) VALUES (%s, 'x'{value})", [path])

    def cached() -> dict[str, bool]:
        """The paths of the index, and whether the entry of each lives for ever."""
        index: set[str] = client.smembers("bifrost:module:index")  # type: ignore[assignment]
        return {path: client.ttl(f"bifrost:module:{path}") == -1 for path in index}

    init(older)
    put("workspace_files", "old.py")
    init(older)
    assert cached() == {"old.py": True}

    init(newer)
    put("file_index", "new.py")
    init(newer)
    assert cached() == {"old.py": False, "new.py": False}

    database.execute("DELETE FROM file_index WHERE path = 'old.py'")
    init(older, BIFROST_ALLOW_AHEAD="1")
    assert cached() == {"new.py": False}
    assert database.execute("SELECT version_num FROM alembic_version") == [("two",)]
