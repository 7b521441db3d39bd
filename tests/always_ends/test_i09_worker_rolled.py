"""I9: a worker that gets SIGTERM during a migration."""

from __future__ import annotations

import signal

import pytest

from bifrost_bootstrap.init.decision import SILENCE
from bifrost_bootstrap.progress import BEAT, HEARTBEAT_TTL, heartbeat_key
from bifrost_bootstrap.worker.cache_monitor import ANY_WORKER_BUSY
from tests.servers import Command
from tests.servers.process import wait_until
from tests.setups.stack import COMPLETE, PHASE_TIMEOUT, REVISIONS, Deployment

#: Seconds until the server notices that a client of a running statement is gone.
CANCELLED_WITHIN = 10.0


def wait_for_renewals(deployment: Deployment) -> None:
    """Wait until the running task has vouched for itself for longer than init would bear silence."""
    with deployment.stack.redis.client() as client:
        keys = list(set(client.scan_iter(match="bifrost:bootstrap:held:*")) - {heartbeat_key(ANY_WORKER_BUSY)})
        assert len(keys) == 1
        left, renewals = 0, 0

        def enough() -> bool:
            nonlocal left, renewals
            before, left = left, int(client.pttl(keys[0]))
            renewals += left > before
            return BEAT * renewals > HEARTBEAT_TTL + SILENCE

        wait_until(enough, "the task to vouch for itself, time and again", PHASE_TIMEOUT)


def stop_worker_in_its_revision(deployment: Deployment) -> tuple[Command, Command]:
    """Start a worker and an init. Return both when the worker, which is in a revision, has begun to stop."""
    deployment.hold("migrating")
    worker = deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("migrating")
    worker.send_signal(signal.SIGTERM)
    worker.wait_for("(?i)warm shutdown|shutting down")
    return worker, init


def test_i09_the_revision_ends_and_nothing_new_begins(deployment: Deployment) -> None:
    """The running revision ends and is recorded. The next worker runs the warm, and init exits 0."""
    worker, init = stop_worker_in_its_revision(deployment)
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
    """Init does not treat the last revision of a stopping worker as lost, however long it takes."""
    _, init = stop_worker_in_its_revision(deployment)
    deployment.start_worker()
    wait_for_renewals(deployment)
    deployment.release()
    done = init.wait()
    assert done.returncode == 0
    assert "again" not in done.stderr
    assert deployment.applied() == REVISIONS


@pytest.mark.slow  # 20 s
def test_i09_worker_killed_after_its_grace_period(deployment: Deployment) -> None:
    """If the worker is killed after its grace period, its statement is cancelled and nothing is recorded."""
    worker, init = stop_worker_in_its_revision(deployment)
    worker.kill()
    wait_until(lambda: not deployment.runners(), "the sessions of the worker have gone", CANCELLED_WITHIN)
    assert deployment.applied() == ["0001"]
    deployment.release()
    deployment.start_worker()
    assert init.wait().returncode == 0
    assert deployment.applied() == REVISIONS
