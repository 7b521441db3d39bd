"""Finding a tree, and reading its source as Alembic would."""

from __future__ import annotations

import shutil
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from bifrost_bootstrap.errors import MigrationError, SettingsError, TreeError
from bifrost_bootstrap.migrate import tree_loading
from bifrost_bootstrap.migrate.tree import Alembic, Revision, Tree
from bifrost_bootstrap.migrate.tree_loading import BUILTIN
from bifrost_bootstrap.settings import load as load_settings

#: A program that does not exist. A tree that loads with it was read from its source, without Alembic.
NO_PYTHON = "/nonexistent/python"

MakeTree = Callable[..., Path]


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """Write a tree of these files in `versions/`, return its alembic.ini; `ini` are more lines of that."""

    def make(files: dict[str, str], ini: str = "script_location = %(here)s/scripts") -> Path:
        versions = tmp_path / "scripts" / "versions"
        versions.mkdir(parents=True)
        (tmp_path / "scripts" / "env.py").write_text("raise RuntimeError('reading a tree runs nothing of it')")
        for name, source in files.items():
            (versions / name).parent.mkdir(exist_ok=True)
            (versions / name).write_text(textwrap.dedent(source), encoding="utf-8")
        config = tmp_path / "alembic.ini"
        config.write_text(f"[alembic]\n{ini}\n", encoding="utf-8")
        return config

    return make


def revision(name: str, down: str = "None", *, doc: str = "", **more: str) -> str:
    """Source of a revision; the values are source too."""
    lines = [f'"""{doc}"""'] if doc else []
    lines += [f"revision = {name!r}", f"down_revision = {down}"]
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in more.items()), ""])


def load(config: Path | str, python: str | None = None) -> Tree:
    """Load the tree of this alembic.ini."""
    variables = {"BIFROST_ALEMBIC_CONFIG": str(config)} | ({"BIFROST_ALEMBIC_PYTHON": python} if python else {})
    return tree_loading.load(load_settings((), variables))


def in_alembics_eyes(config: Path) -> tuple[dict[str, Revision], tuple[str, ...]]:
    """Revisions and heads as Alembic's own ScriptDirectory has them."""
    with warnings.catch_warnings():
        # Newer releases want to be told how paths are separated; the trees here name no two.
        warnings.simplefilter("ignore", DeprecationWarning)
        script = ScriptDirectory.from_config(Config(str(config)))
        scripts = list(script.walk_revisions())
    revisions = {
        one.revision: Revision(
            one.revision,
            one.doc.partition("\n")[0],
            tuple(one._versioned_down_revisions),
            tuple(one._resolved_dependencies),
            tuple(sorted(one._orig_branch_labels)),
        )
        for one in scripts
    }
    return revisions, tuple(sorted(script.get_heads()))


