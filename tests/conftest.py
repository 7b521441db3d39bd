"""Fixtures for all tests: servers, a database for each test, environments, processes.

Each xdist worker starts a server when a test first needs it, and all its tests share it. A test that kills, fills or
reconfigures a server starts its own with `start_server`.

If BIFROST_TEST_DATABASE_URL, BIFROST_TEST_REDIS_URL or BIFROST_TEST_RABBITMQ_URL is set, the tests share that server
instead. Without these variables, tests connect only to servers that they have started.
BIFROST_TEST_REDIS_PROGRAM names the program of every private Redis.
"""

from __future__ import annotations

import compileall
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import kombu
import pytest

import bifrost_bootstrap
from tests.servers import (
    Command,
    Database,
    Postgres,
    PostgresServer,
    Proxy,
    Rabbitmq,
    RabbitmqServer,
    RedisAddress,
    RedisServer,
    RunFolder,
    Server,
    ServerMissing,
)
from tests.servers.command import DEFAULT_TIMEOUT, Commands
from tests.servers.redis import DATABASES
from tests.servers.run_checks import RunChecks, lacks_server, note_leaks_in_processes

#: Variables that are removed from the environment of every test, by prefix and by name: the developer's shell must not
#: change a result.
FOREIGN_PREFIXES = ("BIFROST_", "CELERY_", "PG", "FLOWER_")
FOREIGN_NAMES = tuple(
    f"{name}{suffix}"
    for name in ("DATABASE_URL", "REDIS_URL", "RABBITMQ_URL", "ALEMBIC_CONFIG")
    for suffix in ("", "_FILE")
)
#: What a Celery worker logs when it can receive tasks.
WORKER_READY = r"ready\."
#: The queue of `celery call`: the only queue that two tests on the same virtual host would share.
SHARED_QUEUE = "bifrost.bootstrap"
#: The program under test, as installed for this interpreter.
BOOTSTRAP = (sys.executable, "-m", "bifrost_bootstrap")

#: The other fixtures, for every folder. A module stands below those that it imports: pytest rewrites the assertions of
#: a module only if it is not imported yet.
pytest_plugins = (
    "tests.setups.migration",  # tree, start_migrate, start_pool: the step `migrate` alone
    "tests.setups.module_store",  # store, make_store: the rows and the cache of a warm
    "tests.setups.stack",  # stack, deployment: init and worker on servers that a test may hit
    "tests.setups.nodes",  # cluster_deployment: the same, with several nodes of each server
)

AnyServer = TypeVar("AnyServer", bound=Server)


