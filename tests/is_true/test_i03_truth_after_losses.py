"""I3: whatever is lost while init waits, it ends with the truth, and not at the deadline.

tests/always_ends/faults restarts each server, and the worker, in each phase. `test_fault_cells.py` runs a part of that.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256

import pytest

from bifrost_bootstrap.progress import heartbeat_key
from tests.servers import Command
from tests.servers.process import wait_until
from tests.setups.stack import COMPLETE, LESS_PATIENT, PHASE_TIMEOUT, PREFIX, REVISIONS, Deployment

#: `bifrost-bootstrap init` that stops at a barrier when a comparison has found a difference.
STOPPING_INIT = """
import os, sys, time
from pathlib import Path
from bifrost_bootstrap.cli import commands as cli
from bifrost_bootstrap.warm import diff as cache_diff
compare_now, folder = cache_diff.compare_now, Path(sys.argv[1])

def stopping(*arguments, **options):
    found = compare_now(*arguments, **options)
    while not found.diff.empty and (folder / "compared.hold").exists():
        (folder / f"compared.reached.{os.getpid()}").touch()
        time.sleep(0.02)
    return found

cache_diff.compare_now = stopping
sys.exit(cli.run(["init", "--timeout", "3m"]))
"""
#: What Redis says at its `maxmemory`.
NO_MEMORY = "command not allowed when used memory"
#: Seconds that an entry of the API lives.
API_TTL = 24 * 3600


def test_i03_flushed_between_the_end_and_the_look(deployment: Deployment) -> None:
    """Both tasks have succeeded, then Redis is flushed before init looks: it does not believe the result."""
    deployment.hold("warming")  # later, init may have seen the complete cache already
    worker = deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("warming")
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
    deployment.hold("warming")  # later, init may have seen the complete cache already
    worker = deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("warming")
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
    held = heartbeat_key(re.findall(r"migrate\[(\S+)\] received", worker.stderr.read_text())[1])
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


def held_until_warmed(deployment: Deployment, init: Command, worker: Command) -> None:
    """Have the warm of this init end while the init does not look."""
    deployment.wait_reached("warming")
    init.pause()
    deployment.release("warming")
    worker.wait_for(r"warm_module_cache\[\S+\] succeeded")


def api_commits(deployment: Deployment, path: str) -> None:
    """The first half of what the platform's API does."""
    deployment.database.execute("INSERT INTO workspace_files (path, content) VALUES (%s, 'live')", (path,))


def api_sets(deployment: Deployment, path: str) -> None:
    """The second half: the entry, with a time to live, and the index."""
    digest = sha256(b"live").hexdigest()
    entry = json.dumps({"content": "live", "path": path, "hash": digest}, separators=(",", ":"))
    with deployment.stack.redis.client() as client:
        client.set(PREFIX + path, entry, ex=API_TTL)
        client.sadd(f"{PREFIX}index", path)


def test_i03_a_live_writer_is_no_loss(deployment: Deployment) -> None:
    """After the warm the API adds a module, and stands between commit and entry of another when init compares: 0."""
    deployment.hold("warming")
    worker = deployment.start_worker()
    environment = deployment.environment(deployment.stack.init_lines)
    words = [sys.executable, "-c", STOPPING_INIT, str(deployment.folder)]
    init = deployment.commands.start(words, env=environment, cwd=deployment.folder)
    held_until_warmed(deployment, init, worker)
    api_commits(deployment, "live/one")
    api_sets(deployment, "live/one")
    api_commits(deployment, "live/two")
    deployment.hold("compared")
    init.resume()
    deployment.wait_reached("compared")
    api_sets(deployment, "live/two")
    deployment.release("compared")
    done = init.wait()
    assert done.returncode == 0
    assert done.stderr.count("chain enqueued") == 1
    assert deployment.cache() == deployment.rows()


@pytest.fixture
def redis_that_refuses_writes(deployment: Deployment) -> Iterator[Callable[[bool], None]]:
    """Call it to have Redis refuse every write for lack of memory, or take them again."""

    def refuse(refused: bool) -> None:
        with deployment.stack.redis.client() as client:
            client.config_set("maxmemory", int(refused))

    yield refuse
    refuse(False)


def test_i03_redis_refuses_writes_for_a_while(
    deployment: Deployment, redis_that_refuses_writes: Callable[[bool], None]
) -> None:
    """What Redis says against a write does not end an init whose migration is well."""
    deployment.hold("migrating")
    deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("migrating")
    redis_that_refuses_writes(True)
    init.wait_for(rf"INFO +Redis \S+ says: {NO_MEMORY}")
    redis_that_refuses_writes(False)
    deployment.release()
    done = init.wait()
    assert done.returncode == 0
    assert done.stderr.count("chain enqueued") == 1
    assert deployment.applied() == REVISIONS
    assert deployment.cache() == COMPLETE


def test_i03_redis_refuses_the_chain_for_a_while(
    deployment: Deployment, redis_that_refuses_writes: Callable[[bool], None]
) -> None:
    """An init that cannot send its chain, since Redis takes no write, sends it when that has passed."""
    redis_that_refuses_writes(True)
    init = deployment.start_init()
    init.wait_for(rf"INFO +Redis \S+ says: {NO_MEMORY}")
    redis_that_refuses_writes(False)
    init.wait_for("chain enqueued")
    deployment.start_worker()
    assert init.wait().returncode == 0
    assert deployment.cache() == COMPLETE


def test_i03_redis_that_goes_on_refusing_writes(
    deployment: Deployment, redis_that_refuses_writes: Callable[[bool], None]
) -> None:
    """A Redis that refuses to have the chain sent for longer than the patience ends init in 2, in its own words."""
    redis_that_refuses_writes(True)
    environment = deployment.environment(deployment.stack.init_lines)
    init = deployment.commands.start([sys.executable, "-c", LESS_PATIENT], env=environment, cwd=deployment.folder)
    done = init.wait()
    assert done.returncode == 2
    assert NO_MEMORY in done.stderr.splitlines()[-1]
