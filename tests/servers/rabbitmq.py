"""RabbitMQ: a server is one node; each test has a virtual host."""

from __future__ import annotations

import re
import secrets
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, urlsplit, urlunsplit

import kombu
from kombu.transport import pyamqp

from tests.servers.leaks import PLANTED_PASSWORD, PLANTED_PASSWORD_QUOTED
from tests.servers.process import (
    START_DEADLINE,
    ProcessTree,
    RunFolder,
    Server,
    ServerMissing,
    find_program,
    free_port,
    give_back,
    wait_until,
)

#: Debian's /usr/sbin/rabbitmq-server is not used: it changes to the user rabbitmq, and to the node of the machine.
HOMES = (
    "usr/lib/rabbitmq/lib/rabbitmq_server-*",
    "opt/rabbitmq*",
    "opt/homebrew/opt/rabbitmq",
    "usr/local/opt/rabbitmq",
)
ERLANG_FOLDERS = ("/usr/lib/erlang/bin", "/usr/local/lib/erlang/bin", "/opt/homebrew/opt/erlang/lib/erlang/bin")
#: The only user of a private node.
USER = "bifrost"
#: Timeouts of a connection attempt, and of an Erlang expression (seconds).
CONNECT_TIMEOUT = 5.0
EVALUATE_TIMEOUT = 30


