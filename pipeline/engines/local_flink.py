"""A Flink cluster of this machine's own: a JobManager, some TaskManagers and a job server, as separate processes.

FOLDER/cluster.json      addresses, and how many TaskManagers
FOLDER/*.pid, log/       of each process
FOLDER/tmp/              theirs; goes with them
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.engines.flink_rest import Flink, NoAnswerError
from pipeline.engines.installation import console, engines_folder, flink_home, job_server, require_java
from pipeline.engines.services import Service, end, marked, wait_until
from scorer.errors import ConfigurationError, WorkerError

_START_SECONDS = 180.0
_PAGE_PORT = 8081
"""Flink's own; another one where it is taken."""
_SETTINGS = {
    # Beam's --number_of_execution_retries alone did not save a job. What fails by itself fails again and again, and
    # then soon ends the job; machines that are lost now and then never do.
    "restart-strategy.type": "failure-rate",
    "restart-strategy.failure-rate.max-failures-per-interval": "5",
    "restart-strategy.failure-rate.failure-rate-interval": "10min",
    # Until Flink has noticed that a TaskManager is lost, it gives it work, which counts as another failure.
    "restart-strategy.failure-rate.delay": "10s",
    "heartbeat.interval": "2000",
    "heartbeat.timeout": "20000",
    "cluster.registration.error-delay": "1000",
    "taskmanager.memory.network.min": "128mb",  # for exchanges that wait for the whole of their input
    "taskmanager.memory.network.max": "128mb",
    "rest.bind-address": "localhost",
    "jobmanager.bind-host": "localhost",
    "taskmanager.bind-host": "localhost",
    "taskmanager.host": "localhost",
}


@dataclass(frozen=True)
class LocalFlink:
    """Where a cluster listens."""

    rest: str
    """host:port of the JobManager's page and REST interface."""
    rpc_port: int
    """Of the JobManager, for TaskManagers."""
    job_endpoint: str
    """host:port of the job server."""
    taskmanagers: int
    slots: int
    """Of each TaskManager."""


def cluster_folder() -> Path:
    """Of the one that `make flink-up` starts."""
    return engines_folder() / "flink-cluster"


def find(folder: Path) -> LocalFlink | None:
    """The cluster of a folder, if there is one and its JobManager answers."""
    with suppress(FileNotFoundError, NoAnswerError):
        cluster = _read(folder)
        Flink(cluster.rest).slots()
        return cluster
    return None


def up(folder: Path, taskmanagers: int = 2, slots: int = 1) -> LocalFlink:
    """Starts a cluster, or whatever of it is not running.

    Args:
        folder: for its processes' ids, logs and temporary files.
        taskmanagers: one a GPU, on a farm.
        slots: of each, and so of SDK harnesses.

    Raises:
        ConfigurationError: Java or an engine is missing, or the cluster runs with other numbers.
        WorkerError: something does not start; the message ends with its last words.
    """
    java, home, jar = require_java(), flink_home(), job_server("flink")
    cluster = _adopt(folder, taskmanagers, slots)
    environment = _environment(folder, java, cluster)
    settings = _settings(folder, cluster)
    jobmanager, *workers, server = services = _services(folder, taskmanagers)
    with console.status("Flink: starting"):
        _start(jobmanager, [home / "bin" / "jobmanager.sh", "start-foreground", *settings], environment)
        for worker in workers:
            _start(worker, [home / "bin" / "taskmanager.sh", "start-foreground", *settings], environment)
        _await(services[:-1], lambda: Flink(cluster.rest).slots().taskmanagers >= taskmanagers)
        # Last, so that a job server that survived its JobManager is not mistaken for one that is of use.
        _start(server, _server_command(folder, java, jar, cluster), environment)
        _await([server], lambda: _listens(cluster.job_endpoint))
    return cluster


def down(folder: Path) -> int:
    """Ends every process of a cluster, and whatever they started; says how many there were."""
    processes = marked(folder)
    end(processes)
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    for path in [*folder.glob("*.pid"), folder / "cluster.json"]:
        path.unlink(missing_ok=True)
    return len(processes)


