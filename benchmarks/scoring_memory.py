"""Memory that scoring a batch takes beyond the loaded model, of one side alone.

    python -m benchmarks.scoring_memory --side ours --blocks 8

On a CPU, in a process of its own: it builds the ALM, scores a few tokens and one block so that weights are packed,
gives back what malloc kept, notes what is resident, scores a batch, and prints how much more was resident at the peak
(JSON). On a GPU the allocator counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.interleaved import Table
from benchmarks.scoring_sides import Case, Score, Shape, build_alm, make_blocks, make_side

MODULE = "benchmarks.scoring_memory"
PROCESS = Path("/proc/self")
_RESET_PEAK = "5"
_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Memory:
    """Of one side and batch."""

    side: str
    blocks: int
    resident_bytes: int
    """With the model loaded and ready: of the process, or on a GPU of the allocator."""
    kept_bytes: int
    """What the first calls left there: packed weights, buffers; part of resident_bytes. 0 where it is not known."""
    peak_extra_bytes: int
    """At the peak of a batch, beyond resident_bytes."""


def read_status(field: str, text: str) -> int:
    """Bytes of a field of /proc/PID/status, such as VmRSS.

    Raises:
        ValueError: there is no such field.
    """
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.removesuffix("kB"))
    raise ValueError(f"there is no {field} in /proc/self/status")


def on_cpu(function: Callable[[], object], process: Path = PROCESS) -> tuple[int, int]:
    """Bytes of this process before a call, and at its peak beyond that."""
    with suppress(OSError, AttributeError):  # not every libc has it
        ctypes.CDLL(None).malloc_trim(0)
    before = read_status("VmRSS", (process / "status").read_text())
    (process / "clear_refs").write_text(_RESET_PEAK)
    function()
    return before, max(0, read_status("VmHWM", (process / "status").read_text()) - before)


def on_gpu(side: str, score: Score, ids: Tensor, loaded: int) -> Memory:
    """Of the second call; the first one compiles, and packs what is packed.

    Args:
        side: its name.
        score: the side, called before with ids of the same shape.
        ids: [B, T].
        loaded: bytes allocated before the side's first call.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    score(ids)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - resident
    return Memory(side, len(ids), resident, max(0, resident - loaded), extra)


def in_own_process(side: str, case: Case, blocks: int) -> Memory:
    """Measures a side on the CPU.

    Raises:
        RuntimeError: the process failed.
    """
    dtype = str(case.dtype).removeprefix("torch.")
    words = ["--side", side, "--shape", json.dumps(asdict(case.shape)), "--dtype", dtype, "--blocks", str(blocks)]
    done = subprocess.run([sys.executable, "-m", MODULE, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def measure(side: str, case: Case, blocks: int) -> Memory:
    """Loads, prepares, and scores one batch, on the CPU."""
    score = make_side(side, build_alm(case))
    loaded = read_status("VmRSS", (PROCESS / "status").read_text())
    score(make_blocks(case, 1)[:, :_WARM_UP_TOKENS])
    score(make_blocks(case, 1))
    ids = make_blocks(case, blocks)
    resident, extra = on_cpu(lambda: score(ids))
    return Memory(side, blocks, resident, max(0, resident - loaded), extra)


def to_table(outcomes: Sequence[Memory], title: str) -> Table:
    """Megabytes, and shares of the most."""
    most = max(outcome.peak_extra_bytes for outcome in outcomes) or 1
    rows = [
        (
            outcome.side,
            f"{outcome.resident_bytes / 1e6:,.0f}",
            f"{outcome.kept_bytes / 1e6:,.0f}",
            f"{outcome.peak_extra_bytes / 1e6:,.1f}",
            f"{outcome.peak_extra_bytes / most:.3f}",
        )
        for outcome in outcomes
    ]
    return Table(title, ("", "ready, MB", "of it kept by first calls", "more at the peak, MB", "of the most"), rows)


def main(arguments: Sequence[str]) -> int:
    """Prints one side's memory as JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--side", required=True)
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON: fields of a Shape")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--blocks", type=int, default=8)
    flags = parser.parse_args(list(arguments))
    case = Case(Shape(**flags.shape), torch.device("cpu"), getattr(torch, flags.dtype))
    print(json.dumps(asdict(measure(flags.side, case, flags.blocks))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
