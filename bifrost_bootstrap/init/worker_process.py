"""The bootstrap worker of `init --with-worker`: a process of its own on a queue of its own."""

from __future__ import annotations

import logging
import subprocess
import sys
import uuid
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from bifrost_bootstrap import settings as environment
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import ExitCode, InternalError, OwnProcessError, SettingsError

logger = logging.getLogger(__name__)

#: Starts of the worker in one init; one that cannot start at all would be started for ever.
MOST_STARTS = 5


class WorkerProcess:
    """
    A worker that lives as long as the block. `queue` is the one it consumes, alone.

    Its process ends with ours: it is killed at the end, and ends by itself when its stdin does.
    """

    def __init__(self, tree_queue: str, deadline: Deadline) -> None:
        self._deadline = deadline
        self.queue = f"{tree_queue}.{uuid.uuid4().hex[:8]}"
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._folder = TemporaryDirectory(prefix="bifrost-worker-", ignore_cleanup_errors=True)

    def __enter__(self) -> Self:
        self.ensure_running()
        return self

    def ensure_running(self) -> None:
        """
        Start the worker, or start it again where it died.

        Raises SettingsError where starting it again cannot help; after `MOST_STARTS` InternalError where it says that
        it has a bug, else OwnProcessError.
        """
        if self._process and self._process.poll() is None:
            return
        if self._process:
            self._judge(self._process.returncode)
            self._process.communicate()
        self._starts += 1
        variables = environment.child_environment(
            BIFROST_RUN_QUEUE=self.queue, TMPDIR=self._folder.name,
            # It waits for its servers no longer than we do.
            BIFROST_INIT_TIMEOUT=f"{self._deadline.remaining:.0f}s",
        )  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bifrost_bootstrap", "worker"],
            env=variables, stdin=subprocess.PIPE, stdout=sys.stderr,
        )  # fmt: skip

    def _judge(self, code: int) -> None:
        """Whether another start may help."""
        if code == ExitCode.CONFIGURATION:
            raise SettingsError([f"the worker ended with code {ExitCode.CONFIGURATION}; the lines above it say why"])
        if self._starts >= MOST_STARTS:
            ended = f"ended with code {code} the last of {self._starts} times"
            if code == ExitCode.BUG:
                raise InternalError(f"the worker of this init {ended}")
            raise OwnProcessError("the worker of this init", f"it {ended}")
        logger.warning("the worker ended with code %s; starting another", code)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process
        # Nobody else consumes its queue and what it did is stored: a clean stop would only take 2 s longer.
        self._process.kill()
        self._process.communicate()
        # Killed, it leaves the shared memory of its pool.
        self._folder.cleanup()
