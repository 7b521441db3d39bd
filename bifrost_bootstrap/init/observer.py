"""Gathers what init can see: schema and cache, its tasks, the migration lock, the queue, unreachable servers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from bifrost_bootstrap import broker
from bifrost_bootstrap.broker import QueueState
from bifrost_bootstrap.deadline import REJECTION_TIMEOUT, Deadline
from bifrost_bootstrap.errors import BootstrapError, CertificateError, RefusedError, UnavailableError, WarmError
from bifrost_bootstrap.init import chain
from bifrost_bootstrap.init.chain import SentChain
from bifrost_bootstrap.init.decision import Observation, TaskState
from bifrost_bootstrap.migrate import lock
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.servers import postgres, redis_server
from bifrost_bootstrap.servers.waiting import PROBE_TIMEOUT
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.status import readiness
from bifrost_bootstrap.status.readiness import Readiness

#: Seconds between two reads of schema, cache, lock and queue. The task states are one round trip: read every time.
READINESS_INTERVAL = 2.0
#: The same while a server is unreachable, so that init notices its return at once.
UNREACHABLE_INTERVAL = 0.5
#: Seconds in which a worker that init started has begun with a chain, and how many connections it then has.
WORKER_START = 5.0
WORKER_CONNECTIONS = 3
#: The key in `Observer.away` for a chain that could not be published. It does not stop init from trying again.
SENDING = "the chain"
#: Seconds to wait for the stored results after the work is done (they may be lost), and the polling interval.
RESULT_TIMEOUT = 2.0
RESULT_INTERVAL = 0.05


@dataclass(frozen=True)
class _Progress:
    """
    What was seen of one published chain.

    received, started: see `Observation`; both are about the current step. last_sign: when there was a sign of it.
    """

    states: tuple[TaskState, TaskState] = (TaskState(), TaskState())
    received: bool = False
    started: bool = False
    last_sign: Deadline = field(default_factory=lambda: Deadline(0))

    @property
    def migrated(self) -> bool:
        return self.states[0].status == "SUCCESS"

    def updated(self, states: tuple[TaskState, TaskState]) -> _Progress:
        """The progress after these states were read."""
        alive = any(state.alive for state in states)
        last_sign = Deadline(0) if alive or states != self.states else self.last_sign
        migrated = states[0].status == "SUCCESS"
        # The warm is a message of its own, and the worker that migrated may be gone.
        next_step = migrated and not self.migrated
        current = states[migrated]
        started = (self.started and not next_step) or current.started
        received = (self.received and not next_step) or started or current.alive
        return _Progress(states, received, started, last_sign)

    def with_sign(self) -> _Progress:
        """The progress after a sign of the chain."""
        return replace(self, last_sign=Deadline(0))


class Observer:
    """
    Gathers an `Observation` for one init. Never raises because a server is unreachable; raises CertificateError.

    queue: where the chain is published. own_worker: init has started the only worker, so a queue without a consumer
    means nothing. known: the readiness that was just read, None if it could not be read. away: is filled with the
    servers that could not be asked the last time, and the reason.
    """

    def __init__(
        self,
        settings: Settings,
        tree: Tree,
        queue: str,
        deadline: Deadline,
        *,
        own_worker: bool,
        known: Readiness | None,
        away: dict[str, BootstrapError],
    ) -> None:
        self._settings = settings
        self._tree = tree
        self._queue = queue
        self._deadline = deadline
        self._own_worker = own_worker
        self.away = away
        self.readiness = known
        self._readiness_due = Deadline(READINESS_INTERVAL if known else 0)
        #: The readiness before our first chain. A marker that is not in it was left by a warm that ran since.
        self._before: Readiness | None = None
        self._sent: SentChain | None = None
        self._sent_at = Deadline(0)
        self._progress = _Progress()
        self._lock_holder = ""
        self._queue_state = QueueState(None, None)
        self._servers_due = Deadline(0)
        self._rejected_since: dict[str, Deadline] = {}

    @property
    def missing(self) -> str:
        """The unreachable servers, in words; nothing has failed yet."""
        reasons = {str(error.args[0] if isinstance(error, WarmError) else error) for error in self.away.values()}
        return "; ".join(sorted(reasons))

    @property
    def results(self) -> tuple[TaskState, TaskState]:
        """The states of both tasks."""
        return self._progress.states

    def send(self, send: Callable[[], SentChain]) -> bool:
        """Publish a chain and follow it from now on. False if a server did not accept it."""
        return self._ask(SENDING, lambda: self._follow(send()))

    def _follow(self, sent: SentChain) -> None:
        self._before = self._before or self.readiness
        self.readiness = None
        self._sent = sent
        self._sent_at = Deadline(0)
        self._progress = _Progress()

    def await_results(self) -> None:
        """
        Wait for the results of a chain that has started: the last one is stored a moment after the work is done.

        A chain that still waits in the queue, because another chain did the work, is not waited for.
        """
        timeout = Deadline(RESULT_TIMEOUT)
        started = self._progress.started or self._progress.migrated
        while started and self.results[1].status in ("PENDING", "STARTED") and not timeout.passed:
            timeout.sleep(RESULT_INTERVAL)
            self._ask("the task states", self._read_task_states)

    def observe(self, losses: int) -> Observation:
        """Read the task states; read all the rest if it is due, or if the warm has just succeeded."""
        before = self.results
        self._ask("the task states", self._read_task_states)
        warmed = self.results != before and self.results[1].status == "SUCCESS"
        if warmed or self._servers_due.passed:
            self._ask("schema and cache", self._read_readiness)
            self._ask("the migration lock", self._read_lock_holder)
            self._ask("the queue", self._read_queue)
            self._servers_due = Deadline(UNREACHABLE_INTERVAL if self.away else READINESS_INTERVAL)
        unreachable = bool(self.away.keys() - {SENDING})
        if unreachable:
            # While a server is unreachable, missing signs prove nothing.
            self._progress = self._progress.with_sign()
        return self._observation(losses, self.missing if unreachable else "")

    def _observation(self, losses: int, away: str) -> Observation:
        found = self.readiness
        # Until our first task has run, entries that only need another time to live count as work.
        ready = found is not None and (found.ready if self._sent else found.nothing_to_do)
        migrate, warm = self.results
        return Observation(
            ready=ready,
            behind=found is not None and not found.schema.ready,
            refusal=self._refusal(),
            away=away,
            published=self._sent is not None,
            migrate=migrate,
            warm=warm,
            silent_for=self._progress.last_sign.elapsed,
            age=self._sent_at.elapsed,
            received=self._progress.received,
            started=self._progress.started,
            losses=losses,
            lock_holder=self._lock_holder,
            queued=self._queue_state.messages,
            consumers=None if self._own_worker else self._queue_state.consumers,
        )

    def _ask(self, what: str, read: Callable[[], None]) -> bool:
        """
        Whether the server answered. The reason goes into `away` otherwise.

        A rejection may pass, and so may Redis refusing a write (out of memory, for example).
        """
        try:
            read()
        except CertificateError:
            raise
        except UnavailableError as error:
            self.away[what] = error
            self._rejected_since.pop(what, None)
            return False
        except (RefusedError, WarmError) as error:
            self.away[what] = error
            self._rejected_since.setdefault(what, Deadline(REJECTION_TIMEOUT))
            return False
        self.away.pop(what, None)
        self._rejected_since.pop(what, None)
        return True

    def _refusal(self) -> BootstrapError | None:
        """Why waiting cannot help: no migration leads to the head of this tree, or a server keeps rejecting us."""
        if self.readiness and (refusal := self.readiness.schema.refusal()):
            return refusal
        return next((self.away[what] for what, timeout in self._rejected_since.items() if timeout.passed), None)

    def _read_task_states(self) -> None:
        if self._sent is None:
            return
        with redis_server.connect(self._settings.redis, answer_timeout=PROBE_TIMEOUT) as client:
            # Read first: a Redis that refuses writes still reports the states.
            self._progress = self._progress.updated(chain.states(client, self._sent))
            chain.keep_chain_alive(client, self._sent, self._deadline, self._settings.migration_lock_timeout)

    def _read_readiness(self) -> None:
        if self._sent is None and not self._readiness_due.passed:
            return
        # While our chain is in flight, a comparison costs as much as its warm and says nothing new.
        compare = self._sent is None or self.results[1].status == "SUCCESS"
        self.readiness = readiness.read_readiness(
            self._settings,
            self._tree,
            since=self._before.marker if self._before else None,
            marker_suffices=self._before is not None,
            compare=readiness.compare_timeout(self._deadline) if compare else 0,
            await_open=True,
        )
        if self._sent and self.readiness.obstacle:
            # This error does not mean that the warm was lost.
            raise WarmError(self.readiness.obstacle)

    def _read_lock_holder(self) -> None:
        with postgres.connect(self._settings.database, "init", answer_timeout=PROBE_TIMEOUT) as connection:
            self._lock_holder = str(lock.holder(connection) or "")

    def _read_queue(self) -> None:
        # A worker of ours that does not start may lack connections to the broker; only its log says so.
        age = self._sent_at.elapsed
        late = self._own_worker and self._sent is not None and not self._progress.received and age > WORKER_START
        self._queue_state = broker.queue_state(self._queue, room_for=WORKER_CONNECTIONS if late else 0)
        # A chain that a worker has received is none of those that wait.
        if self._queue_state.messages and not self._progress.received:
            self._progress = self._progress.with_sign()
