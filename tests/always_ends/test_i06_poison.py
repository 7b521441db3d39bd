"""I6: a task that kills its worker process every time is given up and reported."""

from __future__ import annotations

from tests.setups.stack import COMPLETE, REVISIONS, Deployment


def test_i06_given_up_after_a_few_attempts(deployment: Deployment) -> None:
    """A revision that kills its task process is tried three times. Then init ends with 1, and the worker lives."""
    poison = deployment.folder / "poison"
    poison.touch()
    worker = deployment.start_worker()
    done = deployment.start_init().wait()
    assert done.returncode == 1
    assert "given up after 3 attempts" in done.stderr.splitlines()[-1]
    # Not the worker's log: its task process may be killed before it has read that the revision begins.
    assert (deployment.folder / "poisoned").read_text().split() == ["once"] * 3
    poison.unlink()
    assert deployment.start_init().wait().returncode == 0
    assert worker.running
    assert deployment.applied() == REVISIONS
    assert deployment.cache() == COMPLETE
