"""A bootstrap worker that waits where a test tells it to: while `{name}.hold` lies in the folder TEST_BARRIERS.

Its work is the real one. Started by a test as a program, like `bifrost-bootstrap worker`.
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
#: Seconds between two looks at the folder.
POLL_INTERVAL = 0.02

run_warm = warm_step.warm
beat = worker_program.Heartbeat.beat


def barrier(name: str) -> None:
    """Tell that we are here, and wait as long as the test wants."""
    while (FOLDER / f"{name}.hold").exists():
        (FOLDER / f"{name}.reached.{os.getpid()}").touch()
        time.sleep(POLL_INTERVAL)


def warm_with_barriers(settings: Any, deadline: Any, report: Report, **options: Any) -> Any:
    """Stop when entries are staged and nothing is visible yet, and again when all is done but the result."""

    def report_and_wait(progress: Progress) -> None:
        report(progress)
        if progress.total:
            barrier("warming")

    result = run_warm(settings, deadline, report_and_wait, **options)
    barrier("result")
    return result


def beat_with_barrier(heartbeat: worker_program.Heartbeat) -> None:
    """The worker's loop comes here every two seconds."""
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
