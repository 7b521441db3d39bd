"""How `tools/audit` summarizes a report. `make check` does the lookup."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

summarize = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "audit"))["summarize"]
UNKNOWN = {"name": "celery", "skip_reason": "Dependency not found on PyPI and could not be audited: celery (5.7.0)"}
FINE: dict[str, Any] = {"name": "click", "version": "8.3.0", "vulns": []}
BAD = {"name": "redis", "version": "4.5.0", "vulns": [{"id": "CVE-2023-28858", "fix_versions": ["4.5.3"]}]}


@pytest.mark.parametrize(
    ("packages", "lines", "code"),
    [
        ([FINE], ["audit: 1 packages looked up, 0 known vulnerabilities"], 0),
        (
            [BAD, BAD, FINE],
            [
                "audit: redis 4.5.0: CVE-2023-28858 (fixed in 4.5.3)",
                "audit: 2 packages looked up, 1 known vulnerabilities",
            ],
            1,
        ),
        ([UNKNOWN, UNKNOWN], ["audit: NOT DONE: the service knew none of 1 packages"], 0),
        (
            [UNKNOWN, FINE],
            [
                "audit: 1 packages looked up, 0 known vulnerabilities",
                "audit: not looked up, unknown to the service: celery",
            ],
            0,
        ),
    ],
    ids=["fine", "bad", "nothing known", "one unknown"],
)
def test_what_a_report_says(packages: list[dict[str, Any]], lines: list[str], code: int) -> None:
    """A vulnerability is an error. A service without data is reported, and does not count as "nothing found"."""
    assert summarize({"dependencies": packages, "fixes": []}) == (lines, code)
