"""docker-compose.dev.yml, which is used alone."""

from __future__ import annotations

import pytest

from tests.compose.stack import OpenStack

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

PORTS = {"postgres": 5432, "pgbouncer": 5432, "redis": 6379, "rabbitmq": 5672, "flower": 5555}


def test_development_needs_no_settings(open_stack: OpenStack) -> None:
    """Without any setting, init exits 0 from the mounted source, and ports are open on 127.0.0.1 only."""
    free = {f"{name}_PORT": "0" for name in ("POSTGRES", "PGBOUNCER", "REDIS", "RABBITMQ", "RABBITMQ_MANAGEMENT")}
    with open_stack(
        "dev", "docker-compose.dev.yml", BIFROST_SECRETS_DIR="", BIFROST_ALEMBIC_CONFIG="", **free
    ) as stack:
        stack.compose("up", "-d")
        assert stack.wait("init") == 0, stack.output("init")
        where = stack.in_worker("python", "-c", "import bifrost_bootstrap as b; print(b.__file__)")
        assert where == "/src/bifrost_bootstrap/__init__.py\n"
        for service, port in PORTS.items():
            assert stack.compose("port", service, str(port)).stdout.startswith("127.0.0.1:"), service
