"""
Find the tree of this deployment and read it: from its source, or by asking its own Alembic in another process.

This process runs nothing of the tree.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bifrost_bootstrap import settings as environment
from bifrost_bootstrap.errors import MigrationError, SettingsError, TreeError
from bifrost_bootstrap.migrate import process
from bifrost_bootstrap.migrate.tree import Alembic, Revision, Tree
from bifrost_bootstrap.migrate.tree_source import may_run_several_times, read_source, script_location
from bifrost_bootstrap.redaction import masked
from bifrost_bootstrap.settings import Settings

#: Stands for the schema of a version table if the search path leads to none yet (`script/tree_answers.py`).
NOWHERE = "(no schema)"
#: The answers of `version_tables`, which each cost a process.
_VERSION_TABLES: dict[tuple[Alembic, str], tuple[str, ...]] = {}
BUILTIN = Path(__file__).parents[1] / "migrations" / "alembic.ini"


def load(settings: Settings) -> Tree:
    """
    Find and read the tree.

    Raises SettingsError if none is named or the file does not exist, TreeError if its configuration or its own code
    fails, MigrationError if its revisions do not fit together.
    """
    config, why = _find(settings)
    section = settings.alembic_name or "alembic"
    named = [f"--name={settings.alembic_name}"] if settings.alembic_name else []
    options = (*named, *(f"-x{pair}" for pair in settings.alembic_x))
    location, plain = script_location(config, section)
    folder = _working_folder(config, location)
    alembic = Alembic(settings.alembic_python or sys.executable, folder, config, options)
    # Alembic reads what the ini leaves out from a pyproject.toml in the working folder.
    readable = plain and location and not environment.has_tree(folder / environment.PYPROJECT)
    revisions = read_source(folder / location / "versions") if readable else None
    env = folder / location / "env.py"
    if revisions is None:
        revisions, env = _ask_alembic(alembic)
    return Tree(alembic, why, {revision.revision: revision for revision in revisions}, may_run_several_times(env))


def _find(settings: Settings) -> tuple[Path, str]:
    named = settings.alembic_config
    if named == "builtin":
        return BUILTIN, "BIFROST_ALEMBIC_CONFIG=builtin"
    # Do not resolve links: `%(here)s` is the folder of the link, as for Alembic.
    if named and Path(named).is_file():
        return Path(named).absolute(), "BIFROST_ALEMBIC_CONFIG or ALEMBIC_CONFIG names it"
    if named:
        raise SettingsError([f"BIFROST_ALEMBIC_CONFIG names {named}, which is no file"])
    if found := environment.default_tree():
        return found.absolute(), "found in the working folder"
    raise SettingsError([environment.NO_TREE])


def _working_folder(config: Path, location: str) -> Path:
    """Where Alembic runs: in the working folder, as if typed there, or in the ini's if the tree is only there."""
    folders = (Path.cwd(), config.parent) if location else ()
    return next((folder for folder in folders if (folder / location / "env.py").is_file()), Path.cwd())


def _ask_alembic(alembic: Alembic) -> tuple[list[Revision], Path]:
    """The revisions, and where env.py is."""
    answer = process.ask(alembic, {"mode": "describe"})
    if "revisions" not in answer:
        message = f"{alembic.config} cannot be read: {answer['message']}"
        raise TreeError(message) if answer.get("by_tree") else MigrationError("", "", "", message, "", [])
    revisions = [
        Revision(item["revision"], item["title"], *(tuple(item[key]) for key in ("down", "depends_on", "labels")))
        for item in answer["revisions"]
    ]
    return revisions, alembic.folder / answer["env"]


def version_tables(alembic: Alembic, url: str) -> tuple[str, ...]:
    """
    Where env.py keeps its versions in the database of this URL, `schema.table` each, in its order.

    env.py runs as for `alembic current`, and writes nothing. It runs once in the life of this process, if all tables
    have a schema. url: as the operator wrote it.

    Raises TreeError if env.py fails, SettingsError if its interpreter does not start.
    """
    if known := _VERSION_TABLES.get((alembic, url)):
        return known
    answer = process.ask(alembic, {"mode": "tables"}, BIFROST_DATABASE_URL=url, DATABASE_URL=url)
    if "tables" not in answer:
        raise TreeError(masked(answer["message"]))
    tables = tuple(dict.fromkeys(answer["tables"]))
    if not any(table.startswith(NOWHERE) for table in tables):
        _VERSION_TABLES[alembic, url] = tables
    return tables
