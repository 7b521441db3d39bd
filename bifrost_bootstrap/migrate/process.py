"""The process in which the tree's own Alembic runs: it gets one request, sends events, and leaves nothing behind."""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from bifrost_bootstrap import settings as environment
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import SettingsError
from bifrost_bootstrap.migrate.tree import Alembic

logger = logging.getLogger(__name__)

PROGRAM = Path(__file__).with_name("script") / "__main__.py"
#: Seconds for the tree's Alembic to import and answer one request; imports take 0.4 to 2 s.
ASK_TIMEOUT = 60.0
#: Seconds for the last output of a runner that has ended or sent its last event: processes that the tree has started
#: may keep the pipes open.
LAST_OUTPUT = 1.0
#: Bytes of one read: what a pipe holds.
PIPE_BYTES = 65536


class Child:
    """
    The runner (`script/`) under the tree's interpreter, until the block ends. Then its process group is killed.

    request: JSON fields of what it is to do. variables: for its environment. last_line: the last line that the tree
    printed, or "".

    Raises SettingsError if the interpreter does not start.
    """

    def __init__(self, alembic: Alembic, request: Mapping[str, Any], **variables: str) -> None:
        self.last_line = ""
        # This pipe brings the request, and its end tells the runner that we are gone. Not stdin: a revision that reads
        # stdin finds its end at once.
        reading, self._alive = os.pipe()
        # A pipe takes 64 KB before anybody reads; a request has less than 4.
        os.write(self._alive, json.dumps({"arguments": alembic.arguments, **request}).encode() + b"\n")
        try:
            self._process = subprocess.Popen(  # noqa: S603  (the operator's own interpreter)
                [alembic.python, str(PROGRAM), str(reading)],
                cwd=alembic.folder,
                env=environment.child_environment(**variables),
                pass_fds=[reading],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._alive)
            raise unfit(alembic, f"does not start: {error.strerror}") from error
        finally:
            os.close(reading)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._alive)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with self._process:
            pass

    @property
    def returncode(self) -> int | None:
        """Negative: the signal that ended it. None: it runs."""
        return self._process.poll()

    def events(self, every: float) -> Iterator[dict[str, Any]]:
        """
        The runner's events until it ends, and an empty event at once and then every so many seconds.

        The tree's own output goes to the log.
        """
        stdout = self._process.stdout
        stderr = self._process.stderr
        assert stdout and stderr
        due = Deadline(0)
        ended: Deadline | None = None
        incomplete: dict[int, bytes] = defaultdict(bytes)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            selector.register(stderr, selectors.EVENT_READ)
            while selector.get_map() and not (ended and ended.passed):
                for pipe, line in _read_lines(selector, (ended or due).remaining, incomplete):
                    if pipe == stderr.fileno():
                        self.last_line = line
                        logger.debug("tree: %s", line)
                        continue
                    event = json.loads(line)
                    if event["event"] in ("done", "error"):
                        ended = Deadline(LAST_OUTPUT)
                    yield event
                if due.passed and not ended:
                    yield {}
                    due = Deadline(every)
                    if self.returncode is not None:
                        ended = Deadline(LAST_OUTPUT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_OUTPUT)


def _read_lines(
    selector: selectors.BaseSelector, timeout: float, incomplete: dict[int, bytes]
) -> Iterator[tuple[int, str]]:
    """The lines that are complete within so many seconds, each with its pipe. A closed pipe leaves the selector."""
    for key, _ in selector.select(timeout):
        data = os.read(key.fd, PIPE_BYTES)
        if not data:
            selector.unregister(key.fileobj)
        *lines, incomplete[key.fd] = (incomplete[key.fd] + data).split(b"\n")
        for line in lines:
            yield key.fd, line.decode(errors="replace")


def ask(alembic: Alembic, request: Mapping[str, Any], **variables: str) -> dict[str, Any]:
    """
    The answer of the tree's own Alembic to one request, in its own process.

    If the tree fails, the answer has a `message` and nothing that was asked for. variables: for the environment.

    Raises SettingsError if the interpreter does not start, or has no Alembic.
    """
    deadline = Deadline(ASK_TIMEOUT)
    with Child(alembic, request, **variables) as child:
        for event in child.events(every=1.0):
            if event.get("kind") == "no_alembic":
                raise unfit(alembic, event["message"])
            if event:
                return event
            if deadline.passed:
                return {"message": f"no answer within {ASK_TIMEOUT:.0f}s"}
    return {"message": child.last_line or f"its interpreter ended with code {child.returncode}"}


def unfit(alembic: Alembic, why: str) -> SettingsError:
    """The tree's interpreter cannot run the tree. why: what it does or lacks."""
    return SettingsError([f"BIFROST_ALEMBIC_PYTHON names {alembic.python}, which {why}"])
