"""Init and worker on private servers, with a proxy between each process and each server.

Fixtures: `stack` (the servers; started once), `deployment` (database, virtual host, init and worker of a test).
"""

from __future__ import annotations

import contextlib
import json
import sys
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, LiteralString

import kombu
import psutil
import psycopg
import pytest

from bifrost_bootstrap.migrate.tree import QUEUE
from bifrost_bootstrap.urls import digest, parse_postgres
from tests.conftest import Outside
from tests.servers import (
    Command,
    Database,
    PostgresServer,
    Proxy,
    RabbitmqServer,
    RedisServer,
    RunFolder,
    Server,
    ServerMissing,
)
from tests.servers.command import Commands
from tests.servers.process import wait_until
from tests.servers.run_checks import lacks_server

FOLDER = Path(__file__).parent
TREE = FOLDER.parent / "trees" / "barriers" / "alembic.ini"
REVISIONS = ["0001", "0002"]
PREFIX = "bifrost:module:"
#: Read the index, all keys of the cache, and their values (nil for the index). Atomic, because the worker may switch
#: the cache between two reads.
READ_CACHE = """
local keys = redis.call('KEYS', ARGV[1] .. '*')
return {redis.call('SMEMBERS', ARGV[1] .. 'index'), keys, #keys > 0 and redis.call('MGET', unpack(keys)) or {}}
"""
#: The cache before init, written as the API of the platform does.
PREVIOUS = {"kept": "one", "gone": "one"}
#: The rows when the tree is at head.
COMPLETE = {"kept": "two", **{f"new/{number}": "two" for number in range(1, 51)}}
#: How long init may take to reach a phase (seconds). A worker starts in 2 s on an idle machine.
PHASE_TIMEOUT = 60.0
#: How long messages may stay in the queues after init (seconds).
CLEAN_TIMEOUT = 60.0
SERVERS = ("postgres", "redis", "rabbitmq")
#: `bifrost-bootstrap init` with a rejection timeout of 2 s instead of 30 s.
LESS_PATIENT = """
import sys
from bifrost_bootstrap.cli import commands as cli
from bifrost_bootstrap import deadline
deadline.REJECTION_TIMEOUT = 2.0
sys.exit(cli.run(["init", "--timeout", "3m"]))
"""


@dataclass
class Lines:
    """The proxies between a process (init or worker) and the three servers."""

    postgres: Proxy
    redis: Proxy
    rabbitmq: Proxy

    def all(self) -> list[Proxy]:
        return [self.postgres, self.redis, self.rabbitmq]


@dataclass
class Stack:
    """The servers and proxies, started once for many deployments. Only one deployment uses them at a time."""

    run: RunFolder
    postgres: PostgresServer
    redis: RedisServer
    rabbitmq: RabbitmqServer
    init_lines: Lines
    worker_lines: Lines

    def server(self, name: str) -> Server:
        server: Server = getattr(self, name)
        return server

    @contextlib.contextmanager
    def deployment(self, folder: Path, clean_env: dict[str, str]) -> Iterator[Deployment]:
        """Start stopped servers, heal the proxies, and yield a deployment with a new database and virtual host."""
        for name in SERVERS:
            server = self.server(name)
            if not server.running:
                server.start()
        for line in self.init_lines.all() + self.worker_lines.all():
            line.refuse()
            line.heal()
        database = self.postgres.create_database()
        with self.redis.client() as client:
            client.flushall()
        vhost = self.rabbitmq.add_vhost()
        commands = Commands(self.run)
        try:
            yield Deployment(self, folder, clean_env, database, vhost, commands)
        finally:
            for line in self.init_lines.all() + self.worker_lines.all():
                line.refuse()
            commands.close()
            with contextlib.suppress(psycopg.OperationalError):
                self.postgres.drop_database(database)
            with contextlib.suppress(RuntimeError):
                self.rabbitmq.delete_vhost(vhost)


