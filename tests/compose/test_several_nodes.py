"""The example of three RabbitMQ nodes and a PostgreSQL with a standby: one of each is lost, and init succeeds."""

from __future__ import annotations

import pytest

from tests.compose.stack import OpenStack, Stack, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

FILES = ("docker-compose.yml", "deploy/compose/several-nodes.yml")
NODES = ("rabbitmq", "rabbitmq-2", "rabbitmq-3")
ADD_MODULE = (
    "INSERT INTO workspace_files (path, content, content_hash, entity_type)"
    " VALUES ('after_failover.py', 'A = 1', encode(sha256('A = 1'), 'hex'), 'module')"
)


def queue_members(stack: Stack) -> set[frozenset[str]]:
    """The nodes that have a copy, for each lasting queue."""
    listed = stack.compose(
        *("exec", "-T", "rabbitmq", "rabbitmqctl", "--silent", "list_queues", "-p", "bifrost_bootstrap"),
        *("--no-table-headers", "name", "type", "members"),
    ).stdout
    quorum = [line for line in listed.splitlines() if "\tquorum\t" in line]
    return {frozenset(node for node in NODES if f"rabbit@{node}," in f"{line.replace(']', ',')}") for line in quorum}


def test_a_node_of_each_is_lost(open_stack: OpenStack) -> None:
    """Each queue has a copy on every node. Without the first node and the primary, the next init exits 0."""
    with open_stack("nodes", *FILES) as stack:
        stack.compose("up", "-d")
        assert stack.wait("init") == 0, stack.output("init")
        assert queue_members(stack) == {frozenset(NODES)}

        stack.compose("kill", "rabbitmq", "postgres")
        stack.compose("exec", "-T", "-u", "postgres", "postgres-standby", "pg_ctl", "promote")
        stack.compose(
            *("exec", "-T", "-u", "postgres", "postgres-standby"),
            *("psql", "-q", "-v", "ON_ERROR_STOP=1", "-d", "bifrost", "-c", ADD_MODULE),
        )
        stack.compose("up", "-d", "--no-deps", "--force-recreate", "init")
        assert stack.wait("init") == 0, stack.output("init")
        assert "added': 1" in stack.output("bootstrap-worker")
        wait_until(lambda: stack.inspect("bootstrap-worker")["State"]["Health"]["Status"] == "healthy", "the worker")
        assert stack.inspect("bootstrap-worker")["RestartCount"] == 0
