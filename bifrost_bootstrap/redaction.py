"""The only place that masks secrets, and parts of them, in text that is printed, logged or stored."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

#: The shortest secret (characters): shorter ones would mask ordinary words.
_SHORTEST_SECRET = 3
#: The same for variables that are secret only by their name: many of their values are a word or a switch.
_SHORTEST_VALUE = 8
#: The length of the parts of a secret that are masked (characters): libraries shorten values, and quote half a URL.
_PART = 8
#: Names of variables whose value is a secret.
_SECRET_NAME = re.compile(r"SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|APIKEY|(?:^|_)(?:KEY|PASS)S?(?:_|$)", re.IGNORECASE)
#: The password of a URL.
_PASSWORD = re.compile(r"://[^:/@\s]*:([^@\s]+)@")

_secrets: set[str] = set()
_parts: set[str] = set()


def remember_secret(secret: str) -> None:
    """Have `masked` replace this value and its parts from now on, also in their forms in a URL and in JSON."""
    plain = unquote(secret)
    forms = {secret, plain, quote(plain), quote(plain, safe="")}
    forms |= {json.dumps(form, ensure_ascii=ascii)[1:-1] for form in forms for ascii in (True, False)}
    for form in forms - _secrets:
        if len(form) >= _SHORTEST_SECRET:
            _secrets.add(form)
            _parts.update(form[start : start + _PART] for start in range(len(form) - _PART + 1))


def remember_environment(environment: Mapping[str, str]) -> None:
    """Remember the passwords of all URLs, and the values of variables with a name of a secret."""
    for name, value in environment.items():
        if "://" in value:
            for password in _PASSWORD.findall(value):
                remember_secret(password)
        elif _SECRET_NAME.search(name) and not name.endswith("_FILE") and len(value) >= _SHORTEST_VALUE:
            remember_secret(value)


def masked(text: str) -> str:
    """The text with `***` in place of the password of every URL, of each remembered secret, and of parts of these."""
    # The secrets first: the pattern below would mask only half of a password with an "@".
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    # A bounded length: without it, text of nothing but "://" would take minutes.
    text = re.sub(r"(?<=://)([^:/@\s'\"]*):[^@\s'\"]{0,1000}@", r"\1:***@", text)
    return _without_parts(text)


def _without_parts(text: str) -> str:
    found = [start for start in range(len(text) - _PART + 1) if text[start : start + _PART] in _parts]
    kept: list[str] = []
    end = 0
    for start in found:
        if start >= end:
            kept += text[end:start], "***"
        end = start + _PART
    return "".join(kept) + text[end:]
