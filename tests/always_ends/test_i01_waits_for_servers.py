"""I1: init waits for servers that are not up yet, logs that, and stops waiting when waiting cannot help."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from threading import Event

import psycopg
import pytest
from psycopg import sql

from bifrost_bootstrap import deadline
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import RefusedError, UnavailableError
from bifrost_bootstrap.servers import postgres, waiting
from bifrost_bootstrap.urls import parse_postgres
from tests.servers import PLANTED_PASSWORD
from tests.setups.stack import COMPLETE, LESS_PATIENT, Deployment


def test_i01_waits_for_every_server_and_a_worker(deployment: Deployment) -> None:
    """With everything down, init names each server with reason, elapsed time and limit, and continues when
    each is up.
    """
    lines = deployment.stack.init_lines
    for line in lines.all():
        line.refuse()
    init = deployment.start_init("--json")
    for name, line in (("PostgreSQL", lines.postgres), ("Redis", lines.redis), ("RabbitMQ", lines.rabbitmq)):
        init.wait_for(
            rf"waiting for a server: {name} 127\.0\.0\.1:{line.port}/\S+ is not available: .+ \(\d+s of 180s\)"
        )
    for name, line in (("RabbitMQ", lines.rabbitmq), ("PostgreSQL", lines.postgres), ("Redis", lines.redis)):
        line.heal()
        init.wait_for(rf"{name} 127\.0\.0\.1:{line.port}/\S+ is available after")
    init.wait_for("no bootstrap worker")
    deployment.start_worker()
    done = init.wait()
    assert done.returncode == 0, done.stderr
    assert [item["server"].split()[0] for item in json.loads(done.stdout)["waited"]] == [
        "RabbitMQ",
        "PostgreSQL",
        "Redis",
    ]
    assert deployment.cache() == COMPLETE


def test_i01_logs_once_per_interval(caplog: pytest.LogCaptureFixture) -> None:
    """Init logs an unreachable server once per interval, however often it probes the server."""
    probes = 0

    def probe() -> None:
        nonlocal probes
        probes += 1
        if probes < 6:
            raise UnavailableError("a server", "not there")

    caplog.set_level("INFO")
    waited = waiting.wait_for({"a server": probe}, Deadline(60))
    assert [item.server for item in waited] == ["a server"]
    assert len(re.findall("waiting for a server", caplog.text)) == 1
    assert probes == 6


def test_i01_stopped_server_is_69_at_the_deadline(deployment: Deployment) -> None:
    """Init ends with 69 at the deadline, and its last line names the server."""
    deployment.stack.init_lines.redis.refuse()
    done = deployment.start_init(timeout="2s").wait()
    assert done.returncode == 69
    assert f"Redis 127.0.0.1:{deployment.stack.init_lines.redis.port}" in done.stderr.splitlines()[-1]


@pytest.mark.slow  # 20 s
def test_i01_silent_server_does_not_hide_the_others(deployment: Deployment) -> None:
    """A server that accepts connections and never replies is waited for like the others, and ends with 69 as well."""
    deployment.stack.init_lines.postgres.cut()
    deployment.stack.init_lines.redis.refuse()
    init = deployment.start_init(timeout="20s")
    init.wait_for("waiting for a server: Redis")
    init.wait_for("waiting for a server: PostgreSQL")
    assert init.wait().returncode == 69


@pytest.fixture
def rejection_timeout(monkeypatch: pytest.MonkeyPatch) -> float:
    """A rejection timeout of less than the default of 30 s (seconds)."""
    monkeypatch.setattr(deadline, "REJECTION_TIMEOUT", 1.5)
    return 1.5


def login(url: str) -> Callable[[], None]:
    """A probe of PostgreSQL."""

    def probe() -> None:
        with postgres.connect(parse_postgres(url), "test"):
            pass

    return probe


def test_i01_rejected_login_is_retried(deployment: Deployment, rejection_timeout: float) -> None:
    """The rejection timeout starts with the first rejection, however long the server was down before."""
    line = deployment.stack.init_lines.postgres
    url = line.through(deployment.database.url).replace("bifrost:", f"late_{deployment.database.name}:", 1)
    role = sql.Identifier(f"late_{deployment.database.name}")
    line.refuse()
    away = Deadline(2 * rejection_timeout)
    refusals = 0

    def probe() -> None:
        nonlocal refusals
        if away.passed:
            line.heal()
        try:
            login(url)()
        except RefusedError:
            refusals += 1
            if refusals == 2:
                with deployment.stack.postgres.admin() as admin:
                    password = sql.Literal(PLANTED_PASSWORD)
                    admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, password))
            raise

    try:
        assert waiting.wait_for({"PostgreSQL": probe}, Deadline(60))
    finally:
        with deployment.stack.postgres.admin() as admin:
            admin.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(role))
    assert refusals == 2


def test_i01_rejected_login_is_an_error_after_the_timeout(deployment: Deployment, rejection_timeout: float) -> None:
    """A rejection that lasts is the error, long before the deadline."""
    deadline = Deadline(60)
    with pytest.raises(RefusedError, match="nobody"):
        waiting.wait_for({"PostgreSQL": login(deployment.database.url.replace("bifrost:", "nobody:", 1))}, deadline)
    assert rejection_timeout < deadline.elapsed
    assert not deadline.passed


def test_i01_database_dropped_while_init_waits_is_78(deployment: Deployment) -> None:
    """If the database is dropped while init waits for its chain, init ends with 78 before the deadline."""
    environment = deployment.environment(deployment.stack.init_lines)
    init = deployment.commands.start([sys.executable, "-c", LESS_PATIENT], env=environment, cwd=deployment.folder)
    init.wait_for("chain enqueued")
    deployment.stack.postgres.drop_database(deployment.database)
    done = init.wait()
    assert done.returncode == 78
    assert "does not exist" in done.stderr.splitlines()[-1]


def test_i01_silent_redis_is_69(deployment: Deployment) -> None:
    """If Redis never replies, init logs that within seconds and names Redis at the deadline."""
    line = deployment.stack.init_lines.redis
    line.cut()
    init = deployment.start_init(timeout="15s")
    waiting_line = init.wait_for(r"waiting for a server: Redis \S+ is not available: .* \((\d+)s of 15s\)")
    assert int(waiting_line[1]) < 10
    done = init.wait()
    assert done.returncode == 69
    assert f"Redis 127.0.0.1:{line.port}" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["init", "check", pytest.param("plan", marks=pytest.mark.slow)])
def test_i01_locked_table_is_69(deployment: Deployment, command: str) -> None:
    """A comparison that waits for another session's table lock ends with 69 and names the server."""
    deployment.start_worker()
    assert deployment.start_init().wait().returncode == 0
    deployment.database.execute("UPDATE workspace_files SET content = 'three' WHERE path = 'kept'")
    options = ["--timeout", "6s"] if command == "init" else []
    program = f"""
import sys
from bifrost_bootstrap.cli import commands as cli
from bifrost_bootstrap.servers import postgres
postgres.WORK_TIMEOUT = 3.0
sys.exit(cli.run({[command, *options]}))
"""
    with deployment.database.connect() as somebody:
        somebody.execute("BEGIN; LOCK TABLE workspace_files")
        environment = deployment.environment(deployment.stack.init_lines)
        done = deployment.commands.start([sys.executable, "-c", program], env=environment, cwd=deployment.folder).wait()
    assert done.returncode == 69
    assert re.search(r"PostgreSQL \S+ is not available: no answer within \ds", done.stderr.splitlines()[-1])


