"""Write rows, and read schema and cache, without the code of the package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import redis

from tests.servers import Database

#: An empty module, special characters in names and contents, and a package that can be imported.
MODULES = {
    "acceptance_demo/__init__.py": "",
    "acceptance_demo/answer.py": "ANSWER = 42\n",
    "odd names/a b*?[c].py": "# Grüße, 世界 \U0001f600\n",
    "quotes'\"\\.py": "TEXT = '\\'\"\\\\'\n",
}


def insert_modules(database: Database, modules: Mapping[str, str], *, hashes: bool = True) -> None:
    """Insert or update rows as the platform does. `hashes=False`: without content_hash, as its older releases did."""
    for path, content in modules.items():
        database.execute(
            "INSERT INTO workspace_files (path, content, content_hash, entity_type) VALUES (%s, %s, %s, 'module')"
            " ON CONFLICT (path) DO UPDATE SET content = excluded.content, content_hash = excluded.content_hash",
            (path, content, sha256(content) if hashes else None),
        )


def heads(database: Database) -> list[str]:
    """Return the revisions in alembic_version; [] if the table does not exist."""
    if not database.execute("SELECT 1 FROM pg_class WHERE relname = 'alembic_version'"):
        return []
    return [row[0] for row in database.execute("SELECT version_num FROM alembic_version ORDER BY 1")]


def cached(redis_url: str) -> dict[str, str]:
    """Return path and content of every entry. AssertionError if index and entries differ, or if an entry has a TTL."""
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
    """Return path and content of every module row."""
    return dict(
        database.execute(
            "SELECT path, content FROM workspace_files"
            " WHERE entity_type = 'module' AND NOT is_deleted AND content IS NOT NULL"
        )
    )


def sha256(content: str) -> str:
    """Return the content_hash of a module."""
    return hashlib.sha256(content.encode()).hexdigest()
