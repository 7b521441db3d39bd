"""Init and worker on servers of several nodes, and the loss of a node.

Fixtures: `rabbitmq_cluster` (shared), `cluster_deployment` (for each test).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import kombu
import pytest

from bifrost_bootstrap.migrate.tree import QUEUE
from tests.conftest import Outside
from tests.servers import Database, PostgresServer, Proxy, RabbitmqServer, RedisServer, RunFolder, ServerMissing
from tests.servers.command import Commands
from tests.servers.leaks import PLANTED_PASSWORD
from tests.servers.postgres import StandbyServer
from tests.servers.process import wait_until
from tests.servers.rabbitmq_cluster import RabbitmqCluster
from tests.servers.run_checks import lacks_server
from tests.setups.stack import Deployment, Lines, Stack

#: The arguments of our queues: that of `celery call`, and that of a tree.
LASTING: dict[str, object] = {"x-queue-type": "quorum"}
OF_A_TREE: dict[str, object] = {**LASTING, "x-expires": 3_600_000}
#: How long a demoted Redis primary still answers before it is killed (seconds).
DEMOTED = 3.0


@dataclass
class Nodes:
    """The servers of one deployment. `lines` are proxies to the first node of each; `standby_line` to the standby."""

    rabbitmq: RabbitmqCluster
    postgres: PostgresServer
    standby: StandbyServer
    redis: RedisServer
    replica: RedisServer
    lines: Lines
    standby_line: Proxy
    replication: Proxy


@contextlib.contextmanager
def running_nodes(run: RunFolder, rabbitmq: RabbitmqCluster) -> Iterator[Nodes]:
    """Start two PostgreSQL and two Redis, and restart the lost nodes of `rabbitmq`."""
    with contextlib.ExitStack() as started:

        def proxy(port: int) -> Proxy:
            return started.enter_context(Proxy(port))

        rabbitmq.start()
        postgres, redis = PostgresServer(run), RedisServer(run)
        for server in (postgres, redis):
            started.callback(server.close)
            server.start()
        standby = StandbyServer(run, postgres)
        replication = proxy(redis.port)
        follows = {"replicaof": f"127.0.0.1 {replication.port}", "masterauth": f'"{PLANTED_PASSWORD}"'}
        replica = RedisServer(run, follows)
        for server in (standby, replica):
            started.callback(server.close)
            server.start()
        lines = Lines(proxy(postgres.port), proxy(redis.port), proxy(rabbitmq.nodes[0].port))
        yield Nodes(rabbitmq, postgres, standby, redis, replica, lines, proxy(standby.port), replication)


@dataclass
class ClusterDeployment(Deployment):
    """A deployment on several nodes. hosts: the PostgreSQL URL has two hosts; False: one address that moves."""

    nodes: Nodes = field(kw_only=True)
    hosts: bool = field(default=True, kw_only=True)

    def environment(self, lines: Lines) -> dict[str, str]:
        """Return the environment of every process."""
        first, *others = self.nodes.rabbitmq.nodes
        urls = [lines.rabbitmq.through(first.url(self.vhost)), *(node.url(self.vhost) for node in others)]
        database_url = lines.postgres.through(Database(self.nodes.postgres, self.database.name).url)
        if self.hosts:
            address = f"127.0.0.1:{lines.postgres.port}"
            database_url = database_url.replace(address, f"{address},127.0.0.1:{self.nodes.standby_line.port}")
        return {
            **super().environment(lines),
            "BIFROST_RABBITMQ_URL": ";".join(urls),
            "BIFROST_DATABASE_URL": database_url,
        }

    def declare_queues(self, node: RabbitmqServer) -> None:
        """Declare our queues on this node, which becomes their leader."""
        with kombu.Connection(node.url(self.vhost)) as connection:
            for name, arguments in ((QUEUE, LASTING), (self.queue, OF_A_TREE)):
                connection.default_channel.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
        wait_until(lambda: self.nodes.rabbitmq.leader(self.vhost, self.queue) is node, "the leader")

    # ----------------------------------------------------------------------------------------------- faults

    def lose_rabbitmq(self, fault: str) -> None:
        """Lose the first node, to which all processes are connected."""
        lost = self.nodes.rabbitmq.nodes[0]
        if fault == "partition":
            self.nodes.rabbitmq.cut_off(lost)
        else:
            {"kill": lost.kill, "freeze": lost.pause}[fault]()
        self.stack.rabbitmq = self.nodes.rabbitmq.living

    def lose_postgres(self, fault: str) -> None:
        """Lose the primary and promote the standby."""
        nodes, line = self.nodes, self.stack.init_lines.postgres
        wait_until(nodes.standby.caught_up, "the standby")
        {"kill": nodes.postgres.kill, "freeze": nodes.postgres.pause, "partition": line.cut}[fault]()
        nodes.standby.promote()
        if not self.hosts:
            line.lead_to(nodes.standby.port)
            if fault == "partition":
                line.strand()
        self.stack.postgres = nodes.standby
        self.database = Database(nodes.standby, self.database.name)

    def lose_redis(self, fault: str) -> None:
        """Lose the primary and promote the replica. Writes after `stop_replication` are lost."""
        nodes, line = self.nodes, self.stack.init_lines.redis
        with nodes.replica.client() as client:
            client.replicaof("NO", "ONE")
        if fault == "demoted":
            with nodes.redis.client() as client:
                client.config_set("masterauth", PLANTED_PASSWORD)
                client.replicaof("127.0.0.1", nodes.replica.port)
            time.sleep(DEMOTED)
        {"freeze": nodes.redis.pause, "partition": line.cut}.get(fault, nodes.redis.kill)()
        line.lead_to(nodes.replica.port)
        if fault == "partition":
            line.strand()
        self.stack.redis = nodes.replica

    def stop_replication(self) -> None:
        """Wait until the replica is up to date, then stop its replication."""
        with self.nodes.redis.client() as primary, self.nodes.replica.client() as replica:
            wait_until(lambda: replica.dbsize() == primary.dbsize(), "the replica")
        self.nodes.replication.refuse()


@contextlib.contextmanager
def deployed(nodes: Nodes, run: RunFolder, folder: Path, clean_env: dict[str, str]) -> Iterator[ClusterDeployment]:
    """Yield a deployment with a new database and virtual host."""
    stack = Stack(run, nodes.postgres, nodes.redis, nodes.rabbitmq.living, nodes.lines, nodes.lines)
    vhost = stack.rabbitmq.add_vhost()
    commands = Commands(run)
    database = nodes.postgres.create_database()
    try:
        yield ClusterDeployment(stack, folder, clean_env, database, vhost, commands, nodes=nodes)
    finally:
        commands.close()
        # A node that was frozen for long has left the cluster.
        lost = nodes.rabbitmq.nodes[0]
        if lost.running and lost is not nodes.rabbitmq.living:
            lost.kill()
        nodes.rabbitmq.start()
        nodes.rabbitmq.living.delete_vhost(vhost)


# ------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="session")
def rabbitmq_cluster(run_folder: RunFolder, outside: Outside) -> Iterator[RabbitmqCluster]:
    """A private broker of three nodes, shared by the tests of an xdist worker."""
    with contextlib.closing(RabbitmqCluster(run_folder)) as cluster:
        try:
            cluster.start()
        except ServerMissing as missing:
            lacks_server(missing, in_ci=outside.in_ci)
        yield cluster


@pytest.fixture
def cluster_deployment(
    rabbitmq_cluster: RabbitmqCluster, run_folder: RunFolder, tmp_path: Path, clean_env: dict[str, str]
) -> Iterator[ClusterDeployment]:
    """A new deployment on `rabbitmq_cluster`, two PostgreSQL and two Redis servers."""
    with (
        running_nodes(run_folder, rabbitmq_cluster) as nodes,
        deployed(nodes, run_folder, tmp_path / "deployment", clean_env) as deployment,
    ):
        yield deployment
