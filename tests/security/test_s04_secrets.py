"""S4: no secret in the process list. RunChecks searches all output, and test_flower.py the pages of Flower."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path

from tests.servers import PLANTED_PASSWORD, RunFolder
from tests.servers.leaks import leaks_in_processes
from tests.servers.process import ProcessTree, wait_until
from tests.setups.stack import Deployment


def test_s04_no_secret_in_the_process_list(deployment: Deployment, run_folder: RunFolder) -> None:
    """While a revision runs, the arguments of init, its worker, the task process and the runner contain no secret."""
    deployment.hold("migrating")
    init = deployment.start_init(own=True)
    deployment.wait_reached("migrating")
    lines = [" ".join(process.cmdline()) for process in init.descendants()]
    assert any("migrate/script" in line for line in lines), lines
    assert sum("bifrost_bootstrap worker" in line for line in lines) >= 2, lines
    assert not list(leaks_in_processes(run_folder.root.name))
    deployment.release()
    assert init.wait().returncode == 0


def test_s04_a_secret_in_the_process_list_is_found(run_folder: RunFolder, tmp_path: Path) -> None:
    """Positive control: a process with the password in its arguments is found and named.

    It has another mark, because tests that run at the same time search the processes of the whole run.
    """
    mark = f"control of S4 {uuid.uuid4()}"
    program = ["sh", "-c", 'exec sh -c "sleep 600; :" sh "$WORDS"']
    env = {"PATH": "/usr/bin:/bin", "WORDS": PLANTED_PASSWORD, "TMPDIR": str(run_folder.root)}
    careless = ProcessTree(
        program, env=env, cwd=tmp_path, mark=mark, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: bool(list(leaks_in_processes(mark))), "the secret is in the process list")
        assert list(leaks_in_processes(mark)) == [f"the arguments of process {careless.pid} (sh)"]
        assert not list(leaks_in_processes(run_folder.root.name))
    finally:
        careless.end()
    assert not list(leaks_in_processes(mark))
