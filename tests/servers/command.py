"""A process that a test starts. It is killed with all its descendants, and its output goes to files of the run."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from tests.servers.process import ProcessTree, RunFolder, end_processes, processes_left, tail, wait_until

#: How long a test waits for the end of a command, or for a line of its output (seconds).
DEFAULT_TIMEOUT = 60.0


class Command(ProcessTree):
    """A started process whose stdout and stderr go to two files in the output folder of the run.

    Attributes:
        stdout: The file with its standard output.
        stderr: The file with its standard error.
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
        """Wait until it exits; return its exit code and output as text (other bytes than UTF-8 as backslash escapes).

        Raises:
            AssertionError: It still ran after `timeout` seconds, and was killed. The text has its last lines.
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
        """Wait until its output matches the regular expression; return the first match.

        Raises:
            AssertionError: It exited without a match, or `timeout` seconds have passed. The text has its last lines.
        """
        path = self.stdout if stream == "stdout" else self.stderr
        found: list[re.Match[str]] = []

        def matched_or_ended() -> bool:
            ended = not self.running  # before the read, so that the read sees its last line
            if match := re.search(pattern, read(path)):
                found.append(match)
            return bool(found) or ended

        try:
            wait_until(matched_or_ended, f"{pattern!r} on {stream}", timeout)
        except TimeoutError as error:
            raise AssertionError(f"{self.name}: {error}\n{self._tails()}") from None
        if not found:
            code = self.process.returncode
            raise AssertionError(f"{self.name} ended ({code}) without {pattern!r} on {stream}\n{self._tails()}")
        return found[0]

    def terminate(self, timeout: float = DEFAULT_TIMEOUT) -> subprocess.CompletedProcess[str]:
        """Send SIGTERM to the process but not to its children, as a container engine does; then `wait`."""
        self.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def close(self) -> None:
        """Kill it if it still runs. (A worker takes seconds for a clean stop. A test of the stop calls `terminate`.)

        Raises:
            AssertionError: It exited before, by itself or after a signal that it handled, and left processes running.
                They are killed.
        """
        code = self.process.poll()
        if code is None or code < 0:
            self.end()
            return
        left = processes_left(self.mark)
        names = [" ".join(process.cmdline()) for process in left]
        end_processes(left)
        if left:
            raise AssertionError(f"{self.name} ended with {code} and left running: {names}")

    def _tails(self) -> str:
        return f"--- stdout\n{tail(self.stdout)}\n--- stderr\n{tail(self.stderr)}"


def read(path: Path) -> str:
    """Return the text of a file; other bytes than UTF-8 become backslash escapes."""
    return path.read_text(encoding="utf-8", errors="backslashreplace")


class Commands:
    """The commands of one test. `close` ends all of them, the last one first."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._commands: list[Command] = []

    def start(self, args: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> Command:
        """Start a command; in the main thread, if the command outlives the thread (see `process._die_with_parent`)."""
        command = Command(self._run, args, env=env, cwd=cwd)
        self._commands.append(command)
        return command

    def close(self) -> None:
        """Close every command. Raises as `Command.close`, after all of them have ended."""
        with contextlib.ExitStack() as all_closed:
            for command in self._commands:
                all_closed.callback(command.close)
        self._commands.clear()