PLAIN = {
    "empty": {},
    "linear": {
        "0001_first.py": revision("0001", doc="First\\n\\nThe long story.\\n\\nRevision ID: 0001"),
        "0002_second.py": revision("0002", "'0001'", doc="  Second of two  ", branch_labels="None", depends_on="None"),
        "0003.py": revision("0003", "'0002'"),
        "0004.py": revision("0004", "('0003',)", doc="\\nLine one\\nline two\\n\\nmore"),
    },
    "annotated": {
        "a.py": """
            '''As newer Alembic releases write it.'''
            from typing import Sequence, Union
            revision: str = 'a'
            down_revision: Union[str, Sequence[str], None] = None
            branch_labels: Union[str, Sequence[str], None] = None
            depends_on: Union[str, Sequence[str], None] = None
            later: int

            def upgrade() -> None:
                raise RuntimeError
            """,
    },
    "merge": {
        "1.py": revision("1"),
        "2.py": revision("2", "'1'"),
        "3.py": revision("3", "'1'"),
        "4.py": revision("4", "['2', '3']", doc="merge"),
    },
    "fork": {"1.py": revision("1"), "2.py": revision("2", "'1'"), "3.py": revision("3", "'1'")},
    "labelled branches": {
        "1.py": revision("1", branch_labels="('core',)"),
        "2.py": revision("2", "'1'"),
        "3.py": revision("3", branch_labels="['billing', 'money']", depends_on="('2',)"),
        "4.py": revision("4", "'3'", depends_on="'1'"),
    },
    "depends on a later file": {"a.py": revision("9", "'5'"), "b.py": revision("5"), "c.py": revision("7", "'9'")},
    "files that are none": {
        "1.py": revision("1"),
        "__init__.py": "raise RuntimeError",
        "__init__more.py": "raise RuntimeError",
        "__0002_x.py": revision("2", "'1'"),
        ".hidden.py": revision("h", "'2'"),
        ".#2.py": "an editor's lock",
        "notes.txt": "revision = 'x'",
        "README": "",
        "folder/3.py": revision("3", "'1'"),
    },
    "unicode": {"ä.py": "# -*- coding: utf-8 -*-\n" + revision("ü_1", doc="Größe ändern – 変更")},
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_tree_is_read_from_its_source(name: str, make_tree: MakeTree) -> None:
    """The static reading equals Alembic's own view, in revisions, titles, links and heads, and needs no process."""
    config = make_tree(PLAIN[name])
    tree = load(config, NO_PYTHON)
    expected, heads = in_alembics_eyes(config)
    assert {name: _sorted_labels(one) for name, one in tree.revisions.items()} == expected
    assert tree.heads == heads


def _sorted_labels(one: Revision) -> Revision:
    return Revision(one.revision, one.title, one.down, one.depends_on, tuple(sorted(one.labels)))


ODD = {
    "computed id": {"1.py": "revision = 'a' + 'b'\ndown_revision = None\n"},
    "computed link": {"1.py": revision("1"), "2.py": "import os\nrevision = '2'\ndown_revision = os.sep and '1'\n"},
    "unpacked": {"1.py": "revision, down_revision = '1', None\n"},
    "conditional": {"1.py": "if True:\n    revision = '1'\n    down_revision = None\n"},
    "assigned again in an if": {
        "1.py": revision("1"),
        "2.py": revision("2", "'1'"),
        "3.py": revision("3", "'1'") + "if True:\n    down_revision = '2'\n",
    },
    "set unseen": {"1.py": revision("1"), "2.py": revision("2", "None") + "globals()['down_revision'] = '1'\n"},
    "set by a function": {
        "1.py": revision("1"),
        "2.py": revision("2") + "def f():\n    global down_revision\n    down_revision = '1'\nf()\n",
    },
    "imported": {
        "1.py": revision("1"),
        "2.py": revision("2") + "from os import sep as down_revision\ndel down_revision\ndown_revision = '1'\n",
    },
    "dependency by label": {
        "1.py": revision("1", branch_labels="'core'"),
        "2.py": revision("2", branch_labels="'other'", depends_on="'core'"),
    },
}


@pytest.mark.parametrize("name", ODD)
def test_odd_tree_is_asked_of_its_own_alembic(name: str, make_tree: MakeTree) -> None:
    """What the source does not say plainly is asked of the tree's Alembic, with the same result as there."""
    config = make_tree(ODD[name])
    tree = load(config)
    expected, heads = in_alembics_eyes(config)
    assert dict(tree.revisions) == expected
    assert tree.heads == heads
    # The control: without an interpreter there is no answer, so it was asked.
    with pytest.raises(SettingsError, match="BIFROST_ALEMBIC_PYTHON names /nonexistent/python, which does not start"):
        load(config, NO_PYTHON)


@pytest.mark.parametrize(
    "ini",
    [
        "script_location = %(here)s/scripts\nversion_locations = %(here)s/scripts/versions %(here)s/more",
        "script_location = %(here)s/scripts\nrecursive_version_locations = true\nversion_locations = %(here)s/more",
        "script_location = %(folder)s/scripts\nfolder = %(here)s",
    ],
)
def test_odd_configuration_is_asked_of_alembic(ini: str, make_tree: MakeTree, tmp_path: Path) -> None:
    """Several version locations and values made of other values are Alembic's business."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "2.py").write_text(revision("2", "'1'" if "versions %" in ini else "None"))
    config = make_tree({"1.py": revision("1")}, ini)
    assert load(config).heads == in_alembics_eyes(config)[1]
    with pytest.raises(SettingsError, match="does not start"):
        load(config, NO_PYTHON)


@pytest.mark.parametrize(
    "ini",
    [
        "script_location = scripts\nprepend_sys_path = .",
        "script_location = ./scripts",
        "script_location=%(here)s/scripts",
    ],
)
def test_script_location_is_relative_to_the_configuration(
    ini: str, make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree is found from any working folder; Alembic agrees in the folder of the configuration."""
    config = make_tree({"1.py": revision("1")}, ini)
    monkeypatch.chdir("/")
    assert load(config, NO_PYTHON).heads == ("1",)
    monkeypatch.chdir(tmp_path)
    assert load("alembic.ini", NO_PYTHON).heads == in_alembics_eyes(config)[1] == ("1",)


def test_unusual_tree_is_found_from_any_folder(
    make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative location counts from the folder of the configuration where only there a tree is, sourceless or not."""
    config = make_tree({"1.py": revision("1")}, "script_location = scripts\nrecursive_version_locations = true")
    monkeypatch.chdir("/")
    assert load(config).alembic.folder == tmp_path
    assert load(config).heads == ("1",)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"1.py": "revision = '1'\ndown_revision = None\ndef upgrade(:\n"}, "invalid syntax"),
        ({"1.py": revision("1", "'gone'")}, "gone"),
        ({"1.py": revision("1", "'2'"), "2.py": revision("2", "'1'")}, "[Cc]ycle"),
        ({"1.py": revision("1", depends_on="'2'"), "2.py": revision("2", "'1'")}, "[Cc]ycle|[Ll]oop"),
        ({"helper.py": "VALUE = 1\n"}, "revision id"),
        ({"1.py": "revision = '1'\n"}, "down_revision"),
        ({"1.py": revision("1"), "__0001_x.py": revision("1")}, r"revision 1 is in two files: .*/(1|__0001_x)\.py and"),
        ({"1.py": "revision = '1'.strip()\ndown_revision = None", "2.py": revision("1")}, "revision 1 is in two files"),
        ({"1.py": revision("a-b")}, "not allowed in revision identifier"),
    ],
)
def test_broken_tree_is_told_in_alembics_words(files: dict[str, str], words: str, make_tree: MakeTree) -> None:
    """A tree that Alembic cannot read is a failed migration with its words and the file's name."""
    config = make_tree(files)
    with pytest.raises(MigrationError, match=words) as failed:
        load(config)
    assert str(config) in str(failed.value)


def test_import_that_fails(make_tree: MakeTree) -> None:
    """What a revision's file lacks is a matter of what the image holds."""
    config = make_tree({"1.py": "import nowhere_to_be_found\nrevision = 'a' + 'b'\ndown_revision = None\n"})
    with pytest.raises(TreeError, match=rf"{config} cannot be read: ModuleNotFoundError: .*nowhere_to_be_found"):
        load(config)


def test_configuration_without_its_section(tmp_path: Path) -> None:
    """A file that is no alembic.ini is named, whatever it holds."""
    config = tmp_path / "alembic.ini"
    config.write_bytes(b"\xff\xfe not text")
    with pytest.raises(MigrationError, match=str(config)):
        load(config)
    config.write_text("[other]\n")
    with pytest.raises(MigrationError, match=str(config)):
        load(config)


def test_builtin_tree_and_copy_of_a_foreign_one(foreign_tree: Path) -> None:
    """Our own tree and the platform's are plain: no process is needed for either."""
    assert load("builtin", NO_PYTHON).heads == in_alembics_eyes(BUILTIN)[1]
    expected, heads = in_alembics_eyes_from(foreign_tree)
    tree = load(foreign_tree, NO_PYTHON)
    assert (dict(tree.revisions), tree.heads) == (expected, heads)


def in_alembics_eyes_from(config: Path) -> tuple[dict[str, Revision], tuple[str, ...]]:
    """As `in_alembics_eyes`, for a tree with a relative script_location."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(config.parent)
        return in_alembics_eyes(config)


def test_which_tree(make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The named one, else Alembic's own variable, else the working folder's; `why` says which."""
    config = make_tree({"1.py": revision("1")})
    assert load("builtin").why == "BIFROST_ALEMBIC_CONFIG=builtin"
    named = tree_loading.load(load_settings((), {"ALEMBIC_CONFIG": str(config)}))
    assert (named.alembic.config, named.heads) == (config, ("1",))
    assert "ALEMBIC_CONFIG" in named.why
    monkeypatch.chdir(tmp_path)
    found = tree_loading.load(load_settings((), {}))
    assert (found.alembic.config, found.why) == (config, "found in the working folder")


def test_no_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any tree, and with a name that is no file, it is a fault of the configuration that says so."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="BIFROST_ALEMBIC_CONFIG is not set, nor ALEMBIC_CONFIG"):
        tree_loading.load(load_settings((), {}))
    with pytest.raises(SettingsError, match=r"names gone\.ini, which is no file"):
        load("gone.ini")


# ------------------------------------------------------------------------------------------- what a tree can tell


def tree_of(*revisions: Revision) -> Tree:
    """A tree of these revisions."""
    return Tree(Alembic("python", Path(), Path("alembic.ini")), "", {one.revision: one for one in revisions})


DIAMOND = tree_of(
    Revision("1", ""), Revision("2", "", ("1",)), Revision("3", "", ("1",)), Revision("4", "", ("2", "3"))
)
BRANCHES = tree_of(
    Revision("c1", "", labels=("core",)),
    Revision("c2", "", ("c1",)),
    Revision("b1", "", depends_on=("c2",), labels=("billing",)),
    Revision("b2", "", ("b1",)),
)


@pytest.mark.parametrize(
    ("tree", "heads", "pending"),
    [
        (DIAMOND, [], ["1", "2", "3", "4"]),
        (DIAMOND, ["1"], ["2", "3", "4"]),
        (DIAMOND, ["2"], ["3", "4"]),
        (DIAMOND, ["2", "3"], ["4"]),
        (DIAMOND, ["4"], []),
        (BRANCHES, [], ["c1", "c2", "b1", "b2"]),
        (BRANCHES, ["c1"], ["c2", "b1", "b2"]),
        (BRANCHES, ["b1"], ["b2"]),
        (BRANCHES, ["b2"], []),
        (BRANCHES, ["b2", "unknown"], []),
        (tree_of(), [], []),
    ],
)
def test_pending(tree: Tree, heads: list[str], pending: list[str]) -> None:
    """What an upgrade would apply, each revision after all that it builds and depends on."""
    assert [one.revision for one in tree.pending(heads)] == pending


@pytest.mark.parametrize(
    ("tree", "forked"),
    [
        (DIAMOND, False),
        (BRANCHES, False),
        (tree_of(), False),
        (tree_of(Revision("1", ""), Revision("2", "", ("1",)), Revision("3", "", ("1",))), True),
        (tree_of(Revision("1", "", labels=("trunk",)), Revision("2", "", ("1",)), Revision("3", "", ("1",))), True),
        (tree_of(Revision("1", ""), Revision("2", "", ("1",), labels=("a",)), Revision("3", "", ("1",))), True),
        (tree_of(Revision("1", "", labels=("a",)), Revision("2", "", labels=("b",))), False),
    ],
)
def test_forked(tree: Tree, forked: bool) -> None:
    """Several heads are an accident, unless each is a branch with a label of its own."""
    assert tree.forked is forked


def test_several_bases() -> None:
    """A trunk without a label and a plugin with a base of its own are no fork; two heads of one base are."""
    trunk = (Revision("1", ""), Revision("2", "", ("1",)))
    plugin = Revision("p", "", depends_on=("2",), labels=("plugin",))
    assert not tree_of(*trunk, plugin).forked
    assert not tree_of(*trunk, Revision("p", "")).forked
    assert tree_of(*trunk, plugin, Revision("3", "", ("1",))).forked


def test_queue_stands_for_heads_and_target() -> None:
    """Workers of the same heads and database share a queue, of any other tree or database they do not."""
    same = tree_of(Revision("other way", ""), Revision("4", "", ("other way",)))
    assert DIAMOND.queue("h:5432/d") == same.queue("h:5432/d")
    assert DIAMOND.queue("h:5432/d") != DIAMOND.queue("h:5432/e")
    assert DIAMOND.queue("h:5432/d") != BRANCHES.queue("h:5432/d")
    with_option = replace(DIAMOND, alembic=replace(DIAMOND.alembic, options=("-xtenant=acme",)))
    assert DIAMOND.queue("h:5432/d") != with_option.queue("h:5432/d")
    assert DIAMOND.queue("h:5432/d").startswith("bifrost.bootstrap.")


def test_reading_leaves_nothing_behind(make_tree: MakeTree, tmp_path: Path) -> None:
    """Reading a tree from its source writes no bytecode into it."""
    config = make_tree(PLAIN["linear"])
    before = sorted(tmp_path.rglob("*"))
    load(config, NO_PYTHON)
    assert sorted(tmp_path.rglob("*")) == before
    shutil.rmtree(tmp_path / "scripts" / "versions")
    (tmp_path / "scripts" / "versions").mkdir()
    assert load(config, NO_PYTHON).heads == ()
