"""
The init container: bring the deployment into a state in which it may start, and say so only when it is true.

Nothing to do is found by reading schema and cache; otherwise the chain is enqueued and watched. One deadline
covers all of it. `rewarm` is the same with the warm alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bifrost_bootstrap import errors
from bifrost_bootstrap.deadline import Deadline, Overrun
from bifrost_bootstrap.init.decision import Decision, Enqueue, Fail, Observation, Succeed, Wait, decide
from bifrost_bootstrap.migrate import tree_loading
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.progress import Report
from bifrost_bootstrap.servers import postgres, redis_server, waiting
from bifrost_bootstrap.servers.waiting import Waited
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.status import readiness
from bifrost_bootstrap.status.readiness import Readiness

if TYPE_CHECKING:
    from bifrost_bootstrap.init.chain import SentChain
    from bifrost_bootstrap.init.observer import Observer

logger = logging.getLogger(__name__)

#: Seconds between two looks at the task states.
LOOK_PAUSE = 0.1
#: Seconds between two log lines that say the same.
SAY_AGAIN = 10.0
#: Seconds before a queue without a worker is worth a warning: one that was started beside us needs two to four.
WORKER_GRACE = 5.0
#: Seconds that the last look may take past the deadline: two servers that are silent, one after the other.
GRACE = 10.0


#: The servers that could not be asked the last time, and the reason.
Away = dict[str, errors.BootstrapError]


@dataclass(frozen=True)
class InitReport:
    """What an init did. migrate, warm: the tasks' results, empty where nothing was enqueued or a result was lost."""

    readiness: Readiness
    seconds: float
    nothing_to_do: bool = False
    waited: list[Waited] = field(default_factory=list)
    migrate: dict[str, Any] = field(default_factory=dict)
    warm: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "nothing_to_do": self.nothing_to_do,
            "waited": [asdict(item) for item in self.waited],
            "migrate": self.migrate,
            "warm": self.warm,
            **self.readiness.to_dict(),
        }


@dataclass(frozen=True)
class Wanted:
    """What is to be done: migrate and warm, or the warm alone. full, allow_shrink: for the warm."""

    migrate: bool = True
    full: bool = False
    allow_shrink: bool = False

    def refusal(self, truth: Readiness) -> errors.SchemaError | None:
        """Why this cannot be done to a deployment that stands so, or None."""
        schema = truth.schema
        if self.migrate or schema.ready or schema.refusal():
            return schema.refusal()
        pending = f"{len(schema.pending)} revisions are pending, and a re-warm applies none"
        return errors.SchemaError(schema.verdict, pending, "run `bifrost-bootstrap init`, which migrates and warms")


def init(
    settings: Settings,
    deadline: Deadline,
    wanted: Wanted,
    *,
    with_worker: bool,
    report: Report = lambda _progress: None,
) -> InitReport:
    """
    Run to readiness or raise the error that says why not.

    with_worker: start a bootstrap worker on a queue of its own for as long as this takes. report: hears the progress
    of the steps. Safe to be run by any number of replicas, and to be killed at any instant.
    """
    away: Away = {}
    try:
        with deadline.enforced(GRACE):
            return _init(settings, deadline, wanted, report, away, with_worker=with_worker)
    except Overrun:
        if away:
            raise next(iter(away.values())) from None
        too_late = errors.OwnWorkerDeadlineError if with_worker else errors.DeadlineError
        raise too_late("an operation did not return", deadline.seconds) from None


def _init(
    settings: Settings, deadline: Deadline, wanted: Wanted, report: Report, away: Away,
    *, with_worker: bool,
) -> InitReport:  # fmt: skip
    tree = tree_loading.load(settings)
    logger.info("tree %s (%s), heads %s", tree.alembic.config, tree.why, ", ".join(tree.heads) or "none")
    truth = _glance(settings, tree, deadline, away)
    if truth and truth.nothing_to_do and wanted.migrate:
        return InitReport(truth, round(deadline.elapsed, 3), nothing_to_do=True)
    if truth and (refusal := wanted.refusal(truth)):
        raise refusal
    if away and deadline.passed:
        raise next(iter(away.values()))
    # Only from here on Celery is needed; nothing-to-do spares its import.
    from bifrost_bootstrap import broker
    from bifrost_bootstrap.init.observer import Observer
    from bifrost_bootstrap.init.worker_process import OwnWorker

    queue = tree.queue(settings.database.target)
    waited = waiting.wait_for(_servers(settings) | {broker.described(): lambda: broker.queue_state(queue)}, deadline)
    truth = _glance(settings, tree, deadline, away) if waited else truth
    with ExitStack() as stack:
        worker = stack.enter_context(OwnWorker(queue, deadline)) if with_worker else None
        ensure_worker = worker.ensure_running if worker else None
        queue = worker.queue if worker else queue
        observer = Observer(settings, tree, queue, deadline, own_worker=worker is not None, truth=truth, away=away)
        return _Init(settings, deadline, wanted, queue, observer, ensure_worker, report).run(waited)


