"""The stack of the fault tests; a whole run of the matrix is written down in docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.cells import CELLS, table
from tests.faults.fixtures import deployment, stack

__all__ = ["deployment", "stack"]

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- the matrix, as run: begin -->\n", "<!-- the matrix, as run: end -->\n"


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that hears of all tests writes."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_MatrixAsRun(), "matrix-as-run")


class _MatrixAsRun:
    """Collects the cells; when every one has passed, the table is replaced."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if report.when == "call" and report.passed and "cell" in properties:
            self._seconds[str(properties["cell"])] = float(str(properties["seconds"]))

    def pytest_sessionfinish(self) -> None:
        if self._seconds.keys() >= {str(cell) for cell in CELLS}:
            before, _, rest = DOCUMENT.read_text().partition(BEGIN)
            after = rest.partition(END)[2]
            DOCUMENT.write_text(f"{before}{BEGIN}\n{table(self._seconds)}\n{END}{after}")
