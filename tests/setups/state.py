"""The state that a command leaves behind, read by its contract and not by the package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import redis

from tests.servers import Database

#: Modules of all kinds: empty, odd names, odd contents, a package that can be imported.
MODULES = {
    "acceptance_demo/__init__.py": "",
    "acceptance_demo/answer.py": "ANSWER = 42\n",
    "odd names/a b*?[c].py": "# Grüße, 世界 \U0001f600\n",
    "quotes'\"\\.py": "TEXT = '\\'\"\\\\'\n",
}


def insert_modules(database: Database, modules: Mapping[str, str], *, hashes: bool = True) -> None:
    """Write rows as the platform does; without `hashes` as an older release did."""
    for path, content in modules.items():
        database.execute(
            "INSERT INTO workspace_files (path, content, content_hash, entity_type) VALUES (%s, %s, %s, 'module')"
            " ON CONFLICT (path) DO UPDATE SET content = excluded.content, content_hash = excluded.content_hash",
            (path, content, sha256(content) if hashes else None),
        )


def heads(database: Database) -> list[str]:
    """The revisions that the database records; none where it has no version table."""
    if not database.execute("SELECT 1 FROM pg_class WHERE relname = 'alembic_version'"):
        return []
    return [row[0] for row in database.execute("SELECT version_num FROM alembic_version ORDER BY 1")]


def cached(redis_url: str) -> dict[str, str]:
    """Path and content of everything in the module cache; index and entries have to agree."""
    with redis.Redis.from_url(redis_url) as client:
        index = {path.decode() for path in client.smembers("bifrost:module:index")}
        keys = {key.decode() for key in client.scan_iter("bifrost:module:*", count=1000)} - {"bifrost:module:index"}
        assert keys == {f"bifrost:module:{path}" for path in index}
        found = {}
        for path in index:
            entry = json.loads(client.get(f"bifrost:module:{path}") or "{}")
            assert list(entry) == ["content", "path", "hash"]
            assert (entry["path"], entry["hash"]) == (path, sha256(entry["content"]))
            assert client.ttl(f"bifrost:module:{path}") == -1
            found[path] = entry["content"]
    return found


def rows(database: Database) -> dict[str, str]:
    """Path and content of every module of the table."""
    return dict(
        database.execute(
            "SELECT path, content FROM workspace_files"
            " WHERE entity_type = 'module' AND NOT is_deleted AND content IS NOT NULL"
        )
    )


def sha256(content: str) -> str:
    """The hash of the contract."""
    return hashlib.sha256(content.encode()).hexdigest()
