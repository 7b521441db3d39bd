"""Run one cell of the fault matrix and check the result."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from tests.always_ends.faults.cells import CUT, FREEZE, Cell
from tests.servers import Command, Proxy, Server
from tests.setups.stack import COMPLETE, PHASE_TIMEOUT, PREVIOUS, REVISIONS, SERVERS, Deployment

#: Seconds for an init that finds everything done, or does all of it without a fault.
SECOND_INIT_TIMEOUT = 60.0
#: What init says when it meets a server that is down.
NOTICED = r"is not available|cannot be|refused"


def run_cell(deployment: Deployment, cell: Cell) -> float:
    """Bring init into the phase, hit, and prove all that a fault must not change.

    Returns:
        Seconds from the end of the fault to the end of init.
    """
    if cell.fault == "cut" and cell.target.endswith("postgres") and sys.platform != "linux":
        pytest.skip("elsewhere the proxy's kernel goes on to answer the keepalives that have to notice")
    deployment.fill_cache()
    init = reach(deployment, cell)
    hit = _Hit(deployment, cell, init)
    hit.strike()
    return prove(deployment, cell, init)


def prove(deployment: Deployment, cell: Cell, init: Command) -> float:
    """Prove all that a fault must not change, of an init that it has just happened to.

    Returns:
        Seconds until that init ended.
    """
    began = time.monotonic()
    code = init.wait(cell.bound).returncode
    seconds = time.monotonic() - began
    assert code == cell.exit_code, f"init ended with {code}\n{init.stderr.read_text()[-3000:]}"
    lost = cell.target == "redis" and cell.fault in ("kill", "restart")
    if code == 0:
        assert deployment.rows() == COMPLETE
        assert deployment.cache() == COMPLETE
    else:
        assert deployment.cache() in (PREVIOUS, COMPLETE, {} if lost else COMPLETE)
    second = deployment.start_init(timeout="60s").wait(SECOND_INIT_TIMEOUT)
    assert second.returncode == 0, second.stderr[-3000:]
    assert deployment.applied() == REVISIONS
    assert deployment.rows() == deployment.cache() == COMPLETE
    deployment.assert_clean()
    return seconds


def reach(deployment: Deployment, cell: Cell) -> Command:
    """Start worker and init, and return the init when it is in the phase."""
    if cell.phase == "waiting":
        deployment.start_worker()
        _held_back(deployment, cell).refuse()
        init = deployment.start_init()
        init.wait_for("waiting for a server")
        return init
    if cell.phase == "queued":
        # A worker that is hit holds the message, and has not read it.
        if cell.target.startswith("worker"):
            deployment.start_worker().pause()
        init = deployment.start_init()
        init.wait_for("chain enqueued")
        return init
    deployment.hold(cell.phase)
    deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached(cell.phase)
    return init


def _held_back(deployment: Deployment, cell: Cell) -> Proxy:
    """The line that keeps init waiting: of another server than the one that is hit."""
    lines = deployment.stack.init_lines
    return lines.redis if cell.target.endswith("postgres") else lines.postgres


class _Hit:
    """The fault, from its beginning to its end."""

    def __init__(self, deployment: Deployment, cell: Cell, init: Command) -> None:
        self.deployment, self.cell, self.init = deployment, cell, init

    def strike(self) -> None:
        """Do it; when this returns, the fault has ended and nobody is held any more."""
        target = self.cell.target
        if target in SERVERS:
            self._server(self.deployment.stack.server(target))
        elif "-" in target:
            side, server = target.split("-")
            lines = self.deployment.stack.init_lines if side == "init" else self.deployment.stack.worker_lines
            self._line(getattr(lines, server))
        else:
            {"task": self._task, "worker": self._worker, "init": self._init}[target]()
        self.deployment.release()
        if self.cell.phase == "waiting":
            _held_back(self.deployment, self.cell).heal()
        if self.cell.phase == "queued" and not (self.deployment.worker and self.deployment.worker.running):
            self.deployment.start_worker()

    def _server(self, server: Server) -> None:
        if self.cell.fault == "freeze":
            self._freeze(server.pause, server.resume)
        elif self.cell.fault == "kill":
            server.kill()
            # Init has met it, and the work goes on while the server is away. Of a broker that dies when all is done
            # init need not hear any more.
            if self.cell.phase != "waiting" and (self.cell.target, self.cell.phase) != ("rabbitmq", "result"):
                self.init.wait_for(NOTICED)
            self.deployment.release()
            server.start()
        else:
            server.restart()

    def _line(self, line: Proxy) -> None:
        line.cut()
        if self.cell.target.startswith("worker") and self.cell.phase == "queued":
            # The message has come as far as its socket: it reads it, and finds the line cut.
            worker = self.deployment.worker
            assert worker
            worker.resume()
        self.deployment.release()
        time.sleep(CUT)
        line.strand()

    def _freeze(self, pause: Callable[[], object], resume: Callable[[], object]) -> None:
        pause()
        self.deployment.release()
        time.sleep(FREEZE)
        resume()

    def _task(self) -> None:
        task = self.deployment.task_process()
        family = [*task.children(recursive=True), task]
        if self.cell.fault == "freeze":
            self._freeze(
                lambda: [process.suspend() for process in family], lambda: [process.resume() for process in family]
            )
        else:
            task.send_signal(signal.SIGKILL if self.cell.fault == "kill" else signal.SIGTERM)
            psutil.wait_procs([task], timeout=PHASE_TIMEOUT)

    def _worker(self) -> None:
        worker = self.deployment.worker
        assert worker
        if self.cell.fault == "freeze":
            if self.cell.phase != "queued":
                worker.pause()
            self.deployment.release()
            time.sleep(FREEZE)
            worker.resume()
        elif self.cell.fault == "kill":
            # What it has started lives on: a task in the middle of its step, an Alembic child that holds its lock.
            worker.kill_alone()
            self.deployment.start_worker()
        else:
            # As an orchestrator: SIGTERM, and the work may end. What it held and had not begun is lost.
            worker.send_signal(signal.SIGCONT)
            worker.resume()
            worker.send_signal(signal.SIGTERM)
            self.deployment.release()
            worker.wait(PHASE_TIMEOUT)
            self.deployment.start_worker()

    def _init(self) -> None:
        if self.cell.fault == "freeze":
            self._freeze(self.init.pause, self.init.resume)
        elif self.cell.fault == "kill":
            self.init.kill()
        else:
            self.init.send_signal(signal.SIGTERM)
