"""
Read a plainly written tree from its source.

Importing Alembic costs more than a whole `init` with nothing to do. If anything is not plain (a value that is computed
or assigned twice, several version locations, two files with the same id), the answer here is None and Alembic is asked.
"""

from __future__ import annotations

import ast
import configparser
import re
from collections import Counter
from pathlib import Path

from bifrost_bootstrap.migrate.tree import Revision, in_order

#: What Alembic reads of a revision's file.
VARIABLES = ("revision", "down_revision", "depends_on", "branch_labels")
#: Calls by which a file may set its variables unseen.
DYNAMIC = {"globals", "vars", "locals", "exec", "eval", "setattr"}
#: Options of the configuration with which the revisions are not simply the files of `versions`.
UNUSUAL = {"version_locations", "recursive_version_locations", "sourceless"}
#: Syntax that runs its body more than once.
LOOPS = (ast.For, ast.AsyncFor, ast.While)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
#: Functions that run the function or coroutine that they are given once.
RUNNERS = {"run", "run_sync", "run_until_complete"}
#: Files of `versions` that Alembic does not take for revisions begin with one of these.
NO_REVISION = (".#", "__init__")


def read_source(versions: Path) -> list[Revision] | None:
    """
    The revisions in this folder of a script directory.

    None if only Alembic itself can tell, also if the tree is faulty: Alembic has the words for that.
    """
    if not versions.is_dir():
        return None
    revisions: dict[str, Revision] = {}
    for file in sorted(versions.glob("*.py")):
        if file.name.startswith(NO_REVISION):
            continue
        revision = _read_revision(file)
        if revision is None or revision.revision in revisions:
            return None
        revisions[revision.revision] = revision
    names = [*revisions, *(label for revision in revisions.values() for label in revision.labels)]
    if len(names) != len(set(names)):
        return None
    # Revisions are left out of this order if they depend on one that is missing, or on each other in a circle.
    ordered = in_order(revisions, set())
    return list(revisions.values()) if len(ordered) == len(revisions) else None


def script_location(config: Path, section: str) -> tuple[str, bool]:
    """
    The script location in this section of an ini file, and whether its revisions are simply the files of `versions`.

    The location is "" if the file is no ini file, or one that only Alembic can read.
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
        values = _read_variables(module)
        revision, down, depends_on, labels = (_names(values.get(name)) for name in VARIABLES)
    except (OSError, RecursionError, SyntaxError, TypeError, ValueError):
        return None
    # Alembic refuses some characters in other ids.
    if len(revision) != 1 or "down_revision" not in values or not re.fullmatch(r"\w+", revision[0]):
        return None
    return Revision(revision[0], first_line(ast.get_docstring(module) or ""), down, depends_on, labels)


def _read_variables(module: ast.Module) -> dict[str, object]:
    """The variables that the module assigns once and plainly. Raises ValueError if one is set in another way."""
    values: dict[str, object] = {}
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and target.id in VARIABLES:
                    values[target.id] = ast.literal_eval(node.value)
    if _count_bindings(module) != Counter(values.keys()):
        raise ValueError("a variable is set in another way than by one assignment")
    return values


def _count_bindings(module: ast.Module) -> Counter[str]:
    """How often each of the variables is set, in whatever way. Raises ValueError if that cannot be seen."""
    found: Counter[str] = Counter()
    for node in ast.walk(module):
        if isinstance(node, ast.Name) and node.id in DYNAMIC:
            raise ValueError("variables may be set unseen")
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            raise ValueError("variables may be imported unseen")
        is_read = isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load)
        if not is_read and not isinstance(node, ast.Constant | ast.keyword | ast.arg):
            fields = [value for _, value in ast.iter_fields(node)]
            identifiers = [*fields, *(item for value in fields if isinstance(value, list) for item in value)]
            found.update(name for name in identifiers if name in (*VARIABLES, "__doc__"))
    return found


def may_run_several_times(env: Path) -> bool:
    """
    Whether this env.py may run the revisions more than once, for several schemas or version tables.

    False only if it plainly does not: it has no loop and no search path, and uses each function on the way to
    `run_migrations` once, outside a comprehension, to call it or to give it to a runner of coroutines.
    """
    try:
        nodes = list(ast.walk(ast.parse(env.read_bytes())))
    except (OSError, RecursionError, SyntaxError, ValueError):
        return True
    if any(isinstance(node, LOOPS) or "search_path" in str(getattr(node, "value", "")) for node in nodes):
        return True
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    on_the_way = {"run_migrations"}
    while more := {one.name for one in functions if on_the_way & set(map(_named, ast.walk(one)))} - on_the_way:
        on_the_way |= more
    uses = Counter(map(_named, nodes))
    # Offline and online each run them once.
    runs_once = uses["run_migrations"] in (1, 2)
    called = Counter(_named(call.func) for call in calls)
    called += Counter(_named(one) for call in calls if _last_name(call.func) in RUNNERS for one in call.args)
    if not runs_once or any((uses[name], called[name]) != (1, 1) for name in on_the_way - {"run_migrations"}):
        return True
    comprehensions = [node for node in nodes if isinstance(node, COMPREHENSIONS)]
    return any(on_the_way & set(map(_named, ast.walk(one))) for one in comprehensions)


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
