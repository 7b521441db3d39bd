"""
Starts the runner. The tree's interpreter runs this file by its path, with the number of the request's pipe.

It loads its folder as a package with a private name. So the folder is not on the import path, and `import events` in
env.py finds the tree's own module.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parent
PRIVATE_NAME = "_bifrost_runner"


def load_program() -> Any:
    """The module `program` of this folder."""
    # Python puts the folder of the file that it runs first on the path.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != FOLDER.resolve()]
    package = ModuleType(PRIVATE_NAME)
    package.__path__ = [str(FOLDER)]
    sys.modules[PRIVATE_NAME] = package
    return importlib.import_module(f"{PRIVATE_NAME}.program")


if __name__ == "__main__":
    load_program().main()
