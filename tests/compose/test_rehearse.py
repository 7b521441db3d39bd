"""deploy/compose/rehearse.yml: `rehearse` beside the stack, with the image's target of that name."""

from __future__ import annotations

import pytest

from tests.compose.stack import RUN, OpenStack, run

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

FILES = ("docker-compose.yml", "deploy/compose/rehearse.yml")
IMAGE = f"{RUN}-rehearse"


def test_rehearse_before_and_after_the_first_init(open_stack: OpenStack) -> None:
    """As a role that is no superuser, in a read-only container; its options follow the name of the service."""
    with open_stack("rehearse", *FILES, BIFROST_REHEARSE_IMAGE=IMAGE) as stack:
        try:
            stack.compose("build", "rehearse")
            stack.compose("up", "-d", "postgres")
            before = stack.compose("run", "--rm", "rehearse")
            assert "2 revisions apply to this schema; 0 warnings" in before.stdout
            stack.compose("up", "-d")
            assert stack.wait("init") == 0, stack.output("init")
            after = stack.compose("run", "--rm", "rehearse", "--json", "--strict")
            assert '"verdict": "rehearsed"' in after.stdout
            assert "nothing to rehearse" in after.stdout
        finally:
            run("docker", "image", "rm", "--force", IMAGE, check=False)
