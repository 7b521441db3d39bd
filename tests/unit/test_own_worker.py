"""The worker of `init --with-worker`: it is restarted a few times, and then reported."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import BootstrapError, InternalError, SettingsError, UnavailableError
from bifrost_bootstrap.init.worker_process import MOST_STARTS, WorkerProcess


def start_for_ever(worker: WorkerProcess) -> None:
    """As an init does; what nobody ends."""
    while True:
        worker.ensure_running()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("code", "starts", "kind"),
    [(1, MOST_STARTS, UnavailableError), (69, MOST_STARTS, UnavailableError), (70, MOST_STARTS, InternalError),
     (-9, MOST_STARTS, UnavailableError), (78, 1, SettingsError)],
)  # fmt: skip
def test_worker_that_cannot_start(
    code: int, starts: int, kind: type[BootstrapError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started so often, never for longer than its init waits, and then the error is not that of a migration."""
    told, program = tmp_path / "told", tmp_path / "python"
    end = f"exit {code}" if code >= 0 else f"kill {code} $$"
    program.write_text(f'#!/bin/sh\necho "$BIFROST_INIT_TIMEOUT $BIFROST_INIT_TIMEOUT_FILE" >> {told}\n{end}\n')
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("BIFROST_INIT_TIMEOUT_FILE", "/absent")
    with WorkerProcess("queue", Deadline(99.9)) as worker, pytest.raises(kind) as raised:
        start_for_ever(worker)
    assert str(abs(code)) in str(raised.value)
    assert len(told.read_text().splitlines()) == starts
    assert re.fullmatch(r"((100|9\d|8\d)s \n)+", told.read_text())
