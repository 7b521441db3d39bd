"""The base of all private servers: folders, free ports, start, readiness, signals, stop."""

from __future__ import annotations

import fcntl
import itertools
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import psutil

#: How long a server may take until it answers (seconds). RabbitMQ: 4 s on an idle machine, 25 s on a busy one.
START_DEADLINE = 90.0
#: Polling interval (seconds).
POLL_INTERVAL = 0.02
#: How long a process may live after SIGKILL (seconds). After that it is stuck in the kernel.
KILL_DEADLINE = 20.0
#: How long the children of an exited process may live before they count as left behind (seconds).
SETTLE_DEADLINE = 5.0
#: Below the ephemeral ports of Linux (from 32768) and macOS (from 49152): an outgoing connection cannot take the port
#: of a server that is restarting.
PORT_RANGE = range(20_000, 30_000)
#: Prefix of the folder of a run, and how many folders of earlier runs are kept (3, as pytest does).
RUN_PREFIX = "bifrost-tests-"
KEPT_RUNS = 3
#: A variable in the environment of every process of the run. Descendants inherit it, also in their own sessions.
MARK_VARIABLE = "TEST_RUN_MARK"
#: The sockets that reserve the ports of `free_port`, by port.
_held: dict[int, socket.socket] = {}


class ServerMissing(Exception):
    """The program of a server is not installed. The text names the program and the folders that were searched."""


