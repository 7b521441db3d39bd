"""What the tests of the step `migrate` are written in: trees, barriers, and the step as a process of its own."""

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
#: First key of the advisory locks by which tests stop revisions where they want them.
BARRIER_CLASS = 77
#: What the first revision of every tree makes: the table that each revision puts a row in, and the one that the
#: warm reads.
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
    """A copy of one of tests/trees; `revision` adds one on top of the last."""

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
        """Write a revision whose upgrade is `body` (one line, or lines indented by four), then a row in `applied`."""
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
        """The same tree in another folder, to grow on its own."""
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
    """The line of a revision that waits until the test lets it pass."""
    return f'op.execute("SELECT pg_advisory_xact_lock_shared({BARRIER_CLASS}, {number})")'


def concurrent_index(name: str, *, if_not_exists: bool = False, before: str = "") -> str:
    """Lines of a revision that builds an index on `applied` concurrently."""
    before = f"{before}\n        " if before else ""
    exists = "IF NOT EXISTS " if if_not_exists else ""
    return (
        "with op.get_context().autocommit_block():\n"
        f'        {before}op.execute("CREATE INDEX CONCURRENTLY {exists}{name} ON applied (revision)")'
    )


class Barrier:
    """Stops revisions at the line `barrier(number)` until `release`."""

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
        """Server processes that wait here now."""
        rows = self._connection.execute(
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND classid = %s AND objid = %s"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            (BARRIER_CLASS, self._number),
        )
        return [int(row[0]) for row in rows]

    def reached(self, *, besides: Iterable[int] = (), timeout: float = DEFAULT_TIMEOUT) -> int:
        """Wait until a revision is here (in another server process than those), and return its server process."""
        wait_until(lambda: bool(set(self.waiting()) - set(besides)), "a revision at the barrier", timeout)
        return (set(self.waiting()) - set(besides)).pop()

    def release(self) -> None:
        """Let them pass, now and from now on."""
        self._connection.close()


@dataclass(frozen=True)
class Outcome:
    """What a step has ended in: its exit code, the object it printed, and what it logged."""

    code: int
    facts: dict[str, Any]
    log: str

    @property
    def applied(self) -> list[str]:
        return [item["revision"] for item in self.facts["applied"]]


def outcome(step: Command, timeout: float = DEFAULT_TIMEOUT) -> Outcome:
    """Wait for the end of a step."""
    done = step.wait(timeout)
    assert done.stdout, done.stderr
    return Outcome(done.returncode, json.loads(done.stdout), done.stderr)


def applied(database: Database) -> dict[str, int]:
    """How often each revision has left its row."""
    return dict(Counter(row[0] for row in database.execute("SELECT revision FROM applied")))


def recorded(database: Database) -> list[str]:
    """What the version table holds."""
    return sorted(row[0] for row in database.execute("SELECT version_num FROM alembic_version"))


def lock_sessions(database: Database) -> list[int]:
    """Server processes that hold the migration lock."""
    rows = database.execute(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid::int8 = %s AND objid = 1"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        (0x7802FA3E,),
    )
    return [row[0] for row in rows]


def is_alive(database: Database, pid: int) -> bool:
    """Whether this server process is still there."""
    return bool(database.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", (pid,)))


def index_states(database: Database) -> dict[str, bool]:
    """The indexes of `applied`, and whether each is valid."""
    rows = database.execute(
        "SELECT indexrelid::regclass::text, indisvalid FROM pg_index WHERE indrelid = 'applied'::regclass"
    )
    return dict(rows)


def migrate_environment(clean_env: Mapping[str, str], url: str, tree: Tree) -> dict[str, str]:
    """The environment of a step."""
    return {**clean_env, "BIFROST_DATABASE_URL": url, "BIFROST_ALEMBIC_CONFIG": str(tree.config)}


def wait_for_statement(database: Database, words: str, *, waits_for_lock: bool = True) -> int:
    """Wait until a session runs a statement with these words (and waits for a lock in it); its server process."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [
            row[0]
            for row in database.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " AND state = 'active' AND query LIKE %s AND (wait_event_type = 'Lock' OR NOT %s)",
                (f"%{words}%", waits_for_lock),
            )
        ]
        return bool(found)

    wait_until(look, f"a session that runs {words}")
    return found[0]


# ------------------------------------------------------------------------------------------------------ fixtures


class StartMigrate(Protocol):
    """Type of `start_migrate`."""

    def __call__(self, *, deadline: float = 60, env: Mapping[str, str] | None = None, **variables: str) -> Command: ...


class StartPool(Protocol):
    """Type of `start_pool`."""

    def __call__(self, pool_size: int, **settings: str) -> PgbouncerServer: ...


#: Below the pause between two statements that keep the lock's connection alive: only turning it off helps.
ROLE_TIMEOUT = "500ms"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A synchronous tree without revisions."""
    return Tree(tmp_path / "tree")


@pytest.fixture
def start_migrate(
    start_command: StartCommand, clean_env: dict[str, str], database: Database, tree: Tree
) -> StartMigrate:
    """Start the step `migrate` on this test's database and tree, with more variables or others."""

    def start(*, deadline: float = 60, env: Mapping[str, str] | None = None, **variables: str) -> Command:
        env = {**migrate_environment(clean_env, database.url, tree), **(env or {}), **variables}
        return start_command([*RUN_MIGRATE, str(deadline)], env=env)

    return start


@pytest.fixture
def start_pool(run_folder: RunFolder, postgres: Postgres, database: Database, start_server: StartServer) -> StartPool:
    """Start a PgBouncer with pools of this size before a database that ends idle transactions soon."""
    if not isinstance(postgres, PostgresServer):
        pytest.skip("PgBouncer stands before a server of our own")
    database.execute(f"ALTER DATABASE \"{database.name}\" SET idle_in_transaction_session_timeout = '{ROLE_TIMEOUT}'")

    def start(pool_size: int, **settings: str) -> PgbouncerServer:
        timers = {"idle_transaction_timeout": "2", "query_wait_timeout": "60"}
        # A client's next transaction gets the session that has been idle longest, hardly ever the one it just had.
        settings = {**timers, "server_round_robin": "1", **settings}
        return start_server(PgbouncerServer(run_folder, postgres, pool_size=pool_size, settings=settings))

    return start


@pytest.fixture(scope="session")
def other_server(run_folder: RunFolder) -> Iterator[PostgresServer]:
    """A second PostgreSQL of the run."""
    server = PostgresServer(run_folder)
    with contextlib.closing(server):
        yield server.start()
