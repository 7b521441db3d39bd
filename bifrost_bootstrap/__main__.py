"""`python -m bifrost_bootstrap`, and the installed command. Every way out has a code of the contract."""

import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line. An import error is a bug of the installation (70), not Python's 1."""
    # Until the command line listens itself: as PID 1 a signal that nobody handles would be lost.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: os._exit(128 + received))
    _open_what_is_closed()
    try:
        from bifrost_bootstrap.cli.commands import run
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        sys.stderr.write(f"bifrost-bootstrap cannot start: {type(error).__name__}: {error}\n")
        sys.exit(70)
    sys.exit(run(sys.argv[1:]))


def _open_what_is_closed() -> None:
    """Started with `>&-`: what is written goes nowhere, and not into the file or socket that is opened next."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # The lowest number that is free.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if number == 0 else "w"))


if __name__ == "__main__":
    main()
