"""W10: every indexed entry lives as BIFROST_MODULE_CACHE_TTL says, also those that were equal."""

from __future__ import annotations

from bifrost_bootstrap.warm.step import SWITCHING
from tests.warm.conftest import NewDeployment
from tests.warm.deployment import API_TTL, ENTRY, INDEX, Deployment, at

#: Seconds.
TTL = 3600


def lives(deployment: Deployment) -> dict[str, int]:
    """Seconds that each entry has to live; -1 for ever."""
    return {
        key.removeprefix(ENTRY).decode(): int(deployment.client.ttl(key))
        for key in deployment.client.scan_iter(ENTRY + b"*")
        if key != INDEX
    }


def test_w10_entry_of_the_api_is_made_persistent(deployment: Deployment) -> None:
    """An equal entry with 24 hours to live loses its limit, and its content is not written again."""
    deployment.put({"ours.py": "x"})
    deployment.warm()
    deployment.api_write("theirs.py", "y")
    assert lives(deployment) == {"ours.py": -1, "theirs.py": API_TTL}
    result = deployment.warm()
    assert (result.expiring, result.bytes) == (1, 0)
    assert lives(deployment) == {"ours.py": -1, "theirs.py": -1}
    deployment.assert_exact()


def test_w10_entry_of_the_api_after_the_first_reading(deployment: Deployment) -> None:
    """One that the API writes anew while a warm changes another module has no limit either, though it says the same."""
    deployment.put({"ours.py": "x", "theirs.py": "y"})
    deployment.warm()
    deployment.put({"ours.py": "changed"})
    deployment.warm(at(SWITCHING, lambda: deployment.api_write("theirs.py", "y")))
    assert lives(deployment) == {"ours.py": -1, "theirs.py": -1}
    deployment.assert_exact()


def test_w10_policy_reaches_every_entry(deploy: NewDeployment, deployment: Deployment) -> None:
    """With a TTL: new, changed, equal and persistent entries all have it, and it can be taken away again."""
    deployment.put({f"{n}.py": "x" for n in range(4)})
    deployment.warm()
    limited = deploy(deployment.settings.redis, deployment.database, module_cache_ttl=TTL)
    limited.put({"0.py": "changed", "new.py": "x"})
    limited.api_write("theirs.py", "y")
    limited.warm()
    assert all(TTL - 60 < seconds <= TTL for seconds in lives(limited).values())
    assert limited.client.ttl(INDEX) == -1
    deployment.warm()
    assert set(lives(deployment).values()) == {-1}


def test_w10_renewed_in_the_second_half_of_its_life(deploy: NewDeployment, redis_url: str) -> None:
    """An entry in its first half is left as it is, one in its second half is renewed, one of 24 hours is shortened."""
    deployment = deploy(redis_url, module_cache_ttl=TTL)
    deployment.put({f"{n}.py": "x" for n in range(3)})
    deployment.warm()
    for number, seconds in enumerate((TTL // 2 + 60, TTL // 2 - 60, API_TTL)):
        deployment.client.expire(ENTRY + b"%d.py" % number, seconds)
    assert deployment.warm().expiring == 2
    left = lives(deployment)
    assert left["0.py"] <= TTL // 2 + 60
    assert all(TTL - 60 < left[path] <= TTL for path in ("1.py", "2.py"))


def test_w10_large_fill_follows_it_too(deployment: Deployment, deploy: NewDeployment) -> None:
    """Entries that were written into their places do not keep the TTL of staged ones."""
    deployment.put({f"{n}.py": "x" for n in range(6000)})
    deployment.warm()
    assert set(lives(deployment).values()) == {-1}
    limited = deploy(deployment.settings.redis, deployment.database, module_cache_ttl=TTL)
    limited.client.flushdb()
    limited.warm()
    assert all(TTL - 60 < seconds <= TTL for seconds in lives(limited).values())
