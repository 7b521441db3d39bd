"""The tree: the revisions of an Alembic script directory, and how its own Alembic is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bifrost_bootstrap.urls import digest

#: Prefix of the queues of which each belongs to the workers of one tree.
QUEUE = "bifrost.bootstrap"


@dataclass(frozen=True)
class Revision:
    """One revision. `down` and `depends_on` name revisions, `title` is the first line of its docstring."""

    revision: str
    title: str
    down: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Alembic:
    """
    How the tree's own Alembic is called: what an operator would type.

    python: its interpreter. folder: where it runs; relative paths count from there. config: its file, as it was named.
    options: of its command line beside the file (`--name`, `-x`).
    """

    python: str
    folder: Path
    config: Path
    options: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The command line of `alembic upgrade heads`, without the name of the program."""
        return [f"--config={self.config}", *self.options, "upgrade", "heads"]


@dataclass(frozen=True)
class Tree:
    """
    A script directory. `why` says why this one was chosen.

    revisions: by id; empty where the directory holds none. several: env.py may run them for several schemas or version
    tables.
    """

    alembic: Alembic
    why: str
    revisions: Mapping[str, Revision]
    several: bool = False

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Revisions that no other one builds on, sorted."""
        built_on = {down for revision in self.revisions.values() for down in revision.down}
        return tuple(sorted(self.revisions.keys() - built_on))

    @property
    def forked(self) -> bool:
        """Whether several heads are an accident: two of one base, and not each on a branch with a label of its own."""
        branches = {head: self.upto([head], depends=False) for head in self.heads}
        for head, branch in branches.items():
            siblings = [other for name, other in branches.items() if name != head and other & branch]
            # A label from before the fork belongs to several branches, and so names none of them.
            own = branch.difference(*siblings)
            if siblings and not any(self.revisions[name].labels for name in own):
                return True
        return False

    def upto(self, revisions: Iterable[str], *, depends: bool = True) -> set[str]:
        """These revisions and all that they build (and depend) on. Unknown ones are left out."""
        found: set[str] = set()
        rest = [name for name in revisions if name in self.revisions]
        while rest:
            name = rest.pop()
            if name not in found:
                found.add(name)
                revision = self.revisions[name]
                rest += revision.down + (revision.depends_on if depends else ())
        return found

    def pending(self, heads: Iterable[str]) -> list[Revision]:
        """What an upgrade from these database heads would apply, in an order in which it can be applied."""
        return in_order(self.revisions, self.upto(heads))

    def queue(self, target: str) -> str:
        """The queue of the workers that have this tree, and call it with the same options, for this target database."""
        # A release that declared it in another way has another name for it.
        return f"{QUEUE}.{digest('quorum', *self.heads, *self.alembic.options, target)}"


def in_order(revisions: Mapping[str, Revision], done: set[str]) -> list[Revision]:
    """
    Those that are not done, each after what it builds and depends on.

    What depends on a missing revision, or on itself in a circle, is left out.
    """
    done = set(done)
    ordered: list[Revision] = []
    rest = sorted(revisions.keys() - done)
    while rest:
        ready = [name for name in rest if {*revisions[name].down, *revisions[name].depends_on} <= done]
        if not ready:
            break
        ordered += [revisions[name] for name in ready]
        done.update(ready)
        rest = [name for name in rest if name not in done]
    return ordered
