"""The format of entries, and the validity of hashes. No server is needed."""

from __future__ import annotations

import json

import pytest
import redis
from hypothesis import given, settings, strategies as st

from bifrost_bootstrap.errors import BootstrapError, RefusedError, WarmError
from bifrost_bootstrap.servers import redis_server
from bifrost_bootstrap.warm.cache import FINGERPRINT_BYTES, Marker, entry, fingerprint, rights_named
from bifrost_bootstrap.warm.comparison import parse_sha256
from bifrost_bootstrap.warm.diff import CacheDiff
from bifrost_bootstrap.warm.staging import BATCH_SIZE, ENTRY_BYTES, _batches

HASH = "0123456789abcdef" * 4
#: Characters of UTF-8 text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)  # a busy machine may take longer than Hypothesis' 200 ms
@given(path=TEXT, content=TEXT)
def test_entry_has_three_fields_and_its_tail_tells_the_hash(path: str, content: str) -> None:
    """Whatever path and content hold: content, path, hash, in this order, and the last bytes are those of the hash."""
    value = entry(path, content, HASH)
    assert list(json.loads(value).items()) == [("content", content), ("path", path), ("hash", HASH)]
    assert value[-FINGERPRINT_BYTES:] == fingerprint(HASH.encode())


@pytest.mark.parametrize("written", [json.dumps, lambda fields: json.dumps(fields, separators=(",", ":"))])
def test_tail_of_an_entry_of_the_platform(written: object) -> None:
    """Python's own JSON ends in the same way, with and without spaces: whoever wrote an entry can be told apart."""
    assert callable(written)
    assert written({"content": "x", "path": "a.py", "hash": HASH}).encode()[-FINGERPRINT_BYTES:] == fingerprint(
        HASH.encode()
    )


@pytest.mark.parametrize(
    ("content_hash", "wanted"),
    [
        (HASH, HASH),
        (HASH.upper(), HASH),
        (None, None),
        ("", None),
        (HASH[:-1], None),
        (HASH + "0", None),
        ("g" + HASH[1:], None),
        (HASH[:-1] + " ", None),
        (HASH[:30] + "-" + HASH[31:], None),
        ("٣" * 64, None),  # digits, but not ASCII
        ("K" + HASH[1:], None),  # the Kelvin sign: its small letter is a "k"
    ],
)
def test_what_is_a_hash(content_hash: str | None, wanted: str | None) -> None:
    """64 hex digits, in small letters; anything else is none."""
    found = parse_sha256(None if content_hash is None else content_hash.encode())
    assert (found.decode() if found else None) == wanted


@pytest.mark.parametrize(
    ("said", "error", "named"),
    [
        ("The user executing the script can't run this command or subcommand", RefusedError, "a script needs rename: "),
        ("-READONLY You can't write against a read only replica.", WarmError, "is a read-only replica"),
    ],
)
def test_what_redis_6_2_says_of_a_script(said: str, error: type[BootstrapError], named: str) -> None:
    """The error text of Redis 6.2.14, with its line number twice. test_w03 and test_w08 ask the installed servers."""
    words = f"Error running script (call to f_28bd368c): @user_script:2: @user_script: 2: {said} "
    with (
        pytest.raises(error, match=named),
        redis_server.translated("redis://h/0"),
        rights_named("local call = redis.call\ncall('RENAME', 'k', 'k')"),
    ):
        raise redis.ResponseError(words)


@pytest.mark.parametrize(
    ("removed", "indexed", "shrinks"), [(20, 20, False), (21, 21, True), (21, 42, False), (21, 41, True), (0, 0, False)]
)
def test_brake_needs_more_than_half_and_more_than_20(removed: int, indexed: int, shrinks: bool) -> None:
    """Both conditions, each one exceeded and not just reached."""
    assert CacheDiff(removed={b"%d" % number: b"" for number in range(removed)}, indexed=indexed).shrinks is shrinks


def test_difference_seen_twice() -> None:
    """What differs in both looks in the same way remains, under its kind; the totals are those of the later look."""
    first = CacheDiff(added={b"a": b""}, changed={b"c": b"old"}, modules=1)
    later = CacheDiff(added={b"a": b"", b"b": b""}, changed={b"c": b"new"}, modules=2)
    both = first.confirmed_by(later)
    assert (both.added, both.changed, both.entries, both.modules) == ({b"a": b""}, {}, {b"a": b""}, 2)


def test_marker_survives_its_journey() -> None:
    """What a switch writes is what a look reads."""
    marker = Marker("0" * 16, 3, ["a1", "b2"], settled=True)
    assert Marker(**json.loads(marker.to_json())) == marker


def test_batches_are_bounded_by_size() -> None:
    """A batch ends with the module that fills it: no more than one is in memory beyond the bound, and none is lost."""
    rows = [
        (str(number), "x" * size, None)
        for number, size in enumerate([1, BATCH_SIZE, BATCH_SIZE - 2 * ENTRY_BYTES, 1, 5])
    ]
    batches = list(_batches(rows))
    assert [[row[0] for row in batch] for batch in batches] == [["0", "1"], ["2", "3"], ["4"]]
