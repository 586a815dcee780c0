"""`python -m benchmarks.fault_campaign`: faults at random moments of a small real job, and what each of them costs.

    undisturbed run ─▶ for each fault: fresh job ─▶ strike ─▶ rerun ─▶ verify ─▶ the same bytes? ─▶ table

What a fault may cost is the shards in flight and those that it damaged. Exit code 0: every promise held. Exit code 1:
one did not; the folders of those faults are kept, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.faults import KINDS, MissedError, Scene, SkippedError, Undisturbed
from benchmarks.small_job import ROOT, SPLIT_BYTES, Job, Run, files_in, write_alm, write_corpus

_ATTEMPTS = 6
"""At a fault whose moment comes after the end of the job."""
_VERSIONED = ("apache-beam", "numpy", "pyarrow", "tokenizers", "torch", "transformers")
_DEFINITIONS = """\
- **sound before**: shards that were published and whole when the fault struck, and that it did not damage.
- **made again without need**: of these, how many were other files (inode or time of change) in the end. Must be 0.
- **damaged**: shards that were damaged on purpose, or lost their receipt, and so had to be made again.
- **in flight**: shards in the making when the fault struck, at most (living workers).
- **seconds lost**: all runs of the job, from start to end or death, less the undisturbed run, less one start-up (a run
  that finds everything done) for each further run. It contains the work on shards in flight, starting new workers,
  waiting before a second attempt, and the pause of a stopped process.
