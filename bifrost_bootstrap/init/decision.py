"""
What init does next: one pure function from an observation to a decision.

Celery's results are only a fast notification. init succeeds only on what it has read itself from database and cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from bifrost_bootstrap.errors import BootstrapError, MigrateGivenUpError, WarmGivenUpError
from bifrost_bootstrap.init.chain_record import ChainRecord, Stage, TransientFailure, WorkerLost
from bifrost_bootstrap.progress import MESSAGE_TTL

#: How many runs of one step may be lost with their worker before init gives up.
MAX_ATTEMPTS = 3
#: Seconds without a sign of our tasks (heartbeat, message in the queue, new state) after which they count as lost.
#: Messages travel in milliseconds; a worker needs seconds to reconnect to its broker.
SILENCE = 5.0
#: Seconds between two chains if the first one failed because the worker could not reach a server.
RETRY_PAUSE = 3.0


@dataclass(frozen=True)
class Observation:
    """
    What init knows now.

    ready: schema and cache were read, and the deployment may start. behind: the schema was read and is not at head.
    refusal: why waiting cannot help. away: the servers that fail now, in words; all other facts may be stale then.
    chain: the chain that init published last, None before the first. losses: chains that were lost with their worker.
    lock_holder: who holds the migration lock, "" for nobody. queued, consumers: messages and workers of the queue, None
    if the broker does not report them.
    """

    ready: bool = False
    behind: bool = False
    refusal: BootstrapError | None = None
    away: str = ""
    chain: ChainRecord | None = None
    losses: int = 0
    lock_holder: str = ""
    queued: int | None = None
    consumers: int | None = None


@dataclass(frozen=True)
class Succeed:
    """Exit with 0."""


@dataclass(frozen=True)
class Fail:
    """Exit with this error: waiting changes nothing."""

    error: BootstrapError


@dataclass(frozen=True)
class Wait:
    """Go on observing. note: what init waits for."""

    note: str


@dataclass(frozen=True)
class Enqueue:
    """Publish a chain. note: why. worker_lost: a run was lost with its worker; init accepts only a few of these."""

    note: str
    worker_lost: bool = False


Decision = Succeed | Fail | Wait | Enqueue


def decide(seen: Observation) -> Decision:
    """Choose the next action. Pure: the same observation gives the same decision."""
    chain = seen.chain
    if seen.ready:
        return Succeed()
    if error := seen.refusal or (chain and chain.failure(BootstrapError)):
        return Fail(error)
    if seen.away:
        return Wait(seen.away)
    if chain:
        return _decide_finished(seen, chain) or _decide_in_flight(seen, chain)
    if seen.lock_holder:
        return Wait(f"a migration runs already, its lock is held by {seen.lock_holder}")
    return Enqueue("enqueueing the chain")


def _decide_finished(seen: Observation, chain: ChainRecord) -> Decision | None:
    """Decide on a task state that is final; None if no task has one."""
    if failure := chain.failure(TransientFailure):
        again = Enqueue(f"{failure.reason}; enqueueing again")
        return Wait(failure.reason) if chain.age < RETRY_PAUSE else again
    if loss := chain.failure(WorkerLost):
        return _retry_or_give_up(seen, chain, loss.reason)
    if chain.warmed:
        # Somebody flushed the cache since then, or the schema moved.
        return _retry_or_give_up(seen, chain, "both tasks succeeded, but schema and cache are not ready")
    return None


def _decide_in_flight(seen: Observation, chain: ChainRecord) -> Decision:
    """Decide while no task has finished: a worker has the task, or its message is on the way, or it was lost."""
    if chain.alive and chain.progress:
        return Wait(chain.progress.what)
    if chain.alive or chain.silent_for < SILENCE:
        return Wait(_waiting_note(seen, chain))
    if seen.lock_holder:
        # Another migration, or ours without its heartbeat. A second one would only wait for the lock.
        return Wait(f"a migration runs, its lock is held by {seen.lock_holder}")
    if chain.stage is Stage.STARTED:
        return _retry_or_give_up(seen, chain, "its worker was lost")
    if chain.stage is Stage.RECEIVED:
        return Enqueue("the worker that held the chain has gone; enqueueing again")
    if chain.age < MESSAGE_TTL and seen.queued != 0:
        return Wait("no bootstrap worker takes the chain" if seen.consumers == 0 else "the chain is queued")
    return Enqueue("the message expired or was lost with a worker; enqueueing again")


def _waiting_note(seen: Observation, chain: ChainRecord) -> str:
    if seen.consumers == 0 and chain.stage is Stage.PUBLISHED:
        return "no bootstrap worker takes the chain"
    return "warm is about to start" if chain.migrated else "migrate is about to start"


def _retry_or_give_up(seen: Observation, chain: ChainRecord, reason: str) -> Decision:
    attempts = seen.losses + 1
    if attempts >= MAX_ATTEMPTS:
        migrated = chain.migrated and not (seen.behind and chain.warmed)
        given_up = WarmGivenUpError if migrated else MigrateGivenUpError
        return Fail(given_up(attempts, reason))
    return Enqueue(f"{reason}; enqueueing again (attempt {attempts + 1} of {MAX_ATTEMPTS})", worker_lost=True)
