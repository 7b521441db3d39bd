"""Every fault, in every phase of init in which it makes a difference."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.always_ends.faults.cells import CELLS, Cell
from tests.always_ends.faults.matrix import run_cell
from tests.setups.stack import Deployment

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(deployment: Deployment, cell: Cell, record_property: Callable[[str, object], None]) -> None:
    """After the fault, init ends soon with the expected exit code, each revision is applied once, the cache is
    complete.
    """
    record_property("cell", str(cell))
    record_property("seconds", run_cell(deployment, cell))
