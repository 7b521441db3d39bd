"""S6: no 8 consecutive characters of a secret are printed."""

from __future__ import annotations

import pytest

from bifrost_bootstrap import redaction
from tests.servers import Database
from tests.setups.migration import StartMigrate, Tree, outcome

#: As operators name and make them; the last is too short for the settings class, which then prints it whole.
PLANTED = {
    "BIFROST_SECRET_KEY": "tooShortKey",
    "WEBHOOK_TOKEN": "aSecretThatNobodyToldUs99",
    "SMTP_PASSWORD": "with space and=sign",
    "STORE_CREDENTIALS": "QWxhZGRpbjpvcGVuIHNlc2FtZQ==",
    "OTHER_URL": "amqp://somebody:tail-of-a-url-password@broker/vhost",
}
SECRETS = [*list(PLANTED.values())[:-1], "tail-of-a-url-password"]
#: What the platform's env.py does before anything else: a settings class over the whole environment.
SETTINGS_CLASS = """
import os
from pydantic import BaseModel, Field

class Settings(BaseModel):
    BIFROST_SECRET_KEY: str = Field(min_length=32)
    NOT_SET: str

print(dict(os.environ))
Settings.model_validate(dict(os.environ))
"""


def parts(secret: str) -> list[str]:
    """Every 8 characters in a row."""
    return [secret[start : start + 8] for start in range(len(secret) - 7)]


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_s06_settings_class_of_the_tree(
    database: Database, tree: Tree, start_migrate: StartMigrate, level: str
) -> None:
    """Pydantic shortens `input_value=…` in the middle, and a tree may print anything."""
    tree.revision("one")
    env = tree.folder / "env.py"
    env.write_text(SETTINGS_CLASS + env.read_text())
    step = start_migrate(env=PLANTED, BIFROST_LOG_LEVEL=level)
    done = outcome(step)
    output = step.stdout.read_text() + step.stderr.read_text()
    assert done.code != 0
    assert "NOT_SET" in output
    leaked = {secret: [part for part in parts(secret) if part in output] for secret in SECRETS}
    assert leaked == {secret: [] for secret in SECRETS}


def test_s06_ordinary_words_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short values, file paths and switches are not masked."""
    monkeypatch.setattr(redaction, "_secrets", set())
    monkeypatch.setattr(redaction, "_parts", set())
    redaction.remember_environment(
        {"USE_TOKEN": "true", "TLS_KEY_FILE": "/run/secrets/key", "KEYBOARD": "us-intl-layout", "API_KEY": "0123456789"}
    )
    text = "true /run/secrets/key us-intl-layout 0123456789 x2345678y 01234567"
    assert redaction.masked(text) == "true /run/secrets/key us-intl-layout *** x2345678y ***"


@pytest.mark.parametrize("kept", [8, 9, 11])
def test_s06_shortened_in_the_middle(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """Both parts of a shortened value are masked. The text around them stays."""
    monkeypatch.setattr(redaction, "_secrets", set())
    monkeypatch.setattr(redaction, "_parts", set())
    secret = "abcdefghijklmnopqrstuvwxyz"
    redaction.remember_secret(secret)
    assert redaction.masked(f"input_value='{secret[:kept]}...{secret[-kept:]}', x") == "input_value='***...***', x"
