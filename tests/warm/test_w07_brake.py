"""W7: a warm that looks as if it came from the wrong database stops."""

from __future__ import annotations

import pytest

from bifrost_bootstrap.errors import ExitCode, ShrinkError
from bifrost_bootstrap.warm.step import READING
from tests.warm.deployment import Deployment, at


def shrunk(deployment: Deployment, indexed: int, removed: int) -> None:
    """A cache of `indexed` entries whose rows are gone for `removed` of them, with a new row beside."""
    deployment.put({f"{n}.py": "x" for n in range(indexed)})
    deployment.warm()
    deployment.database.execute(
        "DELETE FROM workspace_files WHERE path = ANY(%s)", [[f"{n}.py" for n in range(removed)]]
    )
    deployment.put({"new.py": "y"})


@pytest.mark.parametrize(("indexed", "removed"), [(21, 21), (41, 21), (60, 31)])
def test_w07_stops_where_most_of_the_cache_would_go(deployment: Deployment, indexed: int, removed: int) -> None:
    """More than half and more than 20: nothing is changed, the error has both numbers and ends in 2."""
    shrunk(deployment, indexed, removed)
    before = deployment.module_keys()
    with pytest.raises(ShrinkError, match=f"{removed} of {indexed}") as stopped:
        deployment.warm()
    assert stopped.value.exit_code is ExitCode.WARM
    assert "--allow-shrink" in stopped.value.remedy
    assert deployment.module_keys() == before
    assert deployment.own_keys() == []
    deployment.warm(allow_shrink=True)
    deployment.assert_exact()


def test_w07_stops_after_a_switch(deployment: Deployment) -> None:
    """A pass after the first stops as well; it says what it has not removed, and not that nothing was changed."""
    deployment.put({f"{n}.py": "x" for n in range(30)})
    deployment.warm()
    deployment.put({"new.py": "y"})
    with pytest.raises(ShrinkError, match="would remove 31 of 31 entries, and has removed none of them"):
        deployment.warm(at(READING, lambda: deployment.database.execute("DELETE FROM workspace_files"), number=2))
    assert deployment.content("new.py") == "y"
    assert len(deployment.observed()) == 31


@pytest.mark.parametrize(("indexed", "removed"), [(20, 20), (60, 30), (100, 50)])
def test_w07_lets_small_and_half_go(deployment: Deployment, indexed: int, removed: int) -> None:
    """Twenty entries, or half of them, may go without a word."""
    shrunk(deployment, indexed, removed)
    assert deployment.warm().removed == removed
    deployment.assert_exact()


def test_w07_empty_table_on_first_start(deployment: Deployment) -> None:
    """No rows and no cache: nothing to do, and the marker says so."""
    result = deployment.warm()
    assert (result.modules, result.removed, result.passes) == (0, 0, 1)
    deployment.assert_exact()
    assert deployment.client.exists("bifrost:bootstrap:marker")
