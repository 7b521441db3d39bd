"""The bootstrap worker of `init --with-worker`: a process of its own that consumes a queue of its own."""

from __future__ import annotations

import logging
import subprocess
import sys
import uuid
from tempfile import TemporaryDirectory
from typing import Self

from bifrost_bootstrap import settings as environment
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import ExitCode, InternalError, OwnProcessError, SettingsError

logger = logging.getLogger(__name__)

#: How often one init starts the worker. A worker that never comes up would be started forever.
MOST_STARTS = 5


class WorkerProcess:
    """
    A worker that lives as long as the block. `queue` is the only queue it consumes.

    The process is killed at the end of the block. If init dies before, its stdin closes and the worker ends itself.
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
        Start the worker if it does not run.

        Raises SettingsError if its configuration is wrong. After `MOST_STARTS` starts, raises InternalError if the
        worker reported a bug, else OwnProcessError.
        """
        if self._process:
            code = self._process.poll()
            if code is None:
                return
            self._check_exit(code)
            self._process.communicate()
        self._starts += 1
        variables = environment.child_environment(
            BIFROST_RUN_QUEUE=self.queue,
            TMPDIR=self._folder.name,
            # The worker waits for its servers no longer than init does.
            BIFROST_INIT_TIMEOUT=f"{self._deadline.remaining:.0f}s",
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bifrost_bootstrap", "worker"],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
        )

    def _check_exit(self, code: int) -> None:
        """Raise if the worker ended with a code after which another start cannot help."""
        if code == ExitCode.CONFIGURATION:
            raise SettingsError([f"the worker ended with code {ExitCode.CONFIGURATION}; the lines above it say why"])
        if self._starts >= MOST_STARTS:
            ended = f"ended with code {code} the last of {self._starts} times"
            if code == ExitCode.BUG:
                raise InternalError(f"the worker of this init {ended}")
            raise OwnProcessError("the worker of this init", f"it {ended}")
        logger.warning("the worker ended with code %s; starting another", code)

    def __exit__(self, *_error: object) -> None:
        assert self._process
        # A clean stop would take 2 s longer and gain nothing: no other init uses the queue, and all results are stored.
        self._process.kill()
        self._process.communicate()
        # A killed worker leaves the shared memory of its pool here.
        self._folder.cleanup()
