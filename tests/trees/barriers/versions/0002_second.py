"""Change the modules, when the test lets it."""

import os
import signal
from pathlib import Path

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade():
    op.execute("UPDATE workspace_files SET content = 'two' WHERE path = 'kept'")
    op.execute("DELETE FROM workspace_files WHERE path = 'gone'")
    folder = Path(os.environ["TEST_BARRIERS"])
    # As in barrier_worker.py, but always in the middle of a statement.
    while (folder / "migrating.hold").exists():
        (folder / f"migrating.reached.{os.getpid()}").touch()
        op.execute("SELECT pg_sleep(0.05)")
    if (folder / "fail").exists():
        op.execute("SELECT 1 / 0 AS of_this_test")
    if (folder / "poison").exists():
        with (folder / "poisoned").open("a") as count:
            count.write("once\n")
        os.kill(os.getppid(), signal.SIGKILL)
        op.execute("SELECT pg_sleep(60)")
    op.execute("INSERT INTO workspace_files (path, content) SELECT 'new/' || n, 'two' FROM generate_series(1, 50) n")
    op.execute("INSERT INTO applied VALUES ('0002')")
