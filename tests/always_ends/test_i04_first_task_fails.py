"""I4: when the first task fails, init ends at once, with that task's own error."""

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


def test_i04_own_error_within_seconds(deployment: Deployment) -> None:
    """A revision that fails ends init within 2 s with 1, naming revision, statement and what was applied before."""
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
