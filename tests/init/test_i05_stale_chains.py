"""I5: a chain that nobody took before its init was gone does not run later."""

from __future__ import annotations

from tests.faults.stack import CLEAN_TIMEOUT, Deployment
from tests.servers.process import wait_until


def test_i05_left_in_the_queue(deployment: Deployment) -> None:
    """The message of an init that was killed is gone within 60 s, and a worker that comes then does nothing."""
    init = deployment.start_init()
    init.wait_for("chain enqueued")
    wait_until(lambda: deployment.messages() == 1, "the message is there")
    init.kill()
    wait_until(lambda: deployment.messages() == 0, "the message is gone", CLEAN_TIMEOUT)
    worker = deployment.start_worker()
    # A call by hand comes after whatever was there.
    deployment.call("bifrost.bootstrap.warm_module_cache")
    worker.wait_for("warm_module_cache.* (failed|raised)|has no table")
    assert "bootstrap.migrate[" not in worker.stderr.read_text()
    assert deployment.heads() == []


def test_i05_held_by_a_busy_worker(deployment: Deployment) -> None:
    """A chain that waits in a worker's memory behind another task is refused when its init has gone meanwhile."""
    deployment.hold("warming")
    worker = deployment.start_worker()
    first = deployment.start_init()
    deployment.wait_reached("warming")
    second = deployment.start_init()
    worker.wait_for(r"(?s)migrate\[\S+\] received.*migrate\[\S+\] received")
    second.kill()
    with deployment.stack.redis.client() as client:
        wanted = {bytes(key) for key in client.scan_iter(match="bifrost:bootstrap:wanted:*")}
        assert len(wanted) == 2
        wait_until(lambda: sum(map(client.exists, wanted)) == 1, "nobody wants it", CLEAN_TIMEOUT)
    deployment.release()
    assert first.wait().returncode == 0
    worker.wait_for("is not begun: no init waits for it any more")
    deployment.assert_clean()
