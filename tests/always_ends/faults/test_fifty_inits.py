"""Fifty inits at once, while every kind of fault happens."""

from __future__ import annotations

import time

import pytest

from tests.always_ends.faults.cells import CUT, FREEZE
from tests.setups.stack import COMPLETE, REVISIONS, Deployment

pytestmark = pytest.mark.faults

INITS = 50
#: Seconds for fifty interpreters on two cores, and for what the faults cost.
TIMEOUT = 400.0


def test_fifty_inits_and_every_kind_of_fault(deployment: Deployment) -> None:
    """All inits except the killed one exit 0, each revision is applied once, and no message or process is left."""
    stack = deployment.stack
    deployment.fill_cache()
    deployment.hold("migrating")
    worker = deployment.start_worker()
    inits = [deployment.start_init(timeout=f"{TIMEOUT:.0f}s") for _ in range(INITS)]
    stood = deployment.wait_reached("migrating")

    stack.postgres.pause()
    time.sleep(FREEZE)
    stack.postgres.resume()
    deployment.task_process().kill()
    stood = deployment.wait_reached("migrating", besides=stood)
    worker.kill()
    worker = deployment.start_worker()
    deployment.wait_reached("migrating", besides=stood)
    stack.rabbitmq.kill()
    stack.rabbitmq.start()
    stack.worker_lines.rabbitmq.cut()
    time.sleep(CUT)
    stack.worker_lines.rabbitmq.strand()
    deployment.hold("warming")
    deployment.release("migrating")
    deployment.wait_reached("warming")

    victim = inits.pop()
    victim.kill()
    stack.redis.kill()
    stack.redis.start()
    stack.init_lines.redis.cut()
    time.sleep(CUT)
    stack.init_lines.redis.strand()
    worker.pause()
    time.sleep(FREEZE)
    worker.resume()
    stack.postgres.restart()
    deployment.release()

    ended = [init.wait(TIMEOUT) for init in inits]
    assert [done.returncode for done in ended] == [0] * len(inits), [
        done.stderr.splitlines()[-2:] for done in ended if done.returncode
    ]
    assert deployment.applied() == REVISIONS
    assert deployment.rows() == deployment.cache() == COMPLETE
    deployment.assert_clean()
