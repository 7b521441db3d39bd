"""The nodes; a whole run of the matrix is written down in docs/reliability.md."""

from __future__ import annotations

import pytest

from tests.clusters.cells import CELLS, table
from tests.clusters.fixtures import clusters, rabbitmq_cluster
from tests.faults.as_run import TableAsRun

__all__ = ["clusters", "rabbitmq_cluster"]


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that hears of all tests writes."""
    if not hasattr(config, "workerinput"):
        cells = [str(cell) for cell in CELLS]
        config.pluginmanager.register(TableAsRun("matrix of nodes", cells, table), "nodes-as-run")
