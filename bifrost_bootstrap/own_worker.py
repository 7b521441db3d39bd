"""The bootstrap worker that `init --with-worker` brings along: a process of its own on a queue of its own."""

from __future__ import annotations

import logging
import subprocess
import sys
import uuid
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from bifrost_bootstrap import settings as environment
from bifrost_bootstrap.errors import ExitCode, MigrateGivenUpError, SettingsError

logger = logging.getLogger(__name__)

#: Starts of the worker in one init; one that cannot start at all would be started for ever.
MOST_STARTS = 5


class OwnWorker:
    """
    A worker that lives as long as the block. `queue` is the one it consumes, alone.

    Its process ends with ours: it is killed at the end, and ends by itself when its stdin does.
    """

    def __init__(self, tree_queue: str) -> None:
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

        Raises MigrateGivenUpError after `MOST_STARTS`, SettingsError where starting it again cannot help.
        """
        if self._process and self._process.poll() is None:
            return
        if self._process and self._process.returncode == ExitCode.CONFIGURATION:
            raise SettingsError([f"the worker ended with code {ExitCode.CONFIGURATION}; the lines above it say why"])
        if self._process and self._starts >= MOST_STARTS:
            raise MigrateGivenUpError(self._starts, f"the worker ended with code {self._process.returncode}")
        if self._process:
            logger.warning("the worker ended with code %s; starting another", self._process.returncode)
        self._starts += 1
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bifrost_bootstrap", "worker"],
            env=environment.child_environment(BIFROST_RUN_QUEUE=self.queue, TMPDIR=self._folder.name),
            stdin=subprocess.PIPE, stdout=sys.stderr,
        )  # fmt: skip

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process
        # Nobody else consumes its queue and what it did is stored: a clean stop would only take 2 s longer.
        self._process.kill()
        self._process.wait()
        # Killed, it leaves the shared memory of its pool.
        self._folder.cleanup()
