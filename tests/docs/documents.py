"""The documents: code blocks, code spans, links, headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Block:
    """A fenced code block. note: the text of an HTML comment right above it, "" without one."""

    where: str
    language: str
    note: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


class Document:
    """One Markdown file of the checkout."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.name = str(file.relative_to(CHECKOUT))

    @cached_property
    def text(self) -> str:
        """As written."""
        return self.file.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[Block]:
        """Its fenced code blocks, also those within a list."""
        fence = re.compile(r"^( *)(?:<!-- ([^\n]*?) -->\n\1)?```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
        return [
            Block(
                f"{self.name}:{self.text.count(chr(10), 0, found.start(4))}",
                found[3],
                found[2] or "",
                tuple(line.removeprefix(found[1]) for line in found[4].splitlines()),
            )
            for found in fence.finditer(self.text)
        ]

    @cached_property
    def prose(self) -> str:
        """The text without its code blocks, fenced or indented."""
        text = re.sub(r"^ *```.*?^ *```$", "", self.text, flags=re.MULTILINE | re.DOTALL)
        return re.sub(r"(?<=\n\n)(    .*\n|\n)+", "\n", text)

    @property
    def spans(self) -> list[str]:
        """Code in a line."""
        return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", self.prose)

    @property
    def lines(self) -> list[str]:
        """The lines of its code blocks, fenced or indented, without the prompt."""
        fenced = [line.removeprefix("$ ") for block in self.blocks for line in block.lines]
        return fenced + re.findall(r"^    (\S.*)$", self.text, re.MULTILINE)

    @property
    def links(self) -> list[str]:
        """Targets of its links, but those that lead elsewhere."""
        return [target for target in re.findall(r"\]\(([^)\s]+)\)", self.prose) if "://" not in target]

    @cached_property
    def anchors(self) -> set[str]:
        """What a link into it may name after "#", made of its headings as GitHub does."""
        headings = re.findall(
            r"^#+ (.+)$", re.sub(r"^ *```.*?^ *```$", "", self.text, flags=re.MULTILINE | re.DOTALL), re.M
        )
        return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def fence(document: str, note: str) -> Block:
    """The one block of a document (its path in the checkout) below `<!-- {note} -->`, for the test that runs it."""
    found = [block for block in Document(CHECKOUT / document).blocks if block.note == note]
    assert len(found) == 1, f"{document} has {len(found)} blocks below <!-- {note} -->"
    return found[0]


DOCUMENTS = [Document(file) for file in [*sorted(CHECKOUT.glob("*.md")), *sorted(CHECKOUT.glob("docs/*.md"))]]
