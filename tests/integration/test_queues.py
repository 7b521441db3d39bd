"""The queues in the broker: constant arguments, and routing of both tasks."""

from __future__ import annotations

import json
import sys

import kombu
import pytest

from bifrost_bootstrap.migrate.tree import QUEUE
from tests.conftest import RunCommand

#: Declares the shared queue and that of a tree the way a worker and an init do, on connections of their own.
DECLARE = """
from bifrost_bootstrap.celery import add_queue, app
with app.connection_for_write() as connection:
    queues = [*app.conf.task_queues, add_queue("bifrost.bootstrap.0123456789ab")]
    for queue in queues:
        queue(connection.default_channel).declare()
    print([queue.name for queue in queues])
"""


def test_queues_are_declared_the_same_twice(
    run_command: RunCommand, bifrost_env: dict[str, str], rabbitmq_url: str
) -> None:
    """Two processes declare both queues without a 406. The arguments in the broker are those of the contract."""
    for _ in range(2):
        done = run_command([sys.executable, "-c", DECLARE], env=bifrost_env)
        assert done.returncode == 0, done.stderr
    # Contract: a release that changes one of these is refused by the broker of the other.
    quorum: dict[str, object] = {"x-queue-type": "quorum"}
    expected: dict[str, dict[str, object]] = {
        QUEUE: quorum,
        f"{QUEUE}.0123456789ab": {"x-expires": 3_600_000, **quorum},
    }
    with kombu.Connection(rabbitmq_url) as connection:
        for name, arguments in expected.items():
            with connection.channel() as channel:
                channel.queue_declare(name, durable=True, auto_delete=False, exclusive=False, arguments=arguments)
            changed = {**arguments, "x-expires": 60_000}  # the control
            with connection.channel() as channel, pytest.raises(connection.channel_errors, match="PRECONDITION_FAILED"):
                channel.queue_declare(name, durable=True, auto_delete=False, exclusive=False, arguments=changed)


SEND = """
import json, sys
from bifrost_bootstrap import settings
from bifrost_bootstrap.init import chain
from bifrost_bootstrap.init.run import Request
from bifrost_bootstrap.servers import redis_server
from bifrost_bootstrap.celery import app
from bifrost_bootstrap.deadline import Deadline
configured = settings.load(("redis",))
with redis_server.connect(configured.redis) as client:
    sent = chain.publish(client, sys.argv[1], Request(), Deadline(33.5), lock_timeout=5)
print(json.dumps({"migrate": sent.migrate_id, "warm": sent.warm_id}))
"""


def test_both_tasks_of_a_chain_are_routed(
    run_command: RunCommand, bifrost_env: dict[str, str], rabbitmq_url: str
) -> None:
    """The message of migrate has the same queue for the warm. (A queue given to the call routes only the first
    task.)
    """
    name = f"{QUEUE}.0123456789ab"
    done = run_command([sys.executable, "-c", SEND, name], env=bifrost_env)
    assert done.returncode == 0, done.stderr
    sent = json.loads(done.stdout)
    with kombu.Connection(rabbitmq_url) as connection, connection.channel() as channel:
        message = channel.basic_get(name, no_ack=True)
        assert message is not None
        assert channel.basic_get(name) is None
        properties, headers = message.properties, message.properties["application_headers"]
        assert (headers["task"], headers["id"]) == ("bifrost.bootstrap.migrate", sent["migrate"])
        assert properties["delivery_mode"] == 2
        assert 0 < int(properties["expiration"]) <= 60_000
        _, _, embedded = json.loads(message.body)
    (warm,) = embedded["chain"]
    assert (warm["task"], warm["options"]["task_id"]) == ("bifrost.bootstrap.warm_module_cache", sent["warm"])
    assert warm["options"]["queue"] == name
    assert warm["immutable"] is True
