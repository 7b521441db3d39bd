"""Wheel and sdist contain what the program needs, and the installed program works alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import bifrost_bootstrap
from tests.conftest import RunCommand

ROOT = Path(__file__).parents[2]
#: Seconds to build, and to run the main job on servers of its own.
TIMEOUT = 100
NEEDED = {
    "celeryconfig.py",
    "bifrost_bootstrap/py.typed",
    "bifrost_bootstrap/migrate/script/__main__.py",
    "bifrost_bootstrap/migrate/script/program.py",
    "bifrost_bootstrap/migrations/alembic.ini",
    "bifrost_bootstrap/migrations/env.py",
    "bifrost_bootstrap/migrations/versions/0001_workspace_files.py",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, built from a copy of this checkout."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout
    names = [name for name in tracked.decode().split("\0") if name] or ["pyproject.toml", "README.md", "LICENSE"]
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    program = "from setuptools import build_meta as b; b.build_wheel('..'); b.build_sdist('..')"
    subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, check=True, timeout=TIMEOUT)
    return folder


def test_contents(built: Path) -> None:
    """Both contain everything for run time, and the wheel contains nothing else."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert names >= NEEDED
    assert {name.split("/")[0] for name in names} == {
        "bifrost_bootstrap",
        "celeryconfig.py",
        f"bifrost_bootstrap-{bifrost_bootstrap.__version__}.dist-info",
    }
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    assert packed >= NEEDED | {"pyproject.toml", "README.md", "LICENSE"}


@pytest.fixture(scope="module")
def wheels(built: Path) -> dict[str, Path]:
    """The wheel, and the wheel that is built from the sdist."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        sdist.extractall(built / "unpacked", filter="data")
    (source,) = (built / "unpacked").iterdir()
    program = "from setuptools import build_meta as b; b.build_wheel('..')"
    subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, check=True, timeout=TIMEOUT)
    return {"wheel": next(built.glob("*.whl")), "sdist": next((built / "unpacked").glob("*.whl"))}


@pytest.mark.parametrize("kind", ["wheel", pytest.param("sdist", marks=pytest.mark.slow)])
def test_it_works_on_its_own(wheels: dict[str, Path], kind: str, run_command: RunCommand, tmp_path: Path) -> None:
    """After `pip install`, the main job and Celery's commands work in an empty folder with an empty environment."""
    place, empty = tmp_path / "place", tmp_path / "empty"
    empty.mkdir()
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place), str(wheels[kind])]
    done = run_command([sys.executable, *install], env={"PATH": os.defpath, "HOME": str(tmp_path)}, cwd=empty)
    assert done.returncode == 0, done.stderr
    env = {"PATH": os.defpath, "PYTHONPATH": str(place)}
    where = run_command([sys.executable, "-c", "import bifrost_bootstrap as b; print(b.__file__)"], env=env, cwd=empty)
    assert where.stdout.strip() == str(place / "bifrost_bootstrap" / "__init__.py")
    words = [str(place / "bin" / "bifrost-bootstrap"), "init", "--embedded", "--json"]
    done = run_command(words, env=env, cwd=empty, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema_state"]["database_heads"] == ["0002"]
    # As Flower and `celery call` load it: Celery's settings only.
    urls = {"REDIS_URL": "redis://127.0.0.1:1/0", "RABBITMQ_URL": "amqp://127.0.0.1:1//"}
    done = run_command([sys.executable, "-m", "celery", "-A", "bifrost_bootstrap", "report"], env=env | urls, cwd=empty)
    assert done.returncode == 0, done.stderr
    assert "task_default_queue: 'bifrost.bootstrap'" in done.stdout
    assert list(empty.iterdir()) == []
