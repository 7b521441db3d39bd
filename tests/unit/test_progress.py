"""The progress of a step, and its Redis keys."""

from __future__ import annotations

import json

from bifrost_bootstrap.progress import Progress, heartbeat_key, progress_key


def test_progress_crosses_json() -> None:
    """What the worker writes is what init reads."""
    progress = Progress("warm", 3, 10, "modules", "Grüße")
    assert Progress(**json.loads(json.dumps(progress.to_dict()))) == progress


def test_keys_are_ours_and_differ() -> None:
    """Both keys of a task are below our own prefix, and apart from each other and from those of another task."""
    keys = {progress_key("a"), heartbeat_key("a"), progress_key("b"), heartbeat_key("b")}
    assert len(keys) == 4
    assert all(key.startswith(b"bifrost:bootstrap:") for key in keys)


def test_progress_in_words() -> None:
    """What goes on, and how far it is where that is known."""
    assert str(Progress("migrate", 1, 2, "revisions", "0002 Index")) == "migrate: 1 of 2 revisions, 0002 Index"
    assert str(Progress("warm", note="comparing")) == Progress("warm", note="comparing").what == "warm: comparing"
    assert Progress("warm", 1_000, 2_000, "modules", "staging").what == "warm: staging"
