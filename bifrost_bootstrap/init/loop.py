"""
The init container: bring the deployment into a state in which it may start, and report success only if that is true.

init reads schema and cache. If something is to be done, it publishes the chain and observes it. One deadline covers all
of it. `rewarm` is the same with the warm alone.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bifrost_bootstrap import errors
from bifrost_bootstrap.deadline import Deadline, DeadlineExceeded
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
    from bifrost_bootstrap.init.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

#: Seconds between two reads of the task states.
POLL_INTERVAL = 0.1
#: Seconds between two log lines with the same text.
LOG_INTERVAL = 10.0
#: Seconds before init warns that the queue has no worker. A worker that starts together with init needs two to four.
WORKER_GRACE = 5.0
#: Seconds that the last look may take past the deadline: two silent servers, one after the other.
GRACE = 10.0

#: The servers that could not be asked the last time, and the reason.
Away = dict[str, errors.BootstrapError]


@dataclass(frozen=True)
class InitReport:
    """What an init did. migrate, warm: the results of the tasks; empty if none was published or a result was lost."""

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
class Request:
    """The requested work: migrate and warm, or the warm alone. full, allow_shrink: for the warm."""

    migrate: bool = True
    full: bool = False
    allow_shrink: bool = False

    def refusal(self, found: Readiness) -> errors.SchemaError | None:
        """Why this work is impossible for a schema in this state; None if it is possible."""
        schema = found.schema
        if self.migrate or schema.ready or schema.refusal():
            return schema.refusal()
        pending = f"{len(schema.pending)} revisions are pending, and a re-warm applies none"
        return errors.SchemaError(schema.verdict, pending, "run `bifrost-bootstrap init`, which migrates and warms")


def init(
    settings: Settings,
    deadline: Deadline,
    request: Request,
    report: Report,
    *,
    with_worker: bool,
) -> InitReport:
    """
    Run until the deployment is ready, or raise the error that says why it is not.

    with_worker: start a bootstrap worker on a queue of its own for the time of this init. report: receives the progress
    of the steps. Any number of replicas may run it at once, and it may be killed at any instant.
    """
    away: Away = {}
    try:
        with deadline.interrupt_after(GRACE):
            return _init(settings, deadline, request, report, away, with_worker=with_worker)
    except DeadlineExceeded:
        if away:
            raise next(iter(away.values())) from None
        deadline_error = errors.OwnWorkerDeadlineError if with_worker else errors.DeadlineError
        raise deadline_error("an operation did not return", deadline.seconds) from None


def _init(
    settings: Settings, deadline: Deadline, request: Request, report: Report, away: Away, *, with_worker: bool
) -> InitReport:
    tree = tree_loading.load(settings)
    logger.info("tree %s (%s), heads %s", tree.alembic.config, tree.why, ", ".join(tree.heads) or "none")
    found = _read_readiness(settings, tree, deadline, away)
    if found and found.nothing_to_do and request.migrate:
        return InitReport(found, round(deadline.elapsed, 3), nothing_to_do=True)
    if found and (refusal := request.refusal(found)):
        raise refusal
    if away and deadline.passed:
        raise next(iter(away.values()))
    # An init with nothing to do never imports Celery.
    from bifrost_bootstrap import broker
    from bifrost_bootstrap.init.observer import Observer
    from bifrost_bootstrap.init.worker_process import WorkerProcess

    queue = tree.queue(settings.database.target)
    servers = _server_probes(settings) | {broker.display_name(): lambda: broker.queue_state(queue)}
    waited = waiting.wait_for(servers, deadline, away.values())
    if waited:
        found = _read_readiness(settings, tree, deadline, away)
    with ExitStack() as stack:
        worker = stack.enter_context(WorkerProcess(queue, deadline)) if with_worker else None
        if worker:
            queue = worker.queue
        observer = Observer(settings, tree, queue, deadline, own_worker=with_worker, known=found, away=away)
        return _Loop(settings, deadline, request, queue, observer, worker, report).run(waited)


def _read_readiness(settings: Settings, tree: Tree, deadline: Deadline, away: Away) -> Readiness | None:
    """Schema and cache; None if they cannot be read now, with the reason in `away`."""
    away.clear()
    try:
        return readiness.read_readiness(settings, tree, compare=readiness.compare_timeout(deadline), await_open=True)
    except (errors.UnavailableError, errors.RefusedError) as error:
        logger.debug("first look: %s", error)
        away["schema and cache"] = error
        return None


def _server_probes(settings: Settings) -> dict[str, waiting.Probe]:
    def probe_redis() -> None:
        with redis_server.connect(settings.redis, answer_timeout=waiting.PROBE_TIMEOUT) as client:
            client.ping()

    def probe_postgres() -> None:
        with postgres.connect(settings.database, "init", answer_timeout=waiting.PROBE_TIMEOUT) as connection:
            postgres.scalar(connection, "SELECT 1")

    return {str(settings.database): probe_postgres, redis_server.display_name(settings.redis): probe_redis}


class _Loop:
    """Observe, decide, act, until the deployment is ready or the deadline has passed. worker: of `--with-worker`."""

    def __init__(
        self,
        settings: Settings,
        deadline: Deadline,
        request: Request,
        queue: str,
        observer: Observer,
        worker: WorkerProcess | None,
        report: Report,
    ) -> None:
        self.settings = settings
        self.deadline = deadline
        self.request = request
        self.queue = queue
        self.observer = observer
        self.worker = worker
        self.report = report
        self.losses = 0
        self.note = ""
        self.note_due = Deadline(0)
        self.warning_due = Deadline(0)

    def run(self, waited: list[Waited]) -> InitReport:
        while True:
            if self.worker:
                self.worker.ensure_running()
            seen = self._observe()
            decision = decide(seen)
            if seen.progress:
                self.report(seen.progress)
            self._log_note(decision, seen)
            self._warn_of_no_worker(seen)
            match decision:
                case Succeed():
                    return self._report_success(waited)
                case Fail(error):
                    raise error
                case Enqueue(_, worker_lost) if not self.deadline.passed:
                    # A chain that a server did not accept is decided on again.
                    self.losses += self.observer.send(self._publish) and worker_lost
            if self.deadline.passed:
                raise self._deadline_error(seen)
            self.deadline.sleep(POLL_INTERVAL)

    def _observe(self) -> Observation:
        seen = self.observer.observe(self.losses)
        found = self.observer.readiness
        if not self.request.migrate and self.observer.results[1].status != "SUCCESS":
            # A re-warm was requested: do it although the cache was ready before.
            seen = replace(seen, ready=False)
        if found and (refusal := self.request.refusal(found)):
            seen = replace(seen, refusal=refusal)
        return seen

    def _report_success(self, waited: list[Waited]) -> InitReport:
        found = self.observer.readiness
        assert found
        self.observer.await_results()
        migrate, warm = (state.result for state in self.observer.results)
        return InitReport(found, round(self.deadline.elapsed, 3), waited=waited, migrate=migrate, warm=warm)

    def _publish(self) -> SentChain:
        from bifrost_bootstrap.init import chain

        with redis_server.connect(self.settings.redis, answer_timeout=waiting.PROBE_TIMEOUT) as client:
            # A failed publish may still have reached the broker. A duplicate chain is harmless.
            sent = chain.send(
                client,
                self.queue,
                self.deadline,
                lock_timeout=self.settings.migration_lock_timeout,
                migrate=self.request.migrate,
                full=self.request.full,
                allow_shrink=self.request.allow_shrink,
            )
        logger.info("chain enqueued on %s: migrate %s, warm %s", self.queue, sent.migrate or "left out", sent.warm)
        return sent

    def _warn_of_no_worker(self, seen: Observation) -> None:
        missing = seen.consumers == 0 and seen.published and not (seen.received or seen.away)
        if missing and seen.age > WORKER_GRACE and self.warning_due.passed:
            self.warning_due = Deadline(LOG_INTERVAL)
            error = errors.NoWorkerError(self.queue)
            logger.warning("%s; %s", error, error.remedy)

    def _log_note(self, decision: Decision, seen: Observation) -> None:
        if not isinstance(decision, Wait | Enqueue):
            return
        note = self.observer.missing or decision.note
        if note == self.note and not self.note_due.passed:
            return
        self.note = note
        self.note_due = Deadline(LOG_INTERVAL)
        text = str(seen.progress) if seen.progress and seen.progress.what == note else note
        logger.info("%s (%.0fs of %.0fs)", text, self.deadline.elapsed, self.deadline.seconds)

    def _deadline_error(self, seen: Observation) -> errors.BootstrapError:
        """The most specific reason why the deadline passed."""
        alive = seen.migrate.alive or seen.warm.alive
        if not alive and self.observer.away:
            return next(iter(self.observer.away.values()))
        if not alive and (failure := seen.migrate.transient_failure or seen.warm.transient_failure):
            return errors.UnavailableError("a server of the worker", failure)
        if not alive and seen.lock_holder and not seen.started:
            return errors.BusyError("the migration lock", seen.lock_holder)
        if not seen.received and seen.consumers == 0:
            return errors.NoWorkerError(self.queue)
        deadline_error = errors.OwnWorkerDeadlineError if self.worker else errors.DeadlineError
        return deadline_error(self.note or "the chain is queued", self.deadline.seconds)
