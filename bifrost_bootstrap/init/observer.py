"""What init can see: the truth in database and cache, its tasks, the lock, the queue, and which server is away."""

from __future__ import annotations

from collections.abc import Callable

from bifrost_bootstrap import broker
from bifrost_bootstrap.broker import QueueState
from bifrost_bootstrap.deadline import REFUSAL_PATIENCE, Deadline
from bifrost_bootstrap.errors import BootstrapError, CertificateError, RefusedError, UnavailableError, WarmError
from bifrost_bootstrap.init import chain
from bifrost_bootstrap.init.chain import SentChain
from bifrost_bootstrap.init.decision import Observation, TaskState
from bifrost_bootstrap.migrate import lock
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.servers import postgres, redis_server
from bifrost_bootstrap.servers.waiting import LOOK_TIMEOUT
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.status import readiness
from bifrost_bootstrap.status.readiness import Readiness

#: Seconds between two looks at database and broker; the task states are one round trip and read every time.
TRUTH_PAUSE = 2.0
#: The same while one of them is away, so that its return is seen at once.
AWAY_PAUSE = 0.5
#: Seconds in which a worker of ours has begun on a chain, and the connections to the broker that it has then.
WORKER_START, WORKER_CONNECTIONS = 5.0, 3
#: Among the servers that are away: one that a chain could not be sent over. Only sending one ends that, and so it keeps
#: nobody from trying.
SENDING = "the chain"
#: Seconds that a result may take once its work is seen to be done (it may be lost), and between two looks for it.
RESULT_PATIENCE, RESULT_PAUSE = 2.0, 0.05


