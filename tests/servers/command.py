"""A process that a test starts: bounded, killed with all its descendants, its whole output kept for the run."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from tests.servers.process import ProcessTree, RunFolder, end_processes, processes_left, tail, wait_until

#: Seconds for a command that a test waits for, and for a line that it waits to see.
DEFAULT_TIMEOUT = 60.0
#: Seconds that a long-running command gets to end by SIGTERM when its test is over.
STOP_GRACE = 10.0


class Command(ProcessTree):
    """A started command with stdout and stderr in two files of the run's output folder.

    Attributes:
        stdout: The file with its standard output so far.
        stderr: The file with its standard error so far.
    """

    def __init__(self, run: RunFolder, args: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> None:
        self.args = list(args)
        self.name = run.name("command")
        self.stdout = run.output / f"{self.name}.stdout"
        self.stderr = run.output / f"{self.name}.stderr"
        with (run.output / f"{run.worker}-commands.txt").open("a") as listing:
            listing.write(f"{self.name}: {self.args}\n")
        with self.stdout.open("wb") as stdout, self.stderr.open("wb") as stderr:
            super().__init__(
                self.args,
                env=env,
                cwd=cwd,
                mark=run.mark(self.name),
                stdout=stdout.fileno(),
                stderr=stderr.fileno(),
            )

    def wait(self, timeout: float = DEFAULT_TIMEOUT) -> subprocess.CompletedProcess[str]:
        """Wait for its end and return code and output as text (what is not UTF-8 as backslash escapes).

        Raises:
            AssertionError: It has not ended `timeout` seconds from now; it is killed, and the text has its last lines.
        """
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"{self.name} was still running after {timeout:g} s\n{self._tails()}") from None
        return subprocess.CompletedProcess(self.args, code, read(self.stdout), read(self.stderr))

    def wait_for(
        self, pattern: str, timeout: float = DEFAULT_TIMEOUT, stream: Literal["stdout", "stderr"] = "stderr"
    ) -> re.Match[str]:
        """Wait until its output so far has a match of the regular expression, and return the first.

        Raises:
            AssertionError: It ended without, or `timeout` seconds have passed; with its last lines.
        """
        path = self.stdout if stream == "stdout" else self.stderr
        found: list[re.Match[str]] = []

        def look() -> bool:
            ended = not self.running  # before reading: what it wrote last is seen
            if match := re.search(pattern, read(path)):
                found.append(match)
            return bool(found) or ended

        try:
            wait_until(look, f"{pattern!r} on {stream}", timeout)
        except TimeoutError as error:
            raise AssertionError(f"{self.name}: {error}\n{self._tails()}") from None
        if not found:
            code = self.process.returncode
            raise AssertionError(f"{self.name} ended ({code}) without {pattern!r} on {stream}\n{self._tails()}")
        return found[0]

    def terminate(self, timeout: float = DEFAULT_TIMEOUT) -> subprocess.CompletedProcess[str]:
        """SIGTERM to the process alone, as a container engine does, then as `wait`."""
        self.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def close(self) -> None:
        """End it: SIGTERM, and after STOP_GRACE seconds SIGKILL.

        Raises:
            AssertionError: It has ended by itself, or at SIGTERM, and left processes running; they are killed.
        """
        self.stop(signal.SIGTERM, STOP_GRACE)
        left = processes_left(self.mark) if self.process.returncode >= 0 else []
        names = [" ".join(process.cmdline()) for process in left]
        self.end()
        end_processes(left)
        if left:
            raise AssertionError(f"{self.name} ended with {self.process.returncode} and left running: {names}")

    def _tails(self) -> str:
        return f"--- stdout\n{tail(self.stdout)}\n--- stderr\n{tail(self.stderr)}"


def read(path: Path) -> str:
    """Return a file's text; bytes that are not UTF-8 become backslash escapes."""
    return path.read_text(encoding="utf-8", errors="backslashreplace")


class Commands:
    """The commands of one test; `close` ends them all, the last one first."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._commands: list[Command] = []

    def start(self, args: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> Command:
        """Start a command; from the main thread, if it is to live longer than the call (see ProcessTree)."""
        command = Command(self._run, args, env=env, cwd=cwd)
        self._commands.append(command)
        return command

    def kill(self) -> None:
        """End all that still run at once, where how they end is not what is tested."""
        for command in self._commands:
            if command.running:
                command.kill()

    def close(self) -> None:
        """End all that still run; raises as `Command.close`, when all have been ended."""
        with contextlib.ExitStack() as all_closed:
            for command in self._commands:
                all_closed.callback(command.close)
        self._commands.clear()
