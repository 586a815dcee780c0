"""`python -m trainer.sweep`: masked LMs over alphas and seeds, from shards that were scored once.

```
                seed 0   inf   0   0.001   0.005      one row: the same initial weights, order and noise
shards ──▶      seed 1   inf   0   0.001   0.005
                seed 2   inf   0   0.001   0.005      each a `trainer.pretrain` in OUTPUT/alpha-A-seed-S
```

The sweep reads the shards and writes only into its own folder. Run again, it skips what is finished and goes on with
the rest; more alphas and seeds may be named then, other flags or shards may not.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from scorer import files
from scorer.console import run_command
from scorer.errors import ConfigurationError, HardnessError
from trainer.sweep_record import RECORD_NAME, by_name, content, new_record
from trainer.sweep_report import report
from trainer.sweep_results import OWN_LOSS, UNIFORM_LOSS, Cell, alpha_text, read_metrics

LOG_NAME = "log.txt"
PAPERS_ALPHAS = (math.inf, 0.0, 0.001, 0.005)
_TAIL_BYTES = 4096
_TAIL_LINES = 15
_LOOK_SECONDS = 0.5


class RunError(HardnessError):
    """A run of the sweep failed; what is finished stays, and the same command goes on from there."""


@dataclass(frozen=True)
class Sweep:
    """What was asked for: a grid of runs, and what all of them have in common."""

    output: Path
    alphas: tuple[float, ...]
    seeds: tuple[int, ...]
    shards: tuple[str, ...]
    """Folders to train on."""
    validation_shards: tuple[str, ...]
    """Folders to evaluate on; empty: held-out blocks of `shards`."""
    passed: tuple[str, ...]
    """Flags that are passed on to `trainer.pretrain` as they are."""
    processes: int
    """Of each run, on this machine."""

    def cells(self) -> list[Cell]:
        """All runs, seed by seed: a sweep that is cut short has whole pairs to compare."""
        return [Cell(alpha, seed) for seed in self.seeds for alpha in self.alphas]

    def flags(self, cell: Cell) -> list[str]:
        """The flags of `trainer.pretrain` for one run."""
        validation = ["--validation_shards", *self.validation_shards] if self.validation_shards else []
        own = ["--alpha", alpha_text(cell.alpha), "--seed", str(cell.seed)]
        output = ["--output_dir", str(self.output / cell.name)]
        return ["--shards", *self.shards, *validation, *own, *output, *self.passed]

    def command(self, cell: Cell) -> list[str]:
        """The arguments of `python` for one run."""
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes), "-m"]
        return ["-m", *(launcher if self.processes > 1 else []), "trainer.pretrain", *self.flags(cell)]

    def configuration(self) -> dict[str, str]:
        """What has to stay the same from run to run: the passed flags, and the content of the shards.

        Raises:
            ConfigurationError: a folder of shards is not complete.
        """
        return {
            **by_name(self.passed),
            "--nproc_per_node": str(self.processes),
            "the content of --shards": content(self.shards),
            "the content of --validation_shards": content(self.validation_shards),
        }


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    flags, passed = _parser().parse_known_args(list(arguments))
    output, console = Path(flags.output_dir), Console()
    if files.local_path(flags.output_dir) is None:
        raise ConfigurationError(
            f"--output_dir {flags.output_dir}: a sweep needs a local folder, for its lock and logs"
        )
    if not flags.report_only:
        if not flags.shards:
            raise ConfigurationError("--shards is missing: folders of hardness shards")
        sweep = Sweep(
            output=output,
            alphas=tuple(dict.fromkeys(flags.alphas)),
            seeds=tuple(dict.fromkeys(flags.seeds)),
            shards=tuple(flags.shards),
            validation_shards=tuple(flags.validation_shards),
            passed=tuple(passed),
            processes=flags.nproc_per_node,
        )
        configuration = sweep.configuration()
        files.make_folder(str(output))
        with _lock(output) as lock:
            if new := new_record(output, sweep.alphas, sweep.seeds, configuration):
                _check_flags(sweep)
                files.replace(str(output / RECORD_NAME), files.to_json(new))
            _run_all(sweep, console, lock)
    report(output, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.sweep",
        description="Pretrains masked LMs over a grid of alphas and seeds from the same shards, one after another, and "
        "compares them. All other flags are passed on to trainer.pretrain: see `python -m trainer.pretrain --help`.",
        allow_abbrev=False,
    )
    # Trainers take their flags with dashes too.
    parser.add_argument("--shards", nargs="+", metavar="DIR", help="folders of hardness shards")
    parser.add_argument(
        *("--validation_shards", "--validation-shards"),
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders to evaluate on (default: the last blocks of each of --shards)",
    )
    parser.add_argument(
        *("--output_dir", "--output-dir"), required=True, metavar="DIR", help="for the runs and what they found"
    )
    parser.add_argument(
        "--alphas",
        nargs="+",
        type=_alpha,
        default=PAPERS_ALPHAS,
        metavar="A",
        help="(default: the paper's, inf 0 0.001 0.005)",
    )
    parser.add_argument("--seeds", nargs="+", type=_seed, default=(0, 1, 2), metavar="S", help="(default: 0 1 2)")
    parser.add_argument(
        *("--nproc_per_node", "--nproc-per-node"),
        type=_processes,
        default=1,
        metavar="N",
        help="processes of each run, one a GPU (default: 1)",
    )
    parser.add_argument(
        *("--report_only", "--report-only"), action="store_true", help="train nothing: report what is finished"
    )
    return parser


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not alpha >= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 (all hardness) to inf (uniform)")
    return alpha + 0.0  # no negative zero


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 0")
    return int(text)


def _processes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return int(text)


def _check_flags(sweep: Sweep) -> None:
    """Lets `trainer.pretrain` parse its flags before the first run, in a process of its own.

    Parsing them imports torch and claims the device: a gigabyte that the runs can use better.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(parse_flags, sweep.flags(sweep.cells()[0]), sweep.processes).result()


