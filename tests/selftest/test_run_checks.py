"""Selftest of RunChecks: each test runs pytest on a file with a fault."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.conftest import StartCommand
from tests.servers import PLANTED_PASSWORD, RunFolder
from tests.servers.command import read
from tests.servers.leaks import LEAK_MARKS, PLANTED_PASSWORD_QUOTED, leaks_below, leaks_in
from tests.servers.process import KEPT_RUNS, lives, wait_until

ROOT = Path(__file__).parents[2]
#: How long the inner run may take, and how long it may take to end after a signal (seconds).
TIMEOUT = 60.0
#: Words before a command that is to be as in the background of a script, where SIGINT is ignored.
IN_BACKGROUND = ("sh", "-c", 'trap "" INT; exec "$0" "$@"')
#: Every way of putting out the planted password, each in a test that passes, and a process left running.
WRONG = """
import logging, subprocess, sys
from tests.servers.command import read
from tests.servers.leaks import LEAK_MARKS, PLANTED_PASSWORD, PLANTED_PASSWORD_QUOTED
from tests.servers import process

process.SETTLE_DEADLINE = 0.5  # what is left running here does not end by itself

def say(run_command, words):
    run_command(["sh", "-c", "echo at $WORDS >&2"], env={"WORDS": words})

def test_process(run_command):
    say(run_command, PLANTED_PASSWORD)

def test_process_says_quoted(run_command):
    say(run_command, PLANTED_PASSWORD_QUOTED)

def test_process_says_half(run_command):
    say(run_command, "***@" + LEAK_MARKS[1])

def test_print():
    print(PLANTED_PASSWORD)

def test_log():
    logging.getLogger("some.library").warning("connecting with %s", PLANTED_PASSWORD)

def test_stderr():
    sys.stderr.write(PLANTED_PASSWORD)

def test_argument(run_command):
    run_command(["true", PLANTED_PASSWORD])

def test_process_list(start_command):
    program = ["sh", "-c", 'exec sh -c "echo ready; sleep 600; :" sh "$WORDS"']
    start_command(program, env={"WORDS": PLANTED_PASSWORD}).wait_for("ready", stream="stdout")

def test_fine(run_command):
    assert run_command(["echo", "hello"]).stdout == "hello\\n"

def test_leaves(run_folder):
    env = {process.MARK_VARIABLE: run_folder.mark("stray")}
    subprocess.Popen(["/bin/sleep", "601"], env=env, stdout=subprocess.DEVNULL, start_new_session=True)
"""
FINE = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_fine(redis_url, run_command, number):
    assert run_command(["echo", "hello"]).stdout == "hello\\n"
"""
LACKING = """
import tests.servers.redis
tests.servers.redis.PROGRAMS = ("no-such-server",)

def test_one(redis_url):
    pass

def test_two(redis_url):
    pass

def test_fine():
    pass
"""
#: Starts a server and a process, tells their ids, and waits to be interrupted.
LONG = """
import os, time
from pathlib import Path

def test_long(SERVER, start_command):
    command = start_command(["sleep", "600"])
    Path(os.environ["TOLD"]).write_text(f"{SERVER.pid} {command.pid}\\n")
    time.sleep(600)
"""


class Pytest:
    """Runs pytest with this project's conftest.py on a file in a folder of its own.

    Its output is not kept with the run's: there are passwords in it, and they are to be found there only.
    """

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        for each in (folder, self.temporary):
            each.chmod(0o711)  # the private PostgreSQL of that run may be another user's
        path = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": path}
        (folder / "told").touch()
        self.env = env | plugins | {"TMPDIR": str(self.temporary), "TOLD": str(folder / "told"), "CI": ""}

    def command(self, source: str, *options: str) -> list[str]:
        """Return the words that run this source."""
        path = self.folder / "test_inner.py"
        path.write_text(source)
        plugins = ("-p", "tests.conftest", "-p", "no:cacheprovider", "-p", "xdist.plugin")
        return [*(sys.executable, "-m", "pytest", *plugins, "--rootdir", str(self.folder), *options, str(path))]

    def run(self, source: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self.command(source, *options),
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )


