"""Selftest of the private servers: start, kill, restart, pause, and isolation from the servers of the machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import kombu
import psutil
import psycopg
import pytest
import redis as redis_package

from tests.conftest import StartServer
from tests.servers import (
    PLANTED_PASSWORD,
    PgbouncerServer,
    Postgres,
    PostgresServer,
    Rabbitmq,
    RabbitmqServer,
    RedisServer,
    RunFolder,
    Server,
)
from tests.servers.process import lives, wait_until

#: Seconds that a client of a frozen server waits before the test believes in the silence.
SILENCE = 0.3


def test_postgres_survives_kill_and_restart(run_folder: RunFolder, start_server: StartServer) -> None:
    """SIGKILL ends all of PostgreSQL. After the next start port, roles and rows are as before."""
    server = start_server(PostgresServer(run_folder))
    database = server.create_database()
    database.execute("CREATE TABLE kept AS SELECT 1 AS n")
    children = server.tree.descendants() if server.tree else []
    assert len(children) > 2

    server.kill()
    assert not server.running
    assert not any(map(lives, children))
    with pytest.raises(psycopg.OperationalError):
        database.connect()

    server.start()
    assert database.execute("SELECT n FROM kept") == [(1,)]
    server.restart()
    assert database.execute("SELECT n FROM kept") == [(1,)]


def test_postgres_takes_settings(run_folder: RunFolder, start_server: StartServer) -> None:
    """Settings take effect, also if they change between two starts."""
    server = start_server(PostgresServer(run_folder, {"client_connection_check_interval": "500ms"}))
    with server.admin() as connection:
        assert connection.execute("SHOW client_connection_check_interval").fetchone() == ("500ms",)
    server.config["log_statement"] = "all"
    server.restart()
    with server.admin() as connection:
        connection.execute("SELECT 'seen in the log'")
    assert "seen in the log" in server.log.read_text()


def test_postgres_wants_the_password_over_tcp(postgres: Postgres) -> None:
    """A login without the planted password is rejected, and there is no Unix socket."""
    if not isinstance(postgres, PostgresServer):
        pytest.skip("speaks of the private server")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(postgres.url().replace("Zebra", "Donkey"))
    with postgres.admin() as connection:
        assert connection.execute("SHOW unix_socket_directories").fetchone() == ("",)
        assert connection.execute("SHOW password_encryption").fetchone() == ("scram-sha-256",)


def test_the_app_role_is_no_superuser(postgres: Postgres) -> None:
    """The role in the URLs only owns its databases."""
    if not isinstance(postgres, PostgresServer):
        pytest.skip("speaks of the private server")
    with psycopg.connect(postgres.url()) as connection:
        row = connection.execute(
            "SELECT rolsuper, rolcreatedb, rolcreaterole FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
    assert row == (False, False, False)


def test_redis_comes_back_empty(run_folder: RunFolder, start_server: StartServer) -> None:
    """A killed Redis ends at once, and starts again on its port without keys."""
    server = start_server(RedisServer(run_folder, {"maxmemory": "8mb"}))
    with server.client(3) as client:
        client.set("key", "value")
        assert client.config_get("maxmemory") == {"maxmemory": str(8 * 1024 * 1024)}
    server.kill()
    with server.client(3) as client, pytest.raises(redis_package.ConnectionError):
        client.ping()
    server.start()
    with server.client(3) as client:
        assert client.get("key") is None


def test_redis_wants_the_password(run_folder: RunFolder, start_server: StartServer) -> None:
    """Redis rejects a client without the planted password."""
    server = start_server(RedisServer(run_folder))
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"PING\r\n")
        assert client.recv(100).startswith(b"-NOAUTH")


def test_pause_silences_and_resume_gives_back(run_folder: RunFolder, start_server: StartServer) -> None:
    """A paused server keeps its connections and does not reply until `resume`."""
    server = start_server(RedisServer(run_folder))
    with socket.create_connection((server.host, server.port)) as client:
        client.settimeout(SILENCE)
        server.pause()
        client.sendall(f"AUTH {PLANTED_PASSWORD}\r\n".encode())
        with pytest.raises(TimeoutError):
            client.recv(100)
        server.resume()
        client.settimeout(None)
        assert client.recv(100) == b"+OK\r\n"


def test_a_frozen_postgres_freezes_whole_and_can_be_killed(run_folder: RunFolder, start_server: StartServer) -> None:
    """`pause` also stops the backends of PostgreSQL, which leave its process group. `kill` works afterwards."""
    server = start_server(PostgresServer(run_folder))
    with server.admin() as connection:
        backend = psutil.Process(connection.info.backend_pid)
        server.pause()
        # On a busy machine a signal that was sent is not yet heard.
        wait_until(lambda: bool(backend.status() == psutil.STATUS_STOPPED), "the backend is stopped")
        server.resume()
        assert connection.execute("SELECT 1").fetchone() == (1,)
        server.pause()
        server.kill()
    assert not lives(backend)


def test_rabbitmq_survives_kill_and_restart(run_folder: RunFolder, start_server: StartServer) -> None:
    """A killed node restarts with its virtual hosts, durable queues and settings. There is no user guest."""
    server = start_server(RabbitmqServer(run_folder, ["consumer_timeout = 5000"], {"channel_tick_interval": "1000"}))
    url = server.url(server.add_vhost())
    with kombu.Connection(url) as connection, connection.channel() as channel:
        channel.queue_declare("kept", durable=True, auto_delete=False)
    server.evaluate("mnesia:sync_log()")

    server.kill()
    with kombu.Connection(url) as connection, pytest.raises(OSError, match="refused"):
        connection.connect()

    server.start()
    with kombu.Connection(url) as connection, connection.channel() as channel:
        channel.queue_declare("kept", passive=True)
    assert server.evaluate("application:get_env(rabbit, consumer_timeout)") == "{ok, 5000}"
    assert server.evaluate("application:get_env(rabbit, channel_tick_interval)") == "{ok, 1000}"
    assert server.evaluate("[U || {internal_user, U, _, _, _, _} <- ets:tab2list(rabbit_user)]").count("#Bin") == 1
    server.stop()
    assert not server.running


def test_rabbitmq_is_apart_from_the_machines_own(rabbitmq: Rabbitmq) -> None:
    """Node name, epmd, home and data are those of the private node."""
    if not isinstance(rabbitmq, RabbitmqServer):
        pytest.skip("speaks of the private server")
    environ = psutil.Process(rabbitmq.pid).environ()
    assert environ["HOME"] == str(rabbitmq.data)
    assert environ["ERL_EPMD_PORT"] == str(rabbitmq.mapper_port) != "4369"
    assert rabbitmq.evaluate("node()").strip("'") == f"{rabbitmq.name}@localhost"
    assert str(rabbitmq.data) in rabbitmq.evaluate("lists:flatten(rabbit_mnesia:dir())")


def test_pgbouncer_pools_transactions(run_folder: RunFolder, start_server: StartServer) -> None:
    """Two clients share one server connection, transaction by transaction. Mode and size are as configured."""
    postgres = start_server(PostgresServer(run_folder))
    bouncer = start_server(PgbouncerServer(run_folder, postgres, pool_size=1, settings={"query_wait_timeout": "2"}))
    url = bouncer.url(postgres.create_database().name)
    with psycopg.connect(url, autocommit=True) as one, psycopg.connect(url, autocommit=True) as two:
        pids = {connection.execute("SELECT pg_backend_pid()").fetchone() for connection in (one, two)}
        assert len(pids) == 1
        assert len([row for row in bouncer.show("SERVERS") if row["user"] == "bifrost"]) == 1
        with one.transaction():
            one.execute("SELECT 1")
            with pytest.raises(psycopg.OperationalError, match="query_wait_timeout"):
                two.execute("SELECT 1")
    config = {row["key"]: row["value"] for row in bouncer.show("CONFIG")}
    assert (config["pool_mode"], config["default_pool_size"]) == ("transaction", "1")

    bouncer.restart()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("kind", [PostgresServer, RedisServer, RabbitmqServer])
def test_no_password_in_the_process_list(kind: type[Server], request: pytest.FixtureRequest) -> None:
    """The arguments of the servers do not contain the planted password."""
    server = request.getfixturevalue(kind.kind)
    if not isinstance(server, kind):
        pytest.skip("speaks of the private server")
    arguments = psutil.Process(server.pid).cmdline()
    assert arguments
    assert not any(PLANTED_PASSWORD in argument for argument in arguments)


def test_servers_run_unprivileged_where_they_must(postgres: Postgres) -> None:
    """If root runs the tests, PostgreSQL runs as another user; else as the same user."""
    if not isinstance(postgres, PostgresServer):
        pytest.skip("speaks of the private server")
    uid = psutil.Process(postgres.pid).uids().effective
    assert uid != 0
    if os.geteuid() != 0:
        assert uid == os.geteuid()


def test_a_server_that_cannot_start_says_why(run_folder: RunFolder) -> None:
    """The error of a failed start has the log of the server."""
    server = RedisServer(run_folder, {"no-such-setting": "1"})
    with pytest.raises(RuntimeError, match="no-such-setting"):
        server.start()
    server.close()


def test_closing_leaves_the_log_and_nothing_else(run_folder: RunFolder) -> None:
    """A closed server has no process and no data. Its log stays."""
    server = RedisServer(run_folder).start()
    pid = server.pid
    server.close()
    assert not psutil.pid_exists(pid)
    assert not Path(server.data).exists()
    assert server.log.stat().st_size > 0
