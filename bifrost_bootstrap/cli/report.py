"""What programs read: the JSON object of `--json`, and the termination message for Kubernetes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bifrost_bootstrap.errors import BootstrapError, ExitCode, SchemaError
from bifrost_bootstrap.redaction import masked

#: Version of the JSON object of `--json`; fields may be added under one number, not changed.
SCHEMA = 1
#: The commands whose success does not say that the deployment is ready.
_DONE = {"plan": "planned", "load": "loaded", "worker": "stopped"}
#: Bytes that Kubernetes keeps of a termination message.
TERMINATION_BYTES = 4096
#: How text is written that the output's encoding has no character for: a file name may be any bytes.
UNPRINTABLE = "backslashreplace"


def json_object(command: str, code: ExitCode, facts: dict[str, Any]) -> str:
    """The one object that `--json` prints."""
    head = {"schema": SCHEMA, "command": command, "verdict": verdict(command, code), "exit_code": int(code)}
    return masked(json.dumps(head | facts, ensure_ascii=False))


def verdict(command: str, code: ExitCode) -> str:
    """The end in a word: "ready" (of other commands "planned", "loaded", "stopped"), "not_ready", "migration", …"""
    return _DONE.get(command, "ready") if code is ExitCode.OK else code.name.lower()


def error_facts(error: BootstrapError) -> dict[str, Any]:
    """What `--json` and the termination message say of an error."""
    facts = {"error": type(error).__name__, "message": masked(str(error)), "remedy": error.remedy}
    return facts | ({"schema_verdict": error.verdict} if isinstance(error, SchemaError) else {})


def write_termination_message(file: Path | None, command: str, code: ExitCode, facts: dict[str, Any]) -> None:
    """One JSON line for `kubectl describe`. Raises OSError."""
    if file is None:
        return
    line, longest = json_object(command, code, facts), TERMINATION_BYTES
    # In characters, since a cut must not go through one; of numbers and lists only `--json` has room for all.
    while len(line.encode(errors=UNPRINTABLE)) >= TERMINATION_BYTES:
        longest //= 2
        line = json_object(command, code, {key: text[:longest] for key, text in facts.items() if isinstance(text, str)})
    file.write_text(line + "\n", encoding="utf-8", errors=UNPRINTABLE)
