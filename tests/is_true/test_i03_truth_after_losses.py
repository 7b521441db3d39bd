"""I3: whatever is lost while init waits, init ends with the correct result, and before the deadline.

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
from bifrost_bootstrap.warm import comparison
compare_now, folder = comparison.compare_now, Path(sys.argv[1])

def stopping(*arguments, **options):
    found = compare_now(*arguments, **options)
    while not found.empty and (folder / "compared.hold").exists():
        (folder / f"compared.reached.{os.getpid()}").touch()
        time.sleep(0.02)
    return found

comparison.compare_now = stopping
sys.exit(cli.run(["init", "--timeout", "3m"]))
"""
#: What Redis says at its `maxmemory`.
NO_MEMORY = "command not allowed when used memory"
#: Seconds that an entry of the API lives.
API_TTL = 24 * 3600


def pause_init_until_the_warm_has_succeeded(deployment: Deployment) -> Command:
    """Start a worker and an init. Return the init, paused: both tasks have succeeded, and it has not seen that."""
    deployment.hold("warming")  # later, init may have seen the complete cache already
    worker = deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("warming")
    init.pause()
    deployment.release()
    worker.wait_for(r"warm_module_cache\[\S+\] succeeded")
    return init


def test_i03_redis_flushed_after_the_tasks(deployment: Deployment) -> None:
    """Both tasks succeed, then Redis is flushed before init reads the cache: init does not report success."""
    init = pause_init_until_the_warm_has_succeeded(deployment)
    with deployment.stack.redis.client() as client:
        client.flushall()
    init.resume()
    assert init.wait().returncode == 0
    assert deployment.cache() == COMPLETE
    assert deployment.applied() == REVISIONS


def test_i03_cache_lost_after_the_result(deployment: Deployment) -> None:
    """Both results say success, but an entry is missing: init runs the warm again."""
    init = pause_init_until_the_warm_has_succeeded(deployment)
    with deployment.stack.redis.client() as client:
        client.delete("bifrost:bootstrap:marker", f"{PREFIX}kept")
    init.resume()
    done = init.wait()
    assert done.returncode == 0
    assert "both tasks succeeded, but schema and cache are not ready" in done.stderr
    assert deployment.cache() == COMPLETE


def test_i03_result_never_stored(deployment: Deployment) -> None:
    """The worker dies after the work and before it stores the result: init reads schema and cache, and exits 0."""
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
    """If a worker received the chain and died before it started, init publishes the chain again. This is not
    an attempt.
    """
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


def test_i03_marker_does_not_hide_a_changed_row(deployment: Deployment) -> None:
    """A row changed after the last warm is warmed, although marker, heads and counts are those of that warm."""
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
    """After the warm the API adds a module, and is between commit and entry of another one: init exits 0."""
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
    """`redis_that_refuses_writes(True)` makes Redis reject every write (out of memory); False ends that."""

    def refuse(refused: bool) -> None:
        with deployment.stack.redis.client() as client:
            client.config_set("maxmemory", int(refused))

    yield refuse
    refuse(False)


def test_i03_redis_refuses_writes_for_a_while(
    deployment: Deployment, redis_that_refuses_writes: Callable[[bool], None]
) -> None:
    """Rejected writes do not end an init whose migration succeeded."""
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
    """If Redis rejects the writes that publish the chain, init publishes it later."""
    redis_that_refuses_writes(True)
    init = deployment.start_init()
    init.wait_for(rf"INFO +Redis \S+ says: {NO_MEMORY}")
    redis_that_refuses_writes(False)
    init.wait_for("chain enqueued")
    deployment.start_worker()
    assert init.wait().returncode == 0
    assert deployment.cache() == COMPLETE


def test_i03_redis_that_keeps_rejecting_writes_is_2(
    deployment: Deployment, redis_that_refuses_writes: Callable[[bool], None]
) -> None:
    """If Redis rejects these writes for longer than the rejection timeout, init ends with 2 and the error of Redis."""
    redis_that_refuses_writes(True)
    environment = deployment.environment(deployment.stack.init_lines)
    init = deployment.commands.start([sys.executable, "-c", LESS_PATIENT], env=environment, cwd=deployment.folder)
    done = init.wait()
    assert done.returncode == 2
    assert NO_MEMORY in done.stderr.splitlines()[-1]
