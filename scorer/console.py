"""What the commands share at the terminal: logging, and errors without tracebacks."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from scorer.errors import HardnessError


def log_to_stderr() -> None:
    """Sends this project's own log lines (INFO and up) and everybody's warnings to standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for package in ("__main__", "pipeline", "scorer", "trainer"):  # a command run by `python -m` is __main__
        logging.getLogger(package).setLevel(logging.INFO)


def first_line(error: BaseException) -> str:
    """The first line of a library's message, for use inside one of ours."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def run_command(main: Callable[[Sequence[str]], int]) -> None:
    """Runs a command's `main` on the command line and exits with its code.

    A HardnessError becomes its message and its exit code (1 failed, 2 wrong configuration); Ctrl-C becomes 130, and
    a scheduler's SIGTERM 143, after the same tidying up. Any other exception is a bug of ours and keeps its traceback.
    """
    log_to_stderr()
    terminated = threading.Event()

    def terminate(*_: object) -> None:
        terminated.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = main(sys.argv[1:])
    except HardnessError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough (`… | head`); Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on where it stopped", file=sys.stderr)
        code = 143 if terminated.is_set() else 130
    sys.exit(code)
