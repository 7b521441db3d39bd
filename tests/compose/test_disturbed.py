"""Workers that start late or are killed, an init that is killed, and the stop of the stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.stack import OpenStack, Stack, run, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

#: Kills every process of the container but the minimal init, which then ends as its child did.
KILL_ALL = ("sh", "-c", "kill -9 -1")
RUNS = "SELECT count(*) FROM runs"
#: Sessions that run the revision at the gate.
AT_GATE = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%gate WHERE%' AND pid <> pg_backend_pid()"


@pytest.fixture(scope="module")
def servers(open_stack: OpenStack) -> Iterator[Stack]:
    """Only the servers of a stack."""
    with open_stack("disturbed", "docker-compose.yml", "tests/compose/gated-tree.yml") as stack:
        stack.compose("up", "-d", "--wait", "postgres", "pgbouncer", "redis", "rabbitmq")
        yield stack


@pytest.fixture
def stack(servers: Stack) -> Stack:
    """The servers with an empty database and an open gate, without containers of ours."""
    servers.compose("rm", "--force", "--stop", "init", "bootstrap-worker", "flower")
    servers.sql(
        "DROP TABLE IF EXISTS gate, runs, workspace_files, alembic_version; CREATE TABLE gate AS SELECT false AS closed"
    )
    return servers


def close_gate(stack: Stack) -> None:
    """The second revision runs until the gate is open."""
    stack.sql("UPDATE gate SET closed = true")


def open_gate(stack: Stack) -> None:
    """The second revision may end."""
    stack.sql("UPDATE gate SET closed = false")


def wait_at_gate(stack: Stack) -> None:
    """The second revision is running."""
    wait_until(lambda: stack.sql(AT_GATE) == "1", "the revision waits at the gate")


def test_workers_arrive_while_init_waits(stack: Stack) -> None:
    """Without a bootstrap worker, init waits and says so. It exits 0 after three workers have started."""
    stack.compose("up", "-d", "--scale", "bootstrap-worker=0", "init")
    wait_until(lambda: "no bootstrap worker" in stack.output("init"), "init says that a bootstrap worker is missing")
    stack.compose("up", "-d", "--no-deps", "--scale", "bootstrap-worker=3", "bootstrap-worker")
    assert stack.wait("init") == 0, stack.output("init")
    assert stack.sql(RUNS) == "1"


def test_bootstrap_worker_killed_during_a_migration(stack: Stack) -> None:
    """The worker is killed during a migration and restarted: init exits 0, and the migration ran once."""
    close_gate(stack)
    stack.compose("up", "-d", "init")
    wait_at_gate(stack)
    stack.compose("exec", "-T", "bootstrap-worker", *KILL_ALL, check=False)
    open_gate(stack)
    assert stack.wait("init") == 0, stack.output("init")
    assert stack.inspect("bootstrap-worker")["RestartCount"] == 1
    assert stack.sql(RUNS) == "1"


def test_init_killed_during_a_migration(stack: Stack) -> None:
    """Init is killed during a migration: the worker continues, and the next `up` exits 0."""
    close_gate(stack)
    stack.compose("up", "-d", "init")
    wait_at_gate(stack)
    stack.compose("kill", "init")
    assert stack.wait("init") == 137
    stack.compose("up", "-d", "init")
    open_gate(stack)
    assert stack.wait("init") == 0, stack.output("init")
    assert stack.sql(RUNS) == "1"


def test_stop_is_clean(stack: Stack, secrets_folder: Path) -> None:
    """`stop` ends every container with 0 within its grace period, also while a client is connected to PgBouncer."""
    stack.compose("up", "-d", "init", "flower")
    assert stack.wait("init") == 0, stack.output("init")
    stack.compose("up", "-d", "--wait", "--no-deps", "flower", "bootstrap-worker")
    url = (secrets_folder / "database-url").read_text().strip().replace("+asyncpg", "")
    # In a container that stop does not stop, as an API without its profile: it goes when the stack does.
    client = ("run", "--detach", "--no-deps", "--entrypoint", "sh", "postgres", "-c")
    name = stack.compose(*client, f"(echo 'SELECT 1;'; sleep 600) | psql -qAt '{url}'").stdout.strip()
    try:
        wait_until(lambda: run("docker", "logs", name).stdout == "1\n", "an idle client of PgBouncer")
        services = ("flower", "bootstrap-worker", "init", "pgbouncer", "postgres", "redis", "rabbitmq")
        stack.compose("stop", *services)
        ended = {service: stack.inspect(service)["State"]["ExitCode"] for service in services}
    finally:
        run("docker", "rm", "--force", "--volumes", name)
    assert ended == dict.fromkeys(services, 0)
