"""The fault matrix: its cells, the expected result of each, and the combinations that are left out, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SERVERS = ("postgres", "redis", "rabbitmq")
PHASES = ("waiting", "queued", "migrating", "warming", "result")
#: Seconds from the end of the fault to the end of init.
BOUND, BOUND_AFTER_CUT = 30.0, 90.0
#: Seconds of a freeze, and of a cut before new connections pass again.
FREEZE, CUT = 5.0, 3.0


@dataclass(frozen=True)
class Cell:
    """One fault in one phase. target: what it hits, for a line "init-redis". exit_code: of the init it happens to."""

    target: str
    fault: str
    phase: str
    exit_code: int = 0

    def __str__(self) -> str:
        return f"{self.target}-{self.fault}-{self.phase}"

    @property
    def title(self) -> str:
        """What is hit, in the table; a line between two is both of them."""
        return self.target.replace("-", " ↔ ")

    @property
    def bound(self) -> float:
        return BOUND_AFTER_CUT if self.fault == "cut" else BOUND


def _all() -> list[Cell]:
    cells = []
    for phase in PHASES:
        for fault in ("kill", "restart", "freeze"):
            for target in (*SERVERS, "task", "worker"):
                cells.append(Cell(target, fault, phase))
        cells.append(Cell("init", "kill", phase, exit_code=-9))
        cells.append(Cell("init", "restart", phase, exit_code=143))
        cells.append(Cell("init", "freeze", phase))
        for side in ("init", "worker"):
            cells += [Cell(f"{side}-{server}", "cut", phase) for server in SERVERS]
    return cells


def without_meaning(cell: Cell) -> str:
    """Why a cell is not run; "" where it is."""
    idle = cell.phase in ("waiting", "queued")
    if cell.target == "task" and idle:
        return "no task runs yet"
    if cell.target == "worker-postgres" and idle:
        return "a worker that is idle has no connection to PostgreSQL"
    if cell.target == "init-rabbitmq" and cell.phase == "waiting":
        return "init is not connected yet: the same as a server that is not up"
    return ""


EVERY = _all()
CELLS = [cell for cell in EVERY if not without_meaning(cell)]
#: For `make test`: one of each server, of the worker, and of the lines in between; those that showed most.
SHORT = [
    cell
    for cell in CELLS
    if str(cell)
    in {
        "postgres-kill-migrating",
        "redis-kill-result",
        "rabbitmq-restart-queued",
        "worker-kill-migrating",
        "init-redis-cut-warming",
    }
]


def table(seconds: Mapping[str, float], cells: Sequence[Cell] = EVERY, phases: Sequence[str] = PHASES) -> str:
    """The matrix in Markdown. seconds: by cell, from the end of the fault to the end of init."""
    reasons: list[str] = []
    lines = ["| fault | " + " | ".join(phases) + " |", "|---" * (len(phases) + 1) + "|"]
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if reason := without_meaning(cell):
            if reason not in reasons:
                reasons.append(reason)
            text = f"({reasons.index(reason) + 1})"
        else:
            text = f"{cell.exit_code}, {seconds[str(cell)]:.0f} s"
        rows.setdefault((cell.title, cell.fault), []).append(text)
    lines += [f"| {target}: {fault} | " + " | ".join(texts) + " |" for (target, fault), texts in rows.items()]
    return "\n".join([*lines, "", *(f"({number}) {reason}." for number, reason in enumerate(reasons, 1)), ""])