class Outside:
    """The variables that configure the whole test run; read before `clean_environment` removes them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.database_url = environ.get("BIFROST_TEST_DATABASE_URL")
        self.redis_url = environ.get("BIFROST_TEST_REDIS_URL")
        self.rabbitmq_url = environ.get("BIFROST_TEST_RABBITMQ_URL")
        self.in_ci = bool(environ.get("CI"))
        #: Where the browser test writes its screenshot of Flower; `make screenshot` sets it.
        self.screenshot = environ.get("SCREENSHOT")


#: The package under test.
PACKAGE = Path(bifrost_bootstrap.__file__).parent
RUN = pytest.StashKey[RunFolder]()
OUTSIDE = pytest.StashKey[Outside]()


# ------------------------------------------------------------------------------------------------- the whole run


def pytest_configure(config: pytest.Config) -> None:
    """Create the folder of the run, or use that of the xdist controller. SIGTERM ends the run as Ctrl-C does."""
    config.stash[OUTSIDE] = Outside(os.environ)
    # Some machines set PYTHONDONTWRITEBYTECODE. Then each xdist worker rewrites the assertions of every test module
    # (3 s of CPU), and each process of a test compiles the package (50 ms).
    sys.dont_write_bytecode = False
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        config.stash[RUN] = RunFolder(Path(worker["run_folder"]), worker["workerid"])
    else:
        compileall.compile_dir(PACKAGE, quiet=2)
        config.stash[RUN] = RunFolder.create()
        config.pluginmanager.register(RunChecks(config.stash[RUN]), "run-checks")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
        # A shell script ignores SIGINT for its background jobs, and their children inherit that.
        signal.signal(signal.SIGINT, _interrupt)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Pass the folder of the run to an xdist worker."""
    node.workerinput["run_folder"] = str(node.config.stash[RUN].root)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Search in the process that runs the test: its processes may have ended when the controller gets the report."""
    report = yield
    note_leaks_in_processes(report, item.config.stash[RUN])
    return report


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(f"signal {number}")


@pytest.fixture(scope="session")
def run_folder(pytestconfig: pytest.Config) -> RunFolder:
    """The folder with the data of the servers, and with the output of every process that the run starts."""
    return pytestconfig.stash[RUN]


@pytest.fixture(scope="session")
def outside(pytestconfig: pytest.Config) -> Outside:
    """The variables that configure the whole test run."""
    return pytestconfig.stash[OUTSIDE]


# ------------------------------------------------------------------------------------------------------- servers


@contextlib.contextmanager
def _running(server: AnyServer, outside: Outside) -> Iterator[AnyServer]:
    """Start the server and close it at the end. If its program is missing, skip the test, or fail it in CI."""
    with contextlib.closing(server):
        try:
            server.start()
        except ServerMissing as missing:
            lacks_server(missing, in_ci=outside.in_ci)
        yield server


@pytest.fixture(scope="session")
def postgres(run_folder: RunFolder, outside: Outside) -> Iterator[Postgres]:
    """The shared PostgreSQL, for more databases and other roles. A test that needs one database uses `database`."""
    if outside.database_url:
        yield Postgres.at(outside.database_url)
        return
    with _running(PostgresServer(run_folder), outside) as server:
        yield server


@pytest.fixture(scope="session")
def redis(run_folder: RunFolder, outside: Outside) -> Iterator[RedisAddress]:
    """The shared Redis. A test uses `redis_url`, and does not change the configuration of the server."""
    if outside.redis_url:
        yield RedisAddress(outside.redis_url)
        return
    with _running(RedisServer(run_folder), outside) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq(run_folder: RunFolder, outside: Outside, pytestconfig: pytest.Config) -> Iterator[Rabbitmq]:
    """The shared RabbitMQ. A test uses `rabbitmq_url`."""
    if outside.rabbitmq_url:
        if _workers(pytestconfig) > 1:
            raise pytest.UsageError("BIFROST_TEST_RABBITMQ_URL is one virtual host, which xdist workers cannot share")
        yield Rabbitmq(outside.rabbitmq_url)
        return
    with _running(RabbitmqServer(run_folder), outside) as server:
        yield server


class StartServer(Protocol):
    """Type of `start_server`."""

    def __call__(self, server: AnyServer) -> AnyServer: ...


class StartProxy(Protocol):
    """Type of `start_proxy`."""

    def __call__(self, port: int) -> Proxy: ...


@pytest.fixture
def start_server(outside: Outside, commands: Commands) -> Iterator[StartServer]:
    """Start a server for this test alone, for instance `start_server(RedisServer(run_folder, {"maxmemory": "4mb"}))`.

    Returns the started server. The server is killed after the processes of the test.
    """
    with contextlib.ExitStack() as started:
        yield lambda server: started.enter_context(_running(server, outside))
        commands.close()


@pytest.fixture
def start_proxy() -> Iterator[StartProxy]:
    """Start a Proxy in front of a port: `start_proxy(server.port)`. It is closed after the test."""
    with contextlib.ExitStack() as started:
        yield lambda port: started.enter_context(Proxy(port))


def _workers(config: pytest.Config) -> int:
    return int(getattr(config, "workerinput", {"workercount": 1})["workercount"])


@pytest.fixture(scope="session")
def _redis_databases(outside: Outside, pytestconfig: pytest.Config) -> Iterator[int]:
    """Database numbers in turn: a late write of one test does not reach the database of the next."""
    first, step = 0, 1
    if outside.redis_url and (workers := _workers(pytestconfig)) > 1:
        first, step = int(pytestconfig.stash[RUN].worker.removeprefix("gw")), workers
    return itertools.cycle(range(DATABASES)[first::step])


def _delete_queue(url: str, queue: str) -> None:
    with kombu.Connection(url, connect_timeout=5) as connection, connection.channel() as channel:
        channel.queue_delete(queue)


# ---------------------------------------------------------------------------------------------- for a single test


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of FOREIGN_PREFIXES and FOREIGN_NAMES from the environment of the test."""
    for name in os.environ.keys() - without_foreign_variables(os.environ).keys():
        monkeypatch.delenv(name)


@pytest.fixture
def clean_env() -> dict[str, str]:
    """An environment without any setting, for a process: no server is configured."""
    return without_foreign_variables(os.environ)


def without_foreign_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables of FOREIGN_PREFIXES and FOREIGN_NAMES."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(FOREIGN_PREFIXES) and name not in FOREIGN_NAMES
    }


@pytest.fixture
def database(postgres: Postgres, commands: Commands) -> Iterator[Database]:
    """A new, empty database; dropped after the test."""
    database = postgres.create_database()
    yield database
    commands.close()
    postgres.drop_database(database)


