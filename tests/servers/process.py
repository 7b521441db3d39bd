"""What all private servers share: folders, free ports, starting, waiting until ready, signals, the end."""

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

#: Seconds until a server must answer: RabbitMQ takes 4 on an idle machine, 25 with cold disks and busy cores.
START_DEADLINE = 90.0
#: Seconds between two looks at something that is about to happen.
POLL_INTERVAL = 0.02
#: Seconds that a killed process gets to disappear; more than this is a process stuck in the kernel.
KILL_DEADLINE = 20.0
#: Seconds that the children of a process that has ended get to end as well, before they count as left behind.
SETTLE_DEADLINE = 5.0
#: Below the ephemeral range of Linux (32768) and macOS (49152): no outgoing connection of anybody takes the port
#: of a server that is down for a moment.
PORT_RANGE = range(20_000, 30_000)
#: How the folder of a run is called, and how many are kept of those that are over (as pytest keeps its own).
RUN_PREFIX = "bifrost-tests-"
KEPT_RUNS = 3
#: In the environment of every process that a run starts; descendants inherit it, also in sessions of their own.
MARK_VARIABLE = "TEST_RUN_MARK"
#: What holds the ports that this process was given.
_held: dict[int, socket.socket] = {}


class ServerMissing(Exception):
    """A server's program is not installed on this machine; the text says which was looked for, and where."""


