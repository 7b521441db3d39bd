"""I5: a chain that no worker started before its init ended does not run later."""

from __future__ import annotations

import kombu
import pytest

from bifrost_bootstrap.init.chain import WAITING_INIT_TTL
from bifrost_bootstrap.progress import MESSAGE_TTL
from tests.servers.process import wait_until
from tests.setups.stack import CLEAN_TIMEOUT, Deployment


def wanted(deployment: Deployment) -> dict[bytes, int]:
    """The chains that an init waits for, and the milliseconds for which it has said so."""
    with deployment.stack.redis.client() as client:
        keys = [bytes(key) for key in client.scan_iter(match="bifrost:bootstrap:wanted:*")]
        return {key: int(client.pttl(key)) for key in keys}


def test_i05_message_expires_and_init_renews_its_key(deployment: Deployment) -> None:
    """The message expires in the broker, and the waiting init renews its key in Redis for 30 s at a time."""
    init = deployment.start_init()
    init.wait_for("chain enqueued")
    wait_until(lambda: deployment.messages() == 1, "the message is there")
    with kombu.Connection(deployment.stack.rabbitmq.url(deployment.vhost)) as connection:
        message = connection.default_channel.basic_get(deployment.queue, no_ack=True)
    assert message
    assert message.properties["expiration"] == str(int(1000 * MESSAGE_TTL))
    (key, left), *others = wanted(deployment).items()
    assert key.decode().endswith(message.properties["application_headers"]["id"])
    assert 0 < left <= 1000 * WAITING_INIT_TTL
    assert not others
    with deployment.stack.redis.client() as client:
        client.delete(key)
    wait_until(lambda: key in wanted(deployment), "init to say it again")


@pytest.mark.slow
def test_i05_left_in_the_queue(deployment: Deployment) -> None:
    """The message of a killed init is gone within 60 s, and a worker that starts later does nothing."""
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
    """A chain that waits in a worker behind another task is rejected if its init has ended meanwhile."""
    deployment.hold("warming")
    worker = deployment.start_worker()
    first = deployment.start_init()
    deployment.wait_reached("warming")
    first_wanted = wanted(deployment)
    second = deployment.start_init()
    worker.wait_for(r"(?s)migrate\[\S+\] received.*migrate\[\S+\] received")
    assert len(wanted(deployment)) == 2
    second.kill()
    # Nobody renews it any more; what Redis does with it in 30 s is done at once.
    renewed = next(key for key, left in wanted(deployment).items() if key not in first_wanted)
    with deployment.stack.redis.client() as client:
        assert 0 < client.pttl(renewed) <= 1000 * WAITING_INIT_TTL
        client.delete(renewed)
    deployment.release()
    assert first.wait().returncode == 0
    worker.wait_for("was not started: no init waits for it any more")
    deployment.assert_clean()
