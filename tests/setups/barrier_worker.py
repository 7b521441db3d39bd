"""A bootstrap worker with barriers: it waits at the barrier `name` while the file `{name}.hold` exists.

The files are in the folder TEST_BARRIERS. Otherwise it is the real `bifrost-bootstrap worker`. A test starts it as a
program.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from bifrost_bootstrap.cli import commands
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.progress import Progress, Report
from bifrost_bootstrap.warm import step as warm_step
from bifrost_bootstrap.worker import program as worker_program, tasks

FOLDER = Path(os.environ["TEST_BARRIERS"])
#: Polling interval (seconds).
POLL_INTERVAL = 0.02

run_warm = warm_step.warm
beat = worker_program.Heartbeat.beat


def barrier(name: str) -> None:
    """Create `{name}.reached.{pid}`, and wait while `{name}.hold` exists."""
    while (FOLDER / f"{name}.hold").exists():
        (FOLDER / f"{name}.reached.{os.getpid()}").touch()
        time.sleep(POLL_INTERVAL)


def warm_with_barriers(settings: Any, deadline: Any, report: Report, **options: Any) -> Any:
    """Wait at `warming` (entries are staged, none is visible), and at `result` (only the result is missing)."""

    def report_and_wait(progress: Progress) -> None:
        report(progress)
        if progress.total:
            barrier("warming")

    result = run_warm(settings, deadline, report_and_wait, **options)
    barrier("result")
    return result


def beat_with_barrier(heartbeat: worker_program.Heartbeat) -> None:
    """Wait at `loop`. The event loop of the worker calls this every two seconds."""
    barrier("loop")
    beat(heartbeat)


def main() -> int:
    """Run the worker."""
    vars(tasks)["warm_step"] = warm_with_barriers
    type.__setattr__(worker_program.Heartbeat, "beat", beat_with_barrier)
    if queue := os.environ.get("TEST_QUEUE"):
        # The queue is named after host and port of the database, which differ for init behind another proxy.
        type.__setattr__(Tree, "queue", lambda _tree, _target: queue)
    return commands.run(["worker"])


if __name__ == "__main__":
    sys.exit(main())
