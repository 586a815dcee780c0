"""`python -m benchmarks.cluster_faults`: faults of a Flink cluster while a small real job runs there, and their cost.

    undisturbed run ─▶ for each fault: fresh job on Flink ─▶ strike ─▶ rerun ─▶ verify ─▶ the same bytes? ─▶ table

As `benchmarks.fault_campaign`, whose promises hold here too; beyond them, a job that has ended has let go of its slots
and left no process behind, and the cluster itself leaves none when it is taken down.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import psutil

from benchmarks import faults
from benchmarks.fault_campaign import (
    Account,
    Campaign,
    begin_campaign,
    console,
    end_campaign,
    parser,
    prepare,
    run_well,
    small_job,
    strike_all,
)
from benchmarks.faults import MissedError, Scene, last_line
from benchmarks.small_job import Run, command_line, files_in, shards_in, wait_until, workers_among
from pipeline.engines import local_flink
from pipeline.engines.flink_rest import Flink, FlinkJob, NoAnswerError
from pipeline.engines.harness import COMMAND, SILENT_VARIABLE
from pipeline.engines.local_flink import LocalFlink
from pipeline.engines.placement import ENGINE_NAME
from pipeline.engines.services import Service, marked

_SPLIT_BYTES = 19_000
"""Some 20 shards: a job on a cluster takes half a minute to start, and no more shards make it a better test."""
_TASKMANAGERS = 2
_SILENT_SECONDS = 10
_HEARTBEAT_SECONDS = 20
"""After which Flink gives a TaskManager up: `local_flink`'s setting."""
_VANISH_SECONDS = 30.0
"""In which nothing must be left of a job that has ended."""
_WAIT_SECONDS = 15.0
"""That a job without slots is watched, before it gets them."""
_STACK_TRACE = re.compile(r"^\tat [\w.$]+\(.*\)$", re.MULTILINE)
_SETTING = (
    f"It runs on Flink, on a cluster of {_TASKMANAGERS} TaskManagers of one slot (a spare third one where a kind says "
    "so); the bytes it is held to are those of Beam's local runner. After each fault what has died of the cluster is "
    "started again, and after each rerun all slots must be free and no SDK harness and no worker be left. Start-up "
    f"is most of the time of so small a job: a machine starts an interpreter for every stage."
)

_ACCOUNT = Account("benchmarks.cluster_faults", "Faults of a Flink cluster", _SETTING, has_cpu_seconds=False)


@dataclass
class Cluster:
    """The Flink of a campaign; made to measure where a kind of fault asks for it."""

    folder: Path
    taskmanagers: int = 0
    """0 while it is down."""

    def up(self, taskmanagers: int) -> LocalFlink:
        """As many TaskManagers, and all of it alive."""
        if self.taskmanagers not in (0, taskmanagers):
            self.down()
        self.taskmanagers = taskmanagers
        return local_flink.up(self.folder, taskmanagers)

    def down(self) -> None:
        """Ends all of it."""
        local_flink.down(self.folder)
        self.taskmanagers = 0

    def service(self, name: str) -> psutil.Process:
        """The process of 'jobmanager', 'taskmanager-N' or 'job-server'."""
        process = Service(self.folder, name).process()
        if process is None:
            raise MissedError(f"{name} is not there")
        return process

    def running(self, *words: str) -> list[psutil.Process]:
        """Processes of the cluster with all of these words in their command."""
        return [process for process in marked(self.folder) if all(word in str(command_line(process)) for word in words)]

    def harnesses(self) -> list[psutil.Process]:
        """Beam's own, each the child of one that watches it."""
        return self.running("pipeline.engines.harness")

    def watchers(self) -> list[psutil.Process]:
        """Their parents, which TaskManagers start."""
        return self.running(COMMAND)

    def workers(self) -> list[psutil.Process]:
        """What makes shards."""
        return workers_among(marked(self.folder))

    def leftovers(self) -> list[str]:
        """What is there of a job: processes, and slots that are taken."""
        found = [" ".join(command_line(process)[:4]) for process in [*self.watchers(), *self.harnesses()]]
        found += [f"pipeline.worker {process.pid}" for process in self.workers()]
        try:
            slots = self.flink.slots()
        except NoAnswerError as error:
            return [*found, str(error)]
        return [*found, f"{slots.total - slots.free} taken slots"] if slots.free < slots.total else found

    def remains(self) -> list[str]:
        """What is there of a cluster that was taken down, and should not be."""
        processes = [" ".join(command_line(process)) for process in marked(self.folder)]
        return processes + [str(path) for path in self.folder.glob("tmp")]

    @property
    def flink(self) -> Flink:
        """Its JobManager."""
        return Flink(json.loads((self.folder / "cluster.json").read_text())["rest"])


