"""Tests with a checkout of the real platform: `make test-platform PLATFORM=… PLATFORM_PYTHON=…`.
The whole against a checkout of the real platform: `make test-platform PLATFORM=… PLATFORM_PYTHON=…`.

PLATFORM is a checkout of any version since 2026-01-08, PLATFORM_PYTHON an interpreter with its requirements. Its tree
needs `vector`, which the embedded PostgreSQL has. RabbitMQ's place is taken by the embedded Valkey.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import redis
from psycopg.conninfo import conninfo_to_dict

from bifrost_bootstrap.dev.embedded import EmbeddedServers, embedded_servers
from tests.conftest import StartServer
from tests.servers import PgbouncerServer, RunFolder
from tests.servers.leaks import PLANTED_PASSWORD
from tests.servers.pgbouncer import busy_clients
from tests.servers.postgres import APP_ROLE
from tests.servers.process import wait_until

#: Seconds for one init on an empty database (183 revisions take about 10), and for a script of the platform.
INIT_TIMEOUT, SCRIPT_TIMEOUT = 120, 120
#: Kills of an init, each at another moment.
KILLS = 10
#: What its settings class wants, 32 characters or more.
SECRET_KEY = "for-tests-only-0123456789-0123456789"
#: Modules with and without `__init__.py`, imported through the platform's own hook.
MODULES = {
    "shared/__init__.py": "",
    "shared/halo.py": "VALUE = 'halo'\n",
    "loose/tickets.py": "from shared.halo import VALUE\nNAME = VALUE + ' tickets'\n",
}
IMPORT_SCRIPT = """
from src.services.execution.virtual_import import install_virtual_import_hook
install_virtual_import_hook()
import loose.tickets
import shared
print(loose.tickets.NAME)
"""
#: What makes a schema: its rows are equal in two databases of one schema.
SHAPE = (
    """
    SELECT table_name, column_name, data_type, is_nullable, coalesce(column_default, '')
    FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2
    """,
    """
    SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2
    """,
    "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1",
    "SELECT enumtypid::regtype::text, enumlabel FROM pg_enum ORDER BY 1, 2",
    "SELECT version_num FROM alembic_version ORDER BY 1",
)
#: The platform's own writer: set_module while rows change, commit last, as its requests do.
WRITER_SCRIPT = """
import asyncio, hashlib, random, sys
from sqlalchemy import text
from src.core.database import get_session_factory
from src.core.module_cache import invalidate_module, set_module

async def main(seconds):
    table = sys.argv[2]
    extra = ", entity_type, is_deleted, size_bytes" if table == "workspace_files" else ""
    values = ", 'module', false, 0" if extra else ""
    end = asyncio.get_running_loop().time() + seconds
    number = 0
    while asyncio.get_running_loop().time() < end:
        number += 1
        path = f"live/m{random.randrange(50)}.py"
        content = f"N = {number}"
        digest = hashlib.sha256(content.encode()).hexdigest()
        async with get_session_factory()() as session:
            await session.execute(text(
                f"INSERT INTO {table} (path, content, content_hash{extra}) VALUES (:p, :c, :h{values})"
                " ON CONFLICT (path) DO UPDATE SET content = excluded.content, content_hash = excluded.content_hash"
            ), {"p": path, "c": content, "h": digest})
            await set_module(path, content, digest)
            await asyncio.sleep(random.random() / 50)
            await session.commit()

