"""A small real job to experiment on: text, a tokenizer, an ALM of random weights, and `score_corpus` as a process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
VOCABULARY_SIZE = 500
SPLIT_BYTES = 12_000
DEADLINE_SECONDS = 300.0
"""Nothing that is waited for takes nearly as long, however busy the machine."""
POLL_SECONDS = 0.02
_SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


def write_corpus(folder: Path, documents: int = 600) -> Path:
    """English-looking text in `a.jsonl` and `b.txt`, some of it broken, so that there are rejects to account for."""
    generator = random.Random("a small corpus")
    words = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 8))) for _ in range(300)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    texts = [
        " ".join(" ".join(generator.choices(words, weights, k=12)).capitalize() + "." for _ in range(8))
        for _ in range(documents)
    ]
    lines = ['{"text": broken' if number % 50 == 7 else json.dumps({"text": text}) for number, text in enumerate(texts)]
    folder.mkdir(parents=True, exist_ok=True)
    half = documents // 2
    (folder / "a.jsonl").write_text("\n".join(lines[:half]) + "\n")
    (folder / "b.txt").write_text("\n\n".join(texts[half:]) + "\n")
    return folder


def write_alm(folder: Path, corpus: Path, layers: int = 2, dimensions: int = 256) -> Path:
    """Two random GPT-2s over a byte-level BPE of the corpus, their weights large: perplexities spread over decades."""
    _train_tokenizer(corpus).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY_SIZE,
        n_positions=512,
        n_embd=dimensions,
        n_layer=layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=2,
    )
    for direction, reading in (("forward", "left_to_right"), ("backward", "right_to_left")):
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0)
        model.config.reading_direction = reading
        model.save_pretrained(folder / direction)
    return folder


def _train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    *first, mask = _SPECIAL_TOKENS.values()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 1,
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([str(path) for path in sorted(corpus.rglob("*")) if path.is_file()], trainer)
    backend.add_special_tokens([mask])
    return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="<s>", sep_token="</s>", **_SPECIAL_TOKENS)


@dataclass(frozen=True)
class Job:
    """One command line of `score_corpus`, less where the shards go."""

    corpus: Path
    alm: Path
    split_bytes: int = SPLIT_BYTES
    workers: int = 2
    more_flags: Sequence[str] = ()
    """As they stand on the command line: a runner's, say."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What the job sees beside the environment of this process."""

    def flags(self, output: Path) -> list[str]:
        """Of the command, for shards in `output`."""
        flags = {
            "--input": self.corpus,
            "--alm": self.alm,
            "--output": output,
            "--split_bytes": self.split_bytes,
            "--device": "cpu",
            "--micro_batch": 1,
            "--direct_num_workers": self.workers,
        }
        return [*(str(part) for item in flags.items() for part in item), *self.more_flags]

    def start(self, output: Path, log: Path, prefix: Sequence[str] = (), flags: Sequence[str] = ()) -> Run:
        """Starts a run; `prefix` is a command that runs commands, as `nice` is, `flags` come after the job's own."""
        command = [*prefix, sys.executable, "-m", "pipeline.score_corpus", *self.flags(output), *flags]
        return Run(command, log, {**os.environ, **self.environment})


class Run:
    """A command at work, the leader of a process group of its own; all it writes goes to a log."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]):
        self.log = log
        self.code: int | None = None
        """Its exit code, negative where a signal ended it; None while it runs."""
        self._began = time.monotonic()
        self._ended = 0.0
        self._cpu_seconds = 0.0
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )

    @property
    def is_over(self) -> bool:
        """It has ended."""
        if self.code is None:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.code = self.process.returncode = os.waitstatus_to_exitcode(status)
                self._ended = time.monotonic()
                self._cpu_seconds = max(self._cpu_seconds, usage.ru_utime + usage.ru_stime)
        return self.code is not None

    @property
    def seconds(self) -> float:
        """From its start to its end, or to now."""
        return (self._ended if self.is_over else time.monotonic()) - self._began

    @property
    def cpu_seconds(self) -> float:
        """Of all its processes; of one that was killed, up to the last call of `measure`."""
        return self._cpu_seconds

    @property
    def text(self) -> str:
        """All that it wrote, its workers too."""
        return self.log.read_text(errors="replace")

    def measure(self) -> None:
        """Takes down the CPU time so far: nobody is told that of the children of a killed process."""
        self._cpu_seconds = sum(map(_cpu_seconds, self.group()))

    def wait(self, seconds: float = DEADLINE_SECONDS) -> int | None:
        """Its exit code, or None where it goes on for longer than that."""
        wait_until(lambda: self.is_over, seconds)
        return self.code

    def workers(self) -> list[psutil.Process]:
        """Its worker processes that live."""
        return workers_among(self.group())

    def group(self) -> list[psutil.Process]:
        """All processes that it started and itself, as far as they live; also when it has ended."""
        return [process for process in psutil.process_iter() if _belongs(process, self.process.pid)]

    def kill_group(self) -> None:
        """As a machine that loses power."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()


def workers_among(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that make shards."""
    return [process for process in processes if "pipeline.worker" in command_line(process)]


def _belongs(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        return sum(process.cpu_times()[:4])  # its own, and those of children that it has waited for
    except psutil.Error:
        return 0.0


def command_line(process: psutil.Process) -> list[str]:
    """The words of a process's command, none where it is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_until(condition: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> bool:
    """Waits until something holds; False where it does not within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def shards_in(folder: Path) -> list[Path]:
    """The published shards."""
    return sorted(folder.glob("*.parquet"))


def files_in(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too, by their names relative to it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
