"""M18: our reading of a tree's source equals that of Alembic, or Alembic is asked."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory
from hypothesis import given, settings, strategies as st

from bifrost_bootstrap.migrate.tree import Revision
from bifrost_bootstrap.migrate.tree_source import read_source

NAMES = st.sampled_from(["1", "2", "3", "a1", "b_2", "ü"])
#: How a file may set one of Alembic's variables: plainly, in another way, or twice.
PLAINLY = st.sampled_from(["{name} = {value}", "{name}: object = {value}"])
ODDLY = st.sampled_from([
    "{name} = {value}", "{name}: object = {value}", "{name} = {value}  # why", "other = {name} = {value}",
    "({name}) = {value}", "{name}, other = {value}, 1", "if True:\n    {name} = {value}",
    "{name} = None\n{name} = {value}", "{name} = {value}\ndel {name}\n{name} = {value}",
    "for {name} in [{value}]: pass", "globals()['{name}'] = {value}", "exec('{name} = ' + repr({value}))",
    "def f():\n    global {name}\n    {name} = {value}\nf()",
    "with open('/dev/null') as {name}: pass\n{name} = {value}",
    "try:\n    {name} = {value}\nfinally:\n    pass", "{name} = ({name} := {value})",
    "def {name}(): pass\n{name} = {value}",
    "import os as {name}\n{name} = {value}", "class T:\n    {name} = 5\n{name} = {value}",
])  # fmt: skip
FILES = st.sampled_from(
    ["{n}.py", "{n}_x.py", "__{n}_x.py", "__init__{n}.py", ".#{n}.py", ".{n}.py", "{n}.txt", "{n}.PY"]
)
ASSIGNMENTS = st.one_of(PLAINLY, PLAINLY, PLAINLY, PLAINLY, PLAINLY, PLAINLY, ODDLY)
DOCS = st.sampled_from(
    ["", '"""Title"""\n', '"""\n  Two\n  lines\n"""\n', "'''Title.\n\nMore.\n'''\n", '"""\n\nLate"""\n']
)
TUPLES = st.lists(NAMES, max_size=2).map(tuple)
VALUES = st.one_of(st.none(), NAMES, TUPLES, TUPLES.map(list))


@st.composite
def files(draw: st.DrawFn) -> dict[str, str]:
    """Files of a folder `versions`, by name."""
    found = {}
    for number in range(draw(st.integers(0, 4))):
        values = {"revision": draw(NAMES), "down_revision": draw(VALUES)}
        values |= {name: draw(VALUES) for name in ("depends_on", "branch_labels") if draw(st.booleans())}
        lines = [draw(ASSIGNMENTS).format(name=name, value=repr(value)) for name, value in values.items()]
        text = draw(DOCS) + "\n".join(lines) + "\n"
        found[draw(FILES).format(n=number)] = text
    return found


def of_alembic(config: Path) -> dict[str, Revision] | None:
    """What Alembic reads, where it takes the tree; None where it fails, or warns of what it takes all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            scripts = list(ScriptDirectory.from_config(Config(str(config))).walk_revisions())
        except Exception:  # noqa: BLE001  (whatever it is)
            return None
    return {
        one.revision: Revision(
            one.revision, next((line.strip() for line in one.doc.splitlines() if line.strip()), ""),
            tuple(one._versioned_down_revisions), tuple(one._resolved_dependencies),
            tuple(sorted(one._orig_branch_labels)),
        )
        for one in scripts
    }  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(files())
def test_our_reading_is_alembics(sources: dict[str, str]) -> None:
    """Where there is one, it is what Alembic reads, and Alembic takes the tree without a warning."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "alembic.ini"
        config.write_text("[alembic]\nscript_location = %(here)s\n")
        versions = Path(folder) / "versions"
        versions.mkdir()
        for name, text in sources.items():
            (versions / name).write_text(text, encoding="utf-8")
        ours = read_source(versions)
        if ours is not None:
            read = {
                one.revision: Revision(one.revision, one.title, one.down, one.depends_on, tuple(sorted(one.labels)))
                for one in ours
            }
            assert read == of_alembic(config)
