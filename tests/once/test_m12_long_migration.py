"""M12: a migration takes longer than the consumer timeout of RabbitMQ, while more chains wait than the worker
has slots.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import BOOTSTRAP, StartCommand, StartWorker
from tests.servers import Database, RabbitmqServer, RunFolder
from tests.servers.process import wait_until
from tests.setups.migration import Barrier, Tree, applied, barrier, recorded

#: Seconds that the broker allows a consumer to keep a message, and between its looks.
CONSUMER_TIMEOUT, TICK = 3, 1
#: More chains than the worker has slots.
WAITING = 3


@pytest.mark.timeout(240)
def test_m12_outlives_the_consumer_timeout(
    run_folder: RunFolder,
    start_server: Callable[[RabbitmqServer], RabbitmqServer],
    database: Database,
    tree: Tree,
    clean_env: dict[str, str],
    redis_url: str,
    start_command: StartCommand,
    start_worker: StartWorker,
) -> None:
    """A revision runs for several consumer timeouts while three chains wait: it is applied once, all inits
    exit 0, and the worker lives.
    """
    broker = start_server(RabbitmqServer(run_folder, [f"consumer_timeout = {CONSUMER_TIMEOUT * 1000}"]))
    # For the channels that are opened from now on; no setting of the file.
    broker.evaluate(f"application:set_env(rabbit, channel_tick_interval, {TICK * 1000})")
    tree.revision("one").revision("two", barrier())
    env = clean_env | {
        "BIFROST_DATABASE_URL": database.url,
        "BIFROST_REDIS_URL": redis_url,
        "BIFROST_RABBITMQ_URL": broker.url(),
        "BIFROST_ALEMBIC_CONFIG": str(tree.config),
        "BIFROST_MIGRATION_LOCK_TIMEOUT": "10m",
    }
    with Barrier(database) as stop:
        # All send before there is a worker: an init that sees the lock held would wait without a chain.
        inits = [start_command([*BOOTSTRAP, "init"], env=env) for _ in range(1 + WAITING)]
        for init in inits:
            init.wait_for("chain enqueued")
        worker = start_worker(env=env)
        session = stop.reached()
        # Delivered or not, nothing that waits may run into the timeout: five of them go by.
        wait_until(lambda: seconds_of(database, session) > 5 * CONSUMER_TIMEOUT, "a long migration")
        stop.release()
        done = [init.wait(120) for init in inits]
    assert [one.returncode for one in done] == [0] * len(inits), [one.stderr[-1500:] for one in done]
    assert applied(database) == {"one": 1, "two": 1}
    assert recorded(database) == ["two"]
    assert worker.running
    assert "PRECONDITION_FAILED" not in broker.log.read_text() + worker.stderr.read_text()
    assert start_command([*BOOTSTRAP, "init"], env=env).wait().returncode == 0


def seconds_of(database: Database, pid: int) -> float:
    """How long the transaction of this server process has run."""
    rows = database.execute(
        "SELECT extract(epoch FROM clock_timestamp() - xact_start)::float FROM pg_stat_activity WHERE pid = %s", (pid,)
    )
    return float(rows[0][0])
