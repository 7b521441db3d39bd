"""`decide` as a table: one row for each observation. And what init keeps of a chain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bifrost_bootstrap.errors import (
    BootstrapError,
    MigrateGivenUpError,
    MigrationError,
    SchemaError,
    WarmError,
    WarmGivenUpError,
)
from bifrost_bootstrap.init.decision import (
    MAX_ATTEMPTS,
    RETRY_PAUSE,
    SILENCE,
    ChainRecord,
    Decision,
    Enqueue,
    Fail,
    Observation,
    Stage,
    Succeed,
    TaskState,
    TransientFailure,
    Wait,
    WorkerLost,
    decide,
)
from bifrost_bootstrap.progress import MESSAGE_TTL, Progress

REFUSAL = SchemaError("several_heads", "forked", "merge")
MIGRATION_ERROR = MigrationError("0002", "t", "", "no", "", ["0001"])
WARM_ERROR = WarmError("no room")

PENDING = TaskState()
HELD = TaskState(alive=True)
STARTED = TaskState("STARTED", alive=True)
DONE = TaskState("SUCCESS", result={"seconds": 1})
LOST = TaskState("FAILURE", failure=WorkerLost("its worker was lost"))
UNREACHABLE = TaskState("FAILURE", failure=TransientFailure("PostgreSQL was away"))
FAILED_MIGRATE = TaskState("FAILURE", failure=MIGRATION_ERROR)
FAILED_WARM = TaskState("FAILURE", failure=WARM_ERROR)
MIGRATING = TaskState(alive=True, progress=Progress("migrate", note="0001"))
STAGING = TaskState(alive=True, progress=Progress("warm", note="staging"))
#: As often as a worker may be lost before the last attempt.
LAST = MAX_ATTEMPTS - 1
SECOND_ATTEMPT = f"enqueueing again (attempt 2 of {MAX_ATTEMPTS})"


def sent(
    migrate: TaskState = PENDING,
    warm: TaskState = PENDING,
    *,
    stage: Stage = Stage.PUBLISHED,
    age: float = 0,
    silent_for: float = 0,
    **others: Any,
) -> Observation:
    """A chain of ours, just sent: its message is in the queue, which has a worker."""
    chain = ChainRecord("of migrate", "of warm", -age, -silent_for, 0, migrate, warm, stage)
    return Observation(**{"queued": 1, "consumers": 1, **others}, chain=chain)


def silent(
    migrate: TaskState = PENDING, warm: TaskState = PENDING, *, age: float = SILENCE, **others: Any
) -> Observation:
    """The same, long after its last sign."""
    return sent(migrate, warm, age=age, silent_for=SILENCE, **others)


#: What init sees; what it does; the name of the case.
TABLE: list[tuple[Observation, Decision, str]] = [
    # What was read goes before everything that the queue says.
    (Observation(ready=True), Succeed(), "ready"),
    (sent(LOST, ready=True, losses=LAST), Succeed(), "ready after the last loss"),
    (sent(ready=True, away="RabbitMQ is away"), Succeed(), "ready and a server away"),
    (sent(warm=FAILED_WARM, ready=True), Succeed(), "ready and a task failed"),
    (Observation(ready=True, refusal=REFUSAL), Succeed(), "ready and a refusal"),
    # No migration can help.
    (Observation(refusal=REFUSAL), Fail(REFUSAL), "refusal before anything was sent"),
    (sent(STARTED, refusal=REFUSAL), Fail(REFUSAL), "refusal while migrating"),
    # Nothing sent yet.
    (Observation(), Enqueue("enqueueing the chain"), "nothing sent"),
    (Observation(consumers=0, queued=0), Enqueue("enqueueing the chain"), "nothing sent and no worker"),
    (
        Observation(lock_holder="pid 7"),
        Wait("a migration runs already, its lock is held by pid 7"),
        "nothing sent and somebody migrates",
    ),
    # A task failed by itself.
    (sent(FAILED_MIGRATE), Fail(MIGRATION_ERROR), "migrate failed"),
    (sent(DONE, FAILED_WARM), Fail(WARM_ERROR), "warm failed"),
    (sent(FAILED_MIGRATE, losses=LAST), Fail(MIGRATION_ERROR), "migrate failed in the last attempt"),
    (sent(warm=FAILED_WARM, away="RabbitMQ is away"), Fail(WARM_ERROR), "warm failed and a server away"),
    # While a server cannot be asked, what is known may be old.
    (Observation(away="Redis is away"), Wait("Redis is away"), "server away before anything was sent"),
    (
        sent(DONE, DONE, away="PostgreSQL is away"),
        Wait("PostgreSQL is away"),
        "server away after both tasks succeeded",
    ),
    (silent(away="Redis is away", stage=Stage.STARTED), Wait("Redis is away"), "server away and silence"),
    # A server was away from where the task ran: tried again, steadily.
    (sent(UNREACHABLE), Wait("PostgreSQL was away"), "transient failure of a moment ago"),
    (
        sent(DONE, UNREACHABLE, age=RETRY_PAUSE),
        Enqueue("PostgreSQL was away; enqueueing again"),
        "transient failure of warm",
    ),
    (
        sent(UNREACHABLE, age=RETRY_PAUSE, losses=LAST),
        Enqueue("PostgreSQL was away; enqueueing again"),
        "transient failure is no attempt",
    ),
    # A task was lost with its worker.
    (
        sent(LOST, stage=Stage.STARTED),
        Enqueue(f"its worker was lost; {SECOND_ATTEMPT}", worker_lost=True),
        "migrate lost",
    ),
    (
        sent(DONE, LOST, stage=Stage.STARTED),
        Enqueue(f"its worker was lost; {SECOND_ATTEMPT}", worker_lost=True),
        "warm lost",
    ),
    # Celery marks the second task of a chain whose first one was lost, too.
    (sent(LOST, LOST), Enqueue(f"its worker was lost; {SECOND_ATTEMPT}", worker_lost=True), "both lost"),
    # Both ended well, and yet it is not so.
    (
        sent(DONE, DONE),
        Enqueue(
            f"both tasks succeeded, but schema and cache are not ready; {SECOND_ATTEMPT}",
            worker_lost=True,
        ),
        "both succeeded and not ready",
    ),
    # A worker has it.
    (sent(HELD), Wait("migrate is about to start"), "migrate held"),
    (sent(MIGRATING), Wait("migrate: 0001"), "migrate with progress"),
    (sent(DONE, STAGING), Wait("warm: staging"), "warm with progress"),
    (sent(DONE, HELD), Wait("warm is about to start"), "warm held"),
    (silent(STARTED, stage=Stage.STARTED), Wait("migrate is about to start"), "migrate alive without progress"),
    # Its message is on the way.
    (sent(), Wait("migrate is about to start"), "sent"),
    (sent(consumers=0), Wait("no bootstrap worker takes the chain"), "sent and no worker"),
    (sent(consumers=0, stage=Stage.RECEIVED), Wait("migrate is about to start"), "received by a worker that left"),
    (sent(consumers=None, queued=None), Wait("migrate is about to start"), "sent over a broker that reports nothing"),
    (sent(DONE), Wait("warm is about to start"), "migrate done"),
    (silent(), Wait("the chain is queued"), "silence and still queued"),
    (silent(consumers=0), Wait("no bootstrap worker takes the chain"), "silence and no worker"),
    (
        silent(queued=None, consumers=None),
        Wait("the chain is queued"),
        "silence over a broker that reports nothing",
    ),
    # A worker had it, and is silent.
    (
        silent(stage=Stage.STARTED),
        Enqueue(f"its worker was lost; {SECOND_ATTEMPT}", worker_lost=True),
        "silence after migrate started",
    ),
    (
        silent(DONE, stage=Stage.STARTED),
        Enqueue(f"its worker was lost; {SECOND_ATTEMPT}", worker_lost=True),
        "silence after warm started",
    ),
    # It may be that it only cannot tell us.
    (
        silent(stage=Stage.STARTED, lock_holder="pid 7"),
        Wait("a migration runs, its lock is held by pid 7"),
        "silence and the lock is held",
    ),
    (
        silent(stage=Stage.RECEIVED, lock_holder="pid 7"),
        Wait("a migration runs, its lock is held by pid 7"),
        "silence after receipt and the lock is held",
    ),
    # It only held it: nothing is lost but time.
    (
        silent(stage=Stage.RECEIVED),
        Enqueue("the worker that held the chain has gone; enqueueing again"),
        "silence after receipt",
    ),
    # Nobody took the message, and it is gone.
    (
        silent(queued=0),
        Enqueue("the message expired or was lost with a worker; enqueueing again"),
        "silence and the queue is empty",
    ),
    (
        silent(age=MESSAGE_TTL),
        Enqueue("the message expired or was lost with a worker; enqueueing again"),
        "message expired",
    ),
]


@pytest.mark.parametrize(
    ("seen", "decision"), [pytest.param(seen, decision, id=name) for seen, decision, name in TABLE]
)
def test_decision(seen: Observation, decision: Decision) -> None:
    """The observation gives this decision with this text."""
    assert decide(seen) == decision


@pytest.mark.parametrize(
    ("seen", "error", "reason"),
    [
        pytest.param(sent(LOST), MigrateGivenUpError, "its worker was lost", id="migrate lost"),
        pytest.param(sent(DONE, LOST), WarmGivenUpError, "its worker was lost", id="warm lost"),
        pytest.param(
            silent(stage=Stage.STARTED), MigrateGivenUpError, "its worker was lost", id="silence after migrate started"
        ),
        pytest.param(
            silent(DONE, stage=Stage.STARTED), WarmGivenUpError, "its worker was lost", id="silence after warm started"
        ),
        pytest.param(sent(DONE, DONE), WarmGivenUpError, "both tasks succeeded", id="cache lost after success"),
        pytest.param(
            sent(DONE, DONE, behind=True), MigrateGivenUpError, "both tasks succeeded", id="schema behind after success"
        ),
    ],
)
def test_given_up(seen: Observation, error: type[BootstrapError], reason: str) -> None:
    """After the last attempt, init ends with the step, the attempts and the reason; not before it."""
    decision = decide(replace(seen, losses=LAST))
    assert isinstance(decision, Fail)
    assert type(decision.error) is error
    assert str(MAX_ATTEMPTS) in str(decision.error)
    assert reason in str(decision.error)
    assert isinstance(decide(replace(seen, losses=LAST - 1)), Enqueue)


def test_an_expired_message_is_no_attempt() -> None:
    """An expired message is not an attempt: only the deadline ends the wait for a worker."""
    assert isinstance(decide(silent(queued=0, losses=LAST)), Enqueue)


@pytest.mark.parametrize(
    ("state", "stage"),
    [
        pytest.param(PENDING, Stage.PUBLISHED, id="pending"),
        pytest.param(HELD, Stage.RECEIVED, id="held"),
        pytest.param(UNREACHABLE, Stage.PUBLISHED, id="a server was away"),
        pytest.param(STARTED, Stage.STARTED, id="started"),
        pytest.param(DONE, Stage.STARTED, id="done"),
        pytest.param(LOST, Stage.STARTED, id="lost"),
    ],
)
def test_stage(state: TaskState, stage: Stage) -> None:
    """A task that a worker only holds, or that found a server away, has not started: its loss is no poison."""
    assert state.stage is stage


#: A chain that was published at 0, and of which nothing was heard until now.
QUIET = ChainRecord("of migrate", "of warm", seen_at=9)


def test_a_new_state_and_a_heartbeat_are_signs() -> None:
    """A state that changes is a sign, and so is each heartbeat; the same state again is none."""
    started = TaskState("STARTED")
    assert QUIET.with_states(PENDING, PENDING).silent_for == 9
    record = QUIET.with_states(started, PENDING)
    assert record.silent_for == 0
    record = replace(record, seen_at=12)
    assert record.with_states(started, PENDING).silent_for == 3
    assert record.with_states(STARTED, PENDING).silent_for == 0
    assert (record.age, QUIET.with_sign().silent_for) == (12, 0)


def test_the_stage_stays_when_redis_forgets() -> None:
    """What a worker has received or started is known although Redis was flushed."""
    for state in (HELD, STARTED):
        assert QUIET.with_states(state, PENDING).with_states(PENDING, PENDING).stage is state.stage
    assert QUIET.with_states(DONE, STARTED).with_states(PENDING, PENDING).stage is Stage.STARTED


def test_the_stage_is_that_of_the_current_step() -> None:
    """The warm is another message: the stage of the migrate means nothing for it."""
    migrated = QUIET.with_states(STARTED, PENDING).with_states(DONE, PENDING)
    assert migrated.stage is Stage.PUBLISHED
    assert migrated.with_states(DONE, HELD).stage is Stage.RECEIVED
    assert migrated.with_states(DONE, STARTED).stage is Stage.STARTED
