"""Write the table of a complete run into docs/reliability.md."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[3] / "docs" / "reliability.md"


class TableAsRun:
    """Collects the cells; when every one has passed, the table of this name is replaced.

    Args:
        name: As in the document: `<!-- the NAME, as run: begin -->`.
        cells: All of them.
        table: Makes the table, of the seconds by cell.
    """

    def __init__(self, name: str, cells: Collection[str], table: Callable[[Mapping[str, float]], str]) -> None:
        self._begin, self._end = (f"<!-- the {name}, as run: {edge} -->\n" for edge in ("begin", "end"))
        self._cells = set(cells)
        self._table = table
        self._seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of each test, as it ends."""
        properties = dict(report.user_properties)
        if report.when == "call" and report.passed and "cell" in properties:
            self._seconds[str(properties["cell"])] = float(str(properties["seconds"]))

    def pytest_sessionfinish(self) -> None:
        """Write."""
        if self._seconds.keys() >= self._cells:
            before, _, rest = DOCUMENT.read_text().partition(self._begin)
            after = rest.partition(self._end)[2]
            DOCUMENT.write_text(f"{before}{self._begin}\n{self._table(self._seconds)}\n{self._end}{after}")
