"""One warm of ours, as a program. It prints its result and peak memory as JSON.

Arguments: `full` rewrites all entries; `profile` also prints a profile.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import resource
import sys

from bifrost_bootstrap import settings
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.warm.step import WarmResult, warm


def run() -> WarmResult:
    loaded = settings.load(needs=("database", "redis"))
    return warm(loaded, Deadline(600), lambda _progress: None, full="full" in sys.argv)


def main() -> None:
    if "profile" in sys.argv:
        profile = cProfile.Profile()
        result = profile.runcall(run)
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    else:
        result = run()
    print(json.dumps(result.to_dict() | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
