"""Write the matrix of nodes into docs/reliability.md after a complete run."""

from __future__ import annotations

import pytest

from tests.always_ends.clusters.cells import CELLS, table
from tests.always_ends.faults.as_run import TableAsRun


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that hears of all tests writes."""
    if not hasattr(config, "workerinput"):
        cells = [str(cell) for cell in CELLS]
        config.pluginmanager.register(TableAsRun("matrix of nodes", cells, table), "nodes-as-run")