def parse_flags(flags: Sequence[str], processes: int = 1) -> None:
    """Parses the flags of one run as it would.

    Of a run of several processes only names and types are checked: what its values mean can only be said among them.

    Raises:
        ConfigurationError: a flag is unknown, or has a value that is refused.
        SystemExit: a flag is unknown, or a value is none of its type.
    """
    # Only here: the sweep itself needs no torch.
    from transformers import HfArgumentParser  # noqa: PLC0415

    from trainer import pretrain  # noqa: PLC0415

    if processes == 1:
        pretrain.parse(flags)
    else:
        HfArgumentParser(pretrain.ARGUMENTS, prog="python -m trainer.pretrain", allow_abbrev=False).parse_args(flags)


@contextmanager
def _lock(output: Path) -> Iterator[int]:
    """Holds the folder against a second sweep.

    Yields:
        A file descriptor for the runs to inherit: a run that outlives a killed sweep goes on holding the folder.

    Raises:
        ConfigurationError: another sweep holds it.
    """
    descriptor = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigurationError(
            f"another sweep is at work in {output}, or a run that outlived one: wait for it, or end it"
        ) from error
    except OSError:
        pass  # a file system without locks
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# The runs -------------------------------------------------------------------------------------------------------------


def _run_all(sweep: Sweep, console: Console, lock: int) -> None:
    cells = sweep.cells()
    for number, cell in enumerate(cells, start=1):
        title = f"[bold]\\[{number}/{len(cells)}][/] {cell}"
        folder = sweep.output / cell.name
        if read_metrics(folder) is not None:
            console.print(f"{title}: done before", highlight=False)
            continue
        console.print(title, highlight=False)
        command = sweep.command(cell)
        console.print(f"python {shlex.join(command)}", style="dim", highlight=False, markup=False, soft_wrap=True)
        began = time.monotonic()
        _train(command, cell, folder, console, lock)
        metrics = read_metrics(folder)
        if metrics is None:
            raise RunError(f"the run {cell} ended without results: see {folder / LOG_NAME}")
        console.print(
            f"      {time.monotonic() - began:.0f} s: loss {metrics[UNIFORM_LOSS]:.4f} on uniform masks, "
            f"{metrics[OWN_LOSS]:.4f} on its own",
            highlight=False,
        )


def _train(command: Sequence[str], cell: Cell, folder: Path, console: Console, lock: int) -> None:
    """Runs one command to its end, its output into the run's log; whatever ends the sweep ends it too."""
    files.make_folder(str(folder))
    # No progress bars in the log, and each line as soon as it is written.
    environment = {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", **os.environ}
    with (folder / LOG_NAME).open("ab") as log:
        log.write(f"$ python {shlex.join(command)}\n".encode())
        log.flush()
        start = log.tell()
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[lock],
        )
        try:
            _watch(process, folder / LOG_NAME, start, console)
        except BaseException as error:
            _end(process, was_told=isinstance(error, KeyboardInterrupt))
            raise
    if process.returncode:
        _fail(process.returncode, cell, folder / LOG_NAME, start, console)


def _watch(process: subprocess.Popen[bytes], log: Path, start: int, console: Console) -> None:
    """Waits for a run, with a line on the console that says how far it is."""
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *(TextColumn("     "), SpinnerColumn(), *columns),
        console=console,
        transient=True,
        refresh_per_second=2,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("starting", total=1.0)
        while True:
            try:
                process.wait(_LOOK_SECONDS)
                return
            except subprocess.TimeoutExpired:
                share, loss = last_logged(_tail(log, start))
                if loss is not None:
                    doing = ", evaluating" if share >= 1 else ""
                    # Never all of it: the clock of a complete task stands still.
                    progress.update(task, completed=min(share, 0.99), description=f"loss {loss}{doing}")


def last_logged(text: str) -> tuple[float, str | None]:
    """What Trainer logged last in `text`: the share of the run that is done, and the training loss (None: nothing)."""
    logged = re.findall(r"'loss': '?([^',}]+)'?.*'progress': '?([\d.]+)", text)
    return (float(logged[-1][1]), logged[-1][0]) if logged else (0.0, None)


def _end(process: subprocess.Popen[bytes], was_told: bool) -> None:
    """Ends a run: more firmly if it takes too long, or at once if somebody presses Ctrl-C again.

    Ctrl-C at a terminal reaches the run as well, which then ends by itself (`was_told`); a scheduler's SIGTERM reaches
    only us.
    """
    for signal_, patience in ((None, 1.0 if was_told else 0.0), (signal.SIGTERM, 60.0), (signal.SIGKILL, None)):
        try:
            if signal_ is not None:
                process.send_signal(signal_)
            process.wait(patience)
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue


def _fail(code: int, cell: Cell, log: Path, start: int, console: Console) -> None:
    lines = _tail(log, start).splitlines()[-_TAIL_LINES:]
    console.print(*lines, sep="\n", style="dim", highlight=False, markup=False, soft_wrap=True)
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    message = f"the run {cell} {ended}: see {log}. What is finished stays; run the same command again to go on"
    raise ConfigurationError(message) if code == ConfigurationError.exit_code else RunError(message)


def _tail(log: Path, start: int) -> str:
    """The last of what was written into a log from byte `start` on."""
    with log.open("rb") as stream:
        stream.seek(max(start, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return stream.read().decode(errors="replace")


if __name__ == "__main__":
    run_command(main)
