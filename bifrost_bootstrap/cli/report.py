"""How a command ended, and what programs read of it: the object of `--json`, the termination message for Kubernetes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bifrost_bootstrap.errors import BootstrapError, ExitCode, SchemaError
from bifrost_bootstrap.redaction import masked

#: Version of the JSON object of `--json`. Fields may be added under one number, but none may change.
SCHEMA = 1
#: The verdict of commands whose success does not mean that the deployment is ready.
_DONE = {"plan": "planned", "rehearse": "rehearsed", "load": "loaded", "worker": "stopped"}
#: Bytes that Kubernetes keeps of a termination message.
TERMINATION_BYTES = 4096
#: How to write characters that the output's encoding lacks: a file name may be any bytes.
UNPRINTABLE = "backslashreplace"

#: Labels and texts. A row without a label continues the one above.
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Outcome:
    """
    How a command ended. `str()` is what stdout shows of it.

    message: the verdict in one line; "" for none. rows: follow the message on stdout; None if stdout stays empty.
    text: follows the rows as it is. facts: the fields of `--json`. remedy: what the operator does next; "" for nothing.
    """

    code: ExitCode
    message: str = ""
    rows: Rows | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        rows = self.rows or []
        width = max((len(label) for label, _ in rows), default=0)
        lines = [self.message, *(f"  {label:<{width}}  {text}" for label, text in rows)]
        return "\n".join([*lines, self.text] if self.text else lines)


def json_object(command: str, code: ExitCode, facts: dict[str, Any]) -> str:
    """The one object that `--json` prints."""
    head = {"schema": SCHEMA, "command": command, "verdict": verdict(command, code), "exit_code": int(code)}
    return masked(json.dumps(head | facts, ensure_ascii=False))


def verdict(command: str, code: ExitCode) -> str:
    """The exit code in a word; for success "ready", "planned", "rehearsed", "loaded" or "stopped"."""
    return _DONE.get(command, "ready") if code is ExitCode.OK else code.name.lower()


def error_facts(error: BootstrapError) -> dict[str, Any]:
    """The fields of `--json` for an error."""
    facts = {"error": type(error).__name__, "message": masked(str(error)), "remedy": error.remedy}
    return facts | ({"schema_verdict": error.verdict} if isinstance(error, SchemaError) else {})


def write_termination_message(file: Path, command: str, code: ExitCode, facts: dict[str, Any]) -> None:
    """
    Write one JSON line for `kubectl describe`, shorter than `TERMINATION_BYTES`. Raises OSError.

    If the object of `--json` is longer, only its texts are written, each of them shortened.
    """
    line = json_object(command, code, facts)
    longest = TERMINATION_BYTES
    while len(line.encode(errors=UNPRINTABLE)) >= TERMINATION_BYTES:
        # Counted in characters: a cut in bytes could divide one.
        longest //= 2
        line = json_object(command, code, {key: text[:longest] for key, text in facts.items() if isinstance(text, str)})
    file.write_text(line + "\n", encoding="utf-8", errors=UNPRINTABLE)
