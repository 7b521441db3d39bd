"""The input and output of a warm: rows in PostgreSQL, the module cache in Redis, its readers and writers.

Fixtures: `store`, `make_store`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

import bifrost_bootstrap
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.progress import Progress, Report
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.warm.step import WarmResult, warm
from tests.servers import Database, Postgres

ENTRY, INDEX, OWN = b"bifrost:module:", b"bifrost:module:index", b"bifrost:bootstrap:"
#: Deadline of a warm (seconds). No test reaches it.
WARM_DEADLINE = 60.0
#: TTL of the entries that the API of the platform writes (seconds).
API_TTL = 24 * 3600

UPSERT = """
    INSERT INTO workspace_files (path, content, content_hash, entity_type, is_deleted)
    VALUES (%s, %s, %s, 'module', false)
    ON CONFLICT (path) DO UPDATE SET content = excluded.content, content_hash = excluded.content_hash,
        entity_type = 'module', is_deleted = false
"""
# Read every path of the index and its entry (or nothing), atomically.
OBSERVE = """
local seen = {}
for _, path in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  seen[#seen + 1] = path
  seen[#seen + 1] = redis.call('GET', KEYS[1] .. path)
end
return seen
"""


def sha256(content: str) -> str:
    """Return the content_hash of a row with this content."""
    return hashlib.sha256(content.encode()).hexdigest()


def entry(path: str, content: str) -> bytes:
    """Return the entry as the API of the platform writes it."""
    return json.dumps({"content": content, "path": path, "hash": sha256(content)}).encode()


@dataclass
class ModuleStore:
    """A migrated database and a Redis database."""

    database: Database
    client: redis.Redis
    settings: Settings

    # ------------------------------------------------------------------------------------------------ the rows

    def put(self, modules: dict[str, str]) -> None:
        """Insert or update these modules in one transaction."""
        with self.database.connect() as connection, connection.transaction(), connection.cursor() as cursor:
            cursor.executemany(UPSERT, [(path, content, sha256(content)) for path, content in modules.items()])

    def upsert(self, connection: psycopg.Connection, path: str, content: str) -> None:
        """Insert or update a module in the transaction of the caller."""
        connection.execute(UPSERT, (path, content, sha256(content)))

    def remove(self, *paths: str) -> None:
        """Set is_deleted of these modules."""
        self.database.execute("UPDATE workspace_files SET is_deleted = true WHERE path = ANY(%s)", [list(paths)])

    def rows(self) -> dict[str, str]:
        """Return path and content of every module row."""
        return dict(
            self.database.execute(
                "SELECT path, content FROM workspace_files"
                " WHERE entity_type = 'module' AND NOT is_deleted AND content IS NOT NULL AND path <> 'index'"
            )
        )

    # ----------------------------------------------------------------------------------------------- the cache

    def observed(self, client: redis.Redis | None = None) -> dict[bytes, bytes | None]:
        """Return the entry (None if missing) of every path of the index, read atomically."""
        seen: Any = (client or self.client).eval(OBSERVE, 2, ENTRY, INDEX)
        return dict(zip(seen[::2], seen[1::2], strict=True))

    def assert_exact(self) -> None:
        """Assert that the cache equals the rows: every path, and every entry with its three fields in order."""
        observed = self.observed()
        rows = self.rows()
        assert set(observed) == {path.encode() for path in rows}
        for path, content in rows.items():
            value = observed[path.encode()]
            assert value is not None
            fields = json.loads(value)
            assert list(fields.items()) == [("content", content), ("path", path), ("hash", sha256(content))]

    def content(self, path: str) -> str | None:
        """Return the content in the entry of this path; None if there is no entry."""
        value: Any = self.client.get(ENTRY + path.encode())
        return None if value is None else json.loads(value)["content"]

    def module_keys(self) -> dict[bytes, bytes | None]:
        """Return every key of the cache with its dumped value. Equal results mean that no key was changed."""
        return {key: self._dumped(key) for key in self.client.scan_iter(ENTRY + b"*")}

    def _dumped(self, key: bytes) -> bytes | None:
        if self.client.type(key) == b"set":
            # DUMP of a set depends on the order of insertion.
            return repr(sorted(self.client.smembers(key))).encode()
        return self.client.dump(key)

    def own_keys(self) -> list[bytes]:
        """Return every key of bifrost_bootstrap except the marker."""
        return [key for key in self.client.scan_iter(OWN + b"*") if key != OWN + b"marker"]

    # --------------------------------------------------------------------------------------- who reads and writes

    def warm(self, report: Report | None = None, **options: bool) -> WarmResult:
        """Run one warm in this process. `report` is called with its progress."""
        return warm(self.settings, Deadline(WARM_DEADLINE), report or (lambda _progress: None), **options)

    def api_set(self, path: str, content: str) -> None:
        """Write entry and index as the API does, without the row."""
        with self.client.pipeline() as pipeline:
            pipeline.set(ENTRY + path.encode(), entry(path, content), ex=API_TTL)
            pipeline.sadd(INDEX, path.encode())
            pipeline.execute()

    def api_write(self, path: str, content: str) -> None:
        """Write a module as the API does: commit the row, then write entry and index."""
        self.put({path: content})
        self.api_set(path, content)

    def api_delete(self, path: str) -> None:
        """Delete a module as the API does: commit, then delete entry and path in the index."""
        self.remove(path)
        with self.client.pipeline() as pipeline:
            pipeline.delete(ENTRY + path.encode())
            pipeline.srem(INDEX, path.encode())
            pipeline.execute()


def at(note: str, action: Callable[[], object], *, number: int = 1) -> Report:
    """Return a report that calls `action` when the warm reports this note for the `number`th time."""
    seen = 0

    def report(progress: Progress) -> None:
        nonlocal seen
        if progress.note == note:
            seen += 1
            if seen == number:
                action()

    return report


# ------------------------------------------------------------------------------------------------------ fixtures


TREE = Path(bifrost_bootstrap.__file__).parent / "migrations" / "alembic.ini"

MakeStore = Callable[..., ModuleStore]


@pytest.fixture(scope="session")
def migrated(postgres: Postgres) -> Iterator[Database]:
    """A migrated database: the template of the databases of `make_store`."""
    database = postgres.create_database(prefix="template")
    migrate(database)
    yield database
    postgres.drop_database(database)


def migrate(database: Database) -> None:
    """Upgrade a database to the head of the built-in tree."""
    environment = {**os.environ, "BIFROST_DATABASE_URL": database.url}
    subprocess.run([sys.executable, "-m", "alembic", "-c", TREE, "upgrade", "head"], check=True, env=environment)


@pytest.fixture
def make_store(postgres: Postgres, migrated: Database) -> Iterator[MakeStore]:
    """Make a store: `make_store(redis_url, database=None, setting=value)`. The default is a new, migrated database."""
    made: list[tuple[ModuleStore, bool]] = []

    def make(redis_url: str, database: Database | None = None, **settings: object) -> ModuleStore:
        ours = database is None
        database = database or postgres.create_database(template=migrated.name)
        values = {"database_url": database.url, "redis_url": redis_url, "alembic_config": "builtin"}
        values |= {name: str(value) for name, value in settings.items()}  # strings, as in the environment
        client = redis.Redis.from_url(redis_url, socket_timeout=20)
        made.append((ModuleStore(database, client, Settings.model_validate(values)), ours))
        return made[-1][0]

    yield make
    for store, ours in made:
        store.client.close()
        if ours:
            postgres.drop_database(store.database)


@pytest.fixture
def store(make_store: MakeStore, redis_url: str) -> ModuleStore:
    """A store with a new, migrated database and an empty cache, on the shared servers."""
    return make_store(redis_url)
