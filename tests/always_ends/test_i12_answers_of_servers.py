"""I12: an error of a server ends with its own text and exit code, never with 70."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kombu
import pytest
import redis

from tests.conftest import RunBootstrap, StartCommand, StartServer
from tests.servers import Database, PostgresServer, Rabbitmq, RabbitmqServer, RedisServer, RunFolder
from tests.servers.rabbitmq import vhost_of
from tests.setups.migration import Tree

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def failure_of(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """Exit code, and what the JSON says."""
    return done.returncode, json.loads(done.stdout)["message"] if done.stdout.strip() else done.stderr


# ------------------------------------------------------------------------------------------------------------ Redis


def test_i12_redis_without_client(
    run_folder: RunFolder, start_server: StartServer, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """Some proxies and servers have no CLIENT command. We do not need it."""
    server = start_server(RedisServer(run_folder, {"rename-command": 'CLIENT ""'}))
    done = run_bootstrap("init", "--with-worker", env=bifrost_env | {"BIFROST_REDIS_URL": server.url(0)})
    assert done.returncode == 0, done.stderr


def test_i12_redis_that_is_busy(
    run_folder: RunFolder, start_server: StartServer, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """Redis that runs a long script is retried, like one that still loads its data."""
    server = start_server(RedisServer(run_folder, {"lua-time-limit": "200"}))
    client = redis.Redis.from_url(server.url(0), socket_timeout=30)
    with client:

        def block() -> None:
            client.eval("local t = redis.call('TIME')[1] + 6 while tonumber(redis.call('TIME')[1]) < t do end", 0)

        script = threading.Thread(target=block)
        script.start()
        time.sleep(1)
        done = run_bootstrap("init", "--with-worker", env=bifrost_env | {"BIFROST_REDIS_URL": server.url(0)})
        script.join()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("path", "words"), [("77", "DB index is out of range")])
def test_i12_redis_without_that_database(
    run_folder: RunFolder,
    start_server: StartServer,
    run_bootstrap: RunBootstrap,
    bifrost_env: dict[str, str],
    path: str,
    words: str,
) -> None:
    """A Redis database number that does not exist is a configuration error."""
    server = start_server(RedisServer(run_folder, {"databases": "16"}))
    url = server.url(0).rpartition("/")[0] + "/" + path
    code, message = failure_of(run_bootstrap("check", "--json", env=bifrost_env | {"BIFROST_REDIS_URL": url}))
    assert (code, words in message) == (78, True), message


# ------------------------------------------------------------------------------------------------------- PostgreSQL


def as_superuser(database: Database, statement: str) -> None:
    """Run a statement as the server's administrator."""
    assert isinstance(database.server, PostgresServer)
    with database.server.admin(database.name) as admin:
        admin.execute(statement.encode())


def test_i12_no_right_to_connect(database: Database, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]) -> None:
    """The message has the first line of PostgreSQL's error without its DETAIL. A missing right is not an
    unavailable server.
    """
    as_superuser(database, "CREATE ROLE nobody_here LOGIN PASSWORD 'a-long-password'")
    try:
        as_superuser(database, f'REVOKE CONNECT ON DATABASE "{database.name}" FROM PUBLIC')
        url = database.url.replace(database.url.partition("://")[2].partition("@")[0], "nobody_here:a-long-password")
        code, message = failure_of(run_bootstrap("check", "--json", env=bifrost_env | {"BIFROST_DATABASE_URL": url}))
        assert (code, "permission denied for database" in message) == (78, True), message
    finally:
        as_superuser(database, "DROP ROLE nobody_here")


