"""
The module cache in Redis: the only place that knows its key names and the entry format.

The contract with the platform's readers and writers: `bifrost:module:{path}` holds an entry, the set
`bifrost:module:index` names every path that has one. Paths are data: never a pattern, never code.
"""

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

ENTRY = b"bifrost:module:"
INDEX = b"bifrost:module:index"
#: The platform's text of `requirements.txt`, which its workers install when they start.
REQUIREMENTS = b"bifrost:requirements:content"
#: Seconds that it lives, as the platform's own init sets it.
REQUIREMENTS_TTL = 24 * 3600
#: Whatever is ours alone.
OWN = b"bifrost:bootstrap:"
MARKER = OWN + b"marker"
#: The path whose entry would be the index itself.
COLLIDING_PATH = b"index"
#: What follows the hash in an entry.
TAIL_END = b'"}'
#: Bytes at the end of an entry that tell what it holds: 64 hex digits and the two.
TAIL = 66
#: Paths in one call of a script that only reads; bounds how long Redis is blocked (3 ms measured for 1,000).
READ_SLICE = 1000
#: Such calls sent in one go, so that Redis works on the next while we read the last.
READ_AHEAD = 8
#: Batches sent whose answers are not read yet: Redis and we seldom wait for each other, and its input stays bounded.
WRITE_AHEAD = 8
#: Seconds that staged entries outlive a warm that died; renewed while it runs. Those that were written in place lie
#: where a live writer's may lie too, so their time is not touched again: it has to do for all of the fill.
STAGE_TTL, FILL_TTL = 300, 3600


def _script(name: str, *parts: str) -> str:
    """A script that runs in Redis in one step; what it takes and returns is told in its file."""
    folder = Path(__file__).with_name("lua")
    return "".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in (*parts, name))


STATES, PROOF, SWITCH = (_script(name, "tail_of") for name in ("states", "proof", "switch"))
RENEW = _script("renew")


@contextmanager
def _rights_named(script: str) -> Iterator[None]:
    """Raise NoPermissionError with the command where Redis names the line of the script only."""
    try:
        yield
    except redis.ResponseError as error:
        # Redis 6.2 puts the line first, 7.2 and Valkey have other words.
        refused = re.search("user executing the script can't|ACL failure in script", str(error))
        line = re.search(r"user_script: *(\d+)", str(error))
        if not (refused and line):
            raise
        called = re.findall(r"\bp?call\('(\w+)'", script.splitlines()[int(line[1]) - 1])
        words = f"a script needs {' and '.join(called).lower()}: {error}"
        raise redis.exceptions.NoPermissionError(words) from error


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
        """Whether a cache of this size is complete by what the last warm found, for a database at these heads."""
        return self.settled and self.modules == size and tuple(sorted(self.heads)) == database_heads


@dataclass
class CacheStates:
    """
    What the cache holds, read before the database.

    marker: as it was before the entries were read, b"" if there was none. fingerprints: by path of the index, the last
    bytes of its entry, b"" if it has none. unindexed: the same for paths that were asked for and are not in the
    index. wrong_ttl: paths whose time to live is not what the TTL policy wants. index_expires: the index has a time to
    live. has_requirements: the requirements entry is there.
    """

    marker: bytes
    fingerprints: dict[bytes, bytes] = field(default_factory=dict)
    unindexed: dict[bytes, bytes] = field(default_factory=dict)
    wrong_ttl: set[bytes] = field(default_factory=set)
    index_expires: bool = False
    has_requirements: bool = False


@dataclass(frozen=True)
class Switched:
    """
    conflicts: paths whose entry somebody had written since it was compared.

    no_other_warm: no other warm has switched since the cache was read, or it has confirmed the cache that it left.
    """

    conflicts: list[bytes]
    no_other_warm: bool

    @property
    def as_planned(self) -> bool:
        return self.no_other_warm and not self.conflicts


def entry(path: str, content: str, content_hash: str) -> bytes:
    """The entry of a module: exactly these three, hash last."""
    return orjson.dumps({"content": content, "path": path, "hash": content_hash})


def tail(content_hash: bytes) -> bytes:
    """How the entry of a module with this hash ends."""
    return content_hash + TAIL_END


