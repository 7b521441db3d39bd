"""W12: a time to live on the index is taken off by the warm and seen by `check`."""

from __future__ import annotations

from bifrost_bootstrap.migrate import tree_loading
from bifrost_bootstrap.status import readiness
from bifrost_bootstrap.warm.step import READING
from tests.warm.deployment import API_TTL, INDEX, Deployment, at


def test_w12_taken_off_though_nothing_else_differs(deployment: Deployment) -> None:
    """A reader of the platform has rebuilt the index and given it 24 hours."""
    deployment.put({"a.py": "x"})
    deployment.warm()
    deployment.client.expire(INDEX, API_TTL)
    deployment.warm()
    assert deployment.client.ttl(INDEX) == -1
    deployment.assert_exact()


def test_w12_set_while_a_warm_runs(deployment: Deployment) -> None:
    """Also where it comes between the switch and the proof."""
    deployment.put({"a.py": "x"})
    deployment.warm(at(READING, lambda: deployment.client.expire(INDEX, API_TTL), number=2))
    assert deployment.client.ttl(INDEX) == -1


def test_w12_seen(deployment: Deployment) -> None:
    """The platform may start, and there is something to do; the words say what."""
    deployment.put({"a.py": "x"})
    deployment.warm()
    deployment.client.expire(INDEX, API_TTL)
    found = readiness.read_readiness(deployment.settings, tree_loading.load(deployment.settings), compare=30)
    assert found.ready
    assert not found.nothing_to_do
    assert found.diff is not None
    assert found.diff.summary() == "the index expires"
    assert found.to_dict()["module_cache"]["index_expires"] is True