def test_i12_statement_timeout_of_the_role(
    database: Database, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """The warm ignores the statement_timeout of the role."""
    assert run_bootstrap("init", "--with-worker", env=bifrost_env).returncode == 0
    database.execute(
        "INSERT INTO workspace_files (path, content, content_hash, entity_type)"
        " SELECT 'm' || n || '.py', repeat('x' || n, 2000), NULL, 'module' FROM generate_series(1, 20000) n"
    )
    database.execute(f"ALTER DATABASE \"{database.name}\" SET statement_timeout = '60ms'")
    done = run_bootstrap("init", "--with-worker", env=bifrost_env)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # 30 s: the rejection timeout
def test_i12_row_level_security(database: Database, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]) -> None:
    """Rows that a policy hides are not treated as missing rows."""
    assert run_bootstrap("init", "--with-worker", env=bifrost_env).returncode == 0
    database.execute(
        "INSERT INTO workspace_files (path, content, content_hash, entity_type) VALUES ('m.py', 'x', NULL, 'module')"
    )
    database.execute("ALTER TABLE workspace_files ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    code, message = failure_of(run_bootstrap("init", "--with-worker", "--json", env=bifrost_env))
    assert (code, "row-level security policy" in message) == (78, True), message


def test_i12_row_in_another_encoding(
    database: Database, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """In a database with encoding SQL_ASCII, a module in Latin-1 is an error that names its path."""
    name = f"{database.name}_ascii"
    as_superuser(
        database,
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C' OWNER bifrost",
    )
    ascii_database = Database(database.server, name)
    env = bifrost_env | {"BIFROST_DATABASE_URL": ascii_database.url}
    try:
        assert run_bootstrap("init", "--with-worker", env=env).returncode == 0
        ascii_database.execute(
            "INSERT INTO workspace_files (path, content, entity_type) VALUES ('fine.py', 'x', 'module'),"
            " ('old.py', '# gr' || convert_from(decode('fc', 'hex'), 'SQL_ASCII') || 'n', 'module')"
        )
        code, message = failure_of(run_bootstrap("init", "--with-worker", "--json", env=env))
    finally:
        database.server.drop_database(ascii_database)
    assert code == 2, message
    assert "row 'old.py'" in message
    assert "0xfc" in message


# --------------------------------------------------------------------------------------------------------- RabbitMQ


@contextmanager
def permissions(rabbitmq: Rabbitmq, vhost: str, configure: str, write: str, read: str) -> Iterator[None]:
    """Other rights of the tests' user in this virtual host."""
    assert isinstance(rabbitmq, RabbitmqServer)
    change = 'rabbit_auth_backend_internal:set_permissions(<<"{}">>, <<"{}">>, <<"{}">>, <<"{}">>, <<"{}">>, <<"t">>)'
    user = rabbitmq.url().partition("://")[2].partition(":")[0]
    rabbitmq.evaluate(change.format(user, vhost, configure, write, read))
    try:
        yield
    finally:
        rabbitmq.evaluate(change.format(user, vhost, ".*", ".*", ".*"))


@pytest.mark.slow
def test_i12_user_without_write(
    rabbitmq: Rabbitmq, rabbitmq_url: str, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """The last line has RabbitMQ's 403. The exit code is 78."""
    with permissions(rabbitmq, vhost_of(rabbitmq_url), ".*", "^$", ".*"):
        code, message = failure_of(run_bootstrap("init", "--with-worker", "--json", env=bifrost_env))
    assert code == 78, message
    assert "ACCESS_REFUSED" in message


@pytest.mark.slow  # 30 s: the rejection timeout
def test_i12_queue_with_other_arguments(
    rabbitmq_url: str, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """If the queue exists with other arguments, the worker ends with 78 and RabbitMQ's error."""
    with kombu.Connection(rabbitmq_url) as connection:
        kombu.Queue("bifrost.bootstrap", durable=True, queue_arguments={"x-max-length": 5})(
            connection.default_channel
        ).declare()
    done = run_bootstrap("worker", env=bifrost_env)
    assert done.returncode == 78, done.stderr
    assert "PRECONDITION_FAILED" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("option", ["--soft-time-limit=1", pytest.param("--time-limit=1", marks=pytest.mark.slow)])
def test_i12_time_limit_of_a_worker(
    run_bootstrap: RunBootstrap, start_command: StartCommand, bifrost_env: dict[str, str], tmp_path: Path, option: str
) -> None:
    """The error names the time limit of the worker."""
    tree = Tree(tmp_path / "tree").revision("one", 'op.execute("SELECT pg_sleep(20)")')
    env = bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(tree.config)}
    celery = [sys.executable, "-m", "celery", "-A", "bifrost_bootstrap", "worker", option]
    start_command(celery, env=env).wait_for("ready")
    code, message = failure_of(run_bootstrap("init", "--json", "--timeout=40s", env=env))
    assert (code, "time limit" in message) == (78, True), message