class Observer:
    """
    Gathers an `Observation` for one init, and never raises because a server is away; CertificateError it does.

    queue: where the chain is sent. own_worker: whether its only worker is ours, so that nobody consuming it yet
    means nothing. truth: as it was read a moment ago, None where it could not be. away: filled with the servers that
    could not be asked the last time, and the reason.
    """

    def __init__(
        self, settings: Settings, tree: Tree, queue: str, deadline: Deadline, *, own_worker: bool,
        truth: Readiness | None, away: dict[str, BootstrapError],
    ) -> None:  # fmt: skip
        self._deadline, self.away = deadline, away
        self._settings, self._tree, self._queue, self._own_worker = settings, tree, queue, own_worker
        self.truth, self._truth_read = truth, Deadline(TRUTH_PAUSE if truth else 0)
        #: The truth before anything of ours ran: a marker that is not in it was left by a warm that ran since.
        self._before: Readiness | None = None
        self._sent: SentChain | None = None
        self._states = (TaskState(), TaskState())
        self._taken = self._begun = False
        self._holder = ""
        self._queue_state = QueueState(None, None)
        self._last_sign = self._sent_at = Deadline(0)
        self._due = Deadline(0)
        self._refused: dict[str, Deadline] = {}

    @property
    def missing(self) -> str:
        """The servers that are away, in words; nothing has failed yet."""
        reasons = {str(error.args[0] if isinstance(error, WarmError) else error) for error in self.away.values()}
        return "; ".join(sorted(reasons))

    def send(self, send: Callable[[], SentChain]) -> bool:
        """Send a chain and follow it; False where a server does not let us. What was seen of an earlier one is over."""
        return self._ask(SENDING, lambda: self._follow(send()))

    def _follow(self, sent: SentChain) -> None:
        self._before = self._before or self.truth
        self.truth = None
        self._sent, self._states = sent, (TaskState(), TaskState())
        self._taken = self._begun = False
        self._last_sign = self._sent_at = Deadline(0)

    @property
    def results(self) -> tuple[TaskState, TaskState]:
        return self._states

    def await_results(self) -> None:
        """
        Hear a chain that has begun to its end: schema and cache are ready a moment before the last result is stored.

        A chain that still waits in the queue, since another one did the work, is not waited for.
        """
        patience = Deadline(RESULT_PATIENCE)
        begun = self._begun or self._states[0].status == "SUCCESS"
        while begun and self._states[1].status in ("PENDING", "STARTED") and not patience.passed:
            patience.sleep(RESULT_PAUSE)
            self._ask("the task states", self._look_at_states)

    def observe(self, losses: int) -> Observation:
        """Look at the task states; and at the truth where it is due or a task has just succeeded."""
        before = self._states
        self._ask("the task states", self._look_at_states)
        migrate, warm = self._states
        ended = self._states != before and warm.status == "SUCCESS"
        if ended or self._due.passed:
            self._ask("schema and cache", self._look_at_truth)
            self._ask("the migration lock", self._look_at_lock)
            self._ask("the queue", self._look_at_queue)
            self._due = Deadline(AWAY_PAUSE if self.away else TRUTH_PAUSE)
        if hindered := bool(self.away.keys() - {SENDING}):
            # Silence means nothing while we cannot hear.
            self._last_sign = Deadline(0)
        # Before anything of ours has run, what a warm could put on the TTL policy is something to do.
        ready = self.truth and (self.truth.ready if self._sent else self.truth.nothing_to_do)
        return Observation(
            ready=bool(ready), behind=bool(self.truth and not self.truth.schema.ready), refusal=self._refusal(),
            away=self.missing if hindered else "",
            sent=self._sent is not None, migrate=migrate, warm=warm,
            silent=self._last_sign.elapsed, age=self._sent_at.elapsed, taken=self._taken, begun=self._begun,
            losses=losses, holder=self._holder, queued=self._queue_state.messages,
            consumers=None if self._own_worker else self._queue_state.consumers,
        )  # fmt: skip

    def _ask(self, what: str, look: Callable[[], None]) -> bool:
        """Whether it was answered. What Redis says against a write (out of memory, say) may pass, as a refusal may."""
        try:
            look()
        except UnavailableError as error:
            self.away[what] = error
        except CertificateError:
            raise
        except (RefusedError, WarmError) as error:
            self.away[what] = error
            self._refused.setdefault(what, Deadline(REFUSAL_PATIENCE))
            return False
        else:
            self.away.pop(what, None)
        self._refused.pop(what, None)
        return what not in self.away

    def _refusal(self) -> BootstrapError | None:
        """Why waiting cannot help: no migration leads to this tree's head, or a server goes on refusing us."""
        if self.truth and (refusal := self.truth.schema.refusal()):
            return refusal
        return next((self.away[what] for what, patience in self._refused.items() if patience.passed), None)

    def _look_at_states(self) -> None:
        if self._sent is None:
            return
        with redis_server.connect(self._settings.redis, answer_timeout=LOOK_TIMEOUT) as client:
            # Read first: a Redis that refuses to be written to still tells how it stands.
            self._note(chain.states(client, self._sent))
            chain.want(client, self._sent, self._deadline, self._settings.migration_lock_timeout)

    def _note(self, states: tuple[TaskState, TaskState]) -> None:
        if states != self._states or any(state.held for state in states):
            self._last_sign = Deadline(0)
        migrated = states[0].status == "SUCCESS"
        if migrated and self._states[0].status != "SUCCESS":
            # The warm is a message of its own, and whoever migrated may be gone.
            self._taken = self._begun = False
        at_work = states[migrated]
        self._begun = self._begun or at_work.begun
        self._taken = self._taken or self._begun or at_work.held
        self._states = states

    def _look_at_truth(self) -> None:
        if self._sent is None and not self._truth_read.passed:
            return
        # While our chain is on its way a comparison would cost as much as its warm, and tell nothing.
        compare = self._sent is None or self._states[1].status == "SUCCESS"
        since = self._before.marker if self._before else None
        self.truth = readiness.look(
            self._settings, self._tree, since=since, marker_suffices=self._before is not None,
            compare=readiness.compare_timeout(self._deadline) if compare else 0, await_open=True,
        )  # fmt: skip
        if self._sent and self.truth.obstacle:
            # It does not say that the warm was lost.
            raise WarmError(self.truth.obstacle)

    def _look_at_lock(self) -> None:
        with postgres.connect(self._settings.database, "init", answer_timeout=LOOK_TIMEOUT) as connection:
            self._holder = str(lock.holder(connection) or "")

    def _look_at_queue(self) -> None:
        # A worker of ours that does not begin may lack connections, of which only its log tells.
        late = self._own_worker and self._sent and not self._taken and self._sent_at.elapsed > WORKER_START
        self._queue_state = broker.queue_state(self._queue, room_for=WORKER_CONNECTIONS if late else 0)
        # Once taken, ours is none of those that wait.
        if self._queue_state.messages and not self._taken:
            self._last_sign = Deadline(0)