@contextlib.contextmanager
def running_stack(run: RunFolder) -> Iterator[Stack]:
    """Start the servers and the proxies."""
    with contextlib.ExitStack() as started:

        def proxy(server: Server) -> Proxy:
            return started.enter_context(Proxy(server.port))

        servers = PostgresServer(run), RedisServer(run), RabbitmqServer(run)
        for server in servers:
            started.callback(server.close)
            server.start()
        yield Stack(run, *servers, Lines(*map(proxy, servers)), Lines(*map(proxy, servers)))


@dataclass
class Deployment:
    """The database, virtual host and processes of one test on a stack."""

    stack: Stack
    folder: Path
    clean_env: dict[str, str]
    database: Database
    vhost: str
    commands: Commands
    env: dict[str, str] = field(default_factory=dict)
    worker: Command | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)

    def environment(self, lines: Lines) -> dict[str, str]:
        """Return the environment of a process that connects through these proxies."""
        return self.clean_env | {
            "BIFROST_DATABASE_URL": lines.postgres.through(self.database.url),
            "BIFROST_REDIS_URL": lines.redis.through(self.stack.redis.url()),
            "BIFROST_RABBITMQ_URL": lines.rabbitmq.through(self.stack.rabbitmq.url(self.vhost)),
            "BIFROST_ALEMBIC_CONFIG": str(TREE),
            "BIFROST_CACHE_GUARD_INTERVAL": "0",
            "TEST_BARRIERS": str(self.folder),
            **self.env,
        }

    @property
    def queue(self) -> str:
        """The queue to which init publishes its chains."""
        url = parse_postgres(self.environment(self.stack.init_lines)["BIFROST_DATABASE_URL"])
        return f"{QUEUE}.{digest('quorum', REVISIONS[-1], url.target)}"

    # ------------------------------------------------------------------------------------------------ processes

    def start_init(self, *options: str, timeout: str = "3m", own: bool = False) -> Command:
        """Start an init. `own`: with `--with-worker`."""
        words = ["init", "--timeout", timeout, *options, *(["--with-worker"] if own else [])]
        environment = self.environment(self.stack.init_lines)
        return self.commands.start(
            [sys.executable, "-m", "bifrost_bootstrap", *words], env=environment, cwd=self.folder
        )

    def start_worker(self, *, queue: str | None = None) -> Command:
        """Start a worker with barriers. `queue` defaults to that of init; "" for the queue that the worker derives."""
        queue = self.queue if queue is None else queue
        environment = self.environment(self.stack.worker_lines) | {"TEST_QUEUE": queue}
        program = [sys.executable, str(FOLDER / "barrier_worker.py")]
        self.worker = self.commands.start(program, env=environment, cwd=self.folder)
        self.worker.wait_for(r"ready\.")
        return self.worker

    def task_process(self) -> psutil.Process:
        """Return the pool process in which the worker runs its tasks."""
        assert self.worker
        children = psutil.Process(self.worker.pid).children()
        pool = [child for child in children if "barrier_worker" in " ".join(child.cmdline())]
        assert len(pool) == 1, [child.cmdline() for child in children]
        return pool[0]

    # ------------------------------------------------------------------------------------------------- barriers

    def hold(self, name: str) -> None:
        """Make every process wait at this barrier."""
        (self.folder / f"{name}.hold").touch()

    def release(self, name: str = "*") -> None:
        """Open this barrier, or all of them."""
        for hold in self.folder.glob(f"{name}.hold"):
            hold.unlink(missing_ok=True)

    def wait_reached(self, name: str, *, besides: Collection[Path] = ()) -> list[Path]:
        """Wait until another process than `besides` has reached the barrier. Return a file for each process."""

        def reached() -> list[Path]:
            return list(self.folder.glob(f"{name}.reached.*"))

        wait_until(lambda: len(reached()) > len(besides), f"barrier {name}", PHASE_TIMEOUT)
        return reached()

    # ---------------------------------------------------------------------------------------------------- state

    def fill_cache(self) -> None:
        """Write the cache PREVIOUS."""
        with self.stack.redis.client() as client:
            for path, content in PREVIOUS.items():
                client.set(PREFIX + path, json.dumps({"content": content, "path": path, "hash": "0" * 64}))
                client.sadd(f"{PREFIX}index", path)

    def cache(self) -> dict[str, str]:
        """Return path and content of every entry. AssertionError if index and entries differ."""
        with self.stack.redis.client() as client:
            index, keys, values = client.eval(READ_CACHE, 0, PREFIX)
        entries = {key: value for key, value in zip(keys, values, strict=True) if key != f"{PREFIX}index".encode()}
        assert set(entries) == {PREFIX.encode() + path for path in index}, (index, keys)
        return {key.decode().removeprefix(PREFIX): json.loads(entry)["content"] for key, entry in entries.items()}

    def rows(self) -> dict[str, str]:
        """Return path and content of every row."""
        return dict(self.database.execute("SELECT path, content FROM workspace_files"))

    def applied(self) -> list[str]:
        """Return each revision as often as it was applied."""
        return sorted(row[0] for row in self.database.execute("SELECT revision FROM applied"))

    def messages(self) -> int:
        """Return the number of messages in our queues, including unacknowledged ones, without events for Flower."""
        answer = self.stack.rabbitmq.evaluate(
            "lists:sum([Count || [{name, {resource, _, queue, Name}}, {messages, Count}] <- "
            f'rabbit_amqqueue:info_all(<<"{self.vhost}">>, [name, messages]), '
            f'binary:match(Name, <<"{QUEUE}">>) =/= nomatch])'
        )
        return int(answer)

    def heads(self) -> list[str]:
        """Return the revisions in alembic_version; [] if the table does not exist."""
        if self.database.execute("SELECT to_regclass('alembic_version')")[0][0] is None:
            return []
        return [row[0] for row in self.database.execute("SELECT version_num FROM alembic_version")]

    def sessions(self) -> list[tuple[Any, ...]]:
        """Return the connections to the database."""
        query: LiteralString = "SELECT pid, application_name, state, query FROM pg_stat_activity WHERE datname = %s"
        with self.stack.postgres.admin() as admin:
            return admin.execute(query, (self.database.name,)).fetchall()

    def runners(self) -> list[tuple[Any, ...]]:
        """Return the sessions that hold the migration lock or run revision 0002."""
        query: LiteralString = (
            "SELECT pid, application_name, query FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
            " AND (application_name LIKE '%%migration-lock%%' OR query LIKE '%%pg_sleep%%')"
        )
        with self.stack.postgres.admin() as admin:
            return admin.execute(query, (self.database.name,)).fetchall()

    # ----------------------------------------------------------------------------------------------------- broker

    def call(self, task: str) -> None:
        """Run `celery call`, as an operator does."""
        words = [sys.executable, "-m", "celery", "-A", "bifrost_bootstrap", "call", task]
        called = self.commands.start(words, env=self.environment(self.stack.init_lines), cwd=self.folder).wait()
        assert called.returncode == 0, called.stderr

    def publish(self, body: bytes, *, task: str, content_type: str = "application/json") -> None:
        """Publish a message to the queue of `celery call`."""
        with kombu.Connection(self.stack.rabbitmq.url(self.vhost)) as connection:
            connection.default_channel.basic_publish(
                connection.default_channel.prepare_message(
                    body,
                    content_type=content_type,
                    content_encoding="utf-8",
                    headers={"task": task, "id": uuid.uuid4().hex, "lang": "py"},
                ),
                exchange=QUEUE,
                routing_key=QUEUE,
            )

    def assert_clean(self) -> None:
        """Assert that no message is left in our queues."""
        wait_until(lambda: self.messages() == 0, "the queues are empty", CLEAN_TIMEOUT)


# ------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="session")
def stack(run_folder: RunFolder, outside: Outside) -> Iterator[Stack]:
    """Private servers and proxies for faults, shared by the tests of an xdist worker. Never those of a URL."""
    try:
        with running_stack(run_folder) as stack:
            yield stack
    except ServerMissing as missing:
        lacks_server(missing, in_ci=outside.in_ci)


@pytest.fixture
def deployment(stack: Stack, tmp_path: Path, clean_env: dict[str, str]) -> Iterator[Deployment]:
    """A new deployment on `stack`. At the end its processes are killed."""
    with stack.deployment(tmp_path / "deployment", clean_env) as deployment:
        yield deployment
