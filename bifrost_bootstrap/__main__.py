"""`python -m bifrost_bootstrap`, and the installed command. It always ends with an exit code of the contract."""

import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line. An import error ends with 70, not with Python's 1."""
    # Until the command line installs its own handlers: PID 1 does not get a signal that has no handler.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: os._exit(128 + received))
    _open_closed_streams()
    try:
        from bifrost_bootstrap.cli.commands import run
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        sys.stderr.write(f"bifrost-bootstrap cannot start: {type(error).__name__}: {error}\n")
        sys.exit(70)
    sys.exit(run(sys.argv[1:]))


def _open_closed_streams() -> None:
    """Open closed standard streams (`>&-`) on /dev/null. Otherwise the next file or socket would get our output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # os.open takes the lowest free number, which is this one.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if number == 0 else "w"))


if __name__ == "__main__":
    main()
