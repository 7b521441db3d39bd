"""Checks of the whole run: no password in any output, no process left running, no test skipped in CI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import pytest

from tests.servers.leaks import leaks_below, leaks_in, leaks_in_processes
from tests.servers.process import RunFolder, end_processes

#: The first words of a skip or failure because a server is not installed. The summary counts these.
LACKS_SERVER = "no server:"
#: The report property that names a process with the password in its arguments.
LEAK = "leak"
#: The exit codes of pytest if no test has failed.
GOOD = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def lacks_server(reason: object, *, in_ci: bool) -> NoReturn:
    """Skip a test whose server is not installed. In CI, fail it."""
    text = f"{LACKS_SERVER} {reason}"
    if in_ci:
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


def note_leaks_in_processes(report: pytest.TestReport, run: RunFolder) -> None:
    """Search the processes before the fixtures end them, and note the result in the report of the test."""
    if report.when == "call":
        report.user_properties += [(LEAK, place) for place in leaks_in_processes(run.root.name)]


class RunChecks:
    """A plugin for the process that gets all reports: pytest itself, or the controller of xdist."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.faults: list[str] = []
        self.lacked_server: set[str] = set()
        self._passed = True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._search(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._search(report)
        self.faults += [f"the planted password is in {value}" for name, value in report.user_properties if name == LEAK]
        if not report.passed and LACKS_SERVER in report.longreprtext + str(report.longrepr):
            self.lacked_server.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Runs after the session fixtures and the xdist workers have ended, and before the summary."""
        left = self.run.left_over()
        self.faults += [f"left running: {process.pid} {' '.join(process.cmdline())}" for process in left]
        end_processes(left)
        self.faults += [f"the planted password is in {place}" for place in leaks_below(self.run.output)]
        self._passed = not self.faults and session.exitstatus in GOOD
        if self.faults and session.exitstatus in GOOD:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, exitstatus: int) -> Iterator[None]:
        yield
        if self.faults:
            terminalreporter.section("faults of the whole run", sep="=", red=True)
            for fault in dict.fromkeys(self.faults):  # a phase repeats the captured output of the phases before
                terminalreporter.line(fault, red=True)
        del exitstatus  # pytest_sessionfinish may have changed it
        if not self._passed:
            terminalreporter.line(f"output of all processes: {self.run.output}")
        count = len(self.lacked_server)
        terminalreporter.line(f"{count} tests lacked a server", yellow=count > 0)

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        """Delete the folder of the run; keep the output if the run failed."""
        del config
        self.run.remove(keep_output=not self._passed)

    def _search(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        """Search the captured output and the failure text of a test."""
        texts = [text for _, text in report.sections]
        if any(map(leaks_in, [*texts, report.longreprtext])):
            self.faults.append(f"the planted password is in the report of {report.nodeid}")
