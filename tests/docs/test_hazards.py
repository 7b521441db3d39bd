"""Every hazard has a test that carries its number, and tests/README.md names the file."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from tests.docs.documents import CHECKOUT

TESTS = CHECKOUT / "tests"
#: The highest number of each letter: M migration, W warm, I init, S security. A new hazard takes the next number.
HIGHEST = {"M": 19, "W": 15, "I": 12, "S": 7}
HAZARDS = [f"{letter}{number}" for letter, highest in HIGHEST.items() for number in range(1, highest + 1)]


def files_by_hazard() -> dict[str, list[str]]:
    """For each hazard, the files below tests/ that have a test function with its number."""
    found = defaultdict(set)
    for file in TESTS.rglob("test_*.py"):
        for letter, number in re.findall(r"^def test_([mwis])(\d\d)_", file.read_text(), re.MULTILINE):
            found[f"{letter.upper()}{int(number)}"].add(str(file.relative_to(TESTS)))
    return {hazard: sorted(files) for hazard, files in found.items()}


def hazards_of_architecture() -> set[str]:
    """Return the numbers in the hazard tables of docs/architecture.md."""
    text = (CHECKOUT / "docs" / "architecture.md").read_text()
    return set(re.findall(r"^\| ([MWIS]\d+) ", text, re.MULTILINE))


def table(files: dict[str, list[str]]) -> str:
    """Return the table for tests/README.md, a line for each hazard."""
    rows = [f"| {hazard} | {' '.join(f'`{file}`' for file in files[hazard])} |" for hazard in HAZARDS]
    return "\n".join(["| hazard | files |", "|---|---|", *rows, ""])


def test_every_hazard_has_a_test() -> None:
    """A hazard without a test whose name has its number fails here, and so does one that has no number yet."""
    assert sorted(files_by_hazard()) == sorted(HAZARDS)


def test_every_hazard_is_described() -> None:
    """docs/architecture.md describes every hazard, and no other."""
    assert sorted(hazards_of_architecture()) == sorted(HAZARDS)


def test_the_readme_names_the_files() -> None:
    """The table in tests/README.md is the one that the test names give; on failure, paste the expected table."""
    text = (Path(TESTS) / "README.md").read_text()
    assert table(files_by_hazard()) in text
