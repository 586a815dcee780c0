"""The faults of the campaign: what strikes a running job, and what must be seen of it from the outside.

A kind of fault starts the job, strikes, and holds exit codes and messages to what is promised. What all kinds have in
common (the rerun, `verify`, the bytes, what was made again) is in `Scene.mend` and `Scene.check`.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.small_job import ROOT, Job, Run, files_in, shards_in, wait_until

LEASE_NAME = "_driver.json"
_VANISH_SECONDS = 30.0
"""In which workers must have found out that their driver is gone."""
_START_SHARE = 0.15
"""Of the kills, how many strike while the job starts."""
_MAX_RERUNS = 3
_PAGE_BYTES = 4096
_LARGE_DISK_BYTES = 256 << 20
_UNPRIVILEGED = 65534
_BUG = re.compile(r"^(Traceback \(|Exception ignored|Fatal Python error).*", re.MULTILINE)


class MissedError(Exception):
    """The job ended before the fault could strike."""


class SkippedError(Exception):
    """This machine does not let the fault be made."""


@dataclass(frozen=True)
class Undisturbed:
    """What the job gives and takes when nothing disturbs it."""

    files: Mapping[str, bytes]
    """By their names relative to the output folder."""
    seconds: float
    """Of a run, from its start to its end."""
    start_up_seconds: float
    """Of a run that finds everything done."""
    cpu_seconds: float
    start_up_cpu_seconds: float

    @property
    def shards(self) -> list[str]:
        """Names of the shards."""
        return sorted(name for name in self.files if name.endswith(".parquet"))

    @property
    def pages_bytes(self) -> int:
        """What the files take on a disk."""
        return sum(-(-len(data) // _PAGE_BYTES) * _PAGE_BYTES for data in self.files.values())


class Ledger:
    """Which sound shards were seen published, to tell later whether they were made again."""

    def __init__(self, expected: Mapping[str, bytes]):
        self._expected = expected
        self._seen: dict[str, tuple[int, int]] = {}
        self._struck_off: set[str] = set()

    def look(self, folder: Path) -> None:
        """Takes down what is published and has the bytes that it should have."""
        for path in shards_in(folder):
            with suppress(FileNotFoundError):
                if path.name not in self._struck_off and path.read_bytes() == self._expected.get(path.name):
                    self._seen.setdefault(path.name, _identity(path))

    def strike_off(self, name: str) -> None:
        """A shard that is about to be damaged, or to lose its receipt."""
        self._struck_off.add(name)
        self._seen.pop(name, None)

    def __len__(self) -> int:
        return len(self._seen)

    def remade(self, folder: Path) -> list[str]:
        """Shards that were sound and are not the same files any more, by time of change and inode."""
        return [name for name, identity in self._seen.items() if _identity(folder / name) != identity]


def _identity(path: Path) -> tuple[int, int]:
    if not path.exists():
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_ino


@dataclass
class Scene:
    """One fault: the job's folder, what was done to it, and what came of it."""

    folder: Path
    """Of everything; empty at first."""
    job: Job
    undisturbed: Undisturbed
    random: random.Random
    variant: int = 0
    """Kinds that have variants take them in turn."""
    prefix: Sequence[str] = ()
    """A command that runs the job's command."""
    moment: str = ""
    """When it struck, in words."""
    in_flight: int = 0
    """Shards that were in the making when it struck, at most."""
    published: int = 0
    """Sound shards when it struck."""
    damaged: list[str] = field(default_factory=list)
    """Shards, or shards whose receipts, were damaged on purpose."""
    runs: list[Run] = field(default_factory=list)
    codes: list[int | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    cleanup: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        """Nothing has happened yet."""
        self.output = self.folder / "shards"
        self.ledger = Ledger(self.undisturbed.files)

    # --- What kinds of faults are made of

    def workers(self, run: Run) -> list[psutil.Process]:
        """What makes the shards of a run, and lives."""
        return run.workers()

    def start(self) -> Run:
        """Starts the job; its time counts as the job's."""
        run = self.job.start(self.output, self.folder / f"run-{len(self.runs) + 1}.log", self.prefix)
        self.cleanup.callback(run.kill_group)
        self.runs.append(run)
        return run

    def reach(self, run: Run, at_least: int = 0, at_start: bool = False, at_most: int | None = None) -> None:
        """Waits for the random moment to strike.

        Args:
            run: of the job.
            at_least: shards that must be published by then.
            at_start: it may also be before the job begins its work.
            at_most: shards that are waited for; None: all but one.

        Raises:
            MissedError: the run ended before.
        """
        if at_start and self.random.random() < _START_SHARE:
            seconds = self.random.random() * self.undisturbed.start_up_seconds
            self.moment = f"{seconds:.1f} s after the start"
        else:
            count = self.random.randint(at_least, at_most or len(self.undisturbed.shards) - 1)
            work = self.undisturbed.seconds - self.undisturbed.start_up_seconds
            seconds = self.random.random() * max(0.1, work) / len(self.undisturbed.shards)
            self.moment = f"{seconds:.2f} s after {count} shards" if count else f"{seconds:.2f} s after the lease"
            begun = self.output / LEASE_NAME
            wait_until(lambda: run.is_over or (len(shards_in(self.output)) >= count if count else begun.exists()))
        time.sleep(seconds)
        if run.is_over:
            raise MissedError(f"the run was over {self.moment}")

    def strike(self, run: Run, blow: Callable[[], object]) -> None:
        """Strikes a run, after a look at what must outlast it."""
        self.ledger.look(self.output)
        self.in_flight = min(len(self.workers(run)), len(self.undisturbed.shards) - len(shards_in(self.output)))
        run.measure()
        blow()
        self.published = len(self.ledger)

    def end(self, run: Run, expected: Sequence[int], messages: Sequence[str] = ()) -> int | None:
        """Waits for the end of a run, and holds its exit code and what it wrote to what is expected.

        Args:
            run: of the job.
            expected: exit codes.
            messages: patterns, of which one must be found where the exit code is neither 0 nor that of a signal.
        """
        code = run.wait()
        self.codes.append(code)
        self.require(code is not None, f"{run.log.name}: the run does not end")
        if code is None:
            run.kill_group()
        wanted = " or ".join(map(str, expected))
        self.require(code in expected, f"{run.log.name}: exit code {code}, expected {wanted}")
        bug = _BUG.search(run.text)
        if bug and (code is None or code >= 0):
            self.violations.append(f"{run.log.name}: {bug[0]}")
        elif bug:
            self.notes.append(f"{run.log.name}, which was killed, shows {bug[0]}")
        if code is not None and code > 0 and messages:
            is_told = any(re.search(message, run.text) for message in messages)
            self.require(is_told, f"{run.log.name}: none of {[*messages]} is in it, but: {last_line(run.text)}")
        self.ledger.look(self.output)
        return code

    def require(self, condition: bool, message: str) -> None:
        """Notes a violation where the condition does not hold."""
        if not condition:
            self.violations.append(message)

    # --- What follows every fault

    def mend(self) -> None:
        """Runs the same command until it ends well; the first time should do."""
        for attempt in range(_MAX_RERUNS):
            run = self.start()
            code = self.end(run, [0])
            if code == 0:
                return
            self.notes.append(f"rerun {attempt + 1} ended with {code}: {last_line(run.text)}")

    def check(self) -> None:
        """Holds the folder to what an undisturbed run gives."""
        code, text = inspect(self.job, "verify", self.output)
        self.require(code == 0, f"verify: exit code {code}: {last_line(text)}")
        found = files_in(self.output)
        aside = {name for name in found if re.search(r"\.parquet\.damaged-\w+$", name)}
        for name in sorted(found.keys() - self.undisturbed.files.keys() - aside):
            self.violations.append(f"{name} is left in the folder")
        for name, data in self.undisturbed.files.items():
            self.require(name in found, f"{name} is missing")
            self.require(found.get(name, data) == data, f"{name} differs from that of the undisturbed run")
        for name in sorted(aside):
            self.require(name.split(".damaged-")[0] in self.damaged, f"{name} was set aside, and nothing damaged it")
        for name in self.remade_without_need:
            self.violations.append(f"{name} was made again, and was sound")

    @property
    def remade_without_need(self) -> list[str]:
        """Sound shards that are other files now."""
        return self.ledger.remade(self.output)

    @property
    def seconds_lost(self) -> float:
        """What all runs took, beyond the undisturbed run and a start-up for each further run."""
        further = (len(self.runs) - 1) * self.undisturbed.start_up_seconds
        return sum(run.seconds for run in self.runs) - self.undisturbed.seconds - further

    @property
    def cpu_seconds_lost(self) -> float:
        """The same in CPU time, which hardly depends on what else the machine does."""
        further = (len(self.runs) - 1) * self.undisturbed.start_up_cpu_seconds
        return sum(run.cpu_seconds for run in self.runs) - self.undisturbed.cpu_seconds - further


def last_line(text: str) -> str:
    """The last line that has something in it."""
    return ([line for line in text.splitlines() if line.strip()] or ["(nothing)"])[-1]


def inspect(job: Job, command: str, output: Path) -> tuple[int, str]:
    """Runs `pipeline.verify` or `pipeline.status`: exit code, and all that it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", f"pipeline.{command}", str(output)],
        cwd=ROOT,
        env={**os.environ, **job.environment, "COLUMNS": "1000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


# --- Processes that die


def worker_kill(scene: Scene) -> None:
    """Kill -9 of a worker: the job replaces it, and ends well by itself."""
    run = scene.start()
    scene.reach(run)
    workers = scene.workers(run)
    if not workers:
        raise MissedError("no worker was there to be killed")
    scene.strike(run, scene.random.choice(workers).kill)
    scene.end(run, [0])


def driver_kill(scene: Scene) -> None:
    """Kill -9 of the driver alone: its workers end by themselves, and a rerun at once is not refused."""
    run = scene.start()
    scene.reach(run, at_start=True)
    scene.strike(run, run.process.kill)
    scene.end(run, [-signal.SIGKILL])
    began = time.monotonic()
    is_gone = wait_until(lambda: not run.group(), _VANISH_SECONDS)
    scene.require(is_gone, f"processes of a killed driver live on: {run.group()}")
    scene.notes.append(f"workers gone after {time.monotonic() - began:.1f} s")
    scene.ledger.look(scene.output)
    run.kill_group()


def group_kill(scene: Scene) -> None:
    """Kill -9 of driver and workers, as when a machine loses power."""
    run = scene.start()
    scene.reach(run, at_start=True)
    scene.strike(run, run.kill_group)
    scene.end(run, [-signal.SIGKILL])


def sigterm(scene: Scene) -> None:
    """SIGTERM to the driver, as schedulers send it."""
    run = scene.start()
    scene.reach(run)
    scene.strike(run, run.process.terminate)
    scene.end(run, [128 + signal.SIGTERM, 0], ["run the same command again"])
    scene.require(wait_until(lambda: not run.group(), _VANISH_SECONDS), "processes live on after SIGTERM")


def sigint(scene: Scene) -> None:
    """SIGINT to the driver alone, or to the whole group as Ctrl-C sends it."""
    run = scene.start()
    scene.reach(run)
    to_group = scene.variant % 2 == 1
    scene.moment += ", whole group" if to_group else ", driver alone"
    send = os.killpg if to_group else os.kill
    scene.strike(run, lambda: send(run.process.pid, signal.SIGINT))
    scene.end(run, [128 + signal.SIGINT, 0], ["run the same command again"])
    scene.require(wait_until(lambda: not run.group(), _VANISH_SECONDS), "processes live on after SIGINT")


# --- Processes that pause


def stop_worker(scene: Scene) -> None:
    """SIGSTOP of a worker for some seconds; the lost seconds contain the pause."""
    run = scene.start()
    scene.reach(run)
    workers = scene.workers(run)
    if not workers:
        raise MissedError("no worker was there to be stopped")
    _pause(scene, run, scene.random.choice(workers))


def stop_driver(scene: Scene) -> None:
    """SIGSTOP of the driver for some seconds; the lost seconds contain the pause."""
    run = scene.start()
    scene.reach(run)
    _pause(scene, run, psutil.Process(run.process.pid))


def _pause(scene: Scene, run: Run, process: psutil.Process) -> None:
    seconds = scene.random.uniform(1.0, 5.0)
    scene.moment += f", for {seconds:.1f} s"
    scene.strike(run, process.suspend)
    time.sleep(seconds)
    with suppress(psutil.NoSuchProcess):
        process.resume()
    scene.end(run, [0])


# --- Drivers that meet


def two_drivers(scene: Scene) -> None:
    """A second driver is refused; of two at the very same time, at most one is, also after a kill."""
    is_later, is_after_kill = scene.variant % 3 == 0, scene.variant % 3 == 2
    if is_after_kill:
        killed = scene.start()
        scene.reach(killed)
        scene.strike(killed, killed.kill_group)
        scene.end(killed, [-signal.SIGKILL])
    first = scene.start()
    if is_later:
        scene.reach(first)
    else:
        scene.moment = f"both at once, {scene.moment}".removesuffix(", ")
    scene.ledger.look(scene.output)
    scene.published = len(scene.ledger)
    second = scene.job.start(scene.output, scene.folder / "second.log", scene.prefix)
    scene.cleanup.callback(second.kill_group)
    refused = ["another driver is at work"]
    code = scene.end(second, [0, 2], refused)
    if code == 0 and is_later:
        scene.require(first.is_over, "the second driver worked beside the first one")
        scene.notes.append("the second driver came when the first had ended")
    if scene.end(first, [0] if is_later or code == 2 else [0, 2], refused) == 2:
        scene.runs[-1] = second  # whose time is then the job's


# --- Disks


def disk_full(scene: Scene) -> None:
    """A disk that is too small, or that something else fills: the job says so, and goes on once there is room."""
    if scene.variant % 2:
        disk_filled(scene)
    else:
        _disk_too_small(scene)


def disk_filled(scene: Scene) -> None:
    """A disk that something else fills while the job runs."""
    disk = _mount(scene, _LARGE_DISK_BYTES)
    run = scene.start()
    scene.reach(run)
    scene.moment += ", filled by another file"
    scene.strike(run, lambda: _fill(disk / "filler"))
    _end_for_want_of_space(scene, run, [0, 1, 2])
    (disk / "filler").unlink()
    _remount(disk, _LARGE_DISK_BYTES)


def _disk_too_small(scene: Scene) -> None:
    needed = scene.undisturbed.pages_bytes
    small = _PAGE_BYTES * max(1, int(needed * scene.random.uniform(0.02, 0.95)) // _PAGE_BYTES)
    disk = _mount(scene, small)
    run = scene.start()
    scene.moment = f"{small / 1024:,.0f} KiB of the {needed / 1024:,.0f} KiB that it takes"
    _end_for_want_of_space(scene, run, [1, 2])
    scene.published = len(scene.ledger)
    _remount(disk, _LARGE_DISK_BYTES)


def _end_for_want_of_space(scene: Scene, run: Run, expected: Sequence[int]) -> None:
    code = scene.end(run, expected, [r"error: .*(No space left|free|room)"])
    scene.notes.append(f"exit code {code} after {run.seconds:.0f} s: {last_line(run.text)}")


def _mount(scene: Scene, size: int) -> Path:
    """A small disk, and the shards on it."""
    disk = scene.folder / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        raise SkippedError("mounting a small disk takes root and `mount`")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SkippedError(f"a small disk cannot be mounted: {done.stderr.strip()}")
    scene.cleanup.callback(_unmount, scene, disk)
    scene.output = disk / "shards"
    return disk


def _remount(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def _unmount(scene: Scene, disk: Path) -> None:
    if scene.violations:
        shutil.copytree(disk, scene.folder / "kept")
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _fill(path: Path) -> None:
    try:
        with path.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(1 << 20))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


# --- Permissions


def permission(scene: Scene) -> None:
    """A folder that the job may not write to any more, the job being a user like any other."""
    scene.prefix = _as_somebody()
    scene.output.mkdir()
    if scene.prefix:
        os.chown(scene.output, _UNPRIVILEGED, _UNPRIVILEGED)
    run = scene.start()
    scene.reach(run)
    locked = scene.output / "_receipts" if scene.variant % 2 else scene.output
    scene.moment += f", {locked.name}/"
    scene.strike(run, lambda: locked.chmod(0o555))
    code = scene.end(run, [0, 1], [r"error: .*[Pp]ermission"])
    scene.notes.append(f"exit code {code}: {last_line(run.text)}")
    locked.chmod(0o755)


def _as_somebody() -> list[str]:
    """Makes root somebody who may read everything (the interpreter may lie in root's home) and write nothing."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise SkippedError("root needs `setpriv` to become somebody else")
    user = ["--reuid", str(_UNPRIVILEGED), "--regid", str(_UNPRIVILEGED), "--clear-groups"]
    return [setpriv, *user, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--"]


# --- Shards and receipts that are damaged

Damage = Callable[[Scene, str], None]
"""Hurts a shard of that name, or what belongs to it."""


def _cut(scene: Scene, name: str) -> None:
    path = scene.output / name
    os.truncate(path, scene.random.randrange(path.stat().st_size))


def _flip(scene: Scene, name: str) -> None:
    with (scene.output / name).open("r+b") as stream:
        position = scene.random.randrange(len(stream.read()))
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 1 << scene.random.randrange(8)]))
    scene.moment += f", byte {position}"


