"""What the documents name exists: links, files, variables, exit codes, commands with options, Compose services."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from bifrost_bootstrap import __version__
from bifrost_bootstrap.celery import MIGRATE, WARM
from bifrost_bootstrap.cli.commands import main
from bifrost_bootstrap.errors import ExitCode
from bifrost_bootstrap.settings import Settings
from tests.docs.documents import CHECKOUT, DOCUMENTS, Block, Document

#: Files that define other variables than settings: those of Compose, of the platform, of the tests.
OTHER_HOMES = (".env.example", "docker-compose.yml", "deploy/compose/services.yml", "Dockerfile", "tests/conftest.py")
#: Folders and files of the checkout that documents speak of without a link.
PLACES = r"(?:bifrost_bootstrap|benchmarks|deploy|docs|requirements|tests|tools)/[\w./-]*"
OUR_PROGRAM = "bifrost-bootstrap"
#: How the comment begins above a block that is no more than a part of a file of the checkout, which it names.
PART_OF = "part of: "
#: Who runs a block, by the first word of the comment above it; the rest of it is the block's name there.
RUNNERS = {"session": "tests/docs", "rights": "tests/security", "compose": "tests/compose", "kube": "tests/kube"}

each = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda one: one.name)


@each
def test_links_lead_somewhere(document: Document) -> None:
    """Each relative link leads to a file of the checkout; after "#", to one of its headings."""
    for target in document.links:
        file, _, anchor = target.partition("#")
        path = (document.file.parent / file).resolve() if file else document.file
        assert path.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in Document(path).anchors, f"{document.name} links to {target}"


@each
def test_files_exist(document: Document) -> None:
    """Each path of the checkout in a code span exists."""
    for code in (span for span in document.spans if not span.startswith("kubectl ")):
        for place in re.findall(rf"(?<![\w/.-]){PLACES}", code):
            found = list(CHECKOUT.glob(f"{place.rstrip('/.')}*"))
            assert found, f"{document.name} names {place}"


@each
def test_variables_exist(document: Document) -> None:
    """Each BIFROST_… variable is a setting, or is defined in one of OTHER_HOMES."""
    known = {f"BIFROST_{name.upper()}{suffix}" for name in Settings.model_fields for suffix in ("", "_FILE")}
    for home in OTHER_HOMES:
        known |= set(re.findall(r"BIFROST_[A-Z_]+", (CHECKOUT / home).read_text()))
    assert set(re.findall(r"BIFROST_[A-Z_]*[A-Z]", document.text)) <= known


@each
def test_exit_codes_exist(document: Document) -> None:
    """Each exit code is one of the contract. A table of exit codes has all of them."""
    spoken = r"\bexit(?:s|ed|ing)?(?: codes?)?(?: with)? (\d+)\b|\bends with (\d+)\b"
    codes = {int(code) for pair in re.findall(spoken, document.text) for code in pair if code}
    assert codes <= set(ExitCode), document.name
    for rows in re.findall(r"^\| code \|.*\n\|[-|]+\n((?:\|.*\n)+)", document.text, re.MULTILINE):
        table = {int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", rows, re.MULTILINE) for code in cell.split(",")}
        assert table == set(ExitCode), document.name


@each
def test_commands_are_ones(document: Document) -> None:
    """The command line accepts each command with the options that are shown."""
    for words in command_lines(document):
        try:
            parse(words)
        except click.ClickException as error:
            pytest.fail(f"{document.name}: {shlex.join(words)}: {error.format_message()}")


def test_commands_are_found_and_refused() -> None:
    """Positive control of the test above: commands are found, and a wrong one is rejected."""
    found = {words[0] for document in DOCUMENTS for words in command_lines(document)}
    assert {"init", "check", "rewarm", "worker"} <= found
    for wrong in (["init", "--with-workers"], ["warm"], ["check", "--wait", "soon"]):
        with pytest.raises(click.ClickException):
            parse(wrong)


@each
def test_tags_name_our_version(document: Document) -> None:
    """Each numbered tag of our image begins with our version; the version of the platform follows."""
    tags = re.findall(r"\bbifrost-bootstrap(?::|, newTag: )(\d[\w.-]*)", document.text)
    assert {tag.partition("-")[0] for tag in tags} <= {__version__}


def test_the_tag_of_the_readme_is_found() -> None:
    """The positive control of the test above: both documents that speak of a built image have tags."""
    for name in ("README.md", "docs/adopting.md"):
        assert f"bifrost-bootstrap:{__version__}-" in (CHECKOUT / name).read_text()


def test_the_changelog_has_our_version() -> None:
    """The newest version of the changelog is ours; before the first release there is none."""
    versions = re.findall(r"^## \[(\d.*?)\]", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[:1] in ([], [__version__])


@each
def test_tasks_exist(document: Document) -> None:
    """Each task that is called by name exists."""
    called = set(re.findall(r"\bcall (\S+?)[)`\s]", document.text))
    assert {name for name in called if "." in name} <= {MIGRATE, WARM}


@each
def test_make_targets_exist(document: Document) -> None:
    """Each `make …` is a target."""
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    named = {match[1] for code in document.spans + document.lines if (match := re.match(r"make ([a-z-]+)", code))}
    assert named <= targets


def yaml_blocks() -> list[Any]:
    """Each YAML block of the documents, but those that tests/kube builds."""
    found = [block for document in DOCUMENTS for block in document.blocks if block.language == "yaml"]
    return [pytest.param(block, id=block.where) for block in found if not block.note.startswith("kube: ")]


@pytest.mark.parametrize("block", yaml_blocks())
def test_yaml_is_what_we_ship(block: Block) -> None:
    """A Compose snippet has keys and conditions of our Compose files. Other YAML is part of a file that we ship."""
    shown = yaml.safe_load(block.text)
    if "services" in shown:
        for name, service in shown["services"].items():
            compare_with_compose(name, service)
        return
    shipped = yaml.safe_load_all((CHECKOUT / block.note.removeprefix(PART_OF)).read_text())
    assert any(is_part(shown, part) for manifest in shipped for part in parts(manifest)), block.where


def compare_with_compose(name: str, service: dict[str, Any]) -> None:
    """Raises AssertionError where our Compose files have no such service, key, variable or condition."""
    base = yaml.safe_load((CHECKOUT / "deploy/compose/services.yml").read_text())["services"]
    ours = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text())["services"]
    shipped = {**base.get(name, {}), **ours[name]}
    assert service.keys() <= {key for one in [*base.values(), *ours.values()] for key in one}, name
    known = {f"BIFROST_{field.upper()}{suffix}" for field in Settings.model_fields for suffix in ("", "_FILE")}
    assert set(service.get("environment", {})) <= known, name
    for other, condition in service.get("depends_on", {}).items():
        assert shipped["depends_on"][other] == condition, name
    if OUR_PROGRAM in (words := service.get("command", [])):
        parse(words[1:])


def parts(manifest: Any) -> Iterator[Any]:
    """The manifest and all that is in it."""
    yield manifest
    for one in manifest.values() if isinstance(manifest, dict) else manifest if isinstance(manifest, list) else ():
        yield from parts(one)


def is_part(shown: Any, shipped: Any) -> bool:
    """Whether what is shown is in what is shipped: some of its keys, some of its items."""
    if isinstance(shown, dict):
        return isinstance(shipped, dict) and all(
            key in shipped and is_part(value, shipped[key]) for key, value in shown.items()
        )
    if isinstance(shown, list):
        return isinstance(shipped, list) and all(any(is_part(one, other) for other in shipped) for one in shown)
    return bool(shown == shipped)


def command_lines(document: Document) -> Iterator[list[str]]:
    """The words behind `bifrost-bootstrap`, wherever a command is shown; in a line also without it: `check --json`."""
    short = [f"{OUR_PROGRAM} {span}" for span in document.spans if re.match(rf"({'|'.join(main.commands)}) \S", span)]
    for code in [*document.spans, *document.lines, *short]:
        for found in re.finditer(rf"\b{OUR_PROGRAM} ([a-z-][^#;|&)']*)", code):
            yield shlex.split(re.sub(r"\[OPTIONS\]|[\[\]]", "", found[1]))


def parse(words: list[str]) -> None:
    """Raises ClickException where the command line would refuse these words."""
    if words[0] in {"--help", "--version"}:
        return
    command = main.commands.get(words[0])
    if command is None:
        raise click.UsageError(f"there is no command {words[0]}")
    try:
        if words[1:] != ["--help"]:
            command.make_context(words[0], list(words[1:]))
    except click.BadOptionUsage:
        pass  # `check --wait`: an option by its name alone


@each
def test_every_block_is_run(document: Document) -> None:
    """Each block of commands or YAML has a comment with its name, and a test that runs this name."""
    assert len(re.findall(r"^ *```", document.text, re.MULTILINE)) == 2 * len(document.blocks), document.name
    for block in document.blocks:
        assert block.language in {"console", "sh", "yaml", "text"}, block.where
        if block.language == "sh" or (block.language == "yaml" and not block.note.startswith(PART_OF)):
            assert is_taken(block), f"{block.where}: nobody runs what stands below {block.note!r}"


def is_taken(block: Block) -> bool:
    """Whether a test names it."""
    kind, _, name = block.note.partition(": ")
    files = (CHECKOUT / RUNNERS[kind]).glob("*.py") if kind in RUNNERS else []
    return bool(name) and any(re.search(rf'"({kind}: )?{re.escape(name)}"', file.read_text()) for file in files)


def test_a_block_that_nobody_runs_is_found() -> None:
    """Positive control of the test above."""
    for note in ("", "compose", "compose: tried by hand", "kube: try it out", "tests: try it out"):
        assert not is_taken(Block("here", "sh", note, ()))
    assert is_taken(Block("here", "sh", "compose: try it out", ()))


def test_the_same_is_shown_in_the_same_words() -> None:
    """Blocks with the same comment are equal, so one run stands for all."""
    shown: dict[str, str] = {}
    for block in (block for document in DOCUMENTS for block in document.blocks if block.note.partition(": ")[2]):
        assert shown.setdefault(block.note, block.text) == block.text, block.where


def test_every_document_is_read() -> None:
    """The documents that must exist are found."""
    names = {Path(document.name) for document in DOCUMENTS}
    assert {Path("README.md"), Path("docs/operations.md"), Path("docs/architecture.md")} <= names