def _services(folder: Path, taskmanagers: int) -> list[Service]:
    names = ["jobmanager", *(f"taskmanager-{index}" for index in range(taskmanagers)), "job-server"]
    return [Service(folder, name) for name in names]


def _start(service: Service, command: list[str | Path], environment: dict[str, str]) -> None:
    if service.process() is None:
        service.start(command, environment)


def _await(services: list[Service], is_ready: Callable[[], bool]) -> None:
    """Waits until a cluster is ready, or one of its processes has ended."""

    def is_decided() -> bool:
        if any(service.process() is None for service in services):
            return True
        with suppress(NoAnswerError):
            return is_ready()
        return False

    in_time = wait_until(is_decided, _START_SECONDS)
    ended = [service for service in services if service.process() is None]
    if ended or not in_time:
        worst = (ended or services)[0]
        raise WorkerError(
            f"{worst.name} {'has ended' if ended else f'is not ready after {_START_SECONDS:.0f} s'}; "
            f"{worst.log} ends with:\n{worst.last_words()}"
        )


def _read(folder: Path) -> LocalFlink:
    return LocalFlink(**json.loads((folder / "cluster.json").read_text()))


def _adopt(folder: Path, taskmanagers: int, slots: int) -> LocalFlink:
    """The addresses of the cluster that was started here, or new ones."""
    if marked(folder):
        cluster = _read(folder)
        if (cluster.taskmanagers, cluster.slots) != (taskmanagers, slots):
            raise ConfigurationError(
                f"the cluster of {folder} has {cluster.taskmanagers} TaskManagers of {cluster.slots} slot(s): "
                "`make flink-down` first"
            )
        return cluster
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    with _free_port(_PAGE_PORT) as page, _free_port() as rpc, _free_port() as job:
        ports = [reserved.getsockname()[1] for reserved in (page, rpc, job)]
    cluster = LocalFlink(f"localhost:{ports[0]}", ports[1], f"localhost:{ports[2]}", taskmanagers, slots)
    (folder / "cluster.json").write_text(json.dumps(asdict(cluster)))
    return cluster


def _free_port(wanted: int = 0) -> socket.socket:
    for port in (wanted, 0):
        with suppress(OSError):
            return socket.create_server(("localhost", port))
    raise WorkerError("there is no free port on this machine")


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def _environment(folder: Path, java: str, cluster: LocalFlink) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) // (cluster.taskmanagers * cluster.slots)
    return {
        "JAVA_HOME": str(Path(os.path.realpath(java)).parent.parent),
        "JVM_ARGS": f"-Djava.io.tmpdir={folder / 'tmp'}",
        "FLINK_LOG_DIR": str(folder / "tmp"),
        "FLINK_PID_DIR": str(folder / "tmp"),
        # Of the harnesses that TaskManagers start: all of them share this one machine.
        **dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(max(1, cores))),
    }


def _settings(folder: Path, cluster: LocalFlink) -> list[str]:
    host, _, port = cluster.rest.rpartition(":")
    settings = _SETTINGS | {
        "rest.address": host,
        "rest.port": port,
        "rest.bind-port": port,
        "jobmanager.rpc.address": "localhost",
        "jobmanager.rpc.port": str(cluster.rpc_port),
        "taskmanager.numberOfTaskSlots": str(cluster.slots),
        "io.tmp.dirs": str(folder / "tmp"),
    }
    return [part for name, value in settings.items() for part in ("-D", f"{name}={value}")]


def _server_command(folder: Path, java: str, jar: Path, cluster: LocalFlink) -> list[str | Path]:
    flags = {
        "--flink-master": cluster.rest,
        "--job-host": "localhost",
        "--job-port": cluster.job_endpoint.rpartition(":")[2],
        "--artifact-port": "0",
        "--expansion-port": "0",
        "--artifacts-dir": str(folder / "tmp" / "artifacts"),
    }
    return [java, f"-Djava.io.tmpdir={folder / 'tmp'}", "-jar", jar, *(part for flag in flags.items() for part in flag)]