def _delete(scene: Scene, name: str) -> None:
    (scene.output / name).unlink()


def _delete_receipt(scene: Scene, name: str) -> None:
    _receipt(scene.output, name).unlink()


def _receipt(output: Path, name: str) -> Path:
    return output / "_receipts" / f"{int(name.split('-')[1]):05d}.json"


def _hurt(scene: Scene, damage: Damage) -> str:
    """Damages one sound published shard."""
    names = [path.name for path in shards_in(scene.output) if path.read_bytes() == scene.undisturbed.files[path.name]]
    if not names:
        raise MissedError("no shard was there to be damaged")
    name = scene.random.choice(names)
    scene.ledger.look(scene.output)
    scene.ledger.strike_off(name)
    scene.damaged.append(name)
    damage(scene, name)
    scene.ledger.look(scene.output)
    scene.published = len(scene.ledger)
    return name


def _between_runs(scene: Scene, damage: Damage) -> None:
    """Kill -9 of everything, then the damage."""
    run = scene.start()
    scene.reach(run, at_least=1)
    scene.moment += ", after a kill"
    scene.strike(run, run.kill_group)
    scene.end(run, [-signal.SIGKILL])
    _hurt(scene, damage)


def _while_running(scene: Scene, damage: Damage) -> None:
    """The damage while the job goes on: it, or `verify`, finds out."""
    run = scene.start()
    scene.reach(run, at_least=1)
    scene.moment += ", while running"
    scene.strike(run, lambda: _hurt(scene, damage))
    code = scene.end(run, [0, 1], ["error: "])
    if code == 0:
        _require_verify_finds(scene, scene.damaged[0])
    scene.notes.append("found by verify" if code == 0 else f"found by the job: {last_line(run.text)}")


