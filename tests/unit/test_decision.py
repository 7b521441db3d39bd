"""What init does next, as a table: one line for each way through `decide`."""

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
    Decision,
    Enqueue,
    Fail,
    Observation,
    Succeed,
    TaskState,
    Wait,
    decide,
)
from bifrost_bootstrap.progress import MESSAGE_TTL, Progress

REFUSAL = SchemaError("several_heads", "forked", "merge")
FAILED_MIGRATE = MigrationError("0002", "t", "", "no", "", ["0001"])
FAILED_WARM = WarmError("no room")

PENDING = TaskState()
HELD = TaskState(alive=True)
STARTED = TaskState("STARTED", alive=True)
DONE = TaskState("SUCCESS", result={"seconds": 1})
LOST = TaskState("FAILURE", worker_lost="its worker was lost")
UNDONE = TaskState("FAILURE", transient_failure="PostgreSQL was away")
#: As often as a worker may be lost before the last attempt.
LAST = MAX_ATTEMPTS - 1

#: A chain of ours, just sent.
SENT = Observation(published=True, queued=1, consumers=1)
#: The same, long after its last sign.
SILENT = replace(SENT, silent_for=SILENCE, age=SILENCE)


def seen(base: Observation, **changes: Any) -> Observation:
    """An observation like another, with these changes."""
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("seen", "decision"),
    [
        # The truth goes before everything that the queue says.
        (Observation(ready=True), Succeed()),
        (seen(SENT, ready=True, migrate=LOST, losses=LAST), Succeed()),
        (seen(SENT, ready=True, away="RabbitMQ is away"), Succeed()),
        (seen(SENT, ready=True, warm=TaskState("FAILURE", error=FAILED_WARM)), Succeed()),
        (Observation(ready=True, refusal=REFUSAL), Succeed()),
        # No migration can help.
        (Observation(refusal=REFUSAL), Fail(REFUSAL)),
        (seen(SENT, refusal=REFUSAL, migrate=STARTED), Fail(REFUSAL)),
        # Nothing sent yet.
        (Observation(), Enqueue("enqueueing the chain")),
        (Observation(consumers=0, queued=0), Enqueue("enqueueing the chain")),
        (
            Observation(lock_holder="pid 7"),
            Wait("a migration runs already, its lock is held by pid 7"),
        ),
        # A task failed by itself.
        (seen(SENT, migrate=TaskState("FAILURE", error=FAILED_MIGRATE)), Fail(FAILED_MIGRATE)),
        (seen(SENT, migrate=DONE, warm=TaskState("FAILURE", error=FAILED_WARM)), Fail(FAILED_WARM)),
        (
            seen(SENT, losses=LAST, migrate=TaskState("FAILURE", error=FAILED_MIGRATE)),
            Fail(FAILED_MIGRATE),
        ),
        (seen(SENT, away="RabbitMQ is away", warm=TaskState("FAILURE", error=FAILED_WARM)), Fail(FAILED_WARM)),
        # While a server cannot be asked, what is known may be old.
        (Observation(away="Redis is away"), Wait("Redis is away")),
        (seen(SENT, away="PostgreSQL is away", migrate=DONE, warm=DONE), Wait("PostgreSQL is away")),
        (seen(SILENT, away="Redis is away", started=True), Wait("Redis is away")),
        # A server was away from where the task ran: tried again, steadily.
        (seen(SENT, migrate=UNDONE), Wait("PostgreSQL was away")),
        (seen(SENT, migrate=DONE, warm=UNDONE, age=RETRY_PAUSE), Enqueue("PostgreSQL was away; enqueueing again")),
        (seen(SENT, migrate=UNDONE, age=RETRY_PAUSE, losses=LAST), Enqueue("PostgreSQL was away; enqueueing again")),
        # A task was lost with its worker.
        (
            seen(SENT, started=True, migrate=LOST),
            Enqueue(f"its worker was lost; enqueueing again (attempt 2 of {MAX_ATTEMPTS})", worker_lost=True),
        ),
        (
            seen(SENT, started=True, migrate=DONE, warm=LOST),
            Enqueue(f"its worker was lost; enqueueing again (attempt 2 of {MAX_ATTEMPTS})", worker_lost=True),
        ),
        # Celery marks the second task of a chain whose first one was lost, too.
        (
            seen(SENT, migrate=LOST, warm=LOST),
            Enqueue(f"its worker was lost; enqueueing again (attempt 2 of {MAX_ATTEMPTS})", worker_lost=True),
        ),
        # Both ended well, and yet it is not so.
        (
            seen(SENT, migrate=DONE, warm=DONE),
            Enqueue(
                "both tasks succeeded, but schema and cache are not ready; "
                f"enqueueing again (attempt 2 of {MAX_ATTEMPTS})",
                worker_lost=True,
            ),
        ),
        # A worker has it.
        (seen(SENT, migrate=HELD), Wait("migrate is about to start")),
        (seen(SENT, migrate=TaskState(alive=True, progress=Progress("migrate", note="0001"))), Wait("migrate: 0001")),
        (
            seen(SENT, migrate=DONE, warm=TaskState(alive=True, progress=Progress("warm", note="staging"))),
            Wait("warm: staging"),
        ),
        (seen(SENT, migrate=DONE, warm=HELD), Wait("warm is about to start")),
        (seen(SILENT, started=True, migrate=STARTED), Wait("migrate is about to start")),
        # Its message is on the way.
        (SENT, Wait("migrate is about to start")),
        (seen(SENT, consumers=0), Wait("no bootstrap worker takes the chain")),
        (seen(SENT, consumers=0, received=True), Wait("migrate is about to start")),
        (seen(SENT, consumers=None, queued=None), Wait("migrate is about to start")),
        (seen(SENT, migrate=DONE), Wait("warm is about to start")),
        (SILENT, Wait("the chain is queued")),
        (seen(SILENT, consumers=0), Wait("no bootstrap worker takes the chain")),
        (seen(SILENT, queued=None, consumers=None), Wait("the chain is queued")),
        # A worker had it, and is silent.
        (
            seen(SILENT, started=True),
            Enqueue(f"its worker was lost; enqueueing again (attempt 2 of {MAX_ATTEMPTS})", worker_lost=True),
        ),
        (
            seen(SILENT, started=True, migrate=DONE),
            Enqueue(f"its worker was lost; enqueueing again (attempt 2 of {MAX_ATTEMPTS})", worker_lost=True),
        ),
        # It may be that it only cannot tell us.
        (seen(SILENT, started=True, lock_holder="pid 7"), Wait("a migration runs, its lock is held by pid 7")),
        (seen(SILENT, received=True, lock_holder="pid 7"), Wait("a migration runs, its lock is held by pid 7")),
        # It only held it: nothing is lost but time.
        (seen(SILENT, received=True), Enqueue("the worker that held the chain has gone; enqueueing again")),
        # Nobody took the message, and it is gone.
        (seen(SILENT, queued=0), Enqueue("the message expired or was lost with a worker; enqueueing again")),
        (seen(SILENT, age=MESSAGE_TTL), Enqueue("the message expired or was lost with a worker; enqueueing again")),
    ],
)  # fmt: skip
def test_decision(seen: Observation, decision: Decision) -> None:
    """Each observation gives this decision, with these words."""
    assert decide(seen) == decision


