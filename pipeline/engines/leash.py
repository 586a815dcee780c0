"""Processes that end with whoever started them, however that ends.

Linux could send a signal when a parent dies, but it does so when the parent's *thread* ends that started the child, and
engines start our processes from threads that come and go. So a small parent looks once a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from pipeline.engines.installation import require_java

JAVA_COMMAND = "hardness-java"
LOOK_SECONDS = 1.0
_STOP_SECONDS = 2.0
"""Less than Beam gives a job server, before it kills the process that holds the leash."""


def hold(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (),
    watch: Callable[[subprocess.Popen[bytes]], int | None] | None = None,
) -> int:
    """Runs a command until it ends, and not longer than the process that started this one.

    Args:
        command: of the child.
        environment: of the child (default: that of this process).
        descriptors: that the child inherits; they are closed here.
        watch: called again and again, a second or less each time; ends the child by an exit code.

    Returns:
        The exit code: the child's, 1 where its end was not its own choice, 143 after SIGTERM or SIGINT.
    """
    owner = os.getppid()
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)  # Ctrl-C, or Beam, which stops its job servers so
    child = subprocess.Popen(command, env=environment, pass_fds=descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        while os.getppid() == owner:
            code = (watch or _look)(child)
            if code is not None:
                return code
        return 1
    finally:
        child.terminate()
        try:
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()


def java_main() -> None:
    """`hardness-java`: Java on a leash, for job servers that a driver starts."""
    sys.exit(hold([require_java(), *sys.argv[1:]]))


def _look(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _leave(_: int, __: FrameType | None) -> None:
    for further in (signal.SIGTERM, signal.SIGINT):  # Beam sends five, and they must not keep the child from its end
        signal.signal(further, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)