class RunFolder:
    """The folder of one test run: the data of its servers, and the output of all processes.

    It is not below pytest's `tmp_path`: if root runs the tests, PostgreSQL runs as another user, who cannot read
    `tmp_path`. All xdist workers share the folder; `worker` makes their file names different.
    """

    def __init__(self, root: Path, worker: str = "main") -> None:
        self.root = root
        self.worker = worker
        self.output = root / "output"
        self._numbers = itertools.count(1)
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls) -> RunFolder:
        """Create a new folder below the temporary folder of the system (`TMPDIR`)."""
        _remove_old_runs()
        root = Path(tempfile.mkdtemp(prefix=RUN_PREFIX))
        root.chmod(0o711)  # a server that runs as another user can enter its own folder, and list nothing
        run = cls(root)
        run._lock = (root / "lock").open("w")
        fcntl.flock(run._lock, fcntl.LOCK_EX)
        run.output.mkdir()
        (root / "data").mkdir(mode=0o711)
        return run

    def name(self, kind: str) -> str:
        """Return a new name that is unique in this run."""
        return f"{self.worker}-{kind}-{next(self._numbers)}"

    def data(self, name: str) -> Path:
        """Return the path of the data folder for this name. The folder does not exist yet."""
        return self.root / "data" / name

    def mark(self, name: str) -> str:
        """Return the value of MARK_VARIABLE for this name."""
        return f"{self.root.name}/{name}/"

    def left_over(self) -> list[psutil.Process]:
        """Return the processes of this run that still run."""
        return processes_left(f"{self.root.name}/")

    def remove(self, *, keep_output: bool) -> None:
        """Delete the folder at the end of the run; with `keep_output`, keep the output."""
        kept = keep_output and any(self.output.iterdir())
        shutil.rmtree(self.root / "data" if kept else self.root, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()


def _remove_old_runs() -> None:
    """Delete the folders of earlier runs that failed or were killed, except the newest KEPT_RUNS."""
    over: list[Path] = []
    for root in Path(tempfile.gettempdir()).glob(f"{RUN_PREFIX}*"):
        try:
            with (root / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # the run still runs or just starts, or another user owns the folder
        over.append(root)
    over.sort(key=lambda root: root.stat().st_mtime, reverse=True)
    for root in over[KEPT_RUNS:]:
        shutil.rmtree(root, ignore_errors=True)


def free_port() -> int:
    """Reserve a free TCP port of 127.0.0.1 and return it. `give_back` ends the reservation.

    The reservation is a bound socket that never listens. A server can still bind the port, because every server sets
    SO_REUSEADDR. The port stays reserved while the server is stopped. (Linux only: elsewhere there is no reservation.)
    """
    ports = random.SystemRandom().sample(PORT_RANGE, 100)
    for port in ports:
        holder = socket.socket()
        try:
            holder.bind(("127.0.0.1", port))
        except OSError:
            holder.close()
            continue
        if sys.platform == "linux":
            # After bind: with this option set, bind would also succeed on a port that another run has reserved.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _held[port] = holder
        else:
            holder.close()
        return port
    raise RuntimeError(f"no free port among {len(ports)} tried")


def give_back(*ports: int) -> None:
    """End the reservation of these ports. Ports without a reservation are ignored."""
    for port in ports:
        if holder := _held.pop(port, None):
            holder.close()


def find_program(name: str, *folders: str) -> str:
    """Return the path of a program. Search PATH, then these folders (glob patterns), the newest version first.

    Raises:
        ServerMissing: The program was not found.
    """
    if found := shutil.which(name):
        return found
    for pattern in folders:
        for path in sorted(Path("/").glob(f"{pattern.lstrip('/')}/{name}"), key=_version_key, reverse=True):
            if os.access(path, os.X_OK):
                return str(path)
    raise ServerMissing(f"{name} is neither on PATH nor in {', '.join(folders) or 'any known place'}")


def _version_key(path: Path) -> list[int]:
    """Sort /usr/lib/postgresql/9 before /usr/lib/postgresql/15."""
    return [int(number) for number in re.findall(r"\d+", str(path))]


def unprivileged_user() -> pwd.struct_passwd | None:
    """The user for servers that refuse to run as root: postgres, or nobody. None if the tests do not run as root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def wait_until(condition: Callable[[], bool], what: str, deadline: float = START_DEADLINE) -> None:
    """Poll until the condition is true. After `deadline` seconds, raise TimeoutError, whose text begins with `what`."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {deadline:g} s")
        time.sleep(POLL_INTERVAL)


@cache
def _die_with_parent(death_signal: str) -> tuple[str, ...]:
    """Return a command prefix with which the kernel sends this signal to the process when its parent dies.

    Empty if setpriv of util-linux is not installed. Linux sends the signal when the *thread* that started the process
    ends, so a process that outlives the thread must be started in the main thread.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return ()
    words = (setpriv, "--pdeathsig", death_signal)
    # The setpriv of BusyBox lacks this option.
    known = subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    return words if known else ()


class ProcessTree:
    """A process in its own session, with all its descendants.

    `kill` and `pause` signal every descendant and not the process group: the backends of PostgreSQL and the children of
    Celery leave the group.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        mark: str,
        stdout: int,
        stderr: int,
        user: pwd.struct_passwd | None = None,
        death_signal: str = "KILL",
    ) -> None:
        identity: dict[str, Any] = {}
        if user is not None:
            identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self.mark = mark
        self.process = subprocess.Popen(
            [*_die_with_parent(death_signal), *command],
            env={**env, MARK_VARIABLE: mark},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C on the terminal reaches pytest only
            **identity,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def descendants(self) -> list[psutil.Process]:
        """Return all current descendants. Empty if the process has exited."""
        try:
            return list(psutil.Process(self.pid).children(recursive=True)) if self.running else []
        except psutil.NoSuchProcess:
            return []

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, not to its descendants. Does nothing if the process has exited."""
        self.process.send_signal(number)

    def pause(self) -> list[psutil.Process]:
        """Send SIGSTOP to the process and its descendants, until there is no new child. Return the descendants."""
        self.send_signal(signal.SIGSTOP)
        frozen: list[psutil.Process] = []
        while new := [child for child in self.descendants() if child not in frozen]:
            for child in new:
                _send(child, signal.SIGSTOP)
            frozen += new
        return frozen

    def resume(self) -> None:
        """Send SIGCONT to the descendants, then to the process."""
        for child in reversed(self.descendants()):
            _send(child, signal.SIGCONT)
        self.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Send SIGKILL to the process and its descendants, and wait until they are gone.

        All are frozen first, so that none starts another child or reacts to the death of another process.
        """
        descendants = self.pause()
        self.send_signal(signal.SIGKILL)
        self.process.wait(KILL_DEADLINE)
        end_processes(descendants)

    def kill_alone(self) -> None:
        """Send SIGKILL to the process only, as the OOM killer does. Its descendants go on running."""
        orphans = self.descendants()
        self.send_signal(signal.SIGKILL)
        self.process.wait(KILL_DEADLINE)
        for orphan in orphans:
            _send(orphan, signal.SIGCONT)

    def stop(self, number: signal.Signals, grace: float) -> None:
        """Send this signal to the process. If it still runs after `grace` seconds, kill it and its descendants."""
        self.resume()  # a frozen process does not handle the signal
        self.send_signal(number)
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.kill()

    def end(self) -> None:
        """Kill the tree, and every process with its mark that left the tree."""
        self.kill()
        end_processes(processes_marked(self.mark))


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass  # the process has exited


def processes_marked(prefix: str) -> list[psutil.Process]:
    """Return the running processes whose MARK_VARIABLE begins with this text."""
    return [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get(MARK_VARIABLE, "").startswith(prefix) and lives(process)
    ]


def processes_left(prefix: str) -> list[psutil.Process]:
    """Return the processes with this mark that still run after SETTLE_DEADLINE. Returns at once if there are none."""
    left = processes_marked(prefix)
    try:
        wait_until(lambda: not any(map(lives, left)), "the end of these", SETTLE_DEADLINE)
    except TimeoutError:
        return [process for process in left if lives(process)]
    return []


def end_processes(processes: Sequence[psutil.Process]) -> None:
    """Kill these processes, and wait until they are gone."""
    for process in processes:
        _send(process, signal.SIGKILL)
    wait_until(lambda: not any(map(lives, processes)), "the end of killed processes", KILL_DEADLINE)


def lives(process: psutil.Process) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Server(ABC):
    """A private server on 127.0.0.1. Its port stays the same after a restart.

    Attributes:
        port: Its TCP port.
        data: The folder with its configuration and data. `close` deletes the folder.
        log: The file with its stdout and stderr since its first start.
    """

    kind: ClassVar[str]
    host: ClassVar[str] = "127.0.0.1"
    #: The signal for a clean stop, and how long the stop may take (seconds).
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    stop_grace: ClassVar[float] = 30.0
    #: The signal that the kernel sends it when the test run dies. A server that has to stop its children needs another.
    death_signal: ClassVar[str] = "KILL"

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.name = run.name(self.kind)
        self.port = free_port()
        self.data = run.data(self.name)
        self.log = run.output / f"{self.name}.log"
        self.tree: ProcessTree | None = None

    @abstractmethod
    def prepare(self) -> None:
        """Write the configuration. Called before each start, so a changed setting takes effect at the next start."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Return the program and its arguments: in the foreground, and without a password."""

    @abstractmethod
    def probe(self) -> None:
        """Connect and log in. An exception in `not_ready` means that the server still starts."""

    #: Exceptions of `probe` that mean that the server still starts.
    not_ready: ClassVar[tuple[type[Exception], ...]]

    def environment(self) -> dict[str, str]:
        """Return the environment of the server. Only PATH is inherited."""
        return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.data), "LC_ALL": "C.UTF-8"}

    def user(self) -> pwd.struct_passwd | None:
        """The user that it runs as. None: the user of the tests."""
        return None

    @property
    def running(self) -> bool:
        return self.tree is not None and self.tree.running

    @property
    def pid(self) -> int:
        """The process id of its main process. RuntimeError if it does not run."""
        return self._tree().pid

    def start(self) -> Self:
        """Start it and wait until a login succeeds.

        Raises:
            ServerMissing: It is not installed.
            RuntimeError: It exited, or did not answer within START_DEADLINE. The text has the end of its log.
        """
        if self.running:
            raise RuntimeError(f"{self.name} is running already")
        self.data.mkdir(mode=0o700, exist_ok=True)
        self.prepare()
        self.hand_over(self.data)
        with self.log.open("ab") as log:
            self.tree = ProcessTree(
                self.command(),
                env=self.environment(),
                cwd=self.data,
                mark=self.run.mark(self.name),
                stdout=log.fileno(),
                stderr=subprocess.STDOUT,
                user=self.user(),
                death_signal=self.death_signal,
            )
        self.wait_ready()
        return self

    def wait_ready(self, deadline: float = START_DEADLINE) -> None:
        """Wait until a login succeeds. Raises RuntimeError as `start`."""
        end = time.monotonic() + deadline
        while True:
            try:
                return self.probe()
            except self.not_ready as error:
                if not self.running or time.monotonic() > end:
                    state = "does not answer" if self.running else "exited"
                    self.kill()
                    raise RuntimeError(f"{self.name} {state}: {error}\n{tail(self.log)}") from error
            time.sleep(POLL_INTERVAL)

    def stop(self) -> None:
        """Stop it cleanly and keep its data. Does nothing if it does not run."""
        if self.tree is not None:
            self.tree.stop(self.stop_signal, self.stop_grace)
            self.tree.end()

    def kill(self) -> None:
        """Send SIGKILL to all its processes and keep its data. Does nothing if it does not run."""
        if self.tree is not None:
            self.tree.end()

    def restart(self) -> None:
        """Stop it cleanly, and start it with the same port and data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze all its processes. Connections stay open, the kernel accepts new ones, and nothing answers."""
        self._tree().pause()

    def resume(self) -> None:
        """Undo `pause`."""
        self._tree().resume()

    def close(self) -> None:
        """Kill it, delete its data, and release its port. The log stays for the search of RunChecks."""
        self.kill()
        give_back(self.port)
        shutil.rmtree(self.data, ignore_errors=True)

    def hand_over(self, *paths: Path) -> None:
        """Change the owner of files or whole folders to the user of the server (for instance a TLS key)."""
        user = self.user()
        if user is None:
            return
        for path in paths:
            for each in (path, *path.rglob("*")):
                os.chown(each, user.pw_uid, user.pw_gid, follow_symlinks=False)

    def _tree(self) -> ProcessTree:
        if self.tree is None or not self.tree.running:
            raise RuntimeError(f"{self.name} is not running")
        return self.tree


def tail(log: Path, lines: int = 30) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="backslashreplace").splitlines()[-lines:])


def settings_lines(settings: Mapping[str, object], separator: str) -> Iterator[str]:
    """Return one line per setting, for a configuration file."""
    for key, value in settings.items():
        yield f"{key}{separator}{value}\n"
