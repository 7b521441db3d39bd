"""
The tree: which Alembic script directory this deployment migrates with, and what it holds.

Importing Alembic costs more than a whole `init` with nothing to do, so a plainly written tree is read from its
source. Where something is not plain (computed revision ids, several version locations, a package path), the
tree's own Alembic is asked, in its own process. Either way nothing of the tree is run in this process.
"""

from __future__ import annotations

import ast
import configparser
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bifrost_bootstrap import settings as environment
from bifrost_bootstrap.errors import MigrationError, SettingsError
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.urls import digest

BUILTIN = Path(__file__).parent / "migrations" / "alembic.ini"
CHILD = Path(__file__).parent / "alembic_child.py"
#: Prefix of the queues on which the workers of one tree are asked.
QUEUE = "bifrost.bootstrap"
#: Seconds for the tree's Alembic to import and tell its revisions; imports take 0.4 to 2 s.
ASK_TIMEOUT = 60.0


@dataclass(frozen=True)
class Revision:
    """One revision. `down` and `depends_on` name revisions, `title` is the first line of its docstring."""

    revision: str
    title: str
    down: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tree:
    """
    A script directory. `why` says why this one was chosen.

    revisions: by id; empty where the directory holds none.
    """

    config: Path
    why: str
    python: str
    revisions: Mapping[str, Revision]

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Revisions that no other one builds on, sorted."""
        built_on = {down for revision in self.revisions.values() for down in revision.down}
        return tuple(sorted(self.revisions.keys() - built_on))

    @property
    def forked(self) -> bool:
        """Whether several heads are an accident: legitimate ones are branches, each with a label of its own."""
        branches = [self.upto([head], depends=False) for head in self.heads]
        # A label of the trunk, before the fork, tells branches no more apart than no label.
        own = [branch.difference(*(other for other in branches if other is not branch)) for branch in branches]
        return len(own) > 1 and not all(any(self.revisions[name].labels for name in branch) for branch in own)

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
        done, ordered = self.upto(heads), []
        rest = sorted(self.revisions.keys() - done)
        while rest:
            ready = [name for name in rest if {*self.revisions[name].down, *self.revisions[name].depends_on} <= done]
            if not ready:
                break
            ordered += [self.revisions[name] for name in ready]
            done.update(ready)
            rest = [name for name in rest if name not in done]
        return ordered

    def queue(self, target: str) -> str:
        """The queue of the workers that have this tree and this target database."""
        return f"{QUEUE}.{digest(*self.heads, target)}"


def load(settings: Settings) -> Tree:
    """
    Find and read the tree.

    Raises SettingsError where none is named or the file is not there, MigrationError where it cannot be read.
    """
    config, why = _locate(settings)
    python = settings.alembic_python or sys.executable
    revisions = _read_source(config)
    if revisions is None:
        revisions = _described(config, python)
    return Tree(config, why, python, {revision.revision: revision for revision in revisions})


def _locate(settings: Settings) -> tuple[Path, str]:
    named = settings.alembic_config
    if named == "builtin":
        return BUILTIN, "BIFROST_ALEMBIC_CONFIG=builtin"
    config = Path(named) if named else environment.DEFAULT_TREE
    why = "BIFROST_ALEMBIC_CONFIG or ALEMBIC_CONFIG names it" if named else "found in the working folder"
    if config.is_file():
        return config.resolve(), why
    if named:
        raise SettingsError([f"BIFROST_ALEMBIC_CONFIG names {named}, which is no file"])
    raise SettingsError([environment.NO_TREE])


def _read_source(config: Path) -> list[Revision] | None:
    """The revisions, or None where only Alembic itself can tell."""
    # RawConfigParser and not Alembic's interpolation: of the values only `%(here)s` is read here.
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(config.read_text(encoding="utf-8"))
        section = dict(parser["alembic"])
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError):
        return None
    location = section.get("script_location", "").replace("%(here)s", str(config.parent))
    unusual = {"version_locations", "recursive_version_locations", "sourceless"} & section.keys()
    if not location or ":" in location or "%" in location or unusual:
        return None
    versions = config.parent / location / "versions"
    if not versions.is_dir():
        return None
    found = [_read_revision(file) for file in sorted(versions.glob("*.py")) if not file.name.startswith((".#", "__"))]
    revisions = [revision for revision in found if revision is not None]
    known = {revision.revision for revision in revisions}
    named = {name for revision in revisions for name in (*revision.down, *revision.depends_on)}
    plain = len(known) == len(found) and named <= known
    # What goes in a circle can never be applied; Alembic has the words for it.
    applicable = Tree(config, "", "", {revision.revision: revision for revision in revisions}).pending(())
    return revisions if plain and len(applicable) == len(known) else None


def _read_revision(file: Path) -> Revision | None:
    try:
        module = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return None
    values: dict[str, Any] = {}
    for node in module.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
                try:
                    values[target.id] = ast.literal_eval(node.value)
                except ValueError:
                    values[target.id] = ...
    try:
        down, depends_on, labels = (
            _names(values.get(name)) for name in ("down_revision", "depends_on", "branch_labels")
        )
    except TypeError:
        return None
    revision = values.get("revision")
    if not isinstance(revision, str) or "down_revision" not in values:
        return None
    title = first_line(ast.get_docstring(module) or "")
    return Revision(revision, title, down, depends_on, labels)


def first_line(text: str) -> str:
    """The first line that says something; "" without one."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _names(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise TypeError


def ask_alembic(config: Path, python: str, request: Mapping[str, Any], **variables: str) -> dict[str, Any]:
    """
    The answer of the tree's own Alembic to one request, in its own process (`alembic_child.py`).

    Where it fails, the answer has a `message` and nothing else that was asked for. variables: for its environment.

    Raises SettingsError where the interpreter does not start, or has no Alembic.
    """
    try:
        child = subprocess.run(  # noqa: S603  (the operator's own interpreter)
            [python, str(CHILD)],
            input=json.dumps({"config": str(config), **request}) + "\n", cwd=config.parent,
            env=environment.child_environment(**variables),
            capture_output=True, text=True, check=False, timeout=ASK_TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"message": f"no answer within {ASK_TIMEOUT:.0f}s"}
    except OSError as error:
        raise unfit(python, f"does not start: {error.strerror}") from error
    lines = child.stderr.splitlines() or [f"its interpreter ended with code {child.returncode}"]
    answer: dict[str, Any] = json.loads(child.stdout or "{}")
    if answer.get("kind") == "no_alembic":
        raise unfit(python, answer["message"])
    return {"message": lines[-1], **answer}


def _described(config: Path, python: str) -> list[Revision]:
    answer = ask_alembic(config, python, {"mode": "describe"})
    if "revisions" not in answer:
        raise MigrationError("", "", "", f"{config} cannot be read: {answer['message']}", "", [])
    return [
        Revision(item["revision"], item["title"], *(tuple(item[key]) for key in ("down", "depends_on", "labels")))
        for item in answer["revisions"]
    ]


def unfit(python: str, why: str) -> SettingsError:
    """The tree's interpreter cannot run the tree. why: what it does or lacks."""
    return SettingsError([f"BIFROST_ALEMBIC_PYTHON names {python}, which {why}"])
