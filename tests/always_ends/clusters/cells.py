"""The matrix of nodes: a broker of three nodes, a PostgreSQL with a standby, a Redis with a replica."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.always_ends.faults import cells

PHASES = ("queued", "migrating", "warming", "result")
#: Seconds from the fault to the end of init.
BOUND = 60.0
#: What happens to each. demoted: it takes no writes for a while, and then it is gone.
FAULTS = {
    "rabbitmq-leader": ("kill", "freeze", "partition"),
    "rabbitmq-follower": ("kill", "freeze", "partition"),
    "postgres-hosts": ("kill", "freeze", "partition"),
    "postgres-address": ("kill", "freeze", "partition"),
    "redis-address": ("kill", "freeze", "partition", "demoted"),
}


@dataclass(frozen=True)
class ClusterCell(cells.Cell):
    """One node is lost in one phase, and another one takes over. target: server, and which node or which address."""

    @property
    def title(self) -> str:
        """Server, and which node or address."""
        return self.target.replace("-", " ")

    @property
    def bound(self) -> float:
        """Seconds."""
        return BOUND


CELLS = [ClusterCell(target, fault, phase) for target, faults in FAULTS.items() for fault in faults for phase in PHASES]

#: For `make test`: the one that found most.
SHORT = [cell for cell in CELLS if str(cell) == "rabbitmq-leader-kill-migrating"]


def table(seconds: Mapping[str, float]) -> str:
    """The matrix in Markdown."""
    return cells.table(seconds, CELLS, PHASES)
