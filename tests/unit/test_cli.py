"""The command line: usage, commands without servers, and only exit codes of the contract."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bifrost_bootstrap
from bifrost_bootstrap.cli import commands
from bifrost_bootstrap.errors import ExitCode
from tests.conftest import RunBootstrap, RunCommand, StartCommand

COMMANDS = ("init", "rewarm", "check", "plan", "worker", "load")
#: The command as pip has installed it.
INSTALLED = Path(sys.executable).with_name("bifrost-bootstrap")


@pytest.fixture
def in_process() -> Iterator[None]:
    """Restore signal handlers and logging, which `cli.run` changes."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(capture=False)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Usage: bifrost-bootstrap"),
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "No such option"),
        (["init", "--nonsense"], "No such option"),
        (["init", "now"], "unexpected extra argument"),
        (["init", "--timeout", "soon"], "'soon' is no duration; write for example 90s, 5m or 1h30m"),
        (["init", "--timeout"], "requires an argument"),
        (["check", "--wait", "-5s"], "'-5s' is no duration"),
        (["load"], "Missing argument 'FOLDER'"),
        (["worker", "--json"], "No such option"),
    ],
)
def test_wrong_usage_is_64(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage is reported on stderr and exits with 64, not with click's 2."""
    assert commands.run(arguments) == 64
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)], ids=str)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_0(arguments: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Help goes to stdout and exits with 0, without any setting. A command has two examples and its exit codes."""
    assert commands.run([*arguments, flag]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"Usage: {' '.join(['bifrost-bootstrap', *arguments])}")
    assert captured.err == ""
    if arguments:
        examples = captured.out.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
        assert [line.strip()[0] == "#" for line in examples] == [True, False] * 2
        assert all(re.search(rf"bifrost-bootstrap {arguments[0]}\b", line) for line in examples[1::2])
        codes = re.findall(r"^ +(\d+) ", captured.out.partition("Exit codes:\n")[2], re.MULTILINE)
        assert {"0", "64", "70", "78", "130", "143"} <= set(codes)


@pytest.mark.usefixtures("in_process")
def test_version_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    """The version of the package, on stdout."""
    assert commands.run(["--version"]) == 0
    assert capsys.readouterr().out == f"bifrost-bootstrap, version {bifrost_bootstrap.__version__}\n"


@pytest.mark.parametrize(
    "command", [[str(INSTALLED)], [sys.executable, "-m", "bifrost_bootstrap"]], ids=["script", "-m"]
)
def test_installed_command(command: list[str], run_command: RunCommand, clean_env: dict[str, str]) -> None:
    """The installed command and `python -m` are the same program; warnings are errors here."""
    done = run_command([*command, "--version"], env=clean_env | {"PYTHONWARNINGS": "error"})
    assert (done.returncode, done.stderr) == (0, "")
    assert bifrost_bootstrap.__version__ in done.stdout


@pytest.mark.parametrize(
    ("arguments", "names", "others"),
    [
        (["init"], ["DATABASE", "REDIS", "RABBITMQ"], []),
        (["rewarm"], ["DATABASE", "REDIS", "RABBITMQ"], []),
        (["worker"], ["DATABASE", "REDIS", "RABBITMQ"], []),
        (["check"], ["DATABASE", "REDIS"], ["RABBITMQ"]),
        (["plan"], ["DATABASE", "REDIS"], ["RABBITMQ"]),
        (["load", "."], ["DATABASE"], ["REDIS", "RABBITMQ"]),
    ],
)
def test_no_settings_is_78(
    arguments: list[str], names: list[str], others: list[str], run_bootstrap: RunBootstrap, clean_env: dict[str, str]
) -> None:
    """Without settings a command exits with 78 and names exactly the variables that it needs, in one message."""
    done = run_bootstrap(*arguments, env=clean_env)
    assert (done.returncode, done.stdout) == (78, "")
    lines = [line for line in done.stderr.splitlines() if "configuration: " in line]
    assert len(lines) == 1
    for name in names:
        assert f"BIFROST_{name}_URL is not set (nor {name}_URL, nor their _FILE)" in lines[0]
    assert not [name for name in others if name in done.stderr]
    assert ("BIFROST_ALEMBIC_CONFIG is not set" in lines[0]) is (arguments[0] != "load")


@pytest.mark.parametrize("command", [["init"], ["check"], ["plan"], ["load", "."]], ids=str)
def test_failure_as_json(command: list[str], run_bootstrap: RunBootstrap, clean_env: dict[str, str]) -> None:
    """With `--json` a failure is exactly one object on stdout, and its exit code is that of the process."""
    done = run_bootstrap(*command, "--json", env=clean_env)
    found = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert done.returncode == found["exit_code"] == 78
    assert (found["schema"], found["command"], found["verdict"]) == (1, command[0], "configuration")
    assert "BIFROST_DATABASE_URL is not set" in found["message"]


def test_termination_log_has_the_verdict(
    run_bootstrap: RunBootstrap, clean_env: dict[str, str], tmp_path: Path
) -> None:
    """BIFROST_TERMINATION_LOG gets one JSON line with the verdict, also after a configuration error."""
    file = tmp_path / "termination-log"
    env = clean_env | {
        "BIFROST_TERMINATION_LOG": str(file),
        "BIFROST_REDIS_URL": "mysql://h",
        "BIFROST_LOG_LEVEL": "LOUD",
    }
    done = run_bootstrap("init", env=env)
    assert done.returncode == 78
    found = json.loads(file.read_text())
    assert (found["exit_code"], found["error"]) == (78, "SettingsError")
    assert "BIFROST_LOG_LEVEL" in found["message"]


def test_termination_log_that_cannot_be_written_changes_nothing(
    run_bootstrap: RunBootstrap, clean_env: dict[str, str], tmp_path: Path
) -> None:
    """The exit code stays if the termination log is a folder."""
    done = run_bootstrap("check", env=clean_env | {"BIFROST_TERMINATION_LOG": str(tmp_path)})
    assert done.returncode == 78


def test_log_format_counts_from_the_first_line_on(run_bootstrap: RunBootstrap, clean_env: dict[str, str]) -> None:
    """With BIFROST_LOG_FORMAT=json every line on stderr is JSON, although other settings are invalid."""
    done = run_bootstrap("init", env=clean_env | {"BIFROST_LOG_FORMAT": "json"})
    assert done.returncode == 78
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert events[-1]["level"] == "error"
    assert "BIFROST_DATABASE_URL" in events[-1]["message"]


def test_load_wants_yes(run_bootstrap: RunBootstrap, clean_env: dict[str, str], tmp_path: Path) -> None:
    """Without `--yes`, `load` names the target and does not connect."""
    env = clean_env | {"BIFROST_DATABASE_URL": "postgresql://u:hidden-word@db.example/platform"}
    done = run_bootstrap("load", str(tmp_path), env=env)
    assert (done.returncode, done.stdout) == (64, "")
    assert "PostgreSQL db.example:5432/platform" in done.stderr
    assert "--yes" in done.stderr
    assert "hidden-word" not in done.stderr


@pytest.mark.parametrize("module", ["click", "pydantic"])
def test_import_error_before_the_start_is_70(
    module: str, run_bootstrap: RunBootstrap, clean_env: dict[str, str], tmp_path: Path
) -> None:
    """A broken installation exits with 70 and names the module, not with Python's 1."""
    (tmp_path / f"{module}.py").write_text("raise ImportError('broken on purpose')")
    done = run_bootstrap("--version", env=clean_env | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (70, "")
    assert "cannot start: ImportError: broken on purpose" in done.stderr


@pytest.mark.parametrize("statement", ["raise ImportError('broken on purpose')", "1 / 0", "x ="])
def test_import_error_after_the_start_is_70(
    statement: str, run_bootstrap: RunBootstrap, clean_env: dict[str, str], tmp_path: Path
) -> None:
    """A broken module that is imported later exits with 70 too. `--json` still prints its object."""
    (tmp_path / "psycopg.py").write_text(statement)
    env = clean_env | {
        "PYTHONPATH": str(tmp_path),
        "BIFROST_DATABASE_URL": "postgresql://u:hidden-word@127.0.0.1:1/d",
        "BIFROST_REDIS_URL": "redis://127.0.0.1:1/0",
        "BIFROST_ALEMBIC_CONFIG": "builtin",
    }
    done = run_bootstrap("check", "--json", env=env)
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 70
    assert found["verdict"] == "bug"
    assert "Traceback" in done.stderr
    assert "hidden-word" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, ExitCode.SIGTERM), (signal.SIGINT, ExitCode.SIGINT)], ids=["TERM", "INT"]
)
@pytest.mark.usefixtures("in_process")
def test_signal_outside_a_command_has_its_code(
    number: signal.Signals, code: ExitCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal before or after the work of a command exits with the code of the signal."""
    monkeypatch.setattr(commands.main, "main", lambda *_arguments, **_options: signal.raise_signal(number))
    assert commands.run([]) == code


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["check", "--json"], 78)], ids=str)
def test_closed_pipe_keeps_the_exit_code(arguments: list[str], code: int, clean_env: dict[str, str]) -> None:
    """If the reader of stdout exits early, there is no traceback, and the exit code is that of the work."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "bifrost_bootstrap", *arguments],
            env=clean_env,
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("redirection", ["> /dev/full", ">&-"])
@pytest.mark.parametrize(("words", "code"), [("--help", 0), ("check --json", 78), ("check", 78), ("nonsense", 64)])
def test_stdout_that_cannot_be_written(
    words: str, code: int, redirection: str, run_command: RunCommand, clean_env: dict[str, str]
) -> None:
    """A full disk or a closed stdout changes no exit code. A full disk is reported."""
    shell = f'exec "$0" -m bifrost_bootstrap {words} {redirection}'
    done = run_command(["/bin/sh", "-c", shell, sys.executable], env=clean_env)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    lost = "WARNING the result cannot be written to stdout: No space left on device" in done.stderr
    assert lost is ("full" in redirection and words in ("--help", "check --json"))


def test_bug_outside_a_command_is_70(monkeypatch: pytest.MonkeyPatch, in_process: None) -> None:
    """An exception outside a command exits with 70."""
    monkeypatch.setattr(commands.main, "main", lambda *_arguments, **_options: 1 / 0)
    assert commands.run([]) == 70


@pytest.mark.parametrize(("leaving", "code"), [(78, 78), (5, 70), ("a text", 70), (None, 70)])
@pytest.mark.usefixtures("in_process")
def test_a_library_that_leaves(leaving: int | str | None, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery's worker leaves with a code of ours if its queues cannot be chosen; any other code is a bug."""

    def leave(*_arguments: object, **_options: object) -> None:
        raise SystemExit(leaving)

    monkeypatch.setattr(commands.main, "main", leave)
    assert commands.run([]) == code


def test_stderr_that_cannot_be_written(run_command: RunCommand, clean_env: dict[str, str]) -> None:
    """A full disk under stderr does not change the code of wrong usage."""
    shell = 'exec "$0" -m bifrost_bootstrap nonsense 2> /dev/full'
    assert run_command(["/bin/sh", "-c", shell, sys.executable], env=clean_env).returncode == 64


#: Cleans up without an end when it is told to stop.
SLOW_TO_END = """
import sys, time
from bifrost_bootstrap.cli import commands as cli
from bifrost_bootstrap.cli import execution as command
command.SIGNAL_GRACE = 0.5

def work(*_, **__):
    try:
        print("at work", file=sys.stderr, flush=True)
        time.sleep(600)
    finally:
        time.sleep(600)

cli.main.main = work
sys.exit(cli.run([]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_i07_hanging_cleanup_is_interrupted(
    number: signal.Signals, code: int, start_command: StartCommand, clean_env: dict[str, str]
) -> None:
    """A clean-up that hangs after a signal is interrupted. The exit code is that of the signal."""
    command = start_command([sys.executable, "-c", SLOW_TO_END], env=clean_env)
    command.wait_for("at work")
    command.send_signal(number)
    assert command.wait(20).returncode == code


def test_file_name_that_is_no_text(run_bootstrap: RunBootstrap, clean_env: dict[str, str]) -> None:
    """A file name that is not UTF-8 is printed, also with `--json`."""
    env = clean_env | {"BIFROST_ALEMBIC_CONFIG": "/gone/\udcff.ini", "BIFROST_DATABASE_URL": "postgresql://127.0.0.1:1/d",
                       "BIFROST_REDIS_URL": "redis://127.0.0.1:1/0"}  # fmt: skip
    done = run_bootstrap("check", "--json", env=env)
    assert done.returncode == 78
    assert "\udcff.ini" in json.loads(done.stdout)["message"]
