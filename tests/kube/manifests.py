"""The manifests of deploy/kubernetes: variants as kustomize builds them, or single files."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.compose.stack import CHECKOUT, run

FOLDER = CHECKOUT / "deploy/kubernetes"
VARIANTS = ("base", "standing-worker", "job")
EXAMPLES = FOLDER / "examples"

Manifest = dict[str, Any]


def kubectl() -> str:
    """What is missing to build the variants; empty where nothing is."""
    return "" if shutil.which("kubectl") else "there is no kubectl: kustomize builds nothing here"


@functools.cache
def built(variant: str) -> list[Manifest]:
    """The manifests of a variant as `kubectl apply -k` sends them. Raises AssertionError where kustomize complains."""
    result = run("kubectl", "kustomize", FOLDER / variant)
    assert result.stderr == "", result.stderr
    return list(yaml.safe_load_all(result.stdout))


def read(file: Path) -> list[Manifest]:
    """The manifests of one file."""
    return list(yaml.safe_load_all(file.read_text()))


def as_written() -> list[Manifest]:
    """The manifests of all files, examples included, without what kustomize makes of them."""
    return [one for file in sorted(FOLDER.glob("*/*.yaml")) if file.name != "kustomization.yaml" for one in read(file)]


def all_variants() -> list[Manifest]:
    """Each manifest as built, without repeats, and as written; without kubectl only as written."""
    if kubectl():
        return as_written()
    found: list[Manifest] = []
    for one in [*(one for variant in VARIANTS for one in built(variant)), *as_written()]:
        if one not in found:
            found.append(one)
    return found


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """The manifest of this kind and name, or of this name and the hash that kustomize puts behind a ConfigMap's."""
    (found,) = (
        one
        for one in manifests
        if one["kind"] == kind and re.fullmatch(rf"{name}(-[0-9a-z]{{10}})?", one["metadata"]["name"])
    )
    return found


def pod_of(manifest: Manifest) -> Manifest:
    """The Pod's specification in a Deployment or Job."""
    pod: Manifest = manifest["spec"]["template"]["spec"]
    return pod


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Name and Pod specification of everything that makes Pods."""
    for one in manifests:
        if "template" in one.get("spec", {}):
            yield one["metadata"]["name"], pod_of(one)


def containers(pod: Manifest) -> list[Manifest]:
    """All containers of a Pod, those of its start first."""
    return [*pod.get("initContainers", []), *pod["containers"]]
