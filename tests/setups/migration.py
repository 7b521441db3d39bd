"""The step `migrate` alone: a tree that a test writes, barriers inside revisions, and the step as a process.

Fixtures: `tree`, `start_migrate`, `start_pool`, `other_server`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import pytest

from tests.conftest import StartCommand, StartServer
from tests.servers import Command, Database, PgbouncerServer, Postgres, PostgresServer, RunFolder
from tests.servers.command import DEFAULT_TIMEOUT
from tests.servers.process import wait_until

TREES = Path(__file__).parent.parent / "trees"
RUN_MIGRATE = (sys.executable, str(Path(__file__).with_name("run_migrate.py")))
#: First key of the advisory locks of `barrier`.
BARRIER_CLASS = 77
#: Body of the first revision of every tree: the table `applied`, into which each revision inserts a row, and the table
#: that the warm reads.
FIRST = """
    op.execute("CREATE TABLE applied (revision text NOT NULL, pid int NOT NULL DEFAULT pg_backend_pid())")
    op.execute(
        "CREATE TABLE workspace_files (path varchar(1000) UNIQUE, content text, content_hash varchar(64),"
        " entity_type varchar(50), is_deleted boolean NOT NULL DEFAULT false)"
    )
"""
REVISION = '''"""{title}"""

import os
from alembic import op

revision = {name!r}
down_revision = {down!r}
branch_labels = {labels!r}
depends_on = {depends_on!r}


def upgrade():
    {body}
    op.execute("INSERT INTO applied (revision) VALUES ('{name}')")
'''


class Tree:
    """A copy of a tree of tests/trees. `revision` adds a revision on top of the last one."""

    def __init__(self, folder: Path, kind: Literal["plain", "asynchronous"] = "plain") -> None:
        shutil.copytree(TREES / kind, folder, ignore=shutil.ignore_patterns("__pycache__"))
        self.folder, self.config = folder, folder / "alembic.ini"
        self.versions = folder / "versions"
        self.versions.mkdir()
        self.last: str | None = None

    def revision(
        self,
        name: str,
        body: str = "",
        *,
        title: str = "",
        down: str | tuple[str, ...] | None = "the last",
        labels: str | None = None,
        depends_on: str | None = None,
    ) -> Self:
        """Write a revision. It runs `body` (one line, or lines indented by four) and inserts a row into `applied`.

        `down` defaults to the last revision. Returns the tree.
        """
        down = self.last if down == "the last" else down
        body = body.strip() or "pass"
        text = REVISION.format(
            name=name, down=down, labels=labels, depends_on=depends_on, title=title or f"Revision {name}",
            body=body if down else FIRST.strip() + "\n    " + body,
        )  # fmt: skip
        (self.versions / f"{name}.py").write_text(text, encoding="utf-8")
        self.last = name
        return self

    def copy(self, folder: Path) -> Tree:
        """Copy the tree to another folder. New revisions of one copy do not appear in the other."""
        shutil.copytree(self.folder, folder)
        other = object.__new__(Tree)
        other.folder, other.config, other.versions, other.last = (
            folder,
            folder / "alembic.ini",
            folder / "versions",
            self.last,
        )
        return other


def barrier(number: int = 1) -> str:
    """Return the line of a revision that waits until `Barrier.release`."""
    return f'op.execute("SELECT pg_advisory_xact_lock_shared({BARRIER_CLASS}, {number})")'


def concurrent_index(name: str, *, if_not_exists: bool = False, before: str = "") -> str:
    """Return the lines of a revision that builds an index on `applied` with CREATE INDEX CONCURRENTLY."""
    before = f"{before}\n        " if before else ""
    exists = "IF NOT EXISTS " if if_not_exists else ""
    return (
        "with op.get_context().autocommit_block():\n"
        f'        {before}op.execute("CREATE INDEX CONCURRENTLY {exists}{name} ON applied (revision)")'
    )


class Barrier:
    """Makes revisions wait at the line `barrier(number)` until `release`."""

    def __init__(self, database: Database, number: int = 1) -> None:
        self._database, self._number = database, number
        self._connection = database.connect()
        self._connection.execute("SELECT pg_advisory_lock(%s, %s)", (BARRIER_CLASS, number))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def waiting(self) -> list[int]:
        """Return the PIDs of the backends that wait at the barrier."""
        rows = self._connection.execute(
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND classid = %s AND objid = %s"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            (BARRIER_CLASS, self._number),
        )
        return [int(row[0]) for row in rows]

    def reached(self, *, besides: Iterable[int] = (), timeout: float = DEFAULT_TIMEOUT) -> int:
        """Wait until a backend other than `besides` waits at the barrier. Return its PID."""
        wait_until(lambda: bool(set(self.waiting()) - set(besides)), "a revision at the barrier", timeout)
        return (set(self.waiting()) - set(besides)).pop()

    def release(self) -> None:
        """Open the barrier for good."""
        self._connection.close()


@dataclass(frozen=True)
class Outcome:
    """The result of a step: exit code, printed JSON object, and log."""

    code: int
    facts: dict[str, Any]
    log: str

    @property
    def applied(self) -> list[str]:
        return [item["revision"] for item in self.facts["applied"]]


def outcome(step: Command, timeout: float = DEFAULT_TIMEOUT) -> Outcome:
    """Wait until a step exits; return its result."""
    done = step.wait(timeout)
    assert done.stdout, done.stderr
    return Outcome(done.returncode, json.loads(done.stdout), done.stderr)


def applied(database: Database) -> dict[str, int]:
    """Return how often each revision was applied (its rows in `applied`)."""
    return dict(Counter(row[0] for row in database.execute("SELECT revision FROM applied")))


def recorded(database: Database) -> list[str]:
    """Return the revisions in alembic_version."""
    return sorted(row[0] for row in database.execute("SELECT version_num FROM alembic_version"))


def lock_sessions(database: Database) -> list[int]:
    """Return the PIDs of the backends that hold the migration lock."""
    rows = database.execute(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid::int8 = %s AND objid = 1"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        (0x7802FA3E,),
    )
    return [row[0] for row in rows]


def is_alive(database: Database, pid: int) -> bool:
    """Whether the backend with this PID exists."""
    return bool(database.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", (pid,)))


def index_states(database: Database) -> dict[str, bool]:
    """Return the indexes of `applied`: name, and whether the index is valid."""
    rows = database.execute(
        "SELECT indexrelid::regclass::text, indisvalid FROM pg_index WHERE indrelid = 'applied'::regclass"
    )
    return dict(rows)


def migrate_environment(clean_env: Mapping[str, str], url: str, tree: Tree) -> dict[str, str]:
    """Return the environment for a step."""
    return {**clean_env, "BIFROST_DATABASE_URL": url, "BIFROST_ALEMBIC_CONFIG": str(tree.config)}


def wait_for_statement(database: Database, words: str, *, waits_for_lock: bool = True) -> int:
    """Wait until a session runs a statement with these words and (by default) waits for a lock. Return its PID."""
    found: list[int] = []

    def find_sessions() -> bool:
        found[:] = [
            row[0]
            for row in database.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " AND state = 'active' AND query LIKE %s AND (wait_event_type = 'Lock' OR NOT %s)",
                (f"%{words}%", waits_for_lock),
            )
        ]
        return bool(found)

    wait_until(find_sessions, f"a session that runs {words}")
    return found[0]


# ------------------------------------------------------------------------------------------------------ fixtures


class StartMigrate(Protocol):
    """Type of `start_migrate`."""

    def __call__(self, *, deadline: float = 60, env: Mapping[str, str] | None = None, **variables: str) -> Command: ...


class StartPool(Protocol):
    """Type of `start_pool`."""

    def __call__(self, pool_size: int, **settings: str) -> PgbouncerServer: ...


#: idle_in_transaction_session_timeout of the database behind a pool. It is shorter than the interval of the lock's
#: keepalive statements, so the lock survives only if it turns the timeout off.
ROLE_TIMEOUT = "500ms"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A synchronous tree without revisions."""
    return Tree(tmp_path / "tree")