def last_line_before_the_count(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of the summary, above pytest's own line that counts the tests."""
    return [line for line in done.stdout.splitlines() if line][-2]


@pytest.fixture
def inner(run_folder: RunFolder, clean_env: dict[str, str]) -> Pytest:
    """A pytest run inside this one."""
    folder = run_folder.data(run_folder.name("inner"))
    folder.mkdir()
    return Pytest(folder, clean_env)


def test_a_run_without_faults_passes_and_leaves_nothing(inner: Pytest) -> None:
    """Control of the tests below: without a fault nothing is reported, and no file is left."""
    done = inner.run(FINE)
    assert done.returncode == 0, done.stdout
    assert "faults of the whole run" not in done.stdout
    assert last_line_before_the_count(done) == "0 tests lacked a server"
    assert not list(inner.temporary.glob("bifrost-tests-*"))


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_s4_faults_of_a_run_are_found_where_all_tests_pass(inner: Pytest, options: Sequence[str]) -> None:
    """S4: the planted password is found in the output of processes (plain, quoted, in part), in their
    arguments, and in captured output. A process left running is found and killed. Each fails a run without
    a failing test.
    """
    done = inner.run(WRONG, *options)
    assert "10 passed" in done.stdout, done.stdout
    assert done.returncode == 1
    faults = done.stdout.partition("faults of the whole run")[2]
    places = re.findall(r"the planted password is in (.*)", faults)
    worker = "gw0" if options else "main"
    places = [re.sub(r"the arguments of process \d+ \(\S*\)", "process list", place) for place in places]
    assert sorted({re.sub(r"^/\S*/|(?<=txt) .*", "", place) for place in places}) == [
        f"{worker}-command-1.stderr (byte 3)",
        f"{worker}-command-2.stderr (byte 3)",
        f"{worker}-command-3.stderr (byte 7)",
        f"{worker}-commands.txt",
        "process list",
        *(f"the report of test_inner.py::test_{name}" for name in ("log", "print", "stderr")),
    ]
    assert not leaks_in(faults)
    stray = re.search(r"left running: (\d+) /bin/sleep 601", done.stdout)
    assert stray, done.stdout
    assert not psutil.pid_exists(int(stray[1])) or not lives(psutil.Process(int(stray[1])))


def test_output_of_old_runs_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the newest finished runs are kept, and a running one is not touched."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    going_on = RunFolder.create()
    over = []
    for number in range(KEPT_RUNS + 2):
        run = RunFolder.create()
        (run.output / "log").touch()
        run.remove(keep_output=True)
        os.utime(run.root, (number, number))
        over.append(run)
    last = RunFolder.create()
    assert set(tmp_path.iterdir()) == {run.root for run in (going_on, *over[-KEPT_RUNS:], last)}
    for run in (going_on, last):
        run.remove(keep_output=True)
        assert not run.root.exists()  # there was no output


def test_s4_the_search_reads_all_of_a_large_file(tmp_path: Path) -> None:
    """S4: the password is found anywhere in a file, also across two chunks. Other files are not named."""
    mebibyte = 1 << 20
    for number, before in enumerate((0, mebibyte - 3, mebibyte, 3 * mebibyte - len(LEAK_MARKS[0]))):
        (tmp_path / f"leak-{number}").write_bytes(b"." * before + PLANTED_PASSWORD_QUOTED.encode() + b"." * 9)
        assert f"{tmp_path}/leak-{number} (byte {before})" in list(leaks_below(tmp_path))
    (tmp_path / "fine").write_text("Qz4 Zebra, Qz4 Yak\n" * 100_000)
    assert len(list(leaks_below(tmp_path))) == 4


def test_s4_either_half_of_the_password_is_a_leak() -> None:
    """S4: masking that ends at the first special character is found."""
    head, rest = PLANTED_PASSWORD.split("@")
    assert leaks_in(f"user:{head}@***")
    assert leaks_in(f"user:***@{rest}")
    assert not leaks_in("user:***@host")


@pytest.mark.parametrize(("ci", "outcome", "code"), [("", "2 skipped", 0), ("1", "2 errors", 1)])
def test_a_missing_server_skips_on_a_laptop_and_fails_in_ci(inner: Pytest, ci: str, outcome: str, code: int) -> None:
    """A test without its server fails in CI. The last line of the summary counts it in any case."""
    inner.env["CI"] = ci
    done = inner.run(LACKING)
    assert done.returncode == code, done.stdout
    assert f"1 passed, {outcome}" in done.stdout
    assert last_line_before_the_count(done) == "2 tests lacked a server"


@pytest.mark.parametrize(
    ("number", "server", "options"),
    [
        pytest.param(signal.SIGINT, "redis", (), id="ctrl-c"),
        pytest.param(signal.SIGTERM, "postgres", (), id="sigterm"),
        pytest.param(signal.SIGTERM, "redis", ("-n", "1"), id="sigterm-xdist", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "postgres", ("-n", "1"), id="sigkill-xdist"),
    ],
)
def test_nothing_outlives_an_interrupted_run(
    inner: Pytest,
    start_command: StartCommand,
    number: signal.Signals,
    server: str,
    options: Sequence[str],
) -> None:
    """Ctrl-C (also if SIGINT was ignored), SIGTERM and SIGKILL end every server and process of a run."""
    told = Path(inner.env["TOLD"])
    words = inner.command(LONG.replace("SERVER", server), *options)
    run = start_command([*IN_BACKGROUND, *words], env=inner.env, cwd=inner.folder)
    wait_until(lambda: read(told).endswith("\n") or not run.running, "the inner run", TIMEOUT)
    assert run.running, read(run.stdout)
    started = [psutil.Process(int(word)) for word in read(told).split()]
    assert len(started) == 2
    assert all(map(lives, started))

    run.send_signal(number)
    code = run.wait(TIMEOUT).returncode
    wait_until(lambda: not any(map(lives, started)), "the end of all", TIMEOUT)
    if number is signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == pytest.ExitCode.INTERRUPTED
        assert not list(inner.temporary.glob("bifrost-tests-*/data"))
