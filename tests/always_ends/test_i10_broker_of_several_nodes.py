"""I10: a lost RabbitMQ node, and a queue that is declared otherwise; `make test-clusters` loses every node."""

from __future__ import annotations

import kombu
import pytest

from bifrost_bootstrap.celery import lasting_queue
from bifrost_bootstrap.migrate.tree import QUEUE
from tests.always_ends.clusters.cells import SHORT, ClusterCell
from tests.always_ends.clusters.matrix import run_cell
from tests.conftest import RunBootstrap
from tests.setups.nodes import ClusterDeployment
from tests.setups.stack import COMPLETE, Deployment

#: RabbitMQ's words for a queue that is there with another type.
OTHERWISE = "inequivalent arg 'x-queue-type'"


@pytest.mark.parametrize("cell", SHORT, ids=str)
def test_i10_lost_node(cluster_deployment: ClusterDeployment, cell: ClusterCell) -> None:
    """Init ends 0 within a minute while the node stays lost, and the worker lives."""
    run_cell(cluster_deployment, cell)


def declare_as_we_do(url: str, queue: str) -> None:
    """As every side of ours declares it."""
    with kombu.Connection(url) as connection:
        lasting_queue(queue)(connection.default_channel).declare()


@pytest.mark.slow  # half a minute: RabbitMQ is asked for 10 s, and deletes after 5
def test_i10_killed_as_a_queue_is_declared(deployment: Deployment) -> None:
    """
    A single node that is killed at once after the first declaration of a queue is of use again, by itself.

    RabbitMQ 3.10 comes back with a queue that has no leader; what it says of it is that it is empty.
    """
    declare_as_we_do(deployment.stack.rabbitmq.url(deployment.vhost), deployment.queue)
    deployment.stack.rabbitmq.kill()
    deployment.stack.rabbitmq.start()
    init = deployment.start_init()
    deployment.start_worker()
    assert init.wait(120).returncode == 0
    assert deployment.cache() == COMPLETE


def declare_classic(url: str, queue: str) -> None:
    """As a release did before queues had several nodes: a tree's with an hour to live without a worker."""
    arguments = {} if queue == QUEUE else {"x-expires": 3_600_000}
    with kombu.Connection(url) as connection:
        connection.default_channel.queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)


@pytest.mark.slow  # half a minute each: the patience with a refusal
@pytest.mark.parametrize("command", ["worker", "init"])
def test_i10_queue_declared_otherwise(deployment: Deployment, run_bootstrap: RunBootstrap, command: str) -> None:
    """A classic queue where ours is to be ends worker and init with 78 and the broker's words."""
    queue = {"worker": QUEUE, "init": deployment.queue}[command]
    declare_classic(deployment.stack.rabbitmq.url(deployment.vhost), queue)
    done = run_bootstrap(command, env=deployment.environment(deployment.stack.init_lines), timeout=60)
    assert done.returncode == 78, done.stderr
    assert OTHERWISE in done.stderr.splitlines()[-1]
    assert "delete_queue" in done.stderr.splitlines()[-1]


def test_i10_init_beside_an_old_queue_of_calls(
    rabbitmq_url: str, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """An init with a worker of its own does not touch the queue of calls by hand, and leaves no such queue behind."""
    declare_classic(rabbitmq_url, QUEUE)
    done = run_bootstrap("init", "--with-worker", env=bifrost_env)
    assert done.returncode == 0, done.stderr
