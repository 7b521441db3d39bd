"""I2: init says within seconds that no worker consumes its queue."""

from __future__ import annotations

from tests.setups.stack import Deployment


def test_i02_nobody_consumes_the_queue(deployment: Deployment) -> None:
    """Without a worker, the first log lines have the queue and the command that starts a worker. The exit code
    is 69.
    """
    init = deployment.start_init(timeout="8s")
    warning = init.wait_for(rf"no bootstrap worker .* consumes the queue {deployment.queue}.*bifrost-bootstrap worker")
    assert "enqueueing again" not in init.stderr.read_text()[: warning.end()]
    done = init.wait()
    assert done.returncode == 69
    assert deployment.queue in done.stderr.splitlines()[-1]
    assert "init --with-worker" in done.stderr.splitlines()[-1]


def test_i02_worker_of_another_tree_does_not_count(deployment: Deployment) -> None:
    """A worker with another tree or another database is not counted, and does not run the chain."""
    deployment.env = {"BIFROST_ALEMBIC_CONFIG": "builtin"}
    deployment.start_worker(queue="")
    deployment.env = {}
    init = deployment.start_init(timeout="8s")
    init.wait_for("no bootstrap worker")
    assert init.wait().returncode == 69
    assert deployment.heads() == []
