"""I8: log lines as text or JSON, the verdict last, and a termination message for Kubernetes."""

from __future__ import annotations

import json

from tests.setups.stack import Deployment


def test_i08_json_lines_from_both_sides(deployment: Deployment) -> None:
    """With JSON logs, every line of init and worker is an object, also progress. The last line of init is the
    verdict.
    """
    message = deployment.folder / "termination"
    deployment.env = {"BIFROST_LOG_FORMAT": "json", "BIFROST_TERMINATION_LOG": str(message)}
    deployment.hold("warming")
    worker = deployment.start_worker()
    init = deployment.start_init("--json")
    deployment.wait_reached("warming")
    init.wait_for("warm: 51 of 51 modules")
    deployment.release()
    done = init.wait()
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert lines[-1]["message"].startswith("init: ready in")
    assert lines[-1]["message"].endswith("(exit 0)")
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    for line in worker.stderr.read_text().splitlines():
        json.loads(line)
    result = json.loads(done.stdout)
    assert (result["schema"], result["exit_code"], result["ready"]) == (1, 0, True)
    assert json.loads(message.read_text())["exit_code"] == 0


def test_i08_the_verdict_of_a_failure(deployment: Deployment) -> None:
    """A failure is in the last line and in the termination message, with what to do."""
    message = deployment.folder / "termination"
    deployment.env = {"BIFROST_TERMINATION_LOG": str(message)}
    done = deployment.start_init(timeout="4s").wait()
    assert done.returncode == 69
    assert done.stdout == ""
    assert "(exit 69)" in done.stderr.splitlines()[-1]
    told = json.loads(message.read_text())
    assert told["exit_code"] == 69
    assert deployment.queue in json.dumps(told)
    assert message.read_text().count("\n") == 1
