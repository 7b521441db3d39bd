"""I10: a lost RabbitMQ node, and a queue with other arguments. `make test-clusters` loses every node in every phase."""

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
    """Init exits 0 within a minute although the node stays lost, and the worker lives."""
    run_cell(cluster_deployment, cell)


def declare_as_we_do(url: str, queue: str) -> None:
    """As every side of ours declares it."""
    with kombu.Connection(url) as connection:
        lasting_queue(queue)(connection.default_channel).declare()


@pytest.mark.slow  # 30 s: the worker asks RabbitMQ for 10 s, and the deletion takes 5 s
def test_i10_node_killed_right_after_a_declaration(deployment: Deployment) -> None:
    """A single node that is killed right after the first declaration of a queue works again without help.

    RabbitMQ 3.10 restarts with a queue without a leader, and reports this queue as empty.
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


@pytest.mark.slow  # 30 s each: the rejection timeout
@pytest.mark.parametrize("command", ["worker", "init"])
def test_i10_queue_of_another_type_is_78(deployment: Deployment, run_bootstrap: RunBootstrap, command: str) -> None:
    """If a classic queue has the name of ours, worker and init end with 78 and the error of the broker."""
    queue = {"worker": QUEUE, "init": deployment.queue}[command]
    declare_classic(deployment.stack.rabbitmq.url(deployment.vhost), queue)
    done = run_bootstrap(command, env=deployment.environment(deployment.stack.init_lines), timeout=60)
    assert done.returncode == 78, done.stderr
    assert OTHERWISE in done.stderr.splitlines()[-1]
    assert "delete_queue" in done.stderr.splitlines()[-1]


def test_i10_init_beside_an_old_queue_of_calls(
    rabbitmq_url: str, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """`init --with-worker` does not use the queue of `celery call`, and does not declare it."""
    declare_classic(rabbitmq_url, QUEUE)
    done = run_bootstrap("init", "--with-worker", env=bifrost_env)
    assert done.returncode == 0, done.stderr
