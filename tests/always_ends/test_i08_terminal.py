"""I8: on a terminal, a progress bar and then a table; elsewhere, plain lines."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import pytest

from tests.servers.process import wait_until
from tests.setups.stack import Deployment

#: Seconds in which a command must have ended after nothing holds it any more.
END_TIMEOUT = 60
COLOUR, BAR = "\x1b[", "━"
#: A foreground colour; bold and the movements of the cursor are none.
COLOURED = re.compile(r"\x1b\[(\d+;)*[39]\d[;m]")


class Terminal:
    """A command whose stdout and stderr are a terminal, and what it has shown so far."""

    def __init__(self, deployment: Deployment, *words: str, **variables: str) -> None:
        master, slave = pty.openpty()
        environment = deployment.environment(deployment.stack.init_lines) | {"TERM": "xterm", "COLUMNS": "150"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bifrost_bootstrap", *words],
            env=environment | variables, cwd=deployment.folder, stdin=slave, stdout=slave, stderr=slave,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""
        self._reader = Thread(target=self._read, args=(master,), daemon=True)
        self._reader.start()

    def _read(self, master: int) -> None:
        # EIO: the process has closed the terminal.
        with os.fdopen(master, "rb", buffering=0) as terminal, suppress(OSError):
            while data := terminal.read(4096):
                self.shown += data.decode(errors="replace")

    def wait(self) -> int:
        """Its exit code, after the last of its output was read."""
        code = self.process.wait(END_TIMEOUT)
        self._reader.join(END_TIMEOUT)
        return code


@contextmanager
def terminal(deployment: Deployment, *words: str, **variables: str) -> Iterator[Terminal]:
    """Run a command on a terminal; it is gone at the end of the block."""
    running = Terminal(deployment, *words, **variables)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def test_i08_bar_and_table(deployment: Deployment) -> None:
    """The bar shows step, count and unit while the step runs. It is removed before the summary."""
    deployment.hold("warming")
    deployment.start_worker()
    with terminal(deployment, "init", "--timeout", "2m") as init:
        deployment.wait_reached("warming")
        wait_until(lambda: "51 of 51 modules" in init.shown and BAR in init.shown, "the bar", END_TIMEOUT)
        # init prints it after the bar, and an error of a server may come before it.
        line = "INFO    warm: 51 of 51 modules, staging"
        wait_until(lambda: line in init.shown, "the log line", END_TIMEOUT)
        deployment.release()
        assert init.wait() == 0
    assert line in init.shown
    assert COLOUR in init.shown.partition("ready in")[0][-8:]
    assert "51 added, 0 changed, 0 removed" in init.shown
    assert BAR not in init.shown.partition("ready in")[2]
    assert init.shown.rstrip().endswith("(exit 0)")


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("check", 3, "not ready: schema is empty, 2 pending"),
        ("plan", 0, "init would apply 2 revisions"),
        ("plan --sql", 0, "CREATE TABLE workspace_files"),
        ("init --with-worker --timeout 1m", 0, "ready in"),
        pytest.param("init --embedded --timeout 1m", 0, "ready in", marks=pytest.mark.slow),
        ("init --timeout 5s", 69, "worker"),
        ("load modules", 64, "say --yes"),
    ],
)
def test_i08_every_command(deployment: Deployment, command: str, code: int, says: str) -> None:
    """On a terminal, each command has its exit code and its text. With NO_COLOR it prints no colours."""
    (deployment.folder / "modules").mkdir()
    for variables in ({}, {"NO_COLOR": "1"}):
        with terminal(deployment, *command.split(), **variables) as shown:
            assert shown.wait() == code, shown.shown
        assert says in shown.shown or "nothing to do" in shown.shown
        assert f"(exit {code})" in shown.shown.splitlines()[-1]
        assert bool(COLOURED.search(shown.shown)) == (not variables and code != 64), shown.shown


@pytest.mark.slow  # 30 s
def test_i08_every_command_with_a_worker(deployment: Deployment) -> None:
    """The same for the commands that need a schema or a worker, and for the worker. Without a terminal: plain lines."""
    deployment.env["BIFROST_ALEMBIC_CONFIG"] = "builtin"
    with terminal(deployment, "worker", NO_COLOR="1") as worker:
        wait_until(lambda: "ready." in worker.shown, "the worker", END_TIMEOUT)
        done = deployment.start_init().wait()
        assert done.returncode == 0
        assert COLOUR not in done.stdout + done.stderr
        assert BAR not in done.stdout + done.stderr
        (deployment.folder / "modules").mkdir()
        (deployment.folder / "modules" / "one.py").write_text("ONE = 1\n")
        for variables in ({}, {"NO_COLOR": "1"}):
            for command, says in {
                "load modules --yes": "of 1 files written",
                "rewarm --full --timeout 1m": "0 removed",
                "init --timeout 1m": "ready",
                "check": "ready",
            }.items():
                with terminal(deployment, *command.split(), **variables) as shown:
                    assert shown.wait() == 0, shown.shown
                assert says in shown.shown
                assert bool(COLOURED.search(shown.shown)) == (not variables), shown.shown
        worker.process.terminate()
        assert worker.wait() == 0
    assert not COLOURED.search(worker.shown)
