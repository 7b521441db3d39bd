"""
The init container: bring the deployment into a state in which it may start, and report success only if that is true.

init reads schema and cache. If something is to be done, it publishes the chain and observes it. One deadline covers all
of it. `rewarm` is the same with the warm alone.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bifrost_bootstrap import errors
from bifrost_bootstrap.deadline import LOG_INTERVAL, Deadline, DeadlineExceeded, Interval
from bifrost_bootstrap.init.decision import Enqueue, Fail, Observation, Stage, Succeed, TransientFailure, Wait, decide
from bifrost_bootstrap.init.run import Request, Run
from bifrost_bootstrap.migrate import tree_loading
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.progress import Report
from bifrost_bootstrap.servers import postgres, redis_server, waiting
from bifrost_bootstrap.servers.waiting import Waited
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.status import readiness
from bifrost_bootstrap.status.readiness import Readiness

if TYPE_CHECKING:
    from bifrost_bootstrap.init.observer import Observer
    from bifrost_bootstrap.init.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

#: Seconds between two reads of the task states.
POLL_INTERVAL = 0.1
#: Seconds before init warns that the queue has no worker. A worker that starts together with init needs two to four.
WORKER_GRACE = 5.0
#: Seconds that the last read may take past the deadline: two silent servers, one after the other.
GRACE = 10.0


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
        """For `--json`."""
        return {
            "seconds": self.seconds,
            "nothing_to_do": self.nothing_to_do,
            "waited": [asdict(item) for item in self.waited],
            "migrate": self.migrate,
            "warm": self.warm,
            **self.readiness.to_dict(),
        }


def init(settings: Settings, deadline: Deadline, request: Request, report: Report, *, with_worker: bool) -> InitReport:
    """
    Run until the deployment is ready, or raise the error that says why it is not.

    report: receives the progress of the steps. with_worker: start a bootstrap worker on a queue of its own for the time
    of this init. Any number of replicas may run it at once, and it may be killed at any instant.
    """
    run = Run(settings, deadline, request, with_worker)
    try:
        with deadline.interrupt_after(GRACE):
            return _init(run, report)
    except DeadlineExceeded:
        raise run.server_errors.first or run.deadline_error("an operation did not return") from None


def _init(run: Run, report: Report) -> InitReport:
    tree = tree_loading.load(run.settings)
    logger.info("tree %s (%s), heads %s", tree.alembic.config, tree.why, ", ".join(tree.heads) or "none")
    found = _read_readiness(run, tree)
    if found and found.nothing_to_do and run.request.migrate:
        return InitReport(found, round(run.deadline.elapsed, 3), nothing_to_do=True)
    if found and (refusal := run.request.refusal(found)):
        raise refusal
    if run.server_errors.first and run.deadline.passed:
        raise run.server_errors.first
    # Only here: an init with nothing to do never imports Celery.
    from bifrost_bootstrap import broker
    from bifrost_bootstrap.init.observer import Observer
    from bifrost_bootstrap.init.worker_process import WorkerProcess

    queue = tree.queue(run.settings.database.target)
    probes = _server_probes(run.settings) | {broker.display_name(): lambda: broker.queue_state(queue)}
    waited = waiting.wait_for(probes, run.deadline, run.server_errors.current.values())
    if waited:
        found = _read_readiness(run, tree)
    with WorkerProcess(queue, run.deadline) if run.own_worker else nullcontext() as worker:
        observer = Observer(run, tree, worker.queue if worker else queue, found)
        return _Loop(run, observer, worker, report).run_until_ready(waited)


def _read_readiness(run: Run, tree: Tree) -> Readiness | None:
    """Schema and cache; None if they cannot be read now, with the reason in `run.server_errors`."""
    timeout = readiness.compare_timeout(run.deadline)
    return run.server_errors.attempt(
        "schema and cache",
        lambda: readiness.read_readiness(run.settings, tree, compare=timeout, await_open=True),
    )


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

    def __init__(self, run: Run, observer: Observer, worker: WorkerProcess | None, report: Report) -> None:
        self.run = run
        self.observer = observer
        self.worker = worker
        self.report = report
        self.losses = 0
        self.note = ""
        self.log_again = Interval(LOG_INTERVAL)
        self.warn_again = Interval(LOG_INTERVAL)

    def run_until_ready(self, waited: list[Waited]) -> InitReport:
        deadline = self.run.deadline
        while True:
            if self.worker:
                self.worker.ensure_running()
            seen = self.observer.observe(self.losses)
            decision = decide(seen)
            if seen.chain and seen.chain.progress:
                self.report(seen.chain.progress)
            match decision:
                case Succeed():
                    return self._report_success(waited)
                case Fail(error):
                    raise error
                case Wait(note) | Enqueue(note):
                    self._log_note(note, seen)
                    self._warn_of_no_worker(seen)
            if isinstance(decision, Enqueue) and not deadline.passed:
                # If a server does not accept the chain, the next observation decides again.
                self.losses += self.observer.publish() and decision.worker_lost
            if deadline.passed:
                raise self._deadline_error(seen)
            deadline.sleep(POLL_INTERVAL)

    def _report_success(self, waited: list[Waited]) -> InitReport:
        found = self.observer.readiness
        assert found
        self.observer.await_results()
        report = InitReport(found, round(self.run.deadline.elapsed, 3), waited=waited)
        if chain := self.observer.chain:
            report = replace(report, migrate=chain.migrate.result, warm=chain.warm.result)
        return report

    def _warn_of_no_worker(self, seen: Observation) -> None:
        chain = seen.chain
        if not chain or chain.age <= WORKER_GRACE or seen.away:
            return
        if seen.consumers == 0 and chain.stage is Stage.PUBLISHED and self.warn_again.due():
            error = errors.NoWorkerError(self.observer.queue)
            logger.warning("%s; %s", error, error.remedy)

    def _log_note(self, note: str, seen: Observation) -> None:
        """Log what init waits for, at once if that is new, and then every `LOG_INTERVAL` seconds."""
        note = str(self.run.server_errors) or note
        if note != self.note:
            self.note = note
            self.log_again = Interval(LOG_INTERVAL)
        if self.log_again.due():
            progress = seen.chain.progress if seen.chain else None
            text = str(progress) if progress and progress.what == note else note
            logger.info("%s (%.0fs of %.0fs)", text, self.run.deadline.elapsed, self.run.deadline.seconds)

    def _deadline_error(self, seen: Observation) -> errors.BootstrapError:
        """The most specific reason why the deadline passed."""
        chain = seen.chain
        going_on = self.run.deadline_error(self.note or "the chain is queued")
        if chain and chain.alive:
            return going_on
        if self.run.server_errors.first:
            return self.run.server_errors.first
        if chain and (failure := chain.failure(TransientFailure)):
            return errors.UnavailableError("a server of the worker", failure.reason)
        stage = chain.stage if chain else Stage.PUBLISHED
        if seen.lock_holder and stage is not Stage.STARTED:
            return errors.BusyError("the migration lock", seen.lock_holder)
        if seen.consumers == 0 and stage is Stage.PUBLISHED:
            return errors.NoWorkerError(self.observer.queue)
        return going_on