class RunFolder:
    """Where one test run keeps its servers' data and collects the output of everything it starts.

    Not below pytest's `tmp_path`: that is closed to the unprivileged users that servers run as under root.
    One folder is shared by all xdist workers; `worker` keeps their names apart.
    """

    def __init__(self, root: Path, worker: str = "main") -> None:
        self.root = root
        self.worker = worker
        self.output = root / "output"
        self._numbers = itertools.count(1)
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls) -> RunFolder:
        """Make a new folder below the system's temporary folder (`TMPDIR`)."""
        _remove_old_runs()
        root = Path(tempfile.mkdtemp(prefix=RUN_PREFIX))
        root.chmod(0o711)  # servers of other users pass through, and see nothing
        run = cls(root)
        run._lock = (root / "lock").open("w")
        fcntl.flock(run._lock, fcntl.LOCK_EX)
        run.output.mkdir()
        (root / "data").mkdir(mode=0o711)
        return run

    def name(self, kind: str) -> str:
        """Return a name that no other process of this run has."""
        return f"{self.worker}-{kind}-{next(self._numbers)}"

    def data(self, name: str) -> Path:
        """Return the (not yet existing) data folder for this name."""
        return self.root / "data" / name

    def mark(self, name: str) -> str:
        """Return the value of MARK_VARIABLE for this name."""
        return f"{self.root.name}/{name}/"

    def left_over(self) -> list[psutil.Process]:
        """Return the processes of this run that go on living, whoever started them."""
        return processes_left(f"{self.root.name}/")

    def remove(self, *, keep_output: bool) -> None:
        """Remove everything, or everything but the output if there is any; the run is over."""
        kept = keep_output and any(self.output.iterdir())
        shutil.rmtree(self.root / "data" if kept else self.root, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()


def _remove_old_runs() -> None:
    """Remove our own runs of long ago: those that failed leave their output, those that were killed everything."""
    over: list[Path] = []
    for root in Path(tempfile.gettempdir()).glob(f"{RUN_PREFIX}*"):
        try:
            with (root / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # still running, just being made, or not ours
        over.append(root)
    over.sort(key=lambda root: root.stat().st_mtime, reverse=True)
    for root in over[KEPT_RUNS:]:
        shutil.rmtree(root, ignore_errors=True)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody has, and keep it from all others who ask for one until `give_back`.

    Also while nobody listens on it, between a stop and a start: a socket that never listens holds it, and leaves
    it to whoever sets SO_REUSEADDR, as every server does. (On Linux; elsewhere nothing holds it.)
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
            # Not before it is bound: then it would be given a port that is held.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _held[port] = holder
        else:
            holder.close()
        return port
    raise RuntimeError(f"no free port among {len(ports)} tried")


def give_back(*ports: int) -> None:
    """Hold these ports no longer; nothing happens where they are not held."""
    for port in ports:
        if holder := _held.pop(port, None):
            holder.close()


def find_program(name: str, *folders: str) -> str:
    """Return the path of a program: PATH first, then the folders (patterns allowed), the newest version first.

    Raises:
        ServerMissing: It is nowhere.
    """
    if found := shutil.which(name):
        return found
    for pattern in folders:
        for path in sorted(Path("/").glob(f"{pattern.lstrip('/')}/{name}"), key=_version_key, reverse=True):
            if os.access(path, os.X_OK):
                return str(path)
    raise ServerMissing(f"{name} is neither on PATH nor in {', '.join(folders) or 'any known place'}")


def _version_key(path: Path) -> list[int]:
    """Order /usr/lib/postgresql/9 before /usr/lib/postgresql/15."""
    return [int(number) for number in re.findall(r"\d+", str(path))]


def unprivileged_user() -> pwd.struct_passwd | None:
    """Whom to run servers as that refuse root: postgres, else nobody; None where we are not root anyway."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def wait_until(condition: Callable[[], bool], what: str, deadline: float = START_DEADLINE) -> None:
    """Look until the condition holds; after `deadline` seconds, TimeoutError says what did not happen."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {deadline:g} s")
        time.sleep(POLL_INTERVAL)


@cache
def _dies_with_us(death_signal: str) -> tuple[str, ...]:
    """Words before a command that have the kernel signal it when its parent dies; nothing where that is not known.

    Linux remembers the *thread* that started the process: start what is to live longer from the main thread.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return ()
    words = (setpriv, "--pdeathsig", death_signal)
    # BusyBox has a setpriv without this option.
    known = subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    return words if known else ()


class ProcessTree:
    """One process in a session of its own, with all its descendants.

    Killing and pausing mean all of them: PostgreSQL's backends and Celery's children leave the process group.
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
            [*_dies_with_us(death_signal), *command],
            env={**env, MARK_VARIABLE: mark},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C on the terminal is for pytest alone
            **identity,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def descendants(self) -> list[psutil.Process]:
        """Return the children, their children and so on, as of now; empty when the process has ended."""
        try:
            return list(psutil.Process(self.pid).children(recursive=True)) if self.running else []
        except psutil.NoSuchProcess:
            return []

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process itself, not to its descendants; nothing happens if it has ended."""
        self.process.send_signal(number)

    def pause(self) -> list[psutil.Process]:
        """Freeze all of it (SIGSTOP), parents first, until no new child turns up; return the descendants."""
        self.send_signal(signal.SIGSTOP)
        frozen: list[psutil.Process] = []
        while new := [child for child in self.descendants() if child not in frozen]:
            for child in new:
                _send(child, signal.SIGSTOP)
            frozen += new
        return frozen

    def resume(self) -> None:
        """Let all of it run again (SIGCONT), children first."""
        for child in reversed(self.descendants()):
            _send(child, signal.SIGCONT)
        self.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End all of it at once (SIGKILL), and wait until it is gone.

        Frozen first: nobody starts another child or notices another's death.
        """
        descendants = self.pause()
        self.send_signal(signal.SIGKILL)
        self.process.wait(KILL_DEADLINE)
        end_processes(descendants)

    def kill_alone(self) -> None:
        """End the process itself (SIGKILL), as the kernel does when memory is short: its descendants live on."""
        orphans = self.descendants()
        self.send_signal(signal.SIGKILL)
        self.process.wait(KILL_DEADLINE)
        for orphan in orphans:
            _send(orphan, signal.SIGCONT)

    def stop(self, number: signal.Signals, grace: float) -> None:
        """Ask the process to end by this signal, and kill all of it when it is still there `grace` seconds later."""
        self.resume()  # a frozen process would not hear
        self.send_signal(number)
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.kill()

    def end(self) -> None:
        """Leave nothing: kill the tree, and whoever of it went elsewhere but bears its mark."""
        self.kill()
        end_processes(processes_marked(self.mark))


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass  # it was faster


def processes_marked(prefix: str) -> list[psutil.Process]:
    """Return the living processes whose mark begins with this text."""
    return [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get(MARK_VARIABLE, "").startswith(prefix) and lives(process)
    ]


def processes_left(prefix: str) -> list[psutil.Process]:
    """Return the marked processes that are still there after SETTLE_DEADLINE; at once when there are none."""
    left = processes_marked(prefix)
    try:
        wait_until(lambda: not any(map(lives, left)), "the end of these", SETTLE_DEADLINE)
    except TimeoutError:
        return [process for process in left if lives(process)]
    return []


def end_processes(processes: Sequence[psutil.Process]) -> None:
    """Kill these, and wait until they are gone."""
    for process in processes:
        _send(process, signal.SIGKILL)
    wait_until(lambda: not any(map(lives, processes)), "the end of killed processes", KILL_DEADLINE)


def lives(process: psutil.Process) -> bool:
    """Whether the process runs, or could: a zombie does not, whoever has yet to reap it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Server(ABC):
    """One private server on 127.0.0.1, on a port that stays the same through restarts.

    Attributes:
        port: Its TCP port.
        data: Its own folder: configuration and data. Removed by `close`.
        log: Everything it has written, of all its starts.
    """

    kind: ClassVar[str]
    host: ClassVar[str] = "127.0.0.1"
    #: How it is asked to end in order, and how long (seconds) that may take.
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    stop_grace: ClassVar[float] = 30.0
    #: What the kernel sends it when the test run has died; a server that cleans up after its children needs more.
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
        """Make the data folder ready for a start; called before each, so that changed settings count."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Return the program and its arguments. It must stay in the foreground, and no password may be in it."""

    @abstractmethod
    def probe(self) -> None:
        """Connect and log in; any of `not_ready` means: not yet."""

    #: Errors of `probe` that mean "not yet".
    not_ready: ClassVar[tuple[type[Exception], ...]]

    def environment(self) -> dict[str, str]:
        """Return the whole environment of the server: nothing is inherited but PATH."""
        return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.data), "LC_ALL": "C.UTF-8"}

    def user(self) -> pwd.struct_passwd | None:
        """Whom it runs as; None: as ourselves."""
        return None

    @property
    def running(self) -> bool:
        return self.tree is not None and self.tree.running

    @property
    def pid(self) -> int:
        """The process id of its main process; it has to be running."""
        return self._tree().pid

    def start(self) -> Self:
        """Start it and wait until it takes a login.

        Raises:
            ServerMissing: It is not installed.
            RuntimeError: It ended, or did not answer in time; with the end of its log.
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
        """Wait until it takes a login; RuntimeError as `start`."""
        end = time.monotonic() + deadline
        while True:
            try:
                return self.probe()
            except self.not_ready as error:
                if not self.running or time.monotonic() > end:
                    state = "does not answer" if self.running else "ended by itself"
                    self.kill()
                    raise RuntimeError(f"{self.name} {state}: {error}\n{tail(self.log)}") from error
            time.sleep(POLL_INTERVAL)

    def stop(self) -> None:
        """End it in order and keep its data; nothing happens if it does not run."""
        if self.tree is not None:
            self.tree.stop(self.stop_signal, self.stop_grace)
            self.tree.end()

    def kill(self) -> None:
        """SIGKILL to all its processes at once, as a power cut; its data stay; nothing happens if it does not run."""
        if self.tree is not None:
            self.tree.end()

    def restart(self) -> None:
        """Stop in order and start with the same port and data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze all its processes: connections stay, the kernel still accepts new ones, nobody answers."""
        self._tree().pause()

    def resume(self) -> None:
        """Undo `pause`."""
        self._tree().resume()

    def close(self) -> None:
        """Kill it, remove its data and give its port back; the log stays for the search through all output."""
        self.kill()
        give_back(self.port)
        shutil.rmtree(self.data, ignore_errors=True)

    def hand_over(self, *paths: Path) -> None:
        """Give files, or whole folders, to the user that the server runs as (a TLS key, for instance)."""
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
    """Return the last lines of a log, for the message of a failure."""
    return "\n".join(log.read_text(errors="backslashreplace").splitlines()[-lines:])


def settings_lines(settings: Mapping[str, object], separator: str) -> Iterator[str]:
    """Write settings one per line, for the servers' configuration files."""
    for key, value in settings.items():
        yield f"{key}{separator}{value}\n"
