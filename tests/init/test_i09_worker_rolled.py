"""I9: a worker that is told to stop in the middle of a migration."""

from __future__ import annotations

import signal

from tests.faults.stack import COMPLETE, REVISIONS, Deployment
from tests.servers.process import wait_until

#: Seconds until the server notices that a client of a running statement is gone.
CANCELLED_WITHIN = 10.0


def test_i09_the_revision_ends_and_nothing_new_begins(deployment: Deployment) -> None:
    """After SIGTERM the running revision ends and is recorded; warm is left to the next worker; init exits 0."""
    deployment.hold("migrating")
    worker = deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("migrating")
    worker.send_signal(signal.SIGTERM)
    worker.wait_for("(?i)warm shutdown|shutting down")
    deployment.release()
    ended = worker.wait()
    assert ended.returncode == 0
    assert "warm_module_cache[" not in ended.stderr
    assert deployment.applied() == REVISIONS
    deployment.start_worker()
    done = init.wait()
    assert done.returncode == 0
    assert "attempt" not in done.stderr
    assert deployment.cache() == COMPLETE


def test_i09_init_waits_for_a_revision_that_outlives_the_heartbeat(deployment: Deployment) -> None:
    """However long the last revision of a stopping worker takes, init does not take it for lost."""
    deployment.hold("migrating")
    worker = deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("migrating")
    worker.send_signal(signal.SIGTERM)
    worker.wait_for("(?i)warm shutdown|shutting down")
    deployment.start_worker()
    # Three lines that say the same come 10 s apart: longer than a heartbeat vouches.
    init.wait_for("(?s)(migrate: 1 of 2.*){3}")
    deployment.release()
    done = init.wait()
    assert done.returncode == 0
    assert "again" not in done.stderr
    assert deployment.applied() == REVISIONS


def test_i09_past_its_grace(deployment: Deployment) -> None:
    """A worker that is killed after its grace has its statement cancelled in the server, and nothing is recorded."""
    deployment.hold("migrating")
    worker = deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("migrating")
    worker.send_signal(signal.SIGTERM)
    worker.wait_for("(?i)warm shutdown|shutting down")
    worker.kill()
    wait_until(lambda: not deployment.runners(), "the sessions of the worker have gone", CANCELLED_WITHIN)
    assert deployment.applied() == ["0001"]
    deployment.release()
    deployment.start_worker()
    assert init.wait().returncode == 0
    assert deployment.applied() == REVISIONS
