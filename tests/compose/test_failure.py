"""What must not happen if init fails."""

from __future__ import annotations

import pytest

from tests.compose.stack import NEVER, OpenStack

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]


def test_nothing_starts_after_a_broken_migration(open_stack: OpenStack) -> None:
    """A failed revision ends init with 1, `up` fails, and neither api nor worker starts."""
    with open_stack("broken", "docker-compose.yml", "tests/compose/broken-tree.yml") as stack:
        up = stack.compose("--profile", "bifrost", "up", "-d", check=False)
        assert up.returncode != 0, up.stderr
        assert stack.wait("init") == 1
        said = stack.output("init")
        assert "0002" in said
        assert "nowhere" in said
        for service in ("api", "worker"):
            assert stack.inspect(service)["State"]["StartedAt"] == NEVER
