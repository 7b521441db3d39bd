"""Run one cell of the matrix of nodes."""

from __future__ import annotations

from tests.always_ends.clusters.cells import ClusterCell
from tests.always_ends.faults.matrix import prove, reach
from tests.setups.nodes import ClusterDeployment


def run_cell(deployment: ClusterDeployment, cell: ClusterCell) -> float:
    """Bring init into the phase, lose a node, and prove all that this must not change while it stays lost.

    Returns:
        Seconds from the loss to the end of init.
    """
    server, which = cell.target.split("-")
    deployment.hosts = which == "hosts"
    first, second, _ = deployment.nodes.rabbitmq.nodes
    deployment.declare_queues(second if which == "follower" else first)
    deployment.fill_cache()
    if server == "redis":
        deployment.stop_replication()
    init = reach(deployment, cell)
    lose = {
        "rabbitmq": deployment.lose_rabbitmq,
        "postgres": deployment.lose_postgres,
        "redis": deployment.lose_redis,
    }[server]
    lose(cell.fault)
    deployment.release()
    if deployment.worker is None:
        deployment.start_worker()
    seconds = prove(deployment, cell, init)
    assert deployment.worker
    assert deployment.worker.running, "the worker ended"
    return seconds