class ModuleCache:
    """
    The cache of one Redis, as warm, check and guard see it.

    ttl: seconds that entries live, 0 for ever; marker and size do not need it.
    """

    def __init__(self, client: redis.Redis, ttl: float = 0.0) -> None:
        self._client, self._ttl_ms = client, round(ttl * 1000)
        # With a TTL an entry is renewed in the second half of its life, so that it never runs out between warms.
        self._policy = (self._ttl_ms // 2, self._ttl_ms) if self._ttl_ms else (-1, -1)

    def states(self, more: Iterable[bytes] = ()) -> CacheStates:
        """What the cache holds for every path of the index and for `more`."""
        states = CacheStates(self._client.get(MARKER) or b"")  # type: ignore[arg-type]
        states.index_expires = self._index_expires()
        states.has_requirements = bool(self._client.exists(REQUIREMENTS))
        self._read_tails(list(self._client.smembers(INDEX)), states.fingerprints, states.wrong_ttl)  # type: ignore[arg-type]
        self._read_tails([path for path in more if path not in states.fingerprints], states.unindexed, states.wrong_ttl)
        return states

    def is_still(self, states: CacheStates) -> bool:
        """Whether marker, index and every entry are as these say, and live as long as they should."""
        if (self._client.get(MARKER) or b"") != states.marker or self.size() != len(states.fingerprints):
            return False
        if self._index_expires():
            return False
        slices = _slices(list(states.fingerprints))
        wanted = (_digest(states.fingerprints[path] for path in one) for one in slices)
        return all(map(operator.eq, self._run(PROOF, slices), wanted))

    def _index_expires(self) -> bool:
        return int(self._client.pttl(INDEX)) >= 0

    def add_requirements(self, content: str) -> bool:
        """Make the requirements entry where there is none; whether it was made. The platform may save a newer one."""
        digest = hashlib.sha256(content.encode()).hexdigest()
        value = orjson.dumps({"content": content, "hash": digest})
        return bool(self._client.set(REQUIREMENTS, value, ex=REQUIREMENTS_TTL, nx=True))

    def _read_tails(self, paths: list[bytes], fingerprints: dict[bytes, bytes], wrong_ttl: set[bytes]) -> None:
        slices = _slices(paths)
        for one, (found, off) in zip(slices, self._run(STATES, slices), strict=True):
            fingerprints.update(zip(one, found, strict=True))
            wrong_ttl.update(one[number] for number in off)

    def _run(self, script: str, slices: Iterable[Sequence[bytes]]) -> Iterator[Any]:
        """What a script that only reads answers to each of these slices; Redis works on the next while we read one."""
        with self._pipelined(READ_AHEAD) as line, _rights_named(script):
            for paths in slices:
                yield from line.send(_packed("EVAL", script, 1, ENTRY, *self._policy, *paths))
            yield from line.answers()

    @contextmanager
    def _pipelined(self, most: int) -> Iterator[Pipelined]:
        """A line for commands whose answers are read later. Raises what happens in the block."""
        connection: Any = self._client.connection_pool.get_connection()
        try:
            yield Pipelined(connection, most)
        except BaseException:
            # Unread answers would be taken for those of the next command.
            connection.disconnect()
            raise
        finally:
            self._client.connection_pool.release(connection)

    def size(self) -> int:
        """Number of paths in the index."""
        return int(self._client.scard(INDEX))

    def marker(self) -> Marker | None:
        """What the last switch left, or None where there was none (or somebody else's value)."""
        value = self._client.get(MARKER)
        try:
            return Marker(**json.loads(value)) if value else None
        except (TypeError, ValueError):
            return None

    @contextmanager
    def stage(self, warm_id: str) -> Iterator[Stage]:
        """What one pass of a warm writes before its switch; all of it is stored when the block ends."""
        with self._pipelined(WRITE_AHEAD) as line:
            yield Stage(line, warm_id)
            line.answers()

    def renew(self, warm_id: str) -> None:
        """Let staged entries live as long again."""
        with _rights_named(RENEW):
            self._client.eval(RENEW, 2, stage_prefix(warm_id), plan_key(warm_id), STAGE_TTL)

    def switch(self, marker: Marker, planned: int, since: bytes) -> Switched:
        """
        Carry out the plan of `planned` entries in one step, together with index, TTLs and marker.

        since: the marker that was read before the entries that the plan was made from.

        Raises WarmError, with nothing changed, where something staged is gone.
        """
        own = (stage_prefix(marker.warm_id), plan_key(marker.warm_id))
        arguments = (ENTRY, INDEX, MARKER, *own, marker.to_json(), self._ttl_ms, planned, since)
        with _rights_named(SWITCH):
            done, paths, *no_other_warm = self._client.eval(SWITCH, 5, *arguments)
        if not done:
            raise StagedLostError(f"what was staged was evicted before the switch, {paths[0]!r} among it")
        return Switched(list(paths), bool(no_other_warm[0]))


class Pipelined:
    """A connection on which at most `most` batches of commands are sent before the answers to the first are read."""

    def __init__(self, connection: Any, most: int) -> None:
        self._connection, self._most = connection, most
        #: Answers that each of the last batches will have.
        self._unanswered: deque[int] = deque()

    def send(self, packed: Iterable[bytes], answers: int = 1) -> list[Any]:
        """Send a batch that will have so many answers; those that it was time to read. Raises the first error."""
        self._connection.send_packed_command([b"".join(packed)])
        self._unanswered.append(answers)
        return self.answers(self._most)

    def answers(self, left: int = 0) -> list[Any]:
        """Read until no more than `left` batches are unanswered. Raises what Redis said against one."""
        found: list[Any] = []
        while len(self._unanswered) > left:
            found += [self._connection.read_response() for _ in range(self._unanswered.popleft())]
        return found


class Stage:
    """
    Entries where no reader looks, and the plan of what the switch does with them.

    Nothing here waits for Redis, which stores one batch while the caller makes the next.
    """

    def __init__(self, line: Pipelined, warm_id: str) -> None:
        self._line, self._prefix, self._plan = line, stage_prefix(warm_id), plan_key(warm_id)
        #: Entries in the plan.
        self.planned = 0

    def write(self, entries: Iterable[tuple[bytes, bytes, bytes]], *, in_place: bool) -> None:
        """
        Write entries (path, value, tail that the path has now) and plan to publish them.

        in_place: where they belong, which nobody reads before the index names it; what somebody else has written
        there stays, and the switch finds it.
        """
        prefix = ENTRY if in_place else self._prefix
        options: tuple[object, ...] = ("EX", FILL_TTL, "NX") if in_place else ("EX", STAGE_TTL)
        # The same for each: what comes before the key, and after the value.
        begin = b"*%d\r\n$3\r\nSET\r\n" % (3 + len(options))
        end = b"\r\n" + b"".join(_words(options))
        packed: list[bytes] = []
        steps = []
        for path, value, found in entries:
            packed += (
                b"%b$%d\r\n%b%b\r\n$%d\r\n" % (begin, len(prefix) + len(path), prefix, path, len(value)),
                value,
                end,
            )
            steps.append(("keep", path, value[-TAIL:]) if in_place else ("set", path, found))
        self._send(packed, steps, answers=len(steps))

    def plan(self, operation: str, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Plan to "keep" (index, and put on policy) or to "remove" these (path, tail that it has now)."""
        steps = [(operation, path, tail) for path, tail in entries]
        for part in _slices(steps):
            self._send([], part)

    def _send(self, packed: list[bytes], steps: list[tuple[str, bytes, bytes]], answers: int = 0) -> None:
        if not steps:
            return
        packed += _packed("RPUSH", self._plan, *(word for step in steps for word in step))
        packed += _packed("EXPIRE", self._plan, FILL_TTL)
        self._line.send(packed, answers + 2)
        self.planned += len(steps)


def _slices(items: list[_Item]) -> list[list[_Item]]:
    return [items[start : start + READ_SLICE] for start in range(0, len(items), READ_SLICE)]


def _digest(fingerprints: Iterable[bytes]) -> bytes:
    """As the script PROOF makes it."""
    return hashlib.sha1(b"\n".join(fingerprints), usedforsecurity=False).hexdigest().encode()


def _packed(*words: object) -> Iterator[bytes]:
    # Not by the client, which takes as long for it as Redis for storing.
    yield b"*%d\r\n" % len(words)
    yield from _words(words)


def _words(words: Iterable[object]) -> Iterator[bytes]:
    for word in words:
        part = word if isinstance(word, bytes) else str(word).encode()
        yield b"$%d\r\n%b\r\n" % (len(part), part)


def stage_prefix(warm_id: str) -> bytes:
    """Where the entries of one warm wait for the switch."""
    return OWN + b"stage:" + warm_id.encode() + b":"


def plan_key(warm_id: str) -> bytes:
    """The list of what the switch is to do."""
    return OWN + b"plan:" + warm_id.encode()