@dataclass
class ClusterScene(Scene):
    """A fault of a job on a cluster."""

    cluster: Cluster = field(kw_only=True)
    taskmanagers: int = _TASKMANAGERS
    job_name: str = ""
    """As Flink calls the job that is to be struck."""

    def start(self) -> Run:
        """Starts the job on a cluster that is whole."""
        flink = self.cluster.up(self.taskmanagers)
        self.job = replace(self.job, more_flags=_flags_of(flink))
        return super().start()

    def workers(self, run: Run) -> list[psutil.Process]:
        """Started by TaskManagers, and not by the driver."""
        return self.cluster.workers()

    def reach(self, run: Run, at_least: int = 1, at_start: bool = False, at_most: int | None = None) -> None:
        """Waits for the random moment to strike: where some shards are there, and not all but a few."""
        super().reach(run, at_least, at_start, at_most or len(self.undisturbed.shards) // 2)
        word = self.output / ENGINE_NAME
        self.job_name = json.loads(word.read_text())["job"] if word.exists() else ""

    def end(self, run: Run, expected: list[int], messages: tuple[str, ...] = ()) -> int | None:  # type: ignore[override]
        """As ever; and what Java has to say is no message for a user."""
        code = super().end(run, expected, messages or [r"error: .*"])
        trace = _STACK_TRACE.search(run.text)
        if trace and code is not None and code > 0:
            self.violations.append(f"{run.log.name}: a stack trace of Java: {trace[0].strip()}")
        return code

    def check(self) -> None:
        """As ever; and nothing is left on the cluster."""
        self.require_nothing_left()
        super().check()

    def require_nothing_left(self) -> None:
        """Of a job that has ended."""
        began = time.monotonic()
        wait_until(lambda: not self.cluster.leftovers(), _VANISH_SECONDS)
        left = self.cluster.leftovers()
        self.require(not left, f"left on the cluster after {_VANISH_SECONDS:.0f} s: {', '.join(left)}")
        seconds = time.monotonic() - began
        if seconds > 1.0:
            self.notes.append(f"the cluster was free of the job after {seconds:.1f} s")

    def flink_job(self) -> FlinkJob | None:
        """The job that was struck, as Flink knows it; None where it has begun none, or forgotten it."""
        return self.cluster.flink.find(self.job_name)

    def pick(self, processes: list[psutil.Process]) -> psutil.Process:
        """A victim."""
        if not processes:
            raise MissedError("nobody was there to be struck")
        return self.random.choice(processes)


def _flags_of(flink: LocalFlink) -> tuple[str, ...]:
    flags = {
        "--runner": "FlinkRunner",
        "--flink_master": flink.rest,
        "--job_endpoint": flink.job_endpoint,
        "--parallelism": str(_TASKMANAGERS),
    }
    return tuple(word for flag in flags.items() for word in flag)


# --- What TaskManagers start


def harness_kill(scene: ClusterScene) -> None:
    """Kill -9 of an SDK harness: Flink begins its splits again, and the job ends well by itself."""
    run = scene.start()
    scene.reach(run)
    scene.strike(run, scene.pick(_parents(scene.cluster.workers(), scene.cluster.harnesses())).kill)
    scene.end(run, [0])


def watcher_kill(scene: ClusterScene) -> None:
    """Kill -9 of the process that watches an SDK harness: the harness ends, and the rest is the same."""
    run = scene.start()
    scene.reach(run)
    harnesses = _parents(scene.cluster.workers(), scene.cluster.harnesses())
    scene.strike(run, scene.pick(_parents(harnesses, scene.cluster.watchers())).kill)
    scene.end(run, [0])


def worker_kill(scene: ClusterScene) -> None:
    """Kill -9 of a worker: its supervisor replaces it, and Flink hears nothing of it."""
    faults.worker_kill(scene)


def harness_stop(scene: ClusterScene) -> None:
    """SIGSTOP of an SDK harness for good: it is killed when it was silent for too long."""
    run = scene.start()
    scene.reach(run)
    victim = scene.pick(_parents(scene.cluster.workers(), scene.cluster.harnesses()))
    scene.strike(run, victim.suspend)
    scene.end(run, [0])
    scene.require(not victim.is_running(), "the stopped harness lives on")


def worker_stop(scene: ClusterScene) -> None:
    """SIGSTOP of a worker for some seconds; the lost seconds contain the pause."""
    faults.stop_worker(scene)


def _parents(children: list[psutil.Process], candidates: list[psutil.Process]) -> list[psutil.Process]:
    """Those of the candidates that have such a child: a job has more harnesses than those that make shards."""
    parents = {child.ppid() for child in children}
    return [process for process in candidates if process.pid in parents]


# --- TaskManagers


def taskmanager_kill(scene: ClusterScene) -> None:
    """Kill -9 of a TaskManager, and no slot to spare: the job waits until there is another one, and ends well."""
    run = scene.start()
    scene.reach(run)
    scene.strike(run, scene.cluster.service(_any_taskmanager(scene)).kill)
    goes_on = not wait_until(lambda: run.is_over, _WAIT_SECONDS)
    scene.notes.append(f"{_WAIT_SECONDS:.0f} s later the job {'waits' if goes_on else 'has ended'}")
    scene.cluster.up(scene.taskmanagers)
    scene.end(run, [0])


def taskmanager_kill_spare(scene: ClusterScene) -> None:
    """Kill -9 of a TaskManager beside a spare one: the job ends well by itself."""
    scene.taskmanagers += 1
    run = scene.start()
    scene.reach(run)
    scene.strike(run, scene.cluster.service(_busy_taskmanager(scene)).kill)
    scene.end(run, [0])


def taskmanager_stop_spare(scene: ClusterScene) -> None:
    """SIGSTOP of a TaskManager for longer than Flink waits: the spare one takes over, and it comes back later."""
    scene.taskmanagers += 1
    run = scene.start()
    scene.reach(run)
    name = _busy_taskmanager(scene)
    scene.strike(run, scene.cluster.service(name).suspend)
    try:
        scene.end(run, [0])
    finally:
        scene.cluster.service(name).resume()
    is_back = wait_until(lambda: scene.cluster.flink.slots().taskmanagers == scene.taskmanagers)
    scene.require(is_back, f"{name} does not come back after its pause")


def taskmanager_pause(scene: ClusterScene) -> None:
    """SIGSTOP of a TaskManager for longer than Flink waits, no slot to spare: the job waits for it to come back."""
    run = scene.start()
    scene.reach(run)
    victim = scene.cluster.service(_any_taskmanager(scene))
    scene.strike(run, victim.suspend)
    time.sleep(_HEARTBEAT_SECONDS + 5)
    victim.resume()
    scene.end(run, [0])


def _any_taskmanager(scene: ClusterScene) -> str:
    return f"taskmanager-{scene.random.randrange(scene.taskmanagers)}"


def _busy_taskmanager(scene: ClusterScene) -> str:
    """One that has a worker."""
    ancestors = {ancestor.pid for worker in scene.cluster.workers() for ancestor in worker.parents()}
    names = [f"taskmanager-{index}" for index in range(scene.taskmanagers)]
    busy = [name for name in names if scene.cluster.service(name).pid in ancestors]
    if not busy:
        raise MissedError("no TaskManager had a worker")
    return scene.random.choice(busy)


# --- JobManager and job server


def jobmanager_kill(scene: ClusterScene) -> None:
    """Kill -9 of the JobManager, which remembers nothing: the job ends, and says what has died."""
    _kill_service(scene, "jobmanager")


def job_server_kill(scene: ClusterScene) -> None:
    """Kill -9 of the job server, the driver's only link: the driver ends the job on Flink, and says what has died."""
    _kill_service(scene, "job-server")
    scene.require_nothing_left()


def _kill_service(scene: ClusterScene, name: str) -> None:
    run = scene.start()
    scene.reach(run)
    scene.strike(run, scene.cluster.service(name).kill)
    _require_told(scene, run)


def _require_told(scene: ClusterScene, run: Run) -> None:
    """The driver ends by itself, with a message of ours."""
    began = time.monotonic()
    scene.end(run, [1], ["error: .*make flink-up.*run the same command again"])
    scene.notes.append(f"the driver ended {time.monotonic() - began:.0f} s later: {last_line(run.text)}")


def machine_loss(scene: ClusterScene) -> None:
    """Kill -9 of cluster and driver, as when a machine loses power."""
    run = scene.start()
    scene.reach(run)

    def blow() -> None:
        for process in marked(scene.cluster.folder):
            process.kill()
        run.kill_group()

    scene.strike(run, blow)
    scene.end(run, [-signal.SIGKILL])
    psutil.wait_procs(marked(scene.cluster.folder))


def flink_down(scene: ClusterScene) -> None:
    """The cluster is taken down under a job: nothing is left of it, and the driver says what is missing."""
    run = scene.start()
    scene.reach(run)
    scene.strike(run, scene.cluster.down)
    scene.violations += [f"left of the cluster: {what}" for what in scene.cluster.remains()]
    _require_told(scene, run)


# --- The driver


def driver_kill(scene: ClusterScene) -> None:
    """Kill -9 of the driver: its job goes on, and a rerun at once ends it there and takes over."""
    run = scene.start()
    scene.reach(run, at_least=0, at_start=True)
    scene.strike(run, run.process.kill)
    scene.end(run, [-signal.SIGKILL])


def driver_kill_late(scene: ClusterScene) -> None:
    """Kill -9 of the driver, and a rerun when its job has ended without it: there is nothing left to do."""
    run = scene.start()
    scene.reach(run)
    scene.strike(run, run.process.kill)
    scene.end(run, [-signal.SIGKILL])
    has_ended = wait_until(lambda: (job := scene.flink_job()) is not None and job.has_ended)
    scene.require(has_ended, "the job of a killed driver does not end")
    scene.ledger.look(scene.output)
    done, planned = len(shards_in(scene.output)), len(scene.undisturbed.shards)
    scene.require(done == planned, f"the job of a killed driver made {done} of {planned} shards")


def sigint(scene: ClusterScene) -> None:
    """Ctrl-C: the job is canceled on Flink, too."""
    faults.sigint(scene)
    _require_canceled(scene)


def sigterm(scene: ClusterScene) -> None:
    """SIGTERM to the driver, as schedulers send it: the same."""
    faults.sigterm(scene)
    _require_canceled(scene)


def _require_canceled(scene: ClusterScene) -> None:
    job = scene.flink_job()
    scene.require(scene.codes[-1] == 0 or (job is not None and job.state == "CANCELED"), f"on Flink there is {job}")
    scene.require_nothing_left()


def two_drivers(scene: ClusterScene) -> None:
    """A second driver of the same folder is refused, and leaves the first one's job alone."""
    run = scene.start()
    scene.reach(run)
    scene.ledger.look(scene.output)
    scene.published = len(scene.ledger)
    first = psutil.Process(run.process.pid)
    first.suspend()  # so that it is there, however long the second one takes to start
    second = scene.job.start(scene.output, scene.folder / "second.log")
    scene.cleanup.callback(second.kill_group)
    scene.end(second, [2], ["another driver is at work"])
    first.resume()
    scene.end(run, [0])


# --- Disks


def disk_full(scene: ClusterScene) -> None:
    """Another file fills the disk: Flink's attempts end soon, and the driver says what is wrong."""
    faults.disk_filled(scene)
    scene.require_nothing_left()


KINDS: dict[str, Callable[[ClusterScene], None]] = {
    kind.__name__: kind
    for kind in (
        *(taskmanager_kill_spare, taskmanager_stop_spare),  # together: they want a cluster of their own
        *(job_server_kill, jobmanager_kill, taskmanager_kill, taskmanager_pause, flink_down, machine_loss),
        *(harness_stop, watcher_kill, harness_kill, worker_kill, worker_stop),
        *(driver_kill, driver_kill_late, sigint, sigterm, two_drivers, disk_full),
    )
}


def main() -> int:
    """Runs the command."""
    flags = _parser().parse_args()
    os.environ[SILENT_VARIABLE] = str(_SILENT_SECONDS)
    folder = begin_campaign(flags)
    cluster = Cluster(folder / "cluster")
    try:
        code = strike_all(_prepare(flags, folder, cluster), flags, _ACCOUNT)
    finally:
        cluster.down()
    left = cluster.remains()
    for what in left:
        console.print(f"[red]left of the cluster:[/] {what}")
    return end_campaign(flags, folder, 1 if left else code)


def _parser() -> argparse.ArgumentParser:
    flags = parser("benchmarks.cluster_faults", __doc__, list(KINDS), faults=24)
    flags.set_defaults(split_bytes=_SPLIT_BYTES, repeats=1, workers=_TASKMANAGERS)
    return flags


def _prepare(flags: argparse.Namespace, folder: Path, cluster: Cluster) -> Campaign:
    """The bytes of the local runner, and the times of Flink."""
    job = small_job(flags, folder)
    run_well(job, folder / "local")
    on_flink = replace(job, more_flags=_flags_of(cluster.up(_TASKMANAGERS)))
    campaign = prepare(folder, on_flink, flags.seed, flags.repeats, files_in(folder / "local"))
    return replace(campaign, kinds=KINDS, setting=partial(ClusterScene, cluster=cluster))


if __name__ == "__main__":
    sys.exit(main())
