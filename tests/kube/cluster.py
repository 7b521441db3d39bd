"""The `kubectl` commands of the documents without a cluster: kubectl itself where it needs none, else podman."""

from __future__ import annotations

import base64
import os
from dataclasses import replace
from pathlib import Path

import yaml

from tests.compose.stack import run
from tests.docs.documents import Block
from tests.kube.manifests import FOLDER, built
from tests.kube.playing import Playing, Pods

#: Notes what it is called with, each word ended by a zero byte, each command by one more.
NOTES = """#!/bin/sh
printf '%s\\0' "$@" '' >>"$CALLS"
"""


class Cluster:
    """
    Does what the commands of a document say, after the shell has read all of them.

    playing: of what has been applied, one Pod of each Deployment.
    """

    def __init__(self, play: Pods, folder: Path, tree: Path) -> None:
        self.play, self.folder, self.tree = play, folder, tree
        self.playing: dict[str, Playing] = {}

    def paste(self, block: Block) -> list[str]:
        """What each of the commands has written."""
        program, notes = self.folder / "programs" / "kubectl", self.folder / "calls"
        program.parent.mkdir(exist_ok=True)
        program.write_text(NOTES)
        program.chmod(0o700)
        notes.unlink(missing_ok=True)
        variables = {"PATH": f"{program.parent}:{os.environ['PATH']}", "CALLS": str(notes)}
        run("sh", "-euc", block.text, variables=variables, folder=self.folder)
        return [self._do(call.split("\0")) for call in notes.read_text().removesuffix("\0\0").split("\0\0")]

    def _do(self, words: list[str]) -> str:
        match words:
            case ["create", "secret", "generic", "bifrost-bootstrap-secrets", *_]:
                made = run("kubectl", *words, "--dry-run=client", "--output=yaml", folder=self.folder).stdout
                data = yaml.safe_load(made)["data"]
                values = {key: base64.b64decode(value).decode() for key, value in data.items()}
                self.play.place = replace(self.play.place, made=values)
                return made
            case ["apply", "-k", folder]:
                variant = str((self.folder / folder).resolve().relative_to(FOLDER))
                for one in built(variant):
                    if one["kind"] == "Deployment":
                        name = one["metadata"]["name"]
                        self.playing[name] = self.play.pod(variant, name, tree=self.tree).play()
                return ""
            case ["rollout", "status", deployment]:
                self._of(deployment).ends_well()
                return ""
            case ["logs", deployment, "-c", container] | ["logs", deployment, "-c", container, "--previous"]:
                return self._of(deployment).pod.output(container)
            case ["describe", "pod", "-l", label]:
                return run("podman", "pod", "ps", "--filter", f"label={label}", "--format", "{{.Name}}").stdout
        raise AssertionError(f"a kubectl command that nobody runs here: {words}")

    def _of(self, deployment: str) -> Playing:
        return self.playing[deployment.removeprefix("deploy/")]
