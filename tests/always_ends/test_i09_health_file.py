"""I9: a worker is healthy during an outage of the broker, so no orchestrator kills it. A hung worker is unhealthy.
not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.process import wait_until
from tests.setups.stack import COMPLETE, REVISIONS, Deployment

#: How long the next update of the health file may take (seconds). It is due every 2 s; a loaded machine is slower.
SIGN_TIMEOUT = 30
#: After how long an unchanged health file shows that the worker hangs (seconds): several updates are due in that time.
SILENCE = 10


@pytest.fixture
def health(deployment: Deployment) -> Path:
    """The health file of the workers."""
    file = deployment.folder / "health"
    deployment.env = {"BIFROST_WORKER_HEALTH_FILE": str(file)}
    return file


@pytest.fixture
def outage(deployment: Deployment) -> Iterator[None]:
    """RabbitMQ is down until the end of the test, or until the test starts it."""
    yield
    deployment.stack.rabbitmq.start()


def assert_lives(health: Path) -> None:
    """Signs of life come, and come again."""
    for _ in range(2):
        health.unlink(missing_ok=True)
        wait_until(health.exists, "a sign of life", SIGN_TIMEOUT)


def test_i09_busy_worker_is_healthy_without_its_broker(deployment: Deployment, health: Path) -> None:
    """The event loop of the worker stands still while it reconnects. A task runs."""
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


def test_i09_idle_worker_is_healthy_without_its_broker(deployment: Deployment, health: Path, outage: None) -> None:
    """The event loop of the worker stands still while it reconnects. No task runs."""
    worker = deployment.start_worker()
    deployment.stack.rabbitmq.kill()
    worker.wait_for("(?i)connection refused|cannot connect")
    assert_lives(health)
    assert worker.running


def test_i09_worker_that_starts_before_its_broker_is_healthy(
    deployment: Deployment, health: Path, outage: None
) -> None:
    """The worker waits for its broker for BIFROST_INIT_TIMEOUT, before its event loop starts."""
    deployment.stack.rabbitmq.kill()
    environment = deployment.environment(deployment.stack.worker_lines)
    command = [sys.executable, "-m", "bifrost_bootstrap", "worker"]
    worker = deployment.commands.start(command, env=environment, cwd=deployment.folder)
    worker.wait_for("waiting for a server: RabbitMQ")
    assert_lives(health)
    assert worker.running


def test_i09_hung_worker_is_unhealthy(deployment: Deployment, health: Path) -> None:
    """The event loop hangs while the connection is open: the health file gets old, although other threads run."""
    deployment.start_worker()
    assert_lives(health)
    deployment.hold("loop")
    deployment.wait_reached("loop")
    health.unlink()
    time.sleep(SILENCE)
    assert not health.exists()
    deployment.release()
    assert_lives(health)
