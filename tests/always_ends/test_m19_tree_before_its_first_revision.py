"""M19: a tree that fails before its first revision is a configuration error with names."""

from __future__ import annotations

import pytest

from tests.servers import Database
from tests.setups.migration import StartMigrate, Tree, applied, outcome

#: What the platform's env.py does first.
SETTINGS_CLASS = """
import os
from pydantic import BaseModel, Field

class Settings(BaseModel):
    SECRET_KEY_OF_THE_PLATFORM: str
    POOL_SIZE: int = 5

Settings.model_validate(dict(os.environ))
"""


def begin_with(tree: Tree, code: str) -> None:
    """Put code before env.py's own."""
    tree.revision("one")
    env = tree.folder / "env.py"
    env.write_text(code + env.read_text())


def test_m19_settings_class(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """The error names all missing and invalid fields. With correct values the same tree migrates."""
    begin_with(tree, SETTINGS_CLASS)
    failed = outcome(start_migrate(POOL_SIZE="many"))
    assert (failed.code, failed.facts["error"]) == (78, "TreeError")
    assert "SECRET_KEY_OF_THE_PLATFORM: Field required" in failed.facts["message"]
    assert "POOL_SIZE: Input should be a valid integer" in failed.facts["message"]
    assert f"{tree.folder}/env.py, line 9" in failed.facts["message"]
    assert "revision and deploy" not in failed.facts["remedy"]
    assert outcome(start_migrate(SECRET_KEY_OF_THE_PLATFORM="x" * 32)).code == 0
    assert applied(database) == {"one": 1}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("{}['tenant']\n", "KeyError: 'tenant'"),
        ("raise ValueError\n", "ValueError ("),
    ],
)
def test_m19_class_and_place(tree: Tree, start_migrate: StartMigrate, code: str, words: str) -> None:
    """The error has class and message of the exception in env.py, and the line."""
    begin_with(tree, code)
    failed = outcome(start_migrate())
    assert failed.code == 78
    assert words in failed.facts["message"]
    assert f"{tree.folder}/env.py, line 1" in failed.facts["message"]


def test_m19_revision_that_has_begun(tree: Tree, start_migrate: StartMigrate) -> None:
    """The same exception in a revision is reported as a failed revision, with class and line."""
    tree.revision("one", "{}['tenant']")
    failed = outcome(start_migrate())
    assert failed.code == 1
    assert "revision one (Revision one) failed: KeyError: 'tenant'" in failed.facts["message"]
    assert f"{tree.versions}/one.py, line " in failed.facts["message"]


def test_m19_error_that_env_py_catches(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """If env.py swallows the error of a revision, it is reported as that revision's error."""
    tree.revision("one").revision("two", "raise ValueError('the second')")
    env = tree.folder / "env.py"
    env.write_text(
        env.read_text().replace(
            "        context.run_migrations()",
            "        try:\n            context.run_migrations()\n        except Exception as error:\n"
            "            print('never mind', error)",
        )
    )
    failed = outcome(start_migrate())
    assert failed.code == 1
    assert "revision two (Revision two) failed: ValueError: the second" in failed.facts["message"]


def test_m19_commit_in_a_revision(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """A revision that commits on its connection is not recorded. The error names the revision and the reason."""
    tree.revision("one").revision("two", "op.get_bind().commit()")
    failed = outcome(start_migrate())
    assert failed.code == 1
    assert "revision two (Revision two) failed: " in failed.facts["message"]
    assert "commit" in failed.facts["message"]
