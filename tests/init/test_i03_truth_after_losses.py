"""I3: whatever is lost while init waits, it ends with the truth, and not at the deadline.

Restarts of each server and of the worker in each phase: tests/faults, of which `test_fault_cells.py` runs some.
"""

from __future__ import annotations

import json
import re

from bifrost_bootstrap.progress import held_key
from tests.faults.stack import COMPLETE, PHASE_TIMEOUT, PREFIX, REVISIONS, Deployment
from tests.servers.process import wait_until


def test_i03_flushed_between_the_end_and_the_look(deployment: Deployment) -> None:
    """Both tasks have succeeded, then Redis is flushed before init looks: it does not believe the result."""
    deployment.hold("result")
    worker = deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("result")
    init.pause()
    deployment.release()
    worker.wait_for(r"warm_module_cache\[\S+\] succeeded")
    with deployment.stack.redis.client() as client:
        client.flushall()
    init.resume()
    assert init.wait().returncode == 0
    assert deployment.cache() == COMPLETE
    assert deployment.applied() == REVISIONS


def test_i03_cache_lost_after_the_result(deployment: Deployment) -> None:
    """Both results are there and say success, but an entry is gone: init has it warmed again."""
    deployment.hold("result")
    worker = deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("result")
    init.pause()
    deployment.release()
    worker.wait_for(r"warm_module_cache\[\S+\] succeeded")
    with deployment.stack.redis.client() as client:
        client.delete("bifrost:bootstrap:marker", f"{PREFIX}kept")
    init.resume()
    done = init.wait()
    assert done.returncode == 0
    assert "both tasks succeeded, but schema and cache are not ready" in done.stderr
    assert deployment.cache() == COMPLETE


def test_i03_result_never_stored(deployment: Deployment) -> None:
    """The work is done and its worker dies before it says so: init sees the truth, and needs no other worker."""
    deployment.hold("result")
    worker = deployment.start_worker()
    init = deployment.start_init("--json")
    deployment.wait_reached("result")
    worker.kill()
    done = init.wait()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["warm"] == {}
    assert deployment.cache() == COMPLETE
    assert done.stderr.count("chain enqueued") == 1


def test_i03_worker_killed_while_it_held_the_chain(deployment: Deployment) -> None:
    """A chain that a worker had taken and not begun is sent again when that worker is gone, and is no attempt."""
    deployment.hold("warming")
    worker = deployment.start_worker()
    first = deployment.start_init()
    deployment.wait_reached("warming")
    second = deployment.start_init()
    worker.wait_for(r"(?s)migrate\[\S+\] received.*migrate\[\S+\] received")
    held = held_key(re.findall(r"migrate\[(\S+)\] received", worker.stderr.read_text())[1])
    with deployment.stack.redis.client() as client:
        # It outlives the worker long enough for init to see it.
        wait_until(lambda: client.exists(held) == 1, "the worker vouches for what it holds", PHASE_TIMEOUT)
    worker.kill()
    deployment.release()
    second.wait_for("the worker that held the chain has gone; enqueueing again")
    deployment.start_worker()
    assert first.wait().returncode == 0
    done = second.wait()
    assert done.returncode == 0
    assert "attempt" not in done.stderr
    assert deployment.applied() == REVISIONS


def test_i03_an_old_marker_is_not_believed(deployment: Deployment) -> None:
    """A row that changed since the last warm is warmed, although marker, heads and counts are those of that warm."""
    deployment.start_worker()
    assert deployment.start_init().wait().returncode == 0
    deployment.database.execute("UPDATE workspace_files SET content = 'three' WHERE path = 'kept'")
    deployment.hold("warming")
    init = deployment.start_init()
    # Two lines that say the same come 10 s apart: meanwhile init has looked at the marker.
    init.wait_for("(?s)(warm: 1 of 1 modules.*){2}")
    deployment.release()
    assert init.wait().returncode == 0
    assert deployment.cache() == {**COMPLETE, "kept": "three"}
