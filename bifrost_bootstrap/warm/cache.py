"""The module cache in Redis: keys, the format of entries, what the cache holds, and the switch to a new state."""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson
import redis

from bifrost_bootstrap.errors import StagedLostError

_Item = TypeVar("_Item")
#: A Redis command: its name and arguments, each bytes or with a text form that Redis reads.
Command = tuple[object, ...]

ENTRY = b"bifrost:module:"
#: The paths that have an entry. Here only `lua/switch.lua` writes it; the platform writes it too.
INDEX = b"bifrost:module:index"
#: The platform's text of `requirements.txt`, which its workers install when they start.
REQUIREMENTS = b"bifrost:requirements:content"
#: Seconds that the requirements entry lives, as the platform's own init sets it.
REQUIREMENTS_TTL = 24 * 3600
#: The prefix of all keys that only this package uses.
OWN = b"bifrost:bootstrap:"
MARKER = OWN + b"marker"
#: The path whose entry would be the index itself.
COLLIDING_PATH = b"index"
#: What follows the hash in an entry.
ENTRY_END = b'"}'
#: Bytes at the end of an entry that tell its content: 64 hex digits and `ENTRY_END`. They are its fingerprint.
FINGERPRINT_BYTES = 66
#: Paths, or steps of a plan, in one command; bounds how long Redis is blocked (3 ms measured for 1,000 that are read).
SLICE = 1000
#: Commands sent ahead while reading: Redis works on the next slice while we read the reply to the last.
READ_AHEAD = 8


def _script(name: str, *parts: str) -> str:
    """A Lua script that Redis runs in one step. Its file says what it takes and returns. parts: files put before it."""
    folder = Path(__file__).with_name("lua")
    return "".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in (*parts, name))


STATES, PROOF, SWITCH = (_script(name, "fingerprint_of") for name in ("states", "proof", "switch"))
RENEW = _script("renew")


def entry(path: str, content: str, content_hash: str) -> bytes:
    """The entry of a module: exactly these three, hash last."""
    return orjson.dumps({"content": content, "path": path, "hash": content_hash})


def fingerprint(content_hash: bytes) -> bytes:
    """The fingerprint of the entry of a module with this hash."""
    return content_hash + ENTRY_END


def stage_prefix(warm_id: str) -> bytes:
    """The prefix of the keys at which the entries of one warm wait for the switch."""
    return OWN + b"stage:" + warm_id.encode() + b":"


def plan_key(warm_id: str) -> bytes:
    """The key of the list of what the switch will do."""
    return OWN + b"plan:" + warm_id.encode()


@dataclass(frozen=True)
class Marker:
    """
    What the last switch wrote together with the index.

    warm_id: of the warm. modules: entries in the index then. heads: the revisions that the database recorded in
    the snapshot that was warmed. settled: the warm compared again afterwards and found no difference.
    """

    warm_id: str
    modules: int
    heads: list[str] = field(default_factory=list)
    settled: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def is_current_for(self, size: int, database_heads: tuple[str, ...]) -> bool:
        """Whether it confirms a cache of this size as complete, for a database at these heads."""
        return self.settled and self.modules == size and tuple(sorted(self.heads)) == database_heads


@dataclass(frozen=True)
class CacheStates:
    """
    What the cache holds, read before the database.

    marker: its value before the entries were read, b"" if there was none. fingerprints: by path of the index, the last
    bytes of its entry, b"" if it has none. unindexed: the same for paths that were asked for and are not in the
    index. wrong_ttl: paths whose TTL is not what the policy says. index_expires: the index has a TTL.
    has_requirements: the requirements entry exists.
    """

    marker: bytes
    fingerprints: dict[bytes, bytes]
    unindexed: dict[bytes, bytes] = field(default_factory=dict)
    wrong_ttl: set[bytes] = field(default_factory=set)
    index_expires: bool = False
    has_requirements: bool = False


@dataclass(frozen=True)
class SwitchResult:
    """
    conflicts: paths that the switch left alone, because somebody else had written their entry since the comparison.

    no_other_warm: no other warm has switched since the cache was read, or the marker of that warm confirms the cache.
    """

    conflicts: list[bytes]
    no_other_warm: bool

    @property
    def as_planned(self) -> bool:
        return self.no_other_warm and not self.conflicts


