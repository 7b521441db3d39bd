"""I1: init waits for what is not up yet, says so, and knows when waiting has no sense."""

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
    """With nothing up, init names each server with reason, elapsed and limit, and goes on as each one comes."""
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


def test_i01_says_it_at_a_steady_pace(caplog: pytest.LogCaptureFixture) -> None:
    """However often init probes a server that is away, it logs it once in each interval."""
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


def test_i01_a_server_that_is_away_until_the_deadline_is_69(deployment: Deployment) -> None:
    """At the deadline the code says that a server was not there, and the last line which."""
    deployment.stack.init_lines.redis.refuse()
    done = deployment.start_init(timeout="2s").wait()
    assert done.returncode == 69
    assert f"Redis 127.0.0.1:{deployment.stack.init_lines.redis.port}" in done.stderr.splitlines()[-1]


@pytest.mark.slow  # 20 s
def test_i01_a_server_that_is_silent_does_not_hide_the_others(deployment: Deployment) -> None:
    """A server that accepts and never answers is waited for beside the others, and ends in 69 as well."""
    deployment.stack.init_lines.postgres.cut()
    deployment.stack.init_lines.redis.refuse()
    init = deployment.start_init(timeout="20s")
    init.wait_for("waiting for a server: Redis")
    init.wait_for("waiting for a server: PostgreSQL")
    assert init.wait().returncode == 69


@pytest.fixture
def rejection_timeout(monkeypatch: pytest.MonkeyPatch) -> float:
    """Shorter than the 30 s that the program has; seconds."""
    monkeypatch.setattr(deadline, "REJECTION_TIMEOUT", 1.5)
    return 1.5


def login(url: str) -> Callable[[], None]:
    """A probe of PostgreSQL."""

    def probe() -> None:
        with postgres.connect(parse_postgres(url), "test"):
            pass

    return probe


def test_i01_a_refused_login_may_become_right(deployment: Deployment, rejection_timeout: float) -> None:
    """The time for a rejection begins with the rejection, however long the server was away before."""
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


def test_i01_a_refused_login_that_lasts_is_given_up(deployment: Deployment, rejection_timeout: float) -> None:
    """A rejection that lasts is the error, long before the deadline."""
    deadline = Deadline(60)
    with pytest.raises(RefusedError, match="nobody"):
        waiting.wait_for({"PostgreSQL": login(deployment.database.url.replace("bifrost:", "nobody:", 1))}, deadline)
    assert rejection_timeout < deadline.elapsed
    assert not deadline.passed


def test_i01_a_refusal_in_the_middle_is_78(deployment: Deployment) -> None:
    """A database that is dropped while init waits for its chain ends it with 78 after a while, not at the deadline."""
    environment = deployment.environment(deployment.stack.init_lines)
    init = deployment.commands.start([sys.executable, "-c", LESS_PATIENT], env=environment, cwd=deployment.folder)
    init.wait_for("chain enqueued")
    deployment.stack.postgres.drop_database(deployment.database)
    done = init.wait()
    assert done.returncode == 78
    assert "does not exist" in done.stderr.splitlines()[-1]


def test_i01_a_silent_redis_is_69(deployment: Deployment) -> None:
    """Redis accepts and never answers, from the start on: init says so within seconds, and names it at the deadline."""
    line = deployment.stack.init_lines.redis
    line.cut()
    init = deployment.start_init(timeout="15s")
    waiting_line = init.wait_for(r"waiting for a server: Redis \S+ is not available: .* \((\d+)s of 15s\)")
    assert int(waiting_line[1]) < 10
    done = init.wait()
    assert done.returncode == 69
    assert f"Redis 127.0.0.1:{line.port}" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["init", "check", pytest.param("plan", marks=pytest.mark.slow)])
def test_i01_a_table_that_is_locked_is_69(deployment: Deployment, command: str) -> None:
    """A comparison that somebody's lock on the table blocks ends, and the server is named."""
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
def test_i01_what_nobody_thought_of_ends_too(deployment: Deployment, hangs: str, code: int, words: str) -> None:
    """A call that never returns is ended soon after the deadline; a server that is known to be away is named."""
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


def test_i01_a_foreign_error_of_a_look_is_not_swallowed() -> None:
    """What is no fault of a server, a bug for instance, ends the wait at once."""

    def probe() -> None:
        raise psycopg.ProgrammingError("a bug")

    with pytest.raises(psycopg.ProgrammingError):
        waiting.wait_for({"a server": probe}, Deadline(60))


def test_i01_an_earlier_error_says_more_than_no_answer_yet() -> None:
    """Where the deadline passes before any server was heard, the error that was seen before is raised."""
    hung = Event()
    earlier = UnavailableError("PostgreSQL db:5432/bifrost", "Connection refused")
    try:
        with pytest.raises(UnavailableError, match="Connection refused"):
            waiting.wait_for({"RabbitMQ": hung.wait}, Deadline(0), [earlier])
    finally:
        hung.set()
