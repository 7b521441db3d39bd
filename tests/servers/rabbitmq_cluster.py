"""Several RabbitMQ nodes that are one broker."""

from __future__ import annotations

from tests.servers.process import RunFolder, wait_until
from tests.servers.rabbitmq import RabbitmqServer

#: Seconds until nodes that can reach each other are one cluster again.
WHOLE_DEADLINE = 60.0
#: Nodes that cannot see most of the others stop, as RabbitMQ's guide tells clusters of three to have it. Seconds in
#: which a frozen node is noticed: by default 60, in which RabbitMQ declares and deletes nothing.
CONF = ("cluster_partition_handling = pause_minority", "net_ticktime = 8")


class RabbitmqCluster:
    """Three nodes on free ports. Each can be killed, frozen, and started again like any server; or be cut off.

    Attributes:
        nodes: The first is the one that the others joined.
    """

    def __init__(self, run: RunFolder, size: int = 3) -> None:
        seed = RabbitmqServer(run, CONF)
        self.nodes = [seed, *(RabbitmqServer(run, CONF, seed=seed) for _ in range(1, size))]
        self._cut_off: RabbitmqServer | None = None

    def start(self) -> RabbitmqCluster:
        """Start what does not run, and wait until all are one cluster."""
        for node in self.nodes:
            if not node.running:
                node.start()
        self._rejoin()
        wait_until(lambda: all(self._sees_all(node) for node in self.nodes), "one cluster", WHOLE_DEADLINE)
        return self

    def close(self) -> None:
        """As a server's: the seed last, whose port mapper the others use."""
        for node in reversed(self.nodes):
            node.close()

    @property
    def living(self) -> RabbitmqServer:
        """A node that runs, and is not cut off; not the first if there is another."""
        return next(node for node in reversed(self.nodes) if node.running and node is not self._cut_off)

    def leader(self, vhost: str, queue: str) -> RabbitmqServer:
        """The node that leads a quorum queue."""
        answer = self.living.evaluate(
            f'{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>)),'
            " {_, Node} = amqqueue:get_pid(Queue), Node"
        )
        return next(node for node in self.nodes if node.node == answer.strip("'"))

    def cut_off(self, lost: RabbitmqServer) -> None:
        """No other node reaches this one, and it none of them: it knows them by a wrong cookie. Clients still do."""
        self._cut_off = lost
        # In one step: where one node has lost it and another has not, RabbitMQ stops both.
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
