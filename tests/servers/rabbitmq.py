"""RabbitMQ: one node per server, one virtual host per test."""

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

#: Not Debian's /usr/sbin/rabbitmq-server, which is for its own user and its own node.
HOMES = (
    "usr/lib/rabbitmq/lib/rabbitmq_server-*",
    "opt/rabbitmq*",
    "opt/homebrew/opt/rabbitmq",
    "usr/local/opt/rabbitmq",
)
ERLANG_FOLDERS = ("/usr/lib/erlang/bin", "/usr/local/lib/erlang/bin", "/opt/homebrew/opt/erlang/lib/erlang/bin")
#: The only user of a private node; there is no guest.
USER = "bifrost"
#: Seconds for one connection attempt, and for one expression in the node.
CONNECT_TIMEOUT = 5.0
EVALUATE_TIMEOUT = 30


class Rabbitmq:
    """A broker that tests may use: our own, or one that BIFROST_TEST_RABBITMQ_URL names."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def url(self, vhost: str | None = None) -> str:
        """Return the URL of a virtual host; None: the one of the base URL."""
        if vhost is None:
            return self.base_url
        return urlunsplit(urlsplit(self.base_url)._replace(path=f"/{quote(vhost, safe='')}"))


def vhost_of(url: str) -> str:
    """The name of the virtual host of a URL."""
    return url.rpartition("/")[2]


class RabbitmqServer(Server, Rabbitmq):
    """A private RabbitMQ node without plugins, apart from the machine's own in every respect.

    It has its own node name, cookie, home, port mapper, distribution port, and data; the machine's configuration
    files are not read. A kill loses what was declared a moment before, as in life; `evaluate("mnesia:sync_log()")`
    has it written.

    Args:
        run: Where its files go.
        conf: Lines of rabbitmq.conf, for instance `["consumer_timeout = 5000"]`.
        advanced: What rabbitmq.conf has no word for: settings of the application `rabbit` as Erlang terms, for
            instance `{"channel_tick_interval": "1000"}`. Both may be changed between two starts.
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
        """Its name among Erlang's nodes."""
        return f"{self.name}@localhost"

    def add_vhost(self, prefix: str = "test") -> str:
        """Create a virtual host of a new name and return the name. It takes some 30 ms: rabbitmqctl takes 2 s."""
        vhost = f"{prefix}-{secrets.token_hex(4)}"
        self.evaluate(
            f'ok = rabbit_vhost:add(<<"{vhost}">>, <<"tests">>), '
            f'ok = rabbit_auth_backend_internal:set_permissions(<<"{USER}">>, <<"{vhost}">>, '
            f'<<".*">>, <<".*">>, <<".*">>, <<"tests">>)'
        )
        return vhost

    def write_down(self) -> None:
        """Have all that was declared written.

        RabbitMQ 3.10 does so within a second. A node that is killed before comes back with a quorum queue that has no
        leader, until the worker replaces it, a quarter of a minute later (docs/reliability.md).
        """
        self.evaluate("mnesia:sync_log(), [dets:sync(Table) || Table <- dets:all()]")

    def delete_vhost(self, vhost: str) -> None:
        """Delete a virtual host with its queues, and close the connections to it."""
        self.evaluate(f'rabbit_vhost:delete(<<"{vhost}">>, <<"tests">>)')

    def evaluate(self, expression: str) -> str:
        """Evaluate an Erlang expression in the node, as `rabbitmqctl eval`, and return the term as text.

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
                    # RabbitMQ 4 takes what stands before a ":" for the name of a kind of encryption.
                    f"default_pass = {secrets.token_hex(16)}",
                    "disk_free_limit.absolute = 1MB",  # a full disk is not what these tests are about
                    *self.conf,
                    "",
                ]
            )
        )
        if self.seed is None:
            self._start_mapper()

    @property
    def cookie(self) -> str:
        """What the nodes of its cluster know each other by."""
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
            # The script then becomes the node, instead of a shell that waits for it.
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
        """Start epmd ourselves: one that the node starts is a daemon that outlives everything."""
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
    """Return the folder of the newest RabbitMQ with its sbin and plugins."""
    found = [home for pattern in HOMES for home in Path("/").glob(pattern) if (home / "sbin/rabbitmq-server").exists()]
    if not found:
        raise ServerMissing(f"no RabbitMQ in {', '.join(f'/{pattern}' for pattern in HOMES)}")
    return max(found, key=lambda home: [int(number) for number in re.findall(r"\d+", home.name)])


def _needed_applications(home: Path, copy: Path) -> None:
    """Link a RabbitMQ home in which only the broker and what it needs is on the code path.

    Erlang looks for every module in every folder of the path: with the 50 folders of unused plugins a start takes
    two to three times as long (measured: 12 s instead of 4).
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
        if name in linked or name not in folders:  # the others are Erlang's own
            continue
        linked.add(name)
        (copy / "plugins" / folders[name].name).symlink_to(folders[name])
        description = (folders[name] / "ebin" / f"{name}.app").read_text()
        if needed := re.search(r"\{\s*applications\s*,\s*\[(.*?)\]", description, re.DOTALL):
            wanted += re.findall(r"\w+", needed[1])
