"""What all parts of one run of init need: the requested work, the deadline, and the servers that fail now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from bifrost_bootstrap import errors
from bifrost_bootstrap.deadline import Deadline, RejectionTimer
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.status.readiness import Readiness

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


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


class ServerErrors:
    """
    The operations that a server did not carry out the last time, and why.

    current: the newest error of each such operation. final: waiting for this one is of no use; None if there is none.
    """

    def __init__(self) -> None:
        self.current: dict[str, errors.BootstrapError] = {}
        self.final: errors.BootstrapError | None = None
        self._timers: dict[str, RejectionTimer] = {}

    def attempt(self, operation: str, call: Callable[[], _Result]) -> _Result | None:
        """
        The result of the call; None if a server failed. Raises CertificateError, and errors that no server causes.

        A rejection may pass, and so may Redis refusing a write (out of memory, for example).
        """
        timer = self._timers.setdefault(operation, RejectionTimer(errors.RefusedError, errors.WarmError))
        try:
            result = call()
        except errors.CertificateError:
            raise
        except (errors.UnavailableError, errors.RefusedError, errors.WarmError) as error:
            logger.debug("%s: %s", operation, error)
            self.current[operation] = error
            if timer.expired_by(error):
                self.final = error
            return None
        self.current.pop(operation, None)
        timer.expired_by(None)
        return result

    @property
    def first(self) -> errors.BootstrapError | None:
        """The error that has lasted longest; None if every operation succeeded the last time."""
        return next(iter(self.current.values()), None)

    def __str__(self) -> str:
        """The servers that fail now, in words; "" for none. init waits for them: nothing has failed yet."""
        reasons = {
            str(error.args[0] if isinstance(error, errors.WarmError) else error) for error in self.current.values()
        }
        return "; ".join(sorted(reasons))


@dataclass(frozen=True)
class Run:
    """
    What all parts of one run of init share.

    own_worker: init has started the only worker of its queue, so that a queue without a consumer means nothing.
    """

    settings: Settings
    deadline: Deadline
    request: Request
    own_worker: bool
    server_errors: ServerErrors = field(default_factory=ServerErrors)

    def deadline_error(self, what: str) -> errors.DeadlineError:
        """The error for a deadline that passed. what: was going on."""
        kind = errors.OwnWorkerDeadlineError if self.own_worker else errors.DeadlineError
        return kind(what, self.deadline.seconds)