- **CPU seconds lost**: the same in CPU time of all processes, which hardly depends on what else the machine does."""

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Outcome:
    """What came of one fault."""

    kind: str
    moment: str
    exit_codes: list[int | None]
    """Of the runs of the job in turn, reruns too."""
    published: int
    damaged: int
    in_flight: int
    remade_without_need: list[str]
    seconds_lost: float
    cpu_seconds_lost: float
    notes: list[str]
    violations: list[str]
    skipped: str | None = None


@dataclass
class Campaign:
    """A job, what it gives undisturbed, and the faults so far."""

    folder: Path
    job: Job
    undisturbed: Undisturbed
    seed: int
    kinds: Mapping[str, Callable[..., None]] = field(default_factory=lambda: KINDS)
    """Each with the function that makes it happen."""
    setting: Callable[..., Scene] = Scene
    """Makes scenes: what stands around the job."""
    outcomes: list[Outcome] = field(default_factory=list)

    def strike(self, kind: str, variant: int) -> Outcome:
        """Makes one fault happen; another moment is drawn where the job was over before."""
        for attempt in range(_ATTEMPTS):
            scene = self._scene(kind, variant, attempt)
            try:
                with scene.cleanup:
                    self.kinds[kind](scene)
                    scene.mend()
                    scene.check()
                    outcome = _outcome(kind, scene)
            except MissedError:
                shutil.rmtree(scene.folder)
                continue
            except SkippedError as reason:
                outcome = Outcome(kind, "", [], 0, 0, 0, [], 0.0, 0.0, [], [], skipped=str(reason))
            if not outcome.violations:
                shutil.rmtree(scene.folder)
            break
        else:
            message = f"the job was over before the fault could strike, {_ATTEMPTS} times"
            outcome = Outcome(kind, "", [], 0, 0, 0, [], 0.0, 0.0, [], [message])
        self.outcomes.append(outcome)
        return outcome

    def _scene(self, kind: str, variant: int, attempt: int) -> Scene:
        folder = self.folder / f"{kind}-{variant}-{attempt}"
        scratch = folder / "tmp"
        scratch.mkdir(parents=True)
        scratch.chmod(0o1777)
        return self.setting(
            folder=folder,
            job=replace(self.job, environment={"TMPDIR": str(scratch)}),
            undisturbed=self.undisturbed,
            random=random.Random(f"{self.seed} {kind} {variant} {attempt}"),
            variant=variant,
        )


def _outcome(kind: str, scene: Scene) -> Outcome:
    def legible(lines: Sequence[str]) -> list[str]:
        return [line.replace(str(scene.folder), "…") for line in lines]

    return Outcome(
        kind=kind,
        moment=scene.moment,
        exit_codes=scene.codes,
        published=scene.published,
        damaged=len(scene.damaged),
        in_flight=scene.in_flight,
        remade_without_need=scene.remade_without_need,
        seconds_lost=round(scene.seconds_lost, 2),
        cpu_seconds_lost=round(scene.cpu_seconds_lost, 2),
        notes=legible(scene.notes),
        violations=legible(scene.violations),
    )


def prepare(folder: Path, job: Job, seed: int = 0, repeats: int = 1, files: dict[str, bytes] | None = None) -> Campaign:
    """Runs a job undisturbed and then once more, several times over, and takes the medians of their times.

    Args:
        folder: of the campaign.
        job: to be disturbed later.
        seed: of the moments, victims and places.
        repeats: how many times over.
        files: what the job must give, if that is known already.

    Raises:
        RuntimeError: the undisturbed job fails, or does not give the same bytes each time.
    """
    runs: list[tuple[Run, Run]] = []
    for number in range(repeats):
        output = folder / f"undisturbed-{number}"
        runs.append((run_well(job, output), run_well(job, output)))
        found = files_in(output)
        if files not in (None, found):
            raise RuntimeError(f"undisturbed runs gave other bytes: see {output}")
        files = found
    assert files is not None
    undisturbed = Undisturbed(
        files,
        seconds=statistics.median(run.seconds for run, _ in runs),
        start_up_seconds=statistics.median(again.seconds for _, again in runs),
        cpu_seconds=statistics.median(run.cpu_seconds for run, _ in runs),
        start_up_cpu_seconds=statistics.median(again.cpu_seconds for _, again in runs),
    )
    return Campaign(folder, job, undisturbed, seed)


def run_well(job: Job, output: Path) -> Run:
    """Runs a job to its end.

    Raises:
        RuntimeError: it fails.
    """
    run = job.start(output, output.with_suffix(".log"))
    if run.wait() != 0:
        run.kill_group()
        raise RuntimeError(f"the undisturbed job failed with {run.code}: see {run.log}")
    return run


def main() -> int:
    """Runs the command."""
    flags = parser("benchmarks.fault_campaign", __doc__, list(KINDS), faults=60).parse_args()
    folder = begin_campaign(flags)
    campaign = prepare(folder, small_job(flags, folder), flags.seed, flags.repeats)
    code = strike_all(campaign, flags, Account("benchmarks.fault_campaign", "Faults at random moments"))
    return end_campaign(flags, folder, code)


def begin_campaign(flags: argparse.Namespace) -> Path:
    """Makes this process fit for a campaign, and its folder."""
    # A shell's background jobs ignore SIGINT and so would the jobs here; a handler of ours is not inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(flags.folder or tempfile.mkdtemp(prefix="fault-campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # for jobs that run as somebody else
    console.print(f"folders in {folder}")
    return folder


def strike_all(campaign: Campaign, flags: argparse.Namespace, account: Account) -> int:
    """Makes all faults happen, and writes down what came of them; gives the exit code."""
    began = time.monotonic()
    shards, calm = len(campaign.undisturbed.shards), campaign.undisturbed
    console.print(f"undisturbed: {shards} shards in {calm.seconds:.1f} s, {calm.start_up_seconds:.1f} s a start-up")
    for number in range(flags.faults):
        kind = flags.kinds[number % len(flags.kinds)]
        outcome = campaign.strike(kind, number // len(flags.kinds))
        _show(f"[{number + 1}/{flags.faults}]", outcome)
        report = _report(campaign, flags, account, time.monotonic() - began)
        for path in map(Path, flags.output):  # after each fault: a campaign may be cut short
            path.write_text(_markdown(report, account) if path.suffix == ".md" else json.dumps(report, indent=2) + "\n")
    console.print(_table(campaign.outcomes))
    failed = [outcome for outcome in campaign.outcomes if outcome.violations]
    if failed:
        console.print(f"[red]{len(failed)} faults broke a promise[/]: what they left is in {campaign.folder}")
    return 1 if failed else 0


def end_campaign(flags: argparse.Namespace, folder: Path, code: int) -> int:
    """Removes the folder of a campaign, unless somebody wants to look at it; passes the exit code on."""
    if code == 0 and not flags.folder:
        shutil.rmtree(folder)
    return code


def parser(module: str, description: str, kinds: Sequence[str], faults: int) -> argparse.ArgumentParser:
    """Flags of a campaign."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description.partition("\n\n")[0])
    parser.add_argument("--faults", type=int, default=faults, help="in all, the kinds taken in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, victims and places")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, metavar="KIND")
    parser.add_argument("--output", nargs="+", default=[], metavar="FILE", help="results, as .md or .json")
    parser.add_argument("--folder", help="for the jobs (default: a temporary one, kept only if something is wrong)")
    parser.add_argument("--corpus", type=Path, help="text (default: some is made up)")
    parser.add_argument("--alm", type=Path, help="with its tokenizer (default: random weights)")
    parser.add_argument("--split_bytes", type=int, default=SPLIT_BYTES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="undisturbed runs")
    return parser


def small_job(flags: argparse.Namespace, folder: Path) -> Job:
    """The job of the flags, and its corpus and ALM where they name none."""
    corpus = flags.corpus or write_corpus(folder / "corpus")
    alm = flags.alm or write_alm(folder / "alm", corpus)
    environment = {"TMPDIR": str(folder)}
    return Job(corpus.resolve(), alm.resolve(), flags.split_bytes, flags.workers, environment=environment)


# --- Results


@dataclass(frozen=True)
class Account:
    """How a campaign gives account of itself."""

    module: str
    """What `python -m` runs."""
    title: str
    setting: str = ""
    """What the job runs on, in sentences."""
    has_cpu_seconds: bool = True
    """Whether all processes of the job are seen, and so their CPU time."""

    @property
    def columns(self) -> list[str]:
        """Of the table."""
        return [name for name in _COLUMNS if self.has_cpu_seconds or not name.startswith("CPU")]

    @property
    def definitions(self) -> str:
        """What the columns mean."""
        lines = _DEFINITIONS.split("\n- ")
        return "\n- ".join(line for line in lines if self.has_cpu_seconds or not line.startswith("**CPU"))


