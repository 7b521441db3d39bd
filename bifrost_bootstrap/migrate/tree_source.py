"""
The revisions of a plainly written tree, read from its source.

Importing Alembic costs more than a whole `init` with nothing to do. Where anything is not plain (a value that is
computed or assigned twice, several version locations, two files of one id), there is no answer here, and Alembic is
asked.
"""

from __future__ import annotations

import ast
import configparser
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bifrost_bootstrap.migrate.tree import Revision, in_order

#: What Alembic reads of a revision's file.
VARIABLES = ("revision", "down_revision", "depends_on", "branch_labels")
#: Calls by which a file may set its variables unseen.
DYNAMIC = {"globals", "vars", "locals", "exec", "eval", "setattr"}
#: Options of the configuration with which the revisions are not simply the files of `versions`.
UNUSUAL = {"version_locations", "recursive_version_locations", "sourceless"}
#: What runs its body more than once; and what runs a function, or a coroutine, that it is given, once.
REPEATS = (ast.For, ast.AsyncFor, ast.While, ast.comprehension)
RUNNERS = {"run", "run_sync", "run_until_complete"}
#: Files of `versions` that Alembic does not take for revisions begin with one of these.
NO_REVISION = (".#", "__init__")


def read_source(versions: Path) -> list[Revision] | None:
    """
    The revisions in this folder of a script directory.

    None where only Alembic itself can tell, also what is wrong with the tree.
    """
    if not versions.is_dir():
        return None
    files = [file for file in sorted(versions.glob("*.py")) if not file.name.startswith(NO_REVISION)]
    revisions: dict[str, Revision] = {}
    for file in files:
        revision = _read_revision(file)
        if revision is None or revision.revision in revisions:
            return None
        revisions[revision.revision] = revision
    labels = [label for revision in revisions.values() for label in revision.labels]
    named = {name for revision in revisions.values() for name in (*revision.down, *revision.depends_on)}
    plain = named <= revisions.keys() and len({*labels, *revisions}) == len(labels) + len(revisions)
    # What goes in a circle can never be applied; Alembic has the words for it.
    applicable = in_order(revisions, set())
    return list(revisions.values()) if plain and len(applicable) == len(revisions) else None


def script_location(config: Path, section: str) -> tuple[str, bool]:
    """
    The script location in this section of an ini file, and whether its revisions are simply the files of `versions`.

    The location is "" where it is no ini file, or one that only Alembic can read.
    """
    # RawConfigParser and not Alembic's interpolation: of the values only `%(here)s` is read here.
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(config.read_text(encoding="utf-8"))
        options = dict(parser[section])
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError):
        return "", False
    location = options.get("script_location", "").replace("%(here)s", str(config.parent))
    if ":" in location or "%" in location:
        return "", False
    return location, not UNUSUAL & options.keys()


def _read_revision(file: Path) -> Revision | None:
    try:
        module = ast.parse(file.read_bytes())
        values = _values(module)
        revision, down, depends_on, labels = (_names(values.get(name)) for name in VARIABLES)
    except (OSError, RecursionError, SyntaxError, TypeError, ValueError):
        return None
    # In other ids there may be characters that Alembic refuses.
    if len(revision) != 1 or "down_revision" not in values or not re.fullmatch(r"\w+", revision[0]):
        return None
    return Revision(revision[0], first_line(ast.get_docstring(module) or ""), down, depends_on, labels)


def _values(module: ast.Module) -> dict[str, object]:
    """The variables that are assigned once, plainly, in the module itself. Raises ValueError where one is not."""
    values: dict[str, object] = {}
    for node in module.body:
        if isinstance(node, ast.Assign):
            targets: list[ast.expr] = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and target.id in VARIABLES and node.value:
                values[target.id] = ast.literal_eval(node.value)
    if _bindings(module) != Counter(values.keys()):
        raise ValueError("a variable is set in another way than by one assignment")
    return values


def _bindings(module: ast.Module) -> Counter[str]:
    """How often each of the variables is set, in whatever way. Raises ValueError where that cannot be seen."""
    found: Counter[str] = Counter()
    for node in ast.walk(module):
        if isinstance(node, ast.Name) and node.id in DYNAMIC:
            raise ValueError("variables may be set unseen")
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            raise ValueError("variables may be imported unseen")
        reads = isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load)
        if not reads and not isinstance(node, ast.Constant | ast.keyword | ast.arg):
            found.update(name for name in _identifiers(node) if name in (*VARIABLES, "__doc__"))
    return found


def _identifiers(node: ast.AST) -> Iterable[str]:
    for _, value in ast.iter_fields(node):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                yield item


def visits_several(env: Path) -> bool:
    """
    Whether this env.py may run the revisions more than once, for several schemas or version tables.

    False only where it is plain that it does not: no loop, no search path, and each function on the way to
    `run_migrations` named once, where it is called or given to a runner of coroutines.
    """
    try:
        nodes = list(ast.walk(ast.parse(env.read_bytes())))
    except (OSError, RecursionError, SyntaxError, ValueError):
        return True
    repeats = (isinstance(node, REPEATS) or "search_path" in str(getattr(node, "value", "")) for node in nodes)
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    on_the_way = {"run_migrations"}
    while more := {one.name for one in functions if on_the_way & set(map(_named, ast.walk(one)))} - on_the_way:
        on_the_way |= more
    uses = Counter(_named(node) for node in nodes)
    given = {_named(one) for call in calls if _last_name(call.func) not in RUNNERS for one in call.args}
    # Offline and online each have one.
    migrates = uses["run_migrations"] in (1, 2)
    once = all(uses[name] == 1 for name in on_the_way - {"run_migrations"})
    return any(repeats) or not migrates or not once or bool(given & on_the_way)


def _named(node: ast.AST) -> str:
    """The name that is used here; of attributes only that of Alembic's function."""
    name = _last_name(node)
    return name if isinstance(node, ast.Name) or name == "run_migrations" else ""


def _last_name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def first_line(text: str) -> str:
    """The first line that says something; "" without one."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _names(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise TypeError