class Rabbitmq:
    """A broker of the tests: a private one, or that of BIFROST_TEST_RABBITMQ_URL."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def url(self, vhost: str | None = None) -> str:
        """Return the URL of a virtual host. None: that of the base URL."""
        if vhost is None:
            return self.base_url
        return urlunsplit(urlsplit(self.base_url)._replace(path=f"/{quote(vhost, safe='')}"))


def vhost_of(url: str) -> str:
    """Return the virtual host in a URL."""
    return url.rpartition("/")[2]


class RabbitmqServer(Server, Rabbitmq):
    """A private RabbitMQ node without plugins.

    It shares nothing with a RabbitMQ of the machine: it has its own node name, cookie, home, epmd, distribution port
    and data, and does not read the configuration files of the machine. A kill may lose queues that were declared in
    the second before it; call `write_down` first to keep them.

    Args:
        run: The folder for its files.
        conf: Lines of rabbitmq.conf, for instance `["consumer_timeout = 5000"]`.
        advanced: Settings of the application `rabbit` that rabbitmq.conf does not have, as Erlang terms, for instance
            `{"channel_tick_interval": "1000"}`. A change of `conf` or `advanced` takes effect at the next start.
        seed: A running node whose cluster it joins at its first start.
    """

    kind: ClassVar[str] = "rabbitmq"
    not_ready: ClassVar[tuple[type[Exception], ...]] = (*pyamqp.Transport.connection_errors, RuntimeError)

    def __init__(
        self,
        run: RunFolder,
        conf: Sequence[str] = (),
        advanced: Mapping[str, str] | None = None,
        seed: RabbitmqServer | None = None,
    ) -> None:
        Server.__init__(self, run)
        Rabbitmq.__init__(self, f"amqp://{USER}:{PLANTED_PASSWORD_QUOTED}@{self.host}:{self.port}/%2F")
        self.conf = list(conf)
        self.advanced = dict(advanced or {})
        self.seed = seed
        self.distribution_port = free_port()
        self.mapper_port: int = seed.mapper_port if seed else free_port()
        self._mapper: ProcessTree | None = None
        self._fresh = seed is None

    @property
    def node(self) -> str:
        """Its Erlang node name."""
        return f"{self.name}@localhost"

    def add_vhost(self, prefix: str = "test") -> str:
        """Create a virtual host with a new name; return the name. (30 ms; rabbitmqctl takes 2 s.)"""
        vhost = f"{prefix}-{secrets.token_hex(4)}"
        self.evaluate(
            f'ok = rabbit_vhost:add(<<"{vhost}">>, <<"tests">>), '
            f'ok = rabbit_auth_backend_internal:set_permissions(<<"{USER}">>, <<"{vhost}">>, '
            f'<<".*">>, <<".*">>, <<".*">>, <<"tests">>)'
        )
        return vhost

    def write_down(self) -> None:
        """Write all declarations to disk now.

        RabbitMQ 3.10 writes them within a second. If the node is killed before that, its quorum queue has no leader
        after the restart, until the worker deletes and declares the queue about 15 s later (docs/reliability.md).
        """
        self.evaluate("mnesia:sync_log(), [dets:sync(Table) || Table <- dets:all()]")

    def delete_vhost(self, vhost: str) -> None:
        """Delete a virtual host with its queues, and close its connections."""
        self.evaluate(f'rabbit_vhost:delete(<<"{vhost}">>, <<"tests">>)')

    def evaluate(self, expression: str) -> str:
        """Evaluate an Erlang expression in the node, as `rabbitmqctl eval` does. Return the result as text.

        Raises:
            RuntimeError: The node does not answer, or the expression fails.
        """
        done = subprocess.run(
            [
                find_program("erl_call", *ERLANG_FOLDERS),
                *("-address", f"localhost:{self.distribution_port}"),
                *("-timeout", str(EVALUATE_TIMEOUT), "-e"),
            ],
            input=f"{expression}.\n",
            capture_output=True,
            text=True,
            check=False,
            env=self.environment(),
            timeout=2 * EVALUATE_TIMEOUT,
        )
        answer = re.fullmatch(r"\{ok, (.*)\}\s*", done.stdout, re.DOTALL)
        if done.returncode != 0 or answer is None:
            raise RuntimeError(f"{self.name}: {expression}\n{done.stdout}{done.stderr}")
        return answer[1]

    def prepare(self) -> None:
        folder = home()
        _needed_applications(folder, self.data / "rabbitmq")
        (self.data / "log").mkdir(exist_ok=True)
        cookie = self.data / ".erlang.cookie"
        if not cookie.exists():
            cookie.touch(mode=0o600)
            cookie.write_text(self.seed.cookie if self.seed else secrets.token_hex(16))
        (self.data / "enabled_plugins").write_text("[].\n")
        (self.data / "environment").touch()
        terms = ", ".join(f"{{{name}, {term}}}" for name, term in self.advanced.items())
        (self.data / "advanced.config").write_text(f"[{{rabbit, [{terms}]}}].\n")
        configuration = self.data / "rabbitmq.conf"
        configuration.touch(mode=0o600)
        joins = "cluster_formation.classic_config.nodes"
        configuration.write_text(
            "\n".join(
                [
                    *([f"{joins}.1 = {self.seed.node}", f"{joins}.2 = {self.node}"] if self.seed else []),
                    f"listeners.tcp.local = {self.host}:{self.port}",
                    f"default_user = {USER}",
                    # Not the planted password: RabbitMQ 4 reads the text before a ":" as the name of an encryption.
                    f"default_pass = {secrets.token_hex(16)}",
                    "disk_free_limit.absolute = 1MB",  # no disk alarm on a nearly full disk
                    *self.conf,
                    "",
                ]
            )
        )
        if self.seed is None:
            self._start_mapper()

    @property
    def cookie(self) -> str:
        """The Erlang cookie of its cluster."""
        return (self.data / ".erlang.cookie").read_text()

    def environment(self) -> dict[str, str]:
        data = self.data
        return super().environment() | {
            "ERL_EPMD_PORT": str(self.mapper_port),
            "ERL_EPMD_ADDRESS": self.host,
            "ERL_FLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_SCRIPTS_DIR": str(data / "rabbitmq" / "sbin"),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_CONF_ENV_FILE": str(data / "environment"),
            "RABBITMQ_CONFIG_FILE": str(data / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(data / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(data / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(data / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(data / "mnesia"),
            "RABBITMQ_LOG_BASE": str(data / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_UPGRADE_LOG": str(data / "log" / "upgrade.log"),
            "RABBITMQ_PID_FILE": str(data / "pid"),
            # With this variable the script runs `exec erl`; without it, a shell waits for the node.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def command(self) -> Sequence[str]:
        return ["/bin/sh", str(self.data / "rabbitmq" / "sbin" / "rabbitmq-server")]

    def probe(self) -> None:
        if self._fresh:
            password = ",".join(str(byte) for byte in PLANTED_PASSWORD.encode())
            self.evaluate(
                f'ok = rabbit_auth_backend_internal:change_password(<<"{USER}">>, <<{password}>>, <<"tests">>),'
                " mnesia:sync_log()"
            )
            self._fresh = False
        options = {"read_timeout": CONNECT_TIMEOUT, "write_timeout": CONNECT_TIMEOUT}
        with kombu.Connection(self.url(), connect_timeout=CONNECT_TIMEOUT, transport_options=options) as connection:
            connection.connect()

    def close(self) -> None:
        super().close()
        if self._mapper is not None:
            self._mapper.end()
            give_back(self.mapper_port)
        give_back(self.distribution_port)

    def _start_mapper(self) -> None:
        """Start epmd. If the node starts it, epmd becomes a daemon that outlives the tests."""
        if self._mapper is not None and self._mapper.running:
            return
        with self.log.open("ab") as log:
            self._mapper = ProcessTree(
                [find_program("epmd", *ERLANG_FOLDERS), "-port", str(self.mapper_port), "-address", self.host],
                env=self.environment(),
                cwd=self.data,
                mark=self.run.mark(f"{self.name}-epmd"),
                stdout=log.fileno(),
                stderr=log.fileno(),
            )
        wait_until(lambda: _listens(self.host, self.mapper_port), "epmd", START_DEADLINE)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT).close()
    except OSError:
        return False
    return True


def home() -> Path:
    """Return the folder of the newest installed RabbitMQ. Raises ServerMissing."""
    found = [home for pattern in HOMES for home in Path("/").glob(pattern) if (home / "sbin/rabbitmq-server").exists()]
    if not found:
        raise ServerMissing(f"no RabbitMQ in {', '.join(f'/{pattern}' for pattern in HOMES)}")
    return max(found, key=lambda home: [int(number) for number in re.findall(r"\d+", home.name)])


def _needed_applications(home: Path, copy: Path) -> None:
    """Make a copy (symbolic links) of a RabbitMQ home with only the broker and the applications that it needs.

    Erlang searches every folder of the code path for every module. With the 50 folders of unused plugins a start took
    12 s instead of 4 s.
    """
    if copy.exists():
        return
    (copy / "plugins").mkdir(parents=True)
    for name in ("sbin", "escript"):
        (copy / name).symlink_to(home / name)
    folders = {path.name.partition("-")[0]: path for path in (home / "plugins").iterdir()}
    wanted, linked = ["rabbit"], set[str]()
    while wanted:
        name = wanted.pop()
        if name in linked or name not in folders:  # part of Erlang itself
            continue
        linked.add(name)
        (copy / "plugins" / folders[name].name).symlink_to(folders[name])
        description = (folders[name] / "ebin" / f"{name}.app").read_text()
        if needed := re.search(r"\{\s*applications\s*,\s*\[(.*?)\]", description, re.DOTALL):
            wanted += re.findall(r"\w+", needed[1])
