"""I9: a worker that migrates through an outage of the broker looks alive, or its orchestrator would kill it."""

from __future__ import annotations

from tests.faults.stack import COMPLETE, REVISIONS, Deployment
from tests.servers.process import wait_until

#: Seconds in which a sign of life comes again: two seconds apart, on a loaded machine.
SIGN_TIMEOUT = 30


def test_i09_a_sign_of_life_while_the_broker_is_away(deployment: Deployment) -> None:
    """The worker's own loop stands still while it reconnects; the task at work touches the file."""
    health = deployment.folder / "health"
    deployment.env = {"BIFROST_WORKER_HEALTH_FILE": str(health)}
    deployment.hold("migrating")
    worker = deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("migrating")
    deployment.stack.rabbitmq.kill()
    try:
        worker.wait_for("(?i)connection refused|cannot connect")
        for _ in range(2):
            health.unlink()
            wait_until(health.exists, "a sign of life", SIGN_TIMEOUT)
    finally:
        deployment.stack.rabbitmq.start()
    deployment.release()
    assert init.wait().returncode == 0
    assert deployment.applied() == REVISIONS
    assert deployment.cache() == COMPLETE
