"""S2: the rights of docs/security.md suffice. With one right less, the error names server and right."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from bifrost_bootstrap.celery import WARM
from tests.conftest import RunBootstrap, RunCommand, StartWorker
from tests.security.rights import MIGRATE, READ, USER, Rights, no_rights, without
from tests.setups.stack import COMPLETE, Deployment

CELERY = (sys.executable, "-m", "celery", "-A", "bifrost_bootstrap")


@pytest.fixture
def rights(deployment: Deployment, tmp_path: Path) -> Iterator[Rights]:
    """A deployment without any right."""
    with no_rights(deployment, tmp_path / "programs") as rights:
        yield rights


@pytest.fixture
def granted(rights: Rights) -> Rights:
    """A deployment with all rights of docs/security.md."""
    for name in ("rabbitmq", "redis", "postgres"):
        rights.grant(name)
    return rights


def test_s02_with_these_rights_everything_works(
    granted: Rights, start_worker: StartWorker, run_bootstrap: RunBootstrap, run_command: RunCommand
) -> None:
    """init, check, rewarm, the worker, `celery call`, `result` and `inspect` work, and Redis logs no rejected
    command.
    """
    env = granted.env
    worker = start_worker(env=env)
    done = run_bootstrap("init", env=env)
    assert done.returncode == 0, done.stderr
    granted.grant("postgres, after the first init")
    called = run_command([*CELERY, "call", WARM, "--kwargs", '{"full": true}'], env=env)
    assert called.returncode == 0, called.stderr
    result = run_command([*CELERY, "result", called.stdout.strip()], env=env)
    assert result.returncode == 0, result.stderr
    assert "'changed': 51" in result.stdout
    ping = run_command([*CELERY, "inspect", "ping", "--json"], env=env)
    assert ping.returncode == 0, ping.stderr
    assert list(json.loads(ping.stdout).values()) == [{"ok": "pong"}]
    for command in (("check",), ("rewarm", "--full"), ("init",)):
        done = run_bootstrap(*command, env=env)
        assert done.returncode == 0, done.stderr
    assert granted.deployment.cache() == COMPLETE
    assert "refused" not in worker.stderr.read_text()
    with granted.deployment.stack.redis.client() as client:
        denied = [entry["object"] for entry in client.acl_log() if entry["username"] == USER]
    # Of later versions: redis-py tells its name, and goes on where it may not.
    assert set(denied) <= {"client|setinfo"}


def test_s02_init_with_its_own_worker(granted: Rights, run_bootstrap: RunBootstrap) -> None:
    """The queue of `init --with-worker` is within the rights too."""
    done = run_bootstrap("init", "--with-worker", env=granted.env)
    assert done.returncode == 0, done.stderr


def test_s02_the_readers_password_is_the_readers(granted: Rights) -> None:
    """The password of the reader is not that of the role that migrates."""
    reader = granted.env["BIFROST_DATABASE_URL"]
    psycopg.connect(reader).close()
    psycopg.connect(granted.env["BIFROST_MIGRATION_DATABASE_URL"]).close()
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(reader.replace(READ, MIGRATE, 1))


def test_s02_the_reader_can_change_nothing(granted: Rights, run_bootstrap: RunBootstrap) -> None:
    """The reader has no DDL and no write in PostgreSQL, and no key of another application in Redis."""
    assert run_bootstrap("init", "--with-worker", env=granted.env).returncode == 0
    with psycopg.connect(granted.env["BIFROST_DATABASE_URL"], autocommit=True) as reader:
        for statement in ("CREATE TABLE mine (n int)", "DELETE FROM workspace_files", "DROP TABLE workspace_files"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                reader.execute(statement)
        reader.execute("SELECT * FROM applied")
    granted.grant("postgres, after the first init")
    with (
        psycopg.connect(granted.env["BIFROST_DATABASE_URL"], autocommit=True) as reader,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        reader.execute("SELECT * FROM applied")


def run_with_one_right_too_few(
    rights: Rights, name: str, less: str, run_bootstrap: RunBootstrap, *command: str
) -> tuple[int, str]:
    """Exit code and stderr of a command where one block of the page lacks this text."""
    for block in ("rabbitmq", "redis", "postgres"):
        rights.grant(block, without(less) if block == name else str)
    done = run_bootstrap(*command, env=rights.env, timeout=100)
    return done.returncode, done.stderr


INIT = ("init", "--with-worker", "--timeout", "90s")


@pytest.mark.slow  # 30 s each: the rejection timeout
@pytest.mark.parametrize(
    ("less", "command", "named"),
    [
        (r"|amq\.default", INIT, "access to exchange 'amq.default'"),
        (r"bifrost\.bootstrap(\..+)?|", INIT, "access to exchange 'bifrost.bootstrap'"),
        (r"bifrost\.bootstrap(\..+)?|", ("worker",), "access to exchange 'bifrost.bootstrap'"),
        # Seen by the worker alone; init says what it brought along.
        (r"|(.+\.)?celery\.pidbox", INIT, "access to exchange 'celery.pidbox'"),
    ],
    ids=["publish", "queue", "queue of a worker", "control"],
)
def test_s02_missing_right_in_rabbitmq(
    rights: Rights, less: str, command: tuple[str, ...], named: str, run_bootstrap: RunBootstrap
) -> None:
    """The exit code is 78, with the error of RabbitMQ."""
    code, said = run_with_one_right_too_few(rights, "rabbitmq", less, run_bootstrap, *command)
    assert re.search(f"ERROR .*RabbitMQ 127.0.0.1.* rejected the connection: .*{named}", said), said
    assert code == 78, said


def test_s02_without_events_only_flower_sees_less(rights: Rights, run_bootstrap: RunBootstrap) -> None:
    """A worker without the right to publish events does its work."""
    code, said = run_with_one_right_too_few(rights, "rabbitmq", r"celeryev(\..+)?|", run_bootstrap, *INIT)
    assert code == 0, said


@pytest.mark.slow  # 30 s each: the rejection timeout
@pytest.mark.parametrize(
    ("less", "named"),
    [
        ("~bifrost:bootstrap:* ", "permissions to access (one of the keys|a key)"),
        ("&bifrost:bootstrap:* ", "permissions to access (one of the channels|a channel)"),
        ("+eval ", "permissions to run the 'eval' command"),
        ("+rename ", "a script needs rename"),
        ("+smembers ", "permissions to run the 'smembers' command"),
    ],
    ids=["keys", "channels", "eval", "in a script", "smembers"],
)
def test_s02_missing_right_in_redis(rights: Rights, less: str, named: str, run_bootstrap: RunBootstrap) -> None:
    """The exit code is 78, with the error of Redis, also if the right is missing in a script."""
    code, said = run_with_one_right_too_few(rights, "redis", less, run_bootstrap, *INIT)
    assert re.search(f"ERROR .*init: Redis 127.0.0.1.* rejected the connection: .*{named}", said), said
    assert code == 78, said


@pytest.mark.slow  # 30 s each: the rejection timeout
@pytest.mark.parametrize(
    ("less", "named"),
    [
        ("GRANT USAGE, CREATE ON SCHEMA public TO bifrost_migrate;", "permission denied for schema public"),
        ("ALTER DEFAULT PRIVILEGES", "permission denied for table"),
    ],
    ids=["create", "select"],
)
def test_s02_missing_right_in_postgres(rights: Rights, less: str, named: str, run_bootstrap: RunBootstrap) -> None:
    """The exit code is 78, with the error of PostgreSQL."""
    code, said = run_with_one_right_too_few(rights, "postgres", less, run_bootstrap, *INIT)
    assert re.search(f"ERROR .*init: PostgreSQL 127.0.0.1.* rejected the connection: {named}", said), said
    assert code == 78, said
