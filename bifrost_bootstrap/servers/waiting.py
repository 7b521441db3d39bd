"""Waiting for servers that are not up yet: side by side, said once and then steadily, within the deadline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Event, Thread

from bifrost_bootstrap.deadline import Deadline, RejectionTimer
from bifrost_bootstrap.errors import RefusedError, UnavailableError

logger = logging.getLogger(__name__)

#: Seconds between two looks at a server, and between two log lines about it.
POLL_INTERVAL, LOG_INTERVAL = 0.5, 10.0
#: Seconds after which a server that is silent is named, although its first look has not ended.
SILENCE = 1.0
#: Seconds that a server gets for the answer to one look.
PROBE_TIMEOUT = 5.0

Look = Callable[[], object]


@dataclass(frozen=True)
class Waited:
    """A server that was not there at once, and how long it took (seconds)."""

    server: str
    seconds: float


def wait_for(servers: Mapping[str, Look], deadline: Deadline, earlier: Iterable[BaseException] = ()) -> list[Waited]:
    """
    Call each look until it no longer raises UnavailableError or RefusedError.

    Returns what had to be waited for. earlier: errors that were seen before. Raises the error of a server at the
    deadline (if none has answered until then, one that was seen earlier), a RefusedError that lasts
    longer than `RejectionTimer`, and a CertificateError and any other error of a look at once.
    """
    since = Deadline(deadline.remaining)
    # The one that was heard of last comes last.
    missing: dict[str, BaseException] = {server: UnavailableError(server, "no answer yet") for server in servers}
    unheard = set(servers)
    rejections = {server: RejectionTimer() for server in servers}
    said: dict[str, Deadline] = {}
    waited: list[Waited] = []
    seen: Queue[tuple[str, BaseException | None]] = Queue()
    given_up = Event()

    def say(server: str) -> None:
        if server not in said or said[server].passed:
            said[server] = Deadline(LOG_INTERVAL)
            logger.info("waiting for it: %s (%.0fs of %.0fs)", missing[server], deadline.elapsed, deadline.seconds)

    for server, look in servers.items():
        # Each in a thread of its own, none has to wait for another; a look that hangs must not keep the process.
        Thread(target=_watch, args=(server, look, seen, given_up), name=server, daemon=True).start()
    try:
        while missing:
            if deadline.passed:
                heard = [error for server, error in missing.items() if server not in unheard]
                raise (heard or [*missing.values(), *earlier])[-1]
            for silent in missing if since.elapsed > SILENCE else ():
                say(silent)
            try:
                server, error = seen.get(timeout=min(POLL_INTERVAL, deadline.remaining))
            except Empty:
                continue
            if error is None:
                del missing[server]
                if server in said:
                    waited.append(Waited(server, round(since.elapsed, 1)))
                    logger.info("%s is there after %.1fs", server, since.elapsed)
                continue
            if server in unheard:
                # What it says now is more than that it was silent.
                unheard.remove(server)
                said.pop(server, None)
            del missing[server]
            missing[server] = error
            if not isinstance(error, UnavailableError | RefusedError) or rejections[server].expired_by(error):
                raise error
            say(server)
    finally:
        given_up.set()
    return waited


def _watch(server: str, look: Look, seen: Queue[tuple[str, BaseException | None]], given_up: Event) -> None:
    while not given_up.is_set():
        try:
            look()
        except (UnavailableError, RefusedError) as error:
            seen.put((server, error))
        except BaseException as error:  # noqa: BLE001  (raised again where it is waited for)
            seen.put((server, error))
            return
        else:
            seen.put((server, None))
            return
        given_up.wait(POLL_INTERVAL)
