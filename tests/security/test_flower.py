"""Flower with least rights: login, tasks with names, states and results, metrics, no secret."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from bifrost_bootstrap.celery import MIGRATE, WARM
from tests.conftest import Outside, RunBootstrap, RunCommand, StartCommand, StartWorker
from tests.security import browser as browsers
from tests.security.flower import LOGIN, Flower, start_flower
from tests.security.rights import no_rights
from tests.servers import Command, RunFolder, ServerMissing
from tests.servers.leaks import leaks_in
from tests.servers.process import wait_until
from tests.servers.run_checks import lacks_server
from tests.setups.stack import Deployment

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "monitoring" / "alerts.yml"
STOCK = (sys.executable, "-m", "celery", "-A", "bifrost_bootstrap")
#: The positive control of the search for secrets: a word in a task's arguments, which Flower is meant to show.
ARGUMENT = "Kj7Okapi"

ONLINE = re.compile(r'flower_worker_online\{worker="bootstrap-\d+@[^"]*"\} 1')


@pytest.fixture
def env(deployment: Deployment, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a deployment with the rights of docs/security.md."""
    with no_rights(deployment, tmp_path / "programs") as rights:
        for name in ("rabbitmq", "redis", "postgres"):
            rights.grant(name)
        yield rights.env


@pytest.fixture
def worker(env: dict[str, str], start_worker: StartWorker) -> Command:
    """A standing worker."""
    return start_worker(env=env)


@pytest.fixture
def flower(env: dict[str, str], worker: Command, start_command: StartCommand, run_bootstrap: RunBootstrap) -> Flower:
    """Flower, with a worker that has run the chain of an init."""
    flower = start_flower(start_command, env)
    wait_until(lambda: bool(ONLINE.search(flower.get("/metrics"))), "the worker in Flower")
    done = run_bootstrap("init", env=env)
    assert done.returncode == 0, done.stderr
    assert worker.running
    flower.wait_for_task(MIGRATE)
    flower.wait_for_task(WARM)
    return flower


def test_flower_shows_what_was_done_and_no_secret(
    flower: Flower, env: dict[str, str], run_command: RunCommand, run_folder: RunFolder
) -> None:
    """Names, states, results and run times of the tasks. Without login only health and metrics. No secret on
    any page.
    """
    for task in flower.tasks().values():
        assert task["state"] == "SUCCESS"
        assert task["runtime"] > 0
        assert task["worker"].startswith("bootstrap-")
    for path in ("/", "/tasks", "/broker", "/api/tasks", f"/task/{flower.wait_for_task(WARM)}"):
        assert flower.status(path, None) == 401
        assert flower.status(path, "watcher:another") == 401
        assert flower.status(path) == 200
    assert flower.status("/metrics", None) == flower.status("/healthcheck", None) == 200

    kwargs = f'{{"{ARGUMENT}": true}}'
    assert run_command([*STOCK, "call", WARM, "--kwargs", kwargs], env=env).returncode == 0
    failed = flower.wait_for_task(WARM, "FAILURE")
    pages = flower.pages()
    for path, page in pages.items():
        # The run's search for planted passwords reads these too.
        (run_folder.output / f"{run_folder.name('flower')}-{quote(path, safe='')[:100]}.html").write_text(page)
        assert not leaks_in(page), f"a secret on {path}"
    # The broker's page, and the worker's with its configuration: they are there, with a masked URL.
    assert re.search(r"amqp://bifrost_bootstrap:\*\*@127\.0\.0\.1", pages["/broker"])
    worker = next(page for path, page in pages.items() if path.startswith("/worker/bootstrap-"))
    assert re.search(r"broker_url", worker)
    # The control: all of it was read, and what is there is found.
    assert ARGUMENT in pages[f"/task/{failed}"]
    assert ARGUMENT in pages[f"/api/task/info/{failed}"]
    assert "&#x27;modules&#x27;: 51" in pages[f"/task/{flower.wait_for_task(WARM)}"].replace("&#39;", "&#x27;")


def test_metrics_that_the_alert_rules_use(flower: Flower, worker: Command) -> None:
    """Flower exports each metric, label and value of deploy/monitoring/alerts.yml after an init. A killed
    worker is offline.
    """
    metrics = flower.get("/metrics", None)
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    expressions = "\n".join(rule["expr"] for group in groups for rule in group["rules"])
    used = set(re.findall(r"\bflower_\w+", expressions))
    assert used == {"flower_events_total", "flower_worker_online"}
    for name in used:
        assert re.search(rf"^{name}{{", metrics, re.MULTILINE), metrics
    (pattern,) = set(re.findall(r'flower_events_total\{task=~"([^"]*)"\}', expressions))
    events = re.findall(r"bifrost_bootstrap:event_seconds\{([^}]*)\}", expressions)
    assert len(events) > 4
    for series in events:
        wanted = dict(re.findall(r'(\w+)="([^"]*)"', series))
        assert re.fullmatch(pattern.replace(r"\\", "\\"), wanted["task"])
        assert wanted["task"] in {MIGRATE, WARM}
        # What fails is exported like what succeeds.
        labels = wanted | {"type": wanted["type"].replace("task-failed", "task-succeeded")}
        lines = [line for line in metrics.splitlines() if line.startswith("flower_events_total{")]
        assert any(all(f'{key}="{value}"' in line for key, value in labels.items()) for line in lines), metrics
    worker.kill()
    wait_until(lambda: not ONLINE.search(flower.get("/metrics")), "the worker's end in Flower")


def test_alert_rules_by_prometheus_own_tool(outside: Outside) -> None:
    """`promtool` accepts the rules, and they fire when they should (tests/security/alerts_test.yml)."""
    promtool = shutil.which("promtool")
    if promtool is None:
        lacks_server("promtool is not installed (Debian, Ubuntu: package prometheus)", in_ci=outside.in_ci)
    checked = subprocess.run([promtool, "check", "rules", str(ALERTS)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tests = Path(__file__).with_name("alerts_test.yml")
    tested = subprocess.run([promtool, "test", "rules", str(tests)], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_flower_in_a_browser(flower: Flower, run_folder: RunFolder, outside: Outside) -> None:
    """A browser logs in, and finds both tasks of the init and the result of one."""
    warm = flower.wait_for_task(WARM)
    try:
        with browsers.browser(run_folder) as window:
            wait = WebDriverWait(window, browsers.TIMEOUT)
            window.get(f"{flower.url}/tasks")
            assert MIGRATE not in window.page_source
            user, _, password = LOGIN.partition(":")
            window.get(f"http://{user}:{quote(password, safe='')}@127.0.0.1:{flower.port}/tasks")
            # Without the login in the address; the browser remembers it.
            window.get(f"{flower.url}/tasks")
            rows = wait.until(lambda seen: seen.find_elements(By.CSS_SELECTOR, "#tasks-table tbody tr:nth-child(2)"))
            table = window.find_element(By.ID, "tasks-table").text
            assert MIGRATE in table, table
            assert WARM in table, table
            assert table.count("SUCCESS") == 2
            assert rows
            if outside.screenshot:
                window.save_screenshot(outside.screenshot)
            window.find_element(By.CSS_SELECTOR, f"a[href$='/task/{warm}']").click()
            wait.until(lambda seen: f"/task/{warm}" in seen.current_url)
            page = window.find_element(By.TAG_NAME, "body").text
            assert WARM in page
            assert "'modules': 51" in page
            assert not leaks_in(window.page_source)
    except ServerMissing as missing:
        lacks_server(missing, in_ci=outside.in_ci)
