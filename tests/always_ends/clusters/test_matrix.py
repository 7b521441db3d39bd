"""I10: every loss of a node, in every phase of init."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.always_ends.clusters.cells import CELLS, ClusterCell
from tests.always_ends.clusters.matrix import run_cell
from tests.setups.nodes import ClusterDeployment

pytestmark = pytest.mark.clusters


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_i10_cell(
    cluster_deployment: ClusterDeployment, cell: ClusterCell, record_property: Callable[[str, object], None]
) -> None:
    """After the loss, init exits 0 within a minute, the worker lives, and each revision is applied once."""
    record_property("cell", str(cell))
    record_property("seconds", run_cell(cluster_deployment, cell))