def _after_manifest(scene: Scene, damage: Damage) -> None:
    """The damage to a finished folder: `verify` finds it."""
    run = scene.start()
    scene.end(run, [0])
    name = _hurt(scene, damage)
    scene.moment = "after the manifest" + scene.moment
    _require_verify_finds(scene, name)


def _require_verify_finds(scene: Scene, name: str) -> None:
    code, text = inspect(scene.job, "verify", scene.output)
    scene.require(code == 1, f"verify: exit code {code} with {name} or its receipt damaged")
    is_named = name in text or _receipt(scene.output, name).name in text
    scene.require(is_named, f"verify does not name {name}: {last_line(text)}")
    scene.require("Traceback" not in text, f"verify: {last_line(text)}")


def _damaging(damage: Damage, *occasions: Callable[[Scene, Damage], None]) -> Callable[[Scene], None]:
    return lambda scene: occasions[scene.variant % len(occasions)](scene, damage)


KINDS: dict[str, Callable[[Scene], None]] = {
    "worker_kill": worker_kill,
    "driver_kill": driver_kill,
    "group_kill": group_kill,
    "disk_full": disk_full,
    "permission": permission,
    "truncate": _damaging(_cut, _between_runs, _after_manifest, _while_running),
    "bit_flip_before_manifest": _damaging(_flip, _between_runs, _while_running),
    "bit_flip_after_manifest": _damaging(_flip, _after_manifest),
    "delete": _damaging(_delete, _between_runs, _after_manifest, _while_running),
    "delete_receipt": _damaging(_delete_receipt, _between_runs, _after_manifest, _while_running),
    "stop_worker": stop_worker,
    "stop_driver": stop_driver,
    "two_drivers": two_drivers,
    "sigterm": sigterm,
    "sigint": sigint,
}
"""Each with the function that makes it happen."""