def _show(number: str, outcome: Outcome) -> None:
    if outcome.skipped:
        console.print(escape(f"{number} {outcome.kind}: skipped: {outcome.skipped}"))
        return
    console.print(
        escape(
            f"{number} {outcome.kind} {outcome.moment}: exit codes {_codes([outcome])}, {outcome.published} sound, "
            f"{len(outcome.remade_without_need)} made again without need, {outcome.seconds_lost:.1f} s lost, "
            f"{outcome.cpu_seconds_lost:.1f} s of CPU time"
        )
    )
    for note in outcome.notes:
        console.print(escape(f"      {note}"), style="dim")
    for violation in outcome.violations:
        console.print(escape(f"      {violation}"), style="red")


def _codes(outcomes: Sequence[Outcome]) -> str:
    """Exit codes of the runs, the different ones only."""
    seen = dict.fromkeys(" → ".join(map(str, outcome.exit_codes)) for outcome in outcomes)
    return ", ".join(seen)


_COLUMNS = (
    *("kind", "faults", "exit codes", "sound before", "made again without need", "damaged", "in flight"),
    *("seconds lost, median", "most", "CPU seconds lost, median", "broken promises"),
)


def _rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """One row a kind, and their sum."""
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    groups = [(kind, [outcome for outcome in outcomes if outcome.kind == kind]) for kind in kinds]
    return [_row(kind, group) for kind, group in groups] + [_row("all", outcomes, is_sum=True)]


def _row(name: str, outcomes: Sequence[Outcome], is_sum: bool = False) -> list[str]:
    struck = [outcome for outcome in outcomes if not outcome.skipped]
    if not struck:
        return [name, f"0 (skipped: {outcomes[0].skipped})", *[""] * (len(_COLUMNS) - 2)]
    lost = [outcome.seconds_lost for outcome in struck]
    return [
        name,
        str(len(struck)),
        "" if is_sum else _codes(struck),
        str(sum(outcome.published for outcome in struck)),
        str(sum(len(outcome.remade_without_need) for outcome in struck)),
        str(sum(outcome.damaged for outcome in struck)),
        str(sum(outcome.in_flight for outcome in struck)),
        f"{statistics.median(lost):.1f}",
        f"{max(lost):.1f}",
        f"{statistics.median(outcome.cpu_seconds_lost for outcome in struck):.1f}",
        str(sum(len(outcome.violations) for outcome in struck)),
    ]


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="Faults")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("kind", "exit codes") else "right")
    for row in _rows(outcomes):
        table.add_row(*row)
    return table


def _report(campaign: Campaign, flags: argparse.Namespace, account: Account, seconds: float) -> dict[str, Any]:
    calm = campaign.undisturbed
    return {
        "command": shlex.join(["python", "-m", account.module, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": _git("rev-parse", "HEAD") + (" with changes" if _git("status", "--porcelain", "-uno") else ""),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _VERSIONED},
        "seed": flags.seed,
        "workers": campaign.job.workers,
        "shards": len(calm.shards),
        "undisturbed_seconds": round(calm.seconds, 2),
        "start_up_seconds": round(calm.start_up_seconds, 2),
        "undisturbed_cpu_seconds": round(calm.cpu_seconds, 2),
        "start_up_cpu_seconds": round(calm.start_up_cpu_seconds, 2),
        "seconds": round(seconds),
        "table": [dict(zip(_COLUMNS, row, strict=True)) for row in _rows(campaign.outcomes)],
        "faults": [asdict(outcome) for outcome in campaign.outcomes],
    }


def _hardware() -> str:
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{cores} CPU cores, {memory:.0f} GiB of memory, {', '.join(gpus) or 'no GPU'}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _markdown(report: dict[str, Any], account: Account) -> str:
    columns = account.columns
    undisturbed, start_up = f"{report['undisturbed_seconds']} s", f"{report['start_up_seconds']} s"
    if account.has_cpu_seconds:
        undisturbed += f" ({report['undisturbed_cpu_seconds']} s of CPU time)"
        start_up += f" ({report['start_up_cpu_seconds']} s)"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"# {account.title}",
        "",
        f"Hardware: {report['hardware']}. Versions: {versions}. Commit: {report['commit']}. Date: {report['date']}.",
        "",
        f"```\n{report['command']}\n```",
        "",
        f"{len(report['faults'])} faults in {report['seconds'] / 60:.0f} minutes, seed {report['seed']}. The job: "
        f"{report['shards']} shards by {report['workers']} workers, {undisturbed} undisturbed; a run that finds "
        f"everything done takes {start_up}. After each fault: the same command again, `verify`, and a comparison of "
        f"every file with that of the undisturbed run. {account.setting}".rstrip(),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row[name] for name in columns) + " |" for row in report["table"]),
        "",
        account.definitions,
    ]
    broken = [fault for fault in report["faults"] if fault["violations"]]
    if broken:
        lines += ["", "## Broken promises", ""]
        lines += [f"- {fault['kind']}, {fault['moment']}: {'; '.join(fault['violations'])}" for fault in broken]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
