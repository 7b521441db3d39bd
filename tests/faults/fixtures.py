"""Fixtures of the tests that hit servers and processes: one stack for each xdist worker, a deployment for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Outside
from tests.faults.stack import Deployment, Stack, running_stack
from tests.servers import RunFolder, ServerMissing
from tests.servers.run_checks import lacks_server


@pytest.fixture(scope="session")
def stack(run_folder: RunFolder, outside: Outside) -> Iterator[Stack]:
    """Servers that the faults hit: this test run's own, whatever it was given."""
    try:
        with running_stack(run_folder) as stack:
            yield stack
    except ServerMissing as missing:
        lacks_server(missing, in_ci=outside.in_ci)


@pytest.fixture
def deployment(stack: Stack, tmp_path: Path, clean_env: dict[str, str]) -> Iterator[Deployment]:
    """A deployment of this test's own, on the stack."""
    with stack.deployment(tmp_path / "deployment", clean_env) as deployment:
        yield deployment
