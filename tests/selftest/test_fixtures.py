"""Selftest of the fixtures in conftest.py."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import kombu
import psutil
import psycopg
import pytest
import redis as redis_package

from tests.conftest import RunBootstrap, RunCommand, StartCommand, without_foreign_variables
from tests.servers import PLANTED_PASSWORD, Database, Postgres, RunFolder, process
from tests.servers.command import Commands
from tests.servers.process import lives, wait_until

#: How long a process of a test may take to react (seconds).
TIMEOUT = 20.0
#: A program that starts a child of its own session, says so, and ends at once.
LEAVES_A_CHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
"""


@pytest.mark.parametrize("run", [1, 2])
def test_databases_are_empty_and_apart(database: Database, run: int) -> None:
    """Two tests can create the same table."""
    database.execute("CREATE TABLE mine (run integer)")
    with database.connect() as connection:
        connection.execute("INSERT INTO mine VALUES (%s)", [run])
    assert database.execute("SELECT run FROM mine") == [(run,)]


def test_a_database_is_dropped_under_its_users(postgres: Postgres) -> None:
    """An open session does not prevent the drop of a test's database."""
    database = postgres.create_database()
    with database.connect() as connection:
        postgres.drop_database(database)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        database.connect()


def test_a_database_can_be_cloned(postgres: Postgres) -> None:
    """A database copied from a template has its tables, and changes in it do not reach the template."""
    template = postgres.create_database(prefix="template")
    template.execute("CREATE TABLE kept AS SELECT 1 AS n")
    clone = postgres.create_database(template=template.name)
    clone.execute("DELETE FROM kept")
    assert template.execute("SELECT n FROM kept") == [(1,)]
    for each in (clone, template):
        postgres.drop_database(each)


def test_no_repr_shows_the_password(database: Database) -> None:
    """The repr of a database contains no password."""
    assert database.name in repr(database)
    assert "Zebra" not in repr(database)


@pytest.mark.parametrize("run", [1, 2])
def test_redis_databases_are_empty(redis_url: str, run: int) -> None:
    """A key of one test does not exist in the next."""
    with redis_package.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("run", run)


@pytest.mark.parametrize("run", [1, 2])
def test_virtual_hosts_are_empty(rabbitmq_url: str, run: int) -> None:
    """A queue of one test does not exist in the next, so the next may declare it with other arguments."""
    with kombu.Connection(rabbitmq_url) as connection, connection.channel() as channel:
        channel.queue_declare("bifrost.bootstrap", durable=run == 1, auto_delete=False)


def test_the_environment_of_tests_is_clean(monkeypatch: pytest.MonkeyPatch, bifrost_env: Mapping[str, str]) -> None:
    """No variable of the developer's shell reaches a test or its processes."""
    foreign = {
        "BIFROST_TEST_SOMETHING",
        "CELERY_BROKER_URL",
        "PGPASSWORD",
        "DATABASE_URL",
        "DATABASE_URL_FILE",
        "REDIS_URL",
        "RABBITMQ_URL",
        "ALEMBIC_CONFIG",
    }
    for name in foreign:
        monkeypatch.setenv(name, "planted")
    assert without_foreign_variables(os.environ).keys() == os.environ.keys() - foreign
    assert {name for name in bifrost_env if name.startswith("BIFROST_")} == {
        "BIFROST_DATABASE_URL",
        "BIFROST_REDIS_URL",
        "BIFROST_RABBITMQ_URL",
        "BIFROST_ALEMBIC_CONFIG",
    }
    assert not foreign & bifrost_env.keys()


def test_the_urls_of_the_environment_work(bifrost_env: Mapping[str, str]) -> None:
    """Each of the three URLs logs in: the special characters of the password are quoted."""
    with psycopg.connect(bifrost_env["BIFROST_DATABASE_URL"]) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with redis_package.Redis.from_url(bifrost_env["BIFROST_REDIS_URL"]) as client:
        assert client.ping()
    with kombu.Connection(bifrost_env["BIFROST_RABBITMQ_URL"]) as connection:
        connection.connect()


def test_run_command_returns_code_and_output(run_command: RunCommand) -> None:
    """Exit code, stdout and stderr are returned as text. The process has no server and an empty folder."""
    program = "import os, sys; print(sorted(os.listdir()), 'é'); print('to stderr', file=sys.stderr); sys.exit(3)"
    done = run_command([sys.executable, "-c", program])
    assert (done.returncode, done.stdout, done.stderr) == (3, "[] é\n", "to stderr\n")


def test_run_command_has_an_end(run_command: RunCommand) -> None:
    """A process that exceeds its timeout is killed and fails the test."""
    with pytest.raises(AssertionError, match=r"still running after 0\.2 s"):
        run_command([sys.executable, "-c", "import time; time.sleep(600)"], timeout=0.2)


def test_waiting_for_a_line_ends_with_the_process(start_command: StartCommand) -> None:
    """`wait_for` finds a line. If the process exits without it, it fails at once with the output."""
    program = "import sys; print('first', file=sys.stderr); print('worker@host ready.', file=sys.stderr)"
    command = start_command([sys.executable, "-c", program])
    assert command.wait_for(r"(\S+) ready\.", TIMEOUT)[1] == "worker@host"
    with pytest.raises(AssertionError, match=r"(?s)ended \(0\) without 'never'.*first"):
        command.wait_for("never", TIMEOUT)


def test_a_command_that_leaves_a_child_is_a_failure(
    run_folder: RunFolder, clean_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child in its own session, whose parent has exited, is found, named and killed."""
    monkeypatch.setattr(process, "SETTLE_DEADLINE", 0.2)
    commands = Commands(run_folder)
    command = commands.start([sys.executable, "-c", LEAVES_A_CHILD], env=clean_env, cwd=tmp_path)
    child = psutil.Process(int(command.wait_for(r"\d+", TIMEOUT, "stdout")[0]))
    command.wait(TIMEOUT)
    with pytest.raises(AssertionError, match=r"left running.*time\.sleep\(600\)"):
        commands.close()
    assert not lives(child)


def test_what_is_left_of_a_killed_command_is_no_failure(
    run_folder: RunFolder, clean_env: dict[str, str], tmp_path: Path
) -> None:
    """If the test kills a process, its orphans are killed without a failure."""
    commands = Commands(run_folder)
    program = LEAVES_A_CHILD + "import time; time.sleep(600)"
    command = commands.start([sys.executable, "-c", program], env=clean_env, cwd=tmp_path)
    child = psutil.Process(int(command.wait_for(r"\d+", TIMEOUT, "stdout")[0]))
    command.send_signal(signal.SIGKILL)
    wait_until(lambda: not command.running, "the end of a killed process", TIMEOUT)
    assert lives(child)
    commands.close()
    assert not lives(child)


def test_a_command_ends_by_sigterm(start_command: StartCommand) -> None:
    """`terminate` sends SIGTERM and returns the exit code."""
    program = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print(1, flush=True); time.sleep(600)"
    )
    command = start_command([sys.executable, "-c", program])
    command.wait_for("1", TIMEOUT, "stdout")
    assert command.terminate(TIMEOUT).returncode == 143


def test_run_bootstrap_runs_the_package(run_bootstrap: RunBootstrap, clean_env: dict[str, str], tmp_path: Path) -> None:
    """The program under test is the one installed for this interpreter, in any working folder."""
    done = run_bootstrap("--version", env=clean_env)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "cwd").iterdir())


def test_the_planted_password_must_be_quoted() -> None:
    """The password contains the characters that a URL must escape."""
    assert set("@:/?%") <= set(PLANTED_PASSWORD)
