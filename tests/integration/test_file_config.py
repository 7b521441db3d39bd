"""`fileConfig` and the prints of a tree affect only the process of the tree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import RunCommand
from tests.servers import Database

#: Migrates in this very process, as the task does, and logs before and after from one and the same logger.
MIGRATE = """
import logging, sys
from bifrost_bootstrap import logs, settings
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.migrate.step import migrate
logs.configure("json", "INFO")
logger = logging.getLogger("bifrost_bootstrap.migrate")
logger.info("before")
migrate(settings.load(("database",)), Deadline(60), lambda progress: None)
logger.info("after")
"""


def test_migration_does_not_silence_us(
    foreign_tree: Path, database: Database, clean_env: dict[str, str], run_command: RunCommand
) -> None:
    """After a migration whose env.py disables every logger, our log continues, and its prints are not on stdout."""
    env_py = foreign_tree.parent / "alembic" / "env.py"
    env_py.write_text("print('printed by env.py')\n" + env_py.read_text())
    env = clean_env | {"BIFROST_DATABASE_URL": database.url, "BIFROST_ALEMBIC_CONFIG": str(foreign_tree)}
    done = run_command([sys.executable, "-c", MIGRATE], env=env)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    messages = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert (messages[0], messages[-1]) == ("before", "after")
    assert any("c93d71ae6f58 applied" in message for message in messages)


def test_control_file_config_in_our_process_would(foreign_tree: Path) -> None:
    """Positive control: the same `fileConfig` in our process disables an existing logger."""
    code = (
        "import logging, sys\nfrom logging.config import fileConfig\n"
        "logger = logging.getLogger('bifrost_bootstrap.x')\nfileConfig(sys.argv[1])\nprint(logger.disabled)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(foreign_tree)], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
