"""Processes that outlive the command that starts them: their process ids and logs in one folder, and their end."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "HARDNESS_CLUSTER"
"""An environment variable of every process of a cluster, inherited by whatever it starts: the cluster's folder."""
_STOP_SECONDS = 10.0


class Service:
    """One of a cluster's processes; may be running, or not, or not any more."""

    def __init__(self, folder: Path, name: str):
        """Starts nothing."""
        self._folder = folder
        self.name = name
        self._pid_file = folder / f"{name}.pid"
        self.log = folder / "log" / f"{name}.log"

    def start(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        """Starts it in a session of its own, so that no Ctrl-C and no closed terminal reaches it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment, MARK: str(self._folder)},
            )
        self._pid_file.write_text(
            json.dumps({"pid": process.pid, "started": psutil.Process(process.pid).create_time()})
        )

    def process(self) -> psutil.Process | None:
        """The living process."""
        try:
            word = json.loads(self._pid_file.read_text())
            process = psutil.Process(word["pid"])
            is_it = abs(process.create_time() - word["started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        except (FileNotFoundError, ValueError, KeyError, psutil.NoSuchProcess):
            return None
        return process if is_it else None

    def stop(self) -> None:
        """Ends it, and waits for that."""
        process = self.process()
        if process is not None:
            end([process])
        self._pid_file.unlink(missing_ok=True)

    def last_words(self, lines: int = 15) -> str:
        """The end of its log."""
        with suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""


def marked(folder: Path) -> list[psutil.Process]:
    """All processes of a cluster that live, whoever started them, but this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == str(folder):
                found.append(process)
    return found


def end(processes: Iterable[psutil.Process]) -> None:
    """Asks processes to end, and makes them."""
    living = list(processes)
    for process in living:
        with suppress(psutil.Error):
            process.terminate()
            process.resume()  # one that is stopped hears nothing
    _, living = psutil.wait_procs(living, _STOP_SECONDS)
    for process in living:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(living, _STOP_SECONDS)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Asks again and again until something is so; says whether it became so in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