@pytest.fixture
def start_migrate(
    start_command: StartCommand, clean_env: dict[str, str], database: Database, tree: Tree
) -> StartMigrate:
    """Start the step `migrate` as a process: `start_migrate(deadline=60, env=None, NAME=value)`.

    It uses `database` and `tree`; `env` and the keyword arguments add or replace variables. `outcome` waits until it
    exits.
    """

    def start(*, deadline: float = 60, env: Mapping[str, str] | None = None, **variables: str) -> Command:
        env = {**migrate_environment(clean_env, database.url, tree), **(env or {}), **variables}
        return start_command([*RUN_MIGRATE, str(deadline)], env=env)

    return start


@pytest.fixture
def start_pool(run_folder: RunFolder, postgres: Postgres, database: Database, start_server: StartServer) -> StartPool:
    """Start a PgBouncer in front of `database`: `start_pool(pool_size, SETTING=value)`.

    Idle transactions end after ROLE_TIMEOUT in the database, and after 2 s in PgBouncer.
    """
    if not isinstance(postgres, PostgresServer):
        pytest.skip("PgBouncer needs a private PostgreSQL")
    database.execute(f"ALTER DATABASE \"{database.name}\" SET idle_in_transaction_session_timeout = '{ROLE_TIMEOUT}'")

    def start(pool_size: int, **settings: str) -> PgbouncerServer:
        timers = {"idle_transaction_timeout": "2", "query_wait_timeout": "60"}
        # Round robin: the next transaction of a client rarely gets the server connection of its last one.
        settings = {**timers, "server_round_robin": "1", **settings}
        return start_server(PgbouncerServer(run_folder, postgres, pool_size=pool_size, settings=settings))

    return start


@pytest.fixture(scope="session")
def other_server(run_folder: RunFolder) -> Iterator[PostgresServer]:
    """A second PostgreSQL, shared by the tests of an xdist worker."""
    server = PostgresServer(run_folder)
    with contextlib.closing(server):
        yield server.start()
