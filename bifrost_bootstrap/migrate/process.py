"""The process in which a tree runs its own Alembic: given one request, heard line by line, gone at the end."""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from bifrost_bootstrap import settings as environment
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import SettingsError
from bifrost_bootstrap.migrate.tree import Alembic

logger = logging.getLogger(__name__)

PROGRAM = Path(__file__).with_name("script") / "__main__.py"
#: Seconds for the tree's Alembic to import and answer one request; imports take 0.4 to 2 s.
ASK_TIMEOUT = 60.0

#: Lines of the tree's own output that are kept for a report.
KEPT_OUTPUT = 20
#: Seconds for the last words of a child that has ended, or said how it ends: what it started may keep its pipes open.
LAST_WORDS = 1.0


class Child:
    """
    `script/` under the tree's interpreter, until the block ends; then nothing is left of its process group.

    request: what it is to do. variables: for its environment. output: the last lines that the tree printed.

    Raises SettingsError where the interpreter does not start.
    """

    def __init__(self, alembic: Alembic, request: Mapping[str, Any], **variables: str) -> None:
        self.output: deque[str] = deque(maxlen=KEPT_OUTPUT)
        # The request, and the sign that we live. Not by stdin: a revision that reads that finds its end at once.
        reading, self._alive = os.pipe()
        # A pipe takes 64 KB before anybody reads; a request has less than 4.
        os.write(self._alive, json.dumps({"arguments": alembic.arguments, **request}).encode() + b"\n")
        try:
            self._process = subprocess.Popen(  # noqa: S603  (the operator's own interpreter)
                [alembic.python, str(PROGRAM), str(reading)], pass_fds=[reading], stdin=subprocess.DEVNULL,
                cwd=alembic.folder, env=environment.child_environment(**variables), bufsize=0,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
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
        What it says until it ends, and an empty event at once and every so many seconds; what the tree prints goes to
        the log.

        What it has started may live on and keep the pipes open.
        """
        stdout, stderr = self._process.stdout, self._process.stderr
        assert stdout and stderr
        ended: Deadline | None = None
        with selectors.DefaultSelector() as selector:
            for stream in (stdout, stderr):
                selector.register(stream, selectors.EVENT_READ, _Lines(stream))
            due = Deadline(0)
            while selector.get_map() and not (ended and ended.passed):
                for key, _ in selector.select(ended.remaining if ended else due.remaining):
                    lines = key.data.read()
                    if lines is None:
                        selector.unregister(key.fileobj)
                    for line in lines or ():
                        if key.fileobj is stderr:
                            self.output.append(line)
                            logger.debug("tree: %s", line)
                            continue
                        event = json.loads(line)
                        if event["event"] in ("done", "error"):
                            ended = Deadline(LAST_WORDS)
                        yield event
                if due.passed and not ended:
                    yield {}
                    if self.returncode is not None:
                        ended = Deadline(LAST_WORDS)
                    due = Deadline(every)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WORDS)


def ask(alembic: Alembic, request: Mapping[str, Any], **variables: str) -> dict[str, Any]:
    """
    The answer of the tree's own Alembic to one request, in its own process (`script/`).

    Where it fails, the answer has a `message` and nothing else that was asked for. variables: for its environment.

    Raises SettingsError where the interpreter does not start, or has no Alembic.
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
    return {"message": child.output[-1] if child.output else f"its interpreter ended with code {child.returncode}"}


def unfit(alembic: Alembic, why: str) -> SettingsError:
    """The tree's interpreter cannot run the tree. why: what it does or lacks."""
    return SettingsError([f"BIFROST_ALEMBIC_PYTHON names {alembic.python}, which {why}"])


class _Lines:
    """Whole lines of a pipe that is read as data comes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._rest = stream, b""

    def read(self) -> list[str] | None:
        """The lines that are complete now; None at the end of the stream."""
        data = os.read(self._stream.fileno(), 65536)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]
