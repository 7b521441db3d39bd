"""I9: a worker looks alive through an outage of the broker, or its orchestrator would kill it; a hung one does not."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.process import wait_until
from tests.setups.stack import COMPLETE, REVISIONS, Deployment

#: Seconds in which a sign of life comes again: two seconds apart, on a loaded machine.
SIGN_TIMEOUT = 30
#: Seconds without a sign of life after which nobody gives one: that many of them would have been due.
SILENCE = 10


@pytest.fixture
def health(deployment: Deployment) -> Path:
    """The health file of the workers."""
    file = deployment.folder / "health"
    deployment.env = {"BIFROST_WORKER_HEALTH_FILE": str(file)}
    return file


@pytest.fixture
def outage(deployment: Deployment) -> Iterator[None]:
    """The broker is away until the test ends, where it does not start it before."""
    yield
    deployment.stack.rabbitmq.start()


def assert_lives(health: Path) -> None:
    """Signs of life come, and come again."""
    for _ in range(2):
        health.unlink(missing_ok=True)
        wait_until(health.exists, "a sign of life", SIGN_TIMEOUT)


def test_i09_a_sign_of_life_while_the_broker_is_away(deployment: Deployment, health: Path) -> None:
    """The worker's own loop stands still while it reconnects; a task is at work."""
    deployment.hold("migrating")
    worker = deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("migrating")
    deployment.stack.rabbitmq.write_down()
    deployment.stack.rabbitmq.kill()
    try:
        worker.wait_for("(?i)connection refused|cannot connect")
        assert_lives(health)
    finally:
        deployment.stack.rabbitmq.start()
    deployment.release()
    assert init.wait().returncode == 0
    assert deployment.applied() == REVISIONS
    assert deployment.cache() == COMPLETE


def test_i09_an_idle_worker_lives_while_the_broker_is_away(deployment: Deployment, health: Path, outage: None) -> None:
    """Nothing is at work, and the loop stands still."""
    worker = deployment.start_worker()
    deployment.stack.rabbitmq.kill()
    worker.wait_for("(?i)connection refused|cannot connect")
    assert_lives(health)
    assert worker.running


def test_i09_a_worker_lives_that_starts_before_its_broker(deployment: Deployment, health: Path, outage: None) -> None:
    """It waits for its broker before there is any loop, for as long as BIFROST_INIT_TIMEOUT says."""
    deployment.stack.rabbitmq.kill()
    environment = deployment.environment(deployment.stack.worker_lines)
    command = [sys.executable, "-m", "bifrost_bootstrap", "worker"]
    worker = deployment.commands.start(command, env=environment, cwd=deployment.folder)
    worker.wait_for("waiting for a server: RabbitMQ")
    assert_lives(health)
    assert worker.running


def test_i09_a_worker_that_hangs_looks_dead(deployment: Deployment, health: Path) -> None:
    """Connected, and its loop comes round no more: the file grows old, although the process has other threads."""
    deployment.start_worker()
    assert_lives(health)
    deployment.hold("loop")
    deployment.wait_reached("loop")
    health.unlink()
    time.sleep(SILENCE)
    assert not health.exists()
    deployment.release()
    assert_lives(health)
