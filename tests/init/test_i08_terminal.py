"""I8: on a terminal a progress bar while it goes on and a table at the end; elsewhere plain lines."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

from tests.faults.stack import Deployment
from tests.servers.process import wait_until

#: Seconds in which a command must have ended after nothing holds it any more.
END_TIMEOUT = 60
COLOUR, BAR = "\x1b[", "━"


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
        # EIO: nobody has the other side any more.
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
    """The bar tells step, count and unit while the work goes on; it is gone when the summary stands there."""
    deployment.hold("warming")
    deployment.start_worker()
    with terminal(deployment, "init", "--timeout", "2m") as init:
        deployment.wait_reached("warming")
        wait_until(lambda: "51 of 51 modules" in init.shown and BAR in init.shown, "the bar", END_TIMEOUT)
        deployment.release()
        assert init.wait() == 0
    assert "INFO    warm: 51 of 51 modules, staging" in init.shown
    assert COLOUR in init.shown.partition("ready in")[0][-8:]
    assert "51 added, 0 changed, 0 removed" in init.shown
    assert BAR not in init.shown.partition("ready in")[2]
    assert init.shown.rstrip().endswith("(exit 0)")


def test_i08_no_colour_and_other_commands(deployment: Deployment) -> None:
    """NO_COLOR is kept; check, plan and a failure are for people too; a pipe gets plain lines."""
    with terminal(deployment, "plan", NO_COLOR="1") as plan, terminal(deployment, "check") as check:
        assert plan.wait() == 0
        assert check.wait() == 3
    assert "[32m" not in plan.shown
    assert "[1;32m" not in plan.shown
    assert "init would apply 2 revisions" in plan.shown
    assert "[1;33mnot ready: schema is empty, 2 pending" in check.shown
    deployment.start_worker()
    done = deployment.start_init().wait()
    assert done.returncode == 0
    assert COLOUR not in done.stdout + done.stderr
    assert BAR not in done.stdout + done.stderr
    with terminal(deployment, "rewarm", "--full", "--timeout", "1m") as rewarm:
        assert rewarm.wait() == 0
    assert "0 added, 51 changed, 0 removed" in rewarm.shown
