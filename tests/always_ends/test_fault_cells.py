"""A few cells of the fault matrix; `make test-faults` runs all."""

from __future__ import annotations

import pytest

from tests.always_ends.faults.cells import SHORT, Cell
from tests.always_ends.faults.matrix import run_cell
from tests.setups.stack import Deployment


@pytest.mark.parametrize("cell", SHORT, ids=str)
def test_fault_cell(deployment: Deployment, cell: Cell) -> None:
    """Init ends soon after the fault with its code, each revision is applied once, the cache is whole."""
    run_cell(deployment, cell)
