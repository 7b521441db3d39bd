"""Write the fault matrix into docs/reliability.md after a complete run."""

from __future__ import annotations

import pytest

from tests.always_ends.faults.as_run import TableAsRun
from tests.always_ends.faults.cells import CELLS, table


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that hears of all tests writes."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(TableAsRun("matrix", [str(cell) for cell in CELLS], table), "matrix-as-run")