class ModuleCache:
    """
    The cache of one Redis, as warm, check and cache monitor see it.

    ttl: seconds that entries live, 0 for ever; `marker` and `size` do not need it.
    """

    def __init__(self, client: redis.Redis, ttl: float = 0.0) -> None:
        self._client = client
        self._ttl_ms = round(ttl * 1000)
        # With a TTL, an entry is renewed in the second half of its life, so that it never expires between two warms.
        self._policy = (self._ttl_ms // 2, self._ttl_ms) if self._ttl_ms else (-1, -1)

    def marker(self) -> Marker | None:
        """What the last switch wrote; None if there is no marker, or a value that is not ours."""
        value = self._client.get(MARKER)
        try:
            return Marker(**json.loads(value)) if value else None
        except (TypeError, ValueError):
            return None

    def size(self) -> int:
        """Number of paths in the index."""
        return int(self._client.scard(INDEX))

    def states(self, unindexed: Iterable[bytes] = ()) -> CacheStates:
        """What the cache holds for every path of the index, and for these paths if they are not in it."""
        marker = self._marker_value()
        index_expires = self._index_expires()
        has_requirements = bool(self._client.exists(REQUIREMENTS))
        index: Any = self._client.smembers(INDEX)
        others = set(unindexed) - index
        fingerprints: dict[bytes, bytes] = {}
        wrong_ttl: set[bytes] = set()
        parts = slices([*index, *others])
        for paths, (found, off) in zip(parts, self._read(STATES, parts), strict=True):
            fingerprints.update(zip(paths, found, strict=True))
            wrong_ttl.update(paths[number] for number in off)
        found_unindexed = {path: fingerprints.pop(path) for path in others}
        return CacheStates(marker, fingerprints, found_unindexed, wrong_ttl, index_expires, has_requirements)

    def is_still(self, states: CacheStates) -> bool:
        """Whether marker, index and every entry are as these say, and live as long as the policy says."""
        if self._marker_value() != states.marker or self.size() != len(states.fingerprints) or self._index_expires():
            return False
        parts = slices(list(states.fingerprints))
        expected = (_digest(states.fingerprints[path] for path in paths) for paths in parts)
        return all(map(operator.eq, self._read(PROOF, parts), expected))

    def _marker_value(self) -> bytes:
        value: Any = self._client.get(MARKER)
        return value or b""

    def _index_expires(self) -> bool:
        return int(self._client.pttl(INDEX)) >= 0

    def _read(self, script: str, parts: Iterable[Sequence[bytes]]) -> Iterator[Any]:
        """The replies of a script that only reads, one for each of these slices of paths."""
        with self.pipelined(READ_AHEAD) as connection, rights_named(script):
            for paths in parts:
                yield from connection.send([("EVAL", script, 1, ENTRY, *self._policy, *paths)])
            yield from connection.read_replies()

    @contextmanager
    def pipelined(self, ahead: int) -> Iterator[PipelinedConnection]:
        """A connection for commands whose replies are read later. Closed if the block fails."""
        connection: Any = self._client.connection_pool.get_connection()
        try:
            yield PipelinedConnection(connection, ahead)
        except BaseException:
            # The next user of this connection would take unread replies for its own.
            connection.disconnect()
            raise
        finally:
            self._client.connection_pool.release(connection)

    def add_requirements(self, content: str) -> bool:
        """Make the requirements entry if there is none; whether it was made. The platform may have set a newer one."""
        digest = hashlib.sha256(content.encode()).hexdigest()
        value = orjson.dumps({"content": content, "hash": digest})
        return bool(self._client.set(REQUIREMENTS, value, ex=REQUIREMENTS_TTL, nx=True))

    def switch(self, marker: Marker, planned: int, since: bytes) -> SwitchResult:
        """
        Carry out the plan of `planned` entries in one step, together with index, TTLs and marker.

        since: the marker that was read before the entries that the plan was made from.

        Raises StagedLostError, with nothing changed, if a staged entry is gone.
        """
        keys = (ENTRY, INDEX, MARKER, stage_prefix(marker.warm_id), plan_key(marker.warm_id))
        with rights_named(SWITCH):
            done, paths, *no_other_warm = self._client.eval(
                SWITCH, len(keys), *keys, marker.to_json(), self._ttl_ms, planned, since
            )
        if not done:
            raise StagedLostError(f"what was staged was evicted before the switch, {paths[0]!r} among it")
        return SwitchResult(list(paths), bool(no_other_warm[0]))


class PipelinedConnection:
    """A connection on which up to `ahead` batches of commands are sent before the replies to the first are read."""

    def __init__(self, connection: Any, ahead: int) -> None:
        self._connection = connection
        self._ahead = ahead
        #: Replies that each of the last batches will have.
        self._unread: deque[int] = deque()

    def send(self, commands: Sequence[Command]) -> list[Any]:
        """Send a batch; return the replies that it was time to read. Raises the first error among them."""
        # Not packed by the client, which takes as long for it as Redis for storing (0.2 s for 10,000 modules).
        self._connection.send_packed_command([b"".join(part for command in commands for part in _packed(command))])
        self._unread.append(len(commands))
        return self.read_replies(self._ahead)

    def read_replies(self, left: int = 0) -> list[Any]:
        """Read until no more than `left` batches are unread. Raises the first error among the replies."""
        replies: list[Any] = []
        while len(self._unread) > left:
            replies += [self._connection.read_response() for _ in range(self._unread.popleft())]
        return replies


def _packed(command: Command) -> Iterator[bytes]:
    """A command in Redis' protocol, in parts, so that a large value is copied only once."""
    yield b"*%d\r\n" % len(command)
    for word in command:
        part = word if isinstance(word, bytes) else str(word).encode()
        yield b"$%d\r\n" % len(part)
        yield part
        yield b"\r\n"


def slices(items: list[_Item]) -> list[list[_Item]]:
    """The items in lists of at most `SLICE`."""
    return [items[start : start + SLICE] for start in range(0, len(items), SLICE)]


def _digest(fingerprints: Iterable[bytes]) -> bytes:
    """As the script PROOF computes it."""
    return hashlib.sha1(b"\n".join(fingerprints), usedforsecurity=False).hexdigest().encode()


@contextmanager
def rights_named(script: str) -> Iterator[None]:
    """Raise NoPermissionError with the refused command. Redis names only the line of the script."""
    try:
        yield
    except redis.ResponseError as error:
        # Redis 6.2 puts the line first, 7.2 and Valkey have other words.
        refused = re.search("user executing the script can't|ACL failure in script", str(error))
        line = re.search(r"user_script: *(\d+)", str(error))
        if not (refused and line):
            raise
        called = re.findall(r"\bp?call\('(\w+)'", script.splitlines()[int(line[1]) - 1])
        reason = f"a script needs {' and '.join(called).lower()}: {error}"
        raise redis.exceptions.NoPermissionError(reason) from error
