"""What the parent hears from the runner: JSON events, one a line."""

from __future__ import annotations

import json
import os
from typing import Any


class Refused(Exception):
    """The runner stops before the tree does harm. `kind` tells the parent which error it is."""

    def __init__(self, kind: str, **facts: Any) -> None:
        super().__init__(kind)
        self.kind = kind
        self.facts = facts


class LockLost(Refused):
    """The parent does not hold the migration lock any more."""

    def __init__(self) -> None:
        super().__init__("unavailable", message="the migration lock was lost while a revision ran")


class Events:
    """The only way out of this process."""

    def __init__(self) -> None:
        # A tree may print: file descriptor 1 becomes stderr, and only this object knows the old one.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, event: str, **facts: Any) -> None:
        self._out.write(json.dumps({"event": event, **facts}) + "\n")
        self._out.flush()
