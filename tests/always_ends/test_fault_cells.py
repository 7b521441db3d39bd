"""A part of the fault matrix; `make test-faults` runs all of it."""

from __future__ import annotations

import pytest

from tests.always_ends.faults.cells import SHORT, Cell
from tests.always_ends.faults.matrix import run_cell
from tests.setups.stack import Deployment


@pytest.mark.parametrize("cell", SHORT, ids=str)
def test_fault_cell(deployment: Deployment, cell: Cell) -> None:
    """After the fault, init ends soon with the expected exit code, each revision is applied once, the cache is
    complete.
    """
    run_cell(deployment, cell)