def _glance(settings: Settings, tree: Tree, deadline: Deadline, away: Away) -> Readiness | None:
    """Schema and cache, where they can be read at once; what is in the way goes into `away`."""
    away.clear()
    try:
        return readiness.look(settings, tree, compare=readiness.compare_timeout(deadline), await_open=True)
    except (errors.UnavailableError, errors.RefusedError) as error:
        logger.debug("at first sight: %s", error)
        away["schema and cache"] = error
        return None


def _servers(settings: Settings) -> dict[str, waiting.Look]:
    def look_at_redis() -> None:
        with redis_server.connect(settings.redis, answer_timeout=waiting.LOOK_TIMEOUT) as client:
            client.ping()

    def look_at_postgres() -> None:
        with postgres.connect(settings.database, "init", answer_timeout=waiting.LOOK_TIMEOUT) as connection:
            postgres.scalar(connection, "SELECT 1")

    return {str(settings.database): look_at_postgres, redis_server.described(settings.redis): look_at_redis}


class _Init:
    """One init that has something to do: observe, decide, act."""

    def __init__(
        self, settings: Settings, deadline: Deadline, wanted: Wanted, queue: str, observer: Observer,
        ensure_worker: Callable[[], None] | None, report: Report,
    ) -> None:  # fmt: skip
        self.settings, self.deadline, self.wanted = settings, deadline, wanted
        self.queue, self.observer, self.ensure_worker = queue, observer, ensure_worker
        self.losses = 0
        self.note, self.said, self.warned = "", Deadline(0), Deadline(0)
        self.report = report

    def run(self, waited: list[Waited]) -> InitReport:
        while True:
            if self.ensure_worker:
                self.ensure_worker()
            seen = self.observer.observe(self.losses)
            if not self.wanted.migrate and self.observer.results[1].status != "SUCCESS":
                # A re-warm was asked for: that the cache was ready before it is no reason to leave it out.
                seen = replace(seen, ready=False)
            if self.observer.truth and (refusal := self.wanted.refusal(self.observer.truth)):
                seen = replace(seen, refusal=refusal)
            decision = decide(seen)
            if seen.progress:
                self.report(seen.progress)
            self._say(decision, seen)
            self._warn_of_no_worker(seen)
            match decision:
                case Succeed():
                    assert self.observer.truth
                    self.observer.await_results()
                    results = (state.result for state in self.observer.results)
                    return InitReport(self.observer.truth, round(self.deadline.elapsed, 3), False, waited, *results)
                case Fail(error):
                    raise error
                case Enqueue(_, lost) if not self.deadline.passed:
                    # One that a server did not let us send is decided on again.
                    self.losses += self.observer.send(self._send) and lost
            if self.deadline.passed:
                raise self._too_late(seen)
            self.deadline.sleep(LOOK_PAUSE)

    def _send(self) -> SentChain:
        from bifrost_bootstrap.init import chain

        with redis_server.connect(self.settings.redis, answer_timeout=waiting.LOOK_TIMEOUT) as client:
            # Where it fails it may be published all the same: a second chain does no harm.
            sent = chain.send(
                client, self.queue, self.deadline, lock_timeout=self.settings.migration_lock_timeout,
                migrate=self.wanted.migrate, full=self.wanted.full, allow_shrink=self.wanted.allow_shrink,
            )  # fmt: skip
        logger.info("chain enqueued on %s: migrate %s, warm %s", self.queue, sent.migrate or "left out", sent.warm)
        return sent

    def _warn_of_no_worker(self, seen: Observation) -> None:
        missing = seen.consumers == 0 and seen.sent and not (seen.taken or seen.away)
        if missing and seen.age > WORKER_GRACE and self.warned.passed:
            self.warned = Deadline(SAY_AGAIN)
            error = errors.NoWorkerError(self.queue)
            logger.warning("%s; %s", error, error.remedy)

    def _say(self, decision: Decision, seen: Observation) -> None:
        if not isinstance(decision, Wait | Enqueue):
            return
        note = self.observer.missing or decision.note
        if note == self.note and not self.said.passed:
            return
        self.note, self.said = note, Deadline(SAY_AGAIN)
        how_far = str(seen.progress) if seen.progress and seen.progress.what == note else note
        logger.info("%s (%.0fs of %.0fs)", how_far, self.deadline.elapsed, self.deadline.seconds)

    def _too_late(self, seen: Observation) -> errors.BootstrapError:
        held = seen.migrate.held or seen.warm.held
        if not held and self.observer.away:
            return next(iter(self.observer.away.values()))
        if not held and (undone := seen.migrate.undone or seen.warm.undone):
            return errors.UnavailableError("a server of the worker", undone)
        if not held and seen.holder and not seen.begun:
            return errors.BusyError("the migration lock", seen.holder)
        if not seen.taken and seen.consumers == 0:
            return errors.NoWorkerError(self.queue)
        too_late = errors.OwnWorkerDeadlineError if self.ensure_worker else errors.DeadlineError
        return too_late(self.note or "the chain is queued", self.deadline.seconds)
