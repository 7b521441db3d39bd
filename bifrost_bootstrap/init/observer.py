"""Reads what init can see: schema and cache, the states of its chain, the migration lock, the queue."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from bifrost_bootstrap import broker
from bifrost_bootstrap.broker import QueueState
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import BootstrapError, WarmError
from bifrost_bootstrap.init import chain
from bifrost_bootstrap.init.decision import ChainRecord, Observation, Stage
from bifrost_bootstrap.init.run import Run
from bifrost_bootstrap.migrate import lock
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.servers import postgres, redis_server
from bifrost_bootstrap.servers.waiting import PROBE_TIMEOUT
from bifrost_bootstrap.status import readiness
from bifrost_bootstrap.status.readiness import Readiness

logger = logging.getLogger(__name__)

#: Seconds between two reads of schema, cache, lock and queue. The task states are one round trip: read every time.
READINESS_INTERVAL = 2.0
#: The same while a server fails, so that init notices its return at once.
UNREACHABLE_INTERVAL = 0.5
#: Seconds in which a worker that init started has begun with a chain, and how many connections it then has.
WORKER_START = 5.0
WORKER_CONNECTIONS = 3
#: Publishing a chain, in `ServerErrors`. If it fails, init tries it again at once.
PUBLISHING = "the chain"
#: Seconds to wait for the stored results after the work is done (they may be lost), and the polling interval.
RESULT_TIMEOUT = 2.0
RESULT_INTERVAL = 0.05


class Observer:
    """
    Publishes the chains of one init, and gathers one `Observation` after another.

    A server that fails raises nothing, but for a CertificateError; see `ServerErrors`. readiness: the last that was
    read; None after a chain was published, and if it could not be read. chain: the last that was published.
    """

    def __init__(self, run: Run, tree: Tree, queue: str, known: Readiness | None) -> None:
        self._run = run
        self._tree = tree
        self.queue = queue
        self.readiness = known
        self.chain: ChainRecord | None = None
        #: The readiness before our first chain. A marker that is not in it was left by a warm that ran since.
        self._before: Readiness | None = None
        self._lock_holder = ""
        self._queue_state = QueueState(None, None)
        self._readiness_due = Deadline(READINESS_INTERVAL if known else 0)
        self._servers_due = Deadline(0)

    def publish(self) -> bool:
        """Publish a chain and follow it from now on. Whether the servers accepted it."""
        published = self._run.server_errors.attempt(PUBLISHING, self._publish)
        if published is None:
            return False
        ids = (published.migrate_id or "left out", published.warm_id)
        logger.info("chain enqueued on %s: migrate %s, warm %s", self.queue, *ids)
        self.chain = published
        self._before = self._before or self.readiness
        self.readiness = None
        return True

    def _publish(self) -> ChainRecord:
        run = self._run
        lock_timeout = run.settings.migration_lock_timeout
        with redis_server.connect(run.settings.redis, answer_timeout=PROBE_TIMEOUT) as client:
            # A failed publish may still have reached the broker. A duplicate chain is harmless.
            return chain.publish(client, self.queue, run.request, run.deadline, lock_timeout=lock_timeout)

    def await_results(self) -> None:
        """
        Wait for the results of a chain that has started: the last one is stored a moment after the work is done.

        A chain that still waits in the queue, because another chain did the work, is not waited for.
        """
        timeout = Deadline(RESULT_TIMEOUT)
        while self.chain and (self.chain.migrated or self.chain.stage is Stage.STARTED) and not timeout.passed:
            if self.chain.warm.status not in ("PENDING", "STARTED"):
                return
            timeout.sleep(RESULT_INTERVAL)
            self._run.server_errors.attempt("the task states", self._read_chain)

    def observe(self, losses: int) -> Observation:
        """Read the task states; read all the rest if it is due, or if the warm has just succeeded."""
        attempt = self._run.server_errors.attempt
        failing = self._run.server_errors.current
        warmed_before = self._warmed
        attempt("the task states", self._read_chain)
        if (self._warmed and not warmed_before) or self._servers_due.passed:
            attempt("schema and cache", self._read_readiness)
            attempt("the migration lock", self._read_lock_holder)
            attempt("the queue", self._read_queue)
            self._servers_due = Deadline(UNREACHABLE_INTERVAL if failing else READINESS_INTERVAL)
        away = str(self._run.server_errors) if failing.keys() - {PUBLISHING} else ""
        if self.chain and away:
            # While a server is unreachable, missing signs prove nothing.
            self.chain = self.chain.with_sign()
        found = self.readiness
        return Observation(
            ready=self._is_ready(),
            behind=found is not None and not found.schema.ready,
            refusal=self._refusal(),
            away=away,
            chain=self.chain,
            losses=losses,
            lock_holder=self._lock_holder,
            queued=self._queue_state.messages,
            consumers=None if self._run.own_worker else self._queue_state.consumers,
        )

    @property
    def _warmed(self) -> bool:
        """Whether the warm of our chain has succeeded."""
        return self.chain is not None and self.chain.warmed

    def _is_ready(self) -> bool:
        found = self.readiness
        if found is None:
            return False
        if not self._run.request.migrate:
            # A re-warm was requested: do it although the cache was ready before.
            return found.ready and self._warmed
        # Until our first task has run, entries that only need another time to live count as work.
        return found.ready if self.chain else found.nothing_to_do

    def _refusal(self) -> BootstrapError | None:
        """Why waiting cannot help: no migration leads to the head of this tree, or a server keeps rejecting us."""
        refusal = self._run.request.refusal(self.readiness) if self.readiness else None
        return refusal or self._run.server_errors.final

    def _read_chain(self) -> None:
        if self.chain is None:
            return
        self.chain = replace(self.chain, seen_at=time.monotonic())
        with redis_server.connect(self._run.settings.redis, answer_timeout=PROBE_TIMEOUT) as client:
            # Read first: a Redis that refuses writes still reports the states.
            self.chain = chain.read(client, self.chain)
            lock_timeout = self._run.settings.migration_lock_timeout
            chain.keep_chain_alive(client, self.chain, self._run.deadline, lock_timeout)

    def _read_readiness(self) -> None:
        if self.chain is None and not self._readiness_due.passed:
            return
        # While our chain is in flight, a comparison costs as much as its warm and says nothing new.
        compare = self.chain is None or self.chain.warmed
        self.readiness = readiness.read_readiness(
            self._run.settings,
            self._tree,
            before=self._before,
            compare=readiness.compare_timeout(self._run.deadline) if compare else 0,
            await_open=True,
        )
        if self.chain and self.readiness.obstacle:
            # This error does not mean that the warm was lost.
            raise WarmError(self.readiness.obstacle)

    def _read_lock_holder(self) -> None:
        with postgres.connect(self._run.settings.database, "init", answer_timeout=PROBE_TIMEOUT) as connection:
            self._lock_holder = lock.read_holder(connection)

    def _read_queue(self) -> None:
        waiting = self.chain if self.chain and self.chain.stage is Stage.PUBLISHED else None
        # A worker of ours that does not start may lack connections to the broker; only its log says so.
        late = self._run.own_worker and waiting is not None and waiting.age > WORKER_START
        self._queue_state = broker.queue_state(self.queue, room_for=WORKER_CONNECTIONS if late else 0)
        # A chain that a worker has received is none of those in the queue.
        if waiting and self._queue_state.messages:
            self.chain = waiting.with_sign()
