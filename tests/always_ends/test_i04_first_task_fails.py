"""I4: when the first task fails, init ends at once with the error of the task."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from tests.setups.stack import PREVIOUS, Deployment

#: Seconds from the failure in the worker to the end of init.
BOUND = 2.0


def when(log: Path, pattern: str) -> datetime:
    """The time of the first log line that matches."""
    found = re.search(rf"^(\S+) .*{pattern}", log.read_text(), re.MULTILINE)
    assert found, log.read_text()
    return datetime.fromisoformat(found[1])


def test_i04_error_of_the_task_within_2_seconds(deployment: Deployment) -> None:
    """Init ends with 1 within 2 s, and names the revision, the statement and the applied revisions."""
    deployment.fill_cache()
    (deployment.folder / "fail").touch()
    worker = deployment.start_worker()
    init = deployment.start_init()
    done = init.wait()
    assert done.returncode == 1
    verdict = done.stderr[done.stderr.index("init: revision 0002") :]
    for words in ("division by zero", "of_this_test", "Change the modules", "applied before it: 0001", "what to do:"):
        assert words in verdict
    passed = when(init.stderr, "init: revision 0002") - when(worker.stderr, "bootstrap.migrate: revision 0002")
    assert passed.total_seconds() < BOUND
    assert deployment.applied() == ["0001"]
    assert deployment.cache() == PREVIOUS
