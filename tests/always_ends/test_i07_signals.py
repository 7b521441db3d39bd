"""I7: SIGTERM and SIGINT end init at once in every phase, also as PID 1."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import StartCommand
from tests.servers import Command
from tests.servers.process import wait_until
from tests.setups.stack import COMPLETE, PHASE_TIMEOUT, Deployment

#: Seconds for "at once": as long as a busy machine needs to end a process.
AT_ONCE = 5.0
SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("number", "code"), [SIGNALS[0], pytest.param(*SIGNALS[1], marks=pytest.mark.slow)])
def test_i07_while_it_waits_for_the_chain(deployment: Deployment, number: signal.Signals, code: int) -> None:
    """Init exits with the code of the signal and says that the work continues. The next init finds it done."""
    deployment.hold("migrating")
    deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("migrating")
    init.send_signal(number)
    done = init.wait(AT_ONCE)
    assert done.returncode == code
    assert "work that a bootstrap worker has begun goes on" in done.stderr.splitlines()[-1]
    deployment.release()
    second = deployment.start_init().wait()
    assert second.returncode == 0
    assert deployment.cache() == COMPLETE


@pytest.mark.parametrize("name", ["postgres", "redis", "rabbitmq"])
def test_i07_while_a_server_is_silent(deployment: Deployment, name: str) -> None:
    """A read from a server that never replies does not delay the exit."""
    getattr(deployment.stack.init_lines, name).cut()
    other = deployment.stack.init_lines.redis if name == "postgres" else deployment.stack.init_lines.postgres
    other.refuse()
    init = deployment.start_init()
    init.wait_for("waiting for a server")
    init.send_signal(signal.SIGTERM)
    assert init.wait(AT_ONCE).returncode == 143


def test_i07_with_its_own_worker(deployment: Deployment) -> None:
    """`init --with-worker` ends its worker too, and no process is left."""
    deployment.hold("migrating")
    init = deployment.start_init(own=True)
    deployment.wait_reached("migrating")
    family = init.descendants()
    assert len(family) >= 3  # worker, task process, Alembic
    init.send_signal(signal.SIGTERM)
    done = init.wait(AT_ONCE)
    assert done.returncode == 143
    assert "begun is cancelled with its worker" in done.stderr.splitlines()[-1]
    _, alive = psutil.wait_procs(family, timeout=AT_ONCE)
    assert not alive
    deployment.release()
    assert deployment.start_init(own=True).wait().returncode == 0


@pytest.mark.slow  # its deadline has to leave a busy machine the time to get there
def test_i07_its_worker_ends_at_the_deadline(deployment: Deployment) -> None:
    """At the deadline, init's worker cancels the running revision. Init does not say that the work continues."""
    deployment.hold("migrating")
    init = deployment.start_init(own=True, timeout="30s")
    deployment.wait_reached("migrating")
    done = init.wait()
    assert done.returncode == 124
    assert "a revision that was running is cancelled" in done.stderr.splitlines()[-1]
    assert "standing bootstrap worker" in done.stderr.splitlines()[-1]
    wait_until(lambda: not deployment.runners(), "the sessions of the worker have gone", PHASE_TIMEOUT)
    assert deployment.applied() == ["0001"]
    deployment.release()
    assert deployment.start_init(own=True).wait().returncode == 0
    assert deployment.cache() == COMPLETE


def test_i07_worker_ends_when_its_init_is_killed(deployment: Deployment) -> None:
    """SIGKILL of `init --with-worker` leaves no process. The next init does the work."""
    deployment.hold("migrating")
    init = deployment.start_init(own=True)
    deployment.wait_reached("migrating")
    family = init.descendants()
    init.send_signal(signal.SIGKILL)
    init.wait(AT_ONCE)
    _, alive = psutil.wait_procs(family, timeout=AT_ONCE)
    assert not alive
    deployment.release()
    assert deployment.start_init(own=True).wait().returncode == 0
    assert deployment.cache() == COMPLETE


@pytest.mark.slow  # 20 s
def test_i07_dead_worker_is_replaced(deployment: Deployment) -> None:
    """If the worker of `init --with-worker` dies, init starts another one, and the chain completes."""
    deployment.hold("migrating")
    init = deployment.start_init(own=True)
    deployment.wait_reached("migrating")
    worker = psutil.Process(init.pid).children()[0]
    worker.kill()
    psutil.wait_procs([worker], timeout=AT_ONCE)
    deployment.release()
    done = init.wait()
    assert done.returncode == 0, done.stderr
    assert "starting another" in done.stderr
    assert deployment.cache() == COMPLETE


@pytest.fixture
def slow_import(tmp_path: Path) -> Path:
    """A folder with a module `click` whose import never ends. The module creates a file when its import begins."""
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "click.py").write_text(
        "import pathlib, time\npathlib.Path(__file__ + '.begun').touch()\ntime.sleep(600)\n"
    )
    return folder


def process_one(start_command: StartCommand, words: list[str], env: dict[str, str]) -> tuple[Command, psutil.Process]:
    """Start a command as PID 1 of a namespace, where the kernel drops signals that nobody handles."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare: not Linux")
    command = start_command([unshare, "--fork", "--pid", "--kill-child", *words], env=env)
    wait_until(lambda: bool(command.descendants()), "PID 1", PHASE_TIMEOUT)
    return command, command.descendants()[0]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_i07_during_imports(
    start_command: StartCommand, clean_env: dict[str, str], slow_import: Path, number: signal.Signals, code: int
) -> None:
    """A signal during the imports ends the process with the right exit code, also as PID 1."""
    env = clean_env | {"PYTHONPATH": f"{slow_import}:{clean_env.get('PYTHONPATH', '')}"}
    command, init = process_one(start_command, [sys.executable, "-m", "bifrost_bootstrap", "init"], env)
    wait_until((slow_import / "click.py.begun").exists, "the import")
    init.send_signal(number)
    assert command.wait(AT_ONCE).returncode == code


def test_i07_as_pid_1(deployment: Deployment, start_command: StartCommand) -> None:
    """As PID 1 of a container, init exits at once with 143 after SIGTERM."""
    words = [sys.executable, "-m", "bifrost_bootstrap", "init"]
    command, init = process_one(start_command, words, deployment.environment(deployment.stack.init_lines))
    command.wait_for("chain enqueued")
    init.send_signal(signal.SIGTERM)
    assert command.wait(AT_ONCE).returncode == 143