asyncio.run(main(float(sys.argv[1])))
"""


@pytest.fixture(scope="session")
def platform_folder() -> Path:
    """The folder `api` of the checkout."""
    if not (os.environ.get("PLATFORM") and os.environ.get("PLATFORM_PYTHON")):
        pytest.skip("needs PLATFORM (a checkout of the platform) and PLATFORM_PYTHON (an interpreter that runs it)")
    return Path(os.environ["PLATFORM"]) / "api"


@pytest.fixture
def servers() -> Iterator[EmbeddedServers]:
    """Empty servers for one test."""
    with embedded_servers() as running:
        yield running


class Platform:
    """One database and one Redis with the platform's own programs, and ours in place of its init container."""

    def __init__(self, folder: Path, servers: EmbeddedServers, database: str = "postgres") -> None:
        self.folder, self.servers = folder, servers
        self.url = servers.database_url.rpartition("/")[0] + "/" + database
        self.client = redis.Redis.from_url(servers.redis_url)
        asynchronous = self.url.replace("postgresql://", "postgresql+asyncpg://")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BIFROST_")}
        self.environment: Mapping[str, str] = kept | {
            "BIFROST_DATABASE_URL": asynchronous,
            "BIFROST_DATABASE_URL_SYNC": self.url,
            "BIFROST_REDIS_URL": servers.redis_url,
            "BIFROST_RABBITMQ_URL": servers.redis_url,
            "BIFROST_SECRET_KEY": SECRET_KEY,
            "BIFROST_ENVIRONMENT": "testing",
            "BIFROST_ALEMBIC_PYTHON": os.environ["PLATFORM_PYTHON"],
            "PYTHONPATH": str(folder),
            # Its own init calls `alembic` by name.
            "PATH": f"{Path(os.environ['PLATFORM_PYTHON']).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def through(self, url: str) -> Platform:
        """The same with another URL of the same database for all its programs."""
        other = Platform(self.folder, self.servers)
        changed = {
            "BIFROST_DATABASE_URL": url.replace("postgresql://", "postgresql+asyncpg://"),
            "BIFROST_DATABASE_URL_SYNC": url,
        }
        other.environment = {**self.environment, **changed}
        return other

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start our command in the platform's folder."""
        environment = {**self.environment, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        return subprocess.Popen(
            [sys.executable, "-m", "bifrost_bootstrap", *command], cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def init(self) -> dict[str, Any]:
        """Our init with its own worker, to its end: the JSON object."""
        with self.start("init", "--with-worker", "--json") as process:
            out, err = process.communicate(timeout=INIT_TIMEOUT)
        assert process.returncode == 0, err
        result: dict[str, Any] = json.loads(out)
        return result

    def run(self, *arguments: str) -> str:
        """A program of the platform's own interpreter, in its folder."""
        done = subprocess.run(
            [os.environ["PLATFORM_PYTHON"], *arguments], cwd=self.folder, env=self.environment, text=True,
            capture_output=True, timeout=SCRIPT_TIMEOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def query(self, query: str) -> list[tuple[Any, ...]]:
        """The rows of a statement."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    def has_committed(self) -> bool:
        """Whether the tree's one transaction has been ended by its first raw COMMIT: others see its tables."""
        return self.query("SELECT to_regclass('users')")[0][0] is not None

    @property
    def table(self) -> str:
        """The table of the modules in this version."""
        return "workspace_files" if self.query("SELECT to_regclass('workspace_files')")[0][0] else "file_index"

    def put(self, modules: Mapping[str, str]) -> None:
        """Insert modules as committed rows."""
        extra, values = (
            (", entity_type, is_deleted, size_bytes", ", 'module', false, 0")
            if self.table == "workspace_files"
            else ("", "")
        )
        with psycopg.connect(self.url) as connection:
            for path, content in modules.items():
                connection.execute(
                    f"INSERT INTO {self.table} (path, content, content_hash{extra})"
                    f" VALUES (%s, %s, encode(sha256(convert_to(%s, 'UTF8')), 'hex'){values})",
                    (path, content, content),
                )

    def shape(self) -> list[tuple[Any, ...]]:
        """Columns, constraints, indexes, enum values and heads: equal for two databases of one schema."""
        return [row for query in SHAPE for row in self.query(query)]

    def assert_cache_equals_table(self) -> None:
        """Every module has its entry, and no path of the index is without a row."""
        where = " WHERE entity_type = 'module' AND NOT is_deleted" if self.table == "workspace_files" else (
            " WHERE path LIKE '%.py' AND path NOT LIKE '\\_%/%'")  # fmt: skip
        rows = dict(self.query(f"SELECT path, content FROM {self.table}{where} AND content IS NOT NULL"))
        index = {bytes(path).decode() for path in self.client.smembers("bifrost:module:index")}  # type: ignore[arg-type]
        entries = {
            path: json.loads(self.client.get(f"bifrost:module:{path}") or b"{}").get("content") for path in index
        }
        assert entries == rows


@pytest.fixture
def platform(platform_folder: Path, servers: EmbeddedServers) -> Platform:
    """Empty servers, and the programs of the platform."""
    return Platform(platform_folder, servers)


def test_schema_is_that_of_its_own_init(platform: Platform, servers: EmbeddedServers) -> None:
    """Init creates the same schema as plain Alembic. A second init has nothing to do."""
    result = platform.init()
    assert result["migrate"]["applied"]
    platform.query("CREATE DATABASE plain")
    plain = Platform(platform.folder, servers, "plain")
    plain.run("-m", "alembic", "upgrade", "head")
    assert platform.shape() == plain.shape()
    assert platform.init()["nothing_to_do"]


def test_modules_through_its_own_import_hook(platform: Platform) -> None:
    """The platform imports our entries, packages with and without `__init__.py`."""
    platform.init()
    hook = (platform.folder / "src/services/execution/virtual_import.py").read_text()
    # The first versions of the hook knew no package without it.
    platform.put(MODULES | ({} if "NamespacePackageLoader" in hook else {"loose/__init__.py": ""}))
    platform.init()
    platform.assert_cache_equals_table()
    assert platform.run("-c", IMPORT_SCRIPT).strip() == "halo tickets"


def test_killed_behind_the_raw_commit(platform_folder: Path, servers: EmbeddedServers) -> None:
    """SIGKILL of the whole init at a random moment of the migration: the next init reaches head."""
    generator = random.Random(15)
    administrator = Platform(platform_folder, servers)
    for number in range(KILLS):
        administrator.query(f"CREATE DATABASE killed_{number}")
        platform = Platform(platform_folder, servers, f"killed_{number}")
        with platform.start("init", "--with-worker") as process:
            wait_until(platform.has_committed, "the first COMMIT of the tree")
            time.sleep(generator.random() * 3)
            os.killpg(process.pid, 9)
            process.communicate()
        assert platform.init()["ready"], number


def test_behind_a_busy_pooler(platform: Platform, run_folder: RunFolder, start_server: StartServer) -> None:
    """PgBouncer in transaction pooling mode, with three other clients in the same pool."""
    platform.query(f"CREATE ROLE {APP_ROLE} LOGIN SUPERUSER PASSWORD '{PLANTED_PASSWORD}'")
    port = int(str(conninfo_to_dict(platform.url)["port"]))
    pool = start_server(PgbouncerServer(run_folder, SimpleNamespace(host="127.0.0.1", port=port), pool_size=5))
    with busy_clients(pool.url()):
        result = platform.through(pool.url()).init()
    assert result["migrate"]["applied"]
    assert platform.init()["nothing_to_do"]


def test_seconds_beside_its_own_init(
    platform: Platform, servers: EmbeddedServers, capsys: pytest.CaptureFixture[str]
) -> None:
    """Durations of both inits, from nothing and with nothing to do. The ratios are printed and not checked."""
    seconds: dict[str, list[float]] = {}
    for number in range(3):
        for who in ("ours", "its own"):
            database = f"timed_{number}_{who.replace(' ', '_')}"
            platform.query(f"CREATE DATABASE {database}")
            timed = Platform(platform.folder, servers, database)
            for what in ("from nothing", "nothing to do"):
                begun = time.monotonic()
                if who == "ours":
                    timed.init()
                else:
                    timed.run("-m", "scripts.init_container")
                seconds.setdefault(f"{who}, {what}", []).append(time.monotonic() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    with capsys.disabled():
        for what in ("from nothing", "nothing to do"):
            ours, own = medians[f"ours, {what}"], medians[f"its own, {what}"]
            print(f"\n{what}: ours {ours:.1f}s, its own {own:.1f}s, ratio {ours / own:.2f}")


def test_warm_beside_its_own_writers(platform: Platform) -> None:
    """The platform's functions write rows and entries during warms. Afterwards the cache equals the table."""
    platform.init()
    platform.put(MODULES)
    writers = [
        subprocess.Popen(
            [os.environ["PLATFORM_PYTHON"], "-c", WRITER_SCRIPT, "8", platform.table],
            cwd=platform.folder, env=platform.environment,
        )
        for _ in range(2)
    ]  # fmt: skip
    while any(writer.poll() is None for writer in writers):
        with platform.start("init", "--with-worker") as process:
            process.communicate(timeout=INIT_TIMEOUT)
        assert process.returncode == 0
    assert [writer.returncode for writer in writers] == [0, 0]
    platform.init()
    platform.assert_cache_equals_table()


def test_rehearsal_from_an_older_version(platform_folder: Path, servers: EmbeddedServers) -> None:
    """PLATFORM_FROM: the newer tree applies to a copy of the older schema, which stays as it is."""
    if not os.environ.get("PLATFORM_FROM"):
        pytest.skip("needs PLATFORM_FROM, a checkout of an older version")
    older = Platform(Path(os.environ["PLATFORM_FROM"]) / "api", servers)
    older.init()
    before = older.shape()
    newer = Platform(platform_folder, servers)
    with newer.start("rehearse", "--json") as process:
        out, err = process.communicate(timeout=INIT_TIMEOUT)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert older.shape() == before
    rehearsed = [revision["revision"] for revision in found["revisions"]]
    tables = {table["table"] for revision in found["revisions"] for table in revision["tables"]}
    assert "public.alembic_version" not in tables
    print(found["message"], *found["warnings"], *found["notes"], sep="\n")
    applied = newer.init()["migrate"]["applied"]
    assert [revision["revision"] for revision in applied] == rehearsed


def test_upgrade_from_an_older_version(platform_folder: Path, servers: EmbeddedServers) -> None:
    """PLATFORM_FROM: one init takes over database and cache of an older checkout."""
    if not os.environ.get("PLATFORM_FROM"):
        pytest.skip("needs PLATFORM_FROM, a checkout of an older version")
    older = Platform(Path(os.environ["PLATFORM_FROM"]) / "api", servers)
    older.init()
    older.put(MODULES)
    older.init()
    newer = Platform(platform_folder, servers)
    newer.init()
    newer.assert_cache_equals_table()
    assert newer.init()["nothing_to_do"]
