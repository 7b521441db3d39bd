"""Run the step `migrate` alone: `python run_migrate.py DEADLINE_SECONDS`. Prints one JSON object."""

import json
import sys

from bifrost_bootstrap import logs, settings
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import BootstrapError
from bifrost_bootstrap.migrate.step import migrate
from bifrost_bootstrap.progress import Progress


def report(progress: Progress) -> None:
    """Log the progress."""
    print("progress:", progress.note, file=sys.stderr, flush=True)


logs.configure("text", "INFO")
try:
    result = migrate(settings.load(needs=("database",)), Deadline(float(sys.argv[1])), report)
    print(json.dumps(result.to_dict()))
    code = 0
except BootstrapError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error), "remedy": error.remedy}))
    code = int(error.exit_code)
sys.exit(code)
