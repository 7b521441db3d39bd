"""The progress bar on a terminal."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from bifrost_bootstrap.cli.terminal import bar
from bifrost_bootstrap.progress import Progress

#: Entries of a warm that goes on for longer than a bar needs to know its rate.
TOTAL = 3000


def test_rate_and_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step goes on, the bar tells how far it is, how many a second, and how long the rest takes."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    line = re.compile(rf"warm: staging .*of {TOTAL:,} modules.*\d modules/s.*\d:\d\d:\d\d")
    with bar() as report:
        for done in range(TOTAL):
            report(Progress("warm", done, TOTAL, "modules", "staging"))
            if line.search(shown.getvalue()):
                break
            time.sleep(0.01)
    assert line.search(shown.getvalue()), shown.getvalue()[-1000:]
