"""Run a warm that kills itself. Arguments: the point, how often it is passed before the kill, LARGE_FILL."""

from __future__ import annotations

import os
import signal
import sys

from bifrost_bootstrap import settings
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.warm import staging, step as warm_step
from tests.setups.module_store import at

if __name__ == "__main__":
    point, number, large_fill = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    staging.LARGE_FILL = large_fill
    staging.BATCH_SIZE = 1  # a report after every module
    report = at(point, lambda: os.kill(os.getpid(), signal.SIGKILL), number=number)
    warm_step.warm(settings.load(needs=("database", "redis")), Deadline(60), report)