@pytest.mark.parametrize(
    ("seen", "error", "reason"),
    [
        (seen(SENT, migrate=LOST), MigrateGivenUpError, "its worker was lost"),
        (seen(SENT, migrate=DONE, warm=LOST), WarmGivenUpError, "its worker was lost"),
        (seen(SILENT, started=True), MigrateGivenUpError, "its worker was lost"),
        (seen(SILENT, started=True, migrate=DONE), WarmGivenUpError, "its worker was lost"),
        (seen(SENT, migrate=DONE, warm=DONE), WarmGivenUpError, "both tasks succeeded"),
        (seen(SENT, migrate=DONE, warm=DONE, behind=True), MigrateGivenUpError, "both tasks succeeded"),
    ],
)
def test_given_up(seen: Observation, error: type[BootstrapError], reason: str) -> None:
    """After the last attempt it ends, with the step, the attempts and the reason; before it, it does not."""
    decision = decide(replace(seen, losses=LAST))
    assert isinstance(decision, Fail)
    assert type(decision.error) is error
    assert str(MAX_ATTEMPTS) in str(decision.error)
    assert reason in str(decision.error)
    assert isinstance(decide(replace(seen, losses=LAST - 1)), Enqueue)


def test_an_expired_message_is_no_attempt() -> None:
    """Waiting for a worker that does not come never gives up by itself: that is the deadline's business."""
    assert isinstance(decide(seen(SILENT, queued=0, losses=LAST)), Enqueue)


@pytest.mark.parametrize(
    ("state", "begun"),
    [(PENDING, False), (HELD, False), (UNDONE, False), (STARTED, True), (DONE, True), (LOST, True)],
)
def test_begun(state: TaskState, begun: bool) -> None:
    """A task that a worker only holds, or that found a server away, has not begun: its loss is no poison."""
    assert state.started is begun