@pytest.fixture
def redis_url(redis: RedisAddress, _redis_databases: Iterator[int], commands: Commands) -> Iterator[str]:
    """The URL of an empty database of the shared Redis. No other running test uses this database."""
    number = next(_redis_databases)
    with redis.client(number) as client:
        client.flushdb()
    yield redis.url(number)
    commands.close()


@pytest.fixture
def rabbitmq_url(rabbitmq: Rabbitmq, commands: Commands) -> Iterator[str]:
    """The URL of a new virtual host. On a server from BIFROST_TEST_RABBITMQ_URL: its URL, with SHARED_QUEUE deleted."""
    if not isinstance(rabbitmq, RabbitmqServer):
        _delete_queue(rabbitmq.url(), SHARED_QUEUE)
        yield rabbitmq.url()
        return
    vhost = rabbitmq.add_vhost()
    yield rabbitmq.url(vhost)
    commands.close()
    rabbitmq.delete_vhost(vhost)


@pytest.fixture
def bifrost_env(clean_env: dict[str, str], database: Database, redis_url: str, rabbitmq_url: str) -> dict[str, str]:
    """The environment of an init container: `database`, `redis_url`, `rabbitmq_url`, and the built-in tree."""
    return clean_env | {
        "BIFROST_DATABASE_URL": database.url,
        "BIFROST_REDIS_URL": redis_url,
        "BIFROST_RABBITMQ_URL": rabbitmq_url,
        "BIFROST_ALEMBIC_CONFIG": "builtin",
    }


@pytest.fixture
def foreign_tree(tmp_path: Path) -> Path:
    """The alembic.ini of a copy of tests/foreign_tree. The test may change the copy."""
    source = Path(__file__).with_name("foreign_tree")
    copy = tmp_path / "foreign_tree"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy / "alembic.ini"


# ------------------------------------------------------------------------------------------------------ processes


@pytest.fixture
def commands(run_folder: RunFolder) -> Iterator[Commands]:
    """The processes of this test. All are killed before the databases of the test are dropped.

    The test fails if a process that exited by itself has left a child running.
    """
    commands = Commands(run_folder)
    yield commands
    commands.close()


class StartCommand(Protocol):
    """Type of `start_command`."""

    def __call__(
        self, args: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Command: ...


class RunCommand(Protocol):
    """Type of `run_command`."""

    def __call__(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> subprocess.CompletedProcess[str]: ...


class RunBootstrap(Protocol):
    """Type of `run_bootstrap`."""

    def __call__(
        self,
        *args: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> subprocess.CompletedProcess[str]: ...


class StartWorker(Protocol):
    """Type of `start_worker`."""

    def __call__(self, *args: str, env: Mapping[str, str] | None = None) -> Command: ...


@pytest.fixture
def start_command(commands: Commands, clean_env: dict[str, str], tmp_path: Path) -> StartCommand:
    """Start a process: `start_command(args, env=clean_env, cwd=an empty folder)` are the defaults."""
    empty = tmp_path / "cwd"
    empty.mkdir()

    def start(args: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Command:
        return commands.start(args, env=clean_env if env is None else env, cwd=cwd or empty)

    return start


@pytest.fixture
def run_command(start_command: StartCommand) -> RunCommand:
    """Run a process to its end, as `start_command`. AssertionError if that takes longer than `timeout` seconds."""

    def run(
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> subprocess.CompletedProcess[str]:
        return start_command(args, env=env, cwd=cwd).wait(timeout)

    return run


@pytest.fixture
def run_bootstrap(request: pytest.FixtureRequest, run_command: RunCommand) -> RunBootstrap:
    """Run `python -m bifrost_bootstrap` with these arguments to its end, in an empty folder.

    `env` defaults to `bifrost_env`. This starts all three servers, so a test that needs none passes `clean_env`.
    """

    def run(
        *args: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> subprocess.CompletedProcess[str]:
        if env is None:
            env = request.getfixturevalue("bifrost_env")
        return run_command([*BOOTSTRAP, *args], env=env, cwd=cwd, timeout=timeout)

    return run


@pytest.fixture
def start_worker(start_command: StartCommand, bifrost_env: dict[str, str]) -> StartWorker:
    """Start a bootstrap worker (default `env`: `bifrost_env`) and wait until it is ready; several are possible."""

    def start(*args: str, env: Mapping[str, str] | None = None) -> Command:
        worker = start_command([*BOOTSTRAP, "worker", *args], env=bifrost_env if env is None else env)
        worker.wait_for(WORKER_READY)
        return worker

    return start


@pytest.fixture
def bootstrap_worker(start_worker: StartWorker) -> Command:
    """A bootstrap worker that is ready, with the environment `bifrost_env`."""
    return start_worker()
