"""Flower as an operator starts it, and an HTTP client for it."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from tests.conftest import StartCommand
from tests.servers import PLANTED_PASSWORD, Command
from tests.servers.process import free_port, wait_until

LOGIN = f"watcher:{PLANTED_PASSWORD}"
#: Seconds for Flower to answer, and to have heard of something.
PATIENCE = 60.0


@dataclass
class Flower:
    """A running Flower."""

    port: int
    process: Command

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def status(self, path: str, login: str | None = LOGIN) -> int:
        """The HTTP status of a page."""
        try:
            self.get(path, login)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def get(self, path: str, login: str | None = LOGIN) -> str:
        """A page."""
        request = urllib.request.Request(f"{self.url}{path}")  # noqa: S310
        if login:
            request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:  # noqa: S310
            return str(response.read().decode())

    def tasks(self) -> dict[str, dict[str, Any]]:
        """What it knows of tasks, by id."""
        found: dict[str, dict[str, Any]] = json.loads(self.get("/api/tasks"))
        return found

    def wait_for_task(self, name: str, state: str = "SUCCESS") -> str:
        """Wait until it has seen a task of this name end so; its id."""
        found: list[str] = []

        def look() -> bool:
            found[:] = [key for key, task in self.tasks().items() if (task["name"], task["state"]) == (name, state)]
            return bool(found)

        wait_until(look, f"{name} {state} in Flower", PATIENCE)
        return found[0]

    def pages(self) -> dict[str, str]:
        """Every page that it links to, and what its API answers about workers, tasks and queues, by path."""
        seen: dict[str, str] = {}
        wanted = [
            *("/", "/workers", "/tasks", "/broker", "/metrics", "/nowhere", "/worker/nobody", "/task/nothing"),
            *("/api/workers?refresh=1", "/api/tasks", "/api/task/types", "/api/queues/length"),
            *(f"/task/{key}" for key in self.tasks()),
            *(f"/api/task/info/{key}" for key in self.tasks()),
            *(f"/api/task/result/{key}" for key in self.tasks()),
        ]
        while wanted:
            path = wanted.pop(0)
            if path in seen:
                continue
            try:
                seen[path] = self.get(path)
            except urllib.error.HTTPError as error:
                seen[path] = error.read().decode()
            links = re.findall(r'href="(/[^"]*)"', seen[path])
            wanted += [link for link in links if not link.startswith(("/static", "/logout"))]
        return seen


def start_flower(start_command: StartCommand, env: dict[str, str]) -> Flower:
    """The stock command, with basic auth from the environment, as Compose and Kubernetes start it."""
    port = free_port()
    words = [sys.executable, "-m", "celery", "-A", "bifrost_bootstrap", "flower"]
    # The last as in Compose, but for the time.
    settings = {"FLOWER_BASIC_AUTH": LOGIN, "FLOWER_PURGE_OFFLINE_WORKERS": "1"}
    process = start_command([*words, f"--port={port}", "--address=127.0.0.1"], env=env | settings)
    flower = Flower(port, process)

    def answers() -> bool:
        assert process.running, process.stderr.read_text()
        with contextlib.suppress(OSError):
            return flower.status("/healthcheck", None) == 200
        return False

    wait_until(answers, "Flower", PATIENCE)
    return flower
