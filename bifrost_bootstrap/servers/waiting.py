"""Waiting for servers that are not up yet: side by side, each logged when the wait begins and then every 10 s."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from queue import Empty, Queue
from threading import Event, Thread

from bifrost_bootstrap.deadline import LOG_INTERVAL, Deadline, Interval, RejectionTimer
from bifrost_bootstrap.errors import RefusedError, UnavailableError

logger = logging.getLogger(__name__)

#: Seconds between two probes of a server.
POLL_INTERVAL = 0.5
#: Seconds after which a server is logged although its first probe has not returned.
SILENCE = 1.0
#: Seconds that a server gets for the answer to one probe.
PROBE_TIMEOUT = 5.0

#: Returns if the server can be used. Raises UnavailableError or RefusedError if not.
Probe = Callable[[], object]


@dataclass(frozen=True)
class Waited:
    """A server that was not available at once, and how long it took (seconds)."""

    server: str
    seconds: float


def wait_for(servers: Mapping[str, Probe], deadline: Deadline, earlier: Iterable[BaseException] = ()) -> list[Waited]:
    """
    Probe each server until it is available. Returns those that had to be waited for; empty if there were none.

    At the deadline, raises the error of the missing server that answered last; if none has answered, the last of
    `earlier`, errors that were seen before. A rejection that lasts (see `RejectionTimer`), and any other error of a
    probe, is raised at once.
    """
    since = Deadline(deadline.remaining)
    missing = {server: _Missing(UnavailableError(server, "no answer yet")) for server in servers}
    waited: list[Waited] = []
    answers: Queue[tuple[str, BaseException | None]] = Queue()
    stop = Event()
    for server, probe in servers.items():
        # A thread each: no server waits for another. Daemons: a probe that hangs must not keep the process alive.
        Thread(target=_probe_until_available, args=(server, probe, answers, stop), name=server, daemon=True).start()
    try:
        while missing and not deadline.passed:
            for one in missing.values():
                one.log(deadline, since)
            try:
                server, error = answers.get(timeout=min(POLL_INTERVAL, deadline.remaining))
            except Empty:
                continue
            state = missing.pop(server)
            if error:
                state.update(error)
                # Back in as the last: the order is that of the answers.
                missing[server] = state
            elif state.logged:
                waited.append(Waited(server, round(since.elapsed, 1)))
                logger.info("%s is available after %.1fs", server, since.elapsed)
    finally:
        stop.set()
    if missing:
        answered = [one.error for one in missing.values() if one.answered]
        raise (answered or [*(one.error for one in missing.values()), *earlier])[-1]
    return waited


@dataclass
class _Missing:
    """A server that is not available yet. error: its last answer."""

    error: BaseException
    answered: bool = False
    logged: bool = False
    log_again: Interval = field(default_factory=lambda: Interval(LOG_INTERVAL))
    rejections: RejectionTimer = field(default_factory=RejectionTimer)

    def log(self, deadline: Deadline, since: Deadline) -> None:
        """Log the last answer if that is due."""
        if (self.answered or since.elapsed > SILENCE) and self.log_again.due():
            self.logged = True
            logger.info("waiting for a server: %s (%.0fs of %.0fs)", self.error, deadline.elapsed, deadline.seconds)

    def update(self, error: BaseException) -> None:
        """Take in an answer. Raises it if waiting is of no use."""
        if self.rejections.expired_by(error) or not isinstance(error, UnavailableError | RefusedError):
            raise error
        if not self.answered:
            # Log it now: the first answer says more than "no answer yet".
            self.log_again = Interval(LOG_INTERVAL)
        self.answered = True
        self.error = error


def _probe_until_available(
    server: str, probe: Probe, answers: Queue[tuple[str, BaseException | None]], stop: Event
) -> None:
    while not stop.is_set():
        error: BaseException | None = None
        try:
            probe()
        except BaseException as failure:  # noqa: BLE001  (raised again by `wait_for`)
            error = failure
        answers.put((server, error))
        if not isinstance(error, UnavailableError | RefusedError):
            return
        stop.wait(POLL_INTERVAL)