@pytest.mark.parametrize(("hangs", "code", "words"), [
    ("readiness.read_readiness", 124, "an operation did not return"),
    ("waiting.wait_for", 69, "Redis 127.0.0.1:"),
])  # fmt: skip
def test_i01_call_that_never_returns_is_interrupted(deployment: Deployment, hangs: str, code: int, words: str) -> None:
    """A call that never returns is interrupted soon after the deadline. The error names a server that is known
    to be down.
    """
    deployment.stack.init_lines.redis.refuse()
    program = f"""
import sys, time
from bifrost_bootstrap.cli import commands as cli
from bifrost_bootstrap.init import loop as init
from bifrost_bootstrap.servers import waiting
from bifrost_bootstrap.status import readiness
init.GRACE = 1.0
{hangs} = lambda *_, **__: time.sleep(600)
sys.exit(cli.run(["init", "--timeout", "2s"]))
"""
    environment = deployment.environment(deployment.stack.init_lines)
    done = deployment.commands.start([sys.executable, "-c", program], env=environment, cwd=deployment.folder).wait()
    assert done.returncode == code
    assert words in done.stderr.splitlines()[-1]


def test_i01_bug_in_a_probe_ends_the_wait() -> None:
    """An exception that is not a server's fault ends the wait at once."""

    def probe() -> None:
        raise psycopg.ProgrammingError("a bug")

    with pytest.raises(psycopg.ProgrammingError):
        waiting.wait_for({"a server": probe}, Deadline(60))


def test_i01_earlier_error_is_raised_if_no_server_answered() -> None:
    """If the deadline passes before the first reply, the error from before the wait is raised."""
    hung = Event()
    earlier = UnavailableError("PostgreSQL db:5432/bifrost", "Connection refused")
    try:
        with pytest.raises(UnavailableError, match="Connection refused"):
            waiting.wait_for({"RabbitMQ": hung.wait}, Deadline(0), [earlier])
    finally:
        hung.set()
