"""Fixtures of the tests in which a server is several nodes: a broker for each xdist worker, the rest for each test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.stack import ClusterDeployment, deployed, running_nodes
from tests.conftest import Outside
from tests.servers import RunFolder, ServerMissing
from tests.servers.rabbitmq_cluster import RabbitmqCluster
from tests.servers.run_checks import lacks_server


@pytest.fixture(scope="session")
def rabbitmq_cluster(run_folder: RunFolder, outside: Outside) -> Iterator[RabbitmqCluster]:
    """Three nodes of this test run's own."""
    with contextlib.closing(RabbitmqCluster(run_folder)) as cluster:
        try:
            cluster.start()
        except ServerMissing as missing:
            lacks_server(missing, in_ci=outside.in_ci)
        yield cluster


@pytest.fixture
def clusters(
    rabbitmq_cluster: RabbitmqCluster, run_folder: RunFolder, tmp_path: Path, clean_env: dict[str, str]
) -> Iterator[ClusterDeployment]:
    """A deployment of this test's own."""
    with (
        running_nodes(run_folder, rabbitmq_cluster) as nodes,
        deployed(nodes, run_folder, tmp_path / "deployment", clean_env) as deployment,
    ):
        yield deployment
