"""A RabbitMQ broker of several nodes."""

from __future__ import annotations

from tests.servers.process import RunFolder, wait_until
from tests.servers.rabbitmq import RabbitmqServer

#: How long nodes may take until they form one cluster again (seconds).
WHOLE_DEADLINE = 60.0
#: pause_minority: RabbitMQ's recommendation for three nodes. net_ticktime: how long the others take to notice a frozen
#: node (seconds; the default is 60, and during that time RabbitMQ declares and deletes nothing).
CONF = ("cluster_partition_handling = pause_minority", "net_ticktime = 8")


class RabbitmqCluster:
    """Three nodes on free ports. A test may kill, freeze and restart each, or disconnect it from the others.

    Attributes:
        nodes: The others joined the first.
    """

    def __init__(self, run: RunFolder, size: int = 3) -> None:
        seed = RabbitmqServer(run, CONF)
        self.nodes = [seed, *(RabbitmqServer(run, CONF, seed=seed) for _ in range(1, size))]
        self._cut_off: RabbitmqServer | None = None

    def start(self) -> RabbitmqCluster:
        """Start the stopped nodes, and wait until all nodes form one cluster."""
        for node in self.nodes:
            if not node.running:
                node.start()
        self._rejoin()
        wait_until(lambda: all(self._sees_all(node) for node in self.nodes), "one cluster", WHOLE_DEADLINE)
        return self

    def close(self) -> None:
        """Close all nodes; the first node last, because the others use its epmd."""
        for node in reversed(self.nodes):
            node.close()

    @property
    def living(self) -> RabbitmqServer:
        """A running node that is not disconnected from the others; the first only if there is no other."""
        return next(node for node in reversed(self.nodes) if node.running and node is not self._cut_off)

    def leader(self, vhost: str, queue: str) -> RabbitmqServer:
        """Return the node that leads a quorum queue."""
        answer = self.living.evaluate(
            f'{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>)),'
            " {_, Node} = amqqueue:get_pid(Queue), Node"
        )
        return next(node for node in self.nodes if node.node == answer.strip("'"))

    def cut_off(self, lost: RabbitmqServer) -> None:
        """Disconnect this node from the other nodes, by a wrong Erlang cookie. Clients still reach the node."""
        self._cut_off = lost
        # In one step: if one node has lost the connection and another has not, RabbitMQ stops both.
        lost.evaluate(self._know_others_by(lost, "wrong") + "[erlang:disconnect_node(Node) || Node <- nodes()]")

    def _rejoin(self) -> None:
        lost, self._cut_off = self._cut_off, None
        if lost is not None and lost.running:
            lost.evaluate(self._know_others_by(lost, lost.cookie) + "ok")

    def _know_others_by(self, node: RabbitmqServer, cookie: str) -> str:
        others = (other for other in self.nodes if other is not node)
        return "".join(f"erlang:set_cookie('{other.node}', '{cookie}'), " for other in others)

    def _sees_all(self, node: RabbitmqServer) -> bool:
        try:
            return node.evaluate("length(rabbit_mnesia:cluster_nodes(running))") == str(len(self.nodes))
        except RuntimeError:
            return False
