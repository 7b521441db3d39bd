"""I6: a task that kills its worker every time is given up and reported."""

from __future__ import annotations

from tests.faults.stack import COMPLETE, REVISIONS, Deployment


def test_i06_given_up_after_a_few_attempts(deployment: Deployment) -> None:
    """A revision that kills its task process is tried three times, then init ends with 1; the worker lives on."""
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


def test_i06_messages_that_no_worker_can_run(deployment: Deployment) -> None:
    """A message of another content type, of an unknown task or with wrong arguments is refused, and work goes on."""
    worker = deployment.start_worker()
    deployment.publish(b"\x80\x04.", content_type="application/x-python-serialize", task="bifrost.bootstrap.migrate")
    worker.wait_for("(?i)refus|not accepted|ContentDisallowed|undecodable")
    deployment.publish(b"[[], {}, {}]", task="bifrost.bootstrap.unknown")
    worker.wait_for("unregistered task of type 'bifrost.bootstrap.unknown'")
    deployment.publish(b"[[1, 2, 3], {}, {}]", task="bifrost.bootstrap.migrate")
    worker.wait_for("TypeError")
    deployment.publish(b"no json", task="bifrost.bootstrap.migrate")
    deployment.publish(b"[1]", task="bifrost.bootstrap.migrate")
    assert deployment.start_init().wait().returncode == 0
    assert worker.running
    deployment.assert_clean()
