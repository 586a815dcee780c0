"""`make demo`: from text to masked LMs trained on their hard tokens, with nothing but this machine's Python.

Every stage is a command that a user would type; it is printed before it runs. What is done is reused.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.python_corpus import write_corpus
from scorer.shards import ShardContent
from scorer.tokenizer import load_tokenizer
from scorer.vocabulary import Vocabulary
from trainer.reader import RowGroup, ShardCorpus, hold_out

FOLDER = Path("runs/demo")
VOCABULARY_SIZE = 2048
ALPHAS = ("0.001", "inf")
_ALM = "n_layer=2,n_embd=128,n_head=4"
_MLM = "num_hidden_layers=2,hidden_size=128,num_attention_heads=4,intermediate_size=512"
_TRAINING = (
    "--global_batch_size 4 --per_device_train_batch_size 4 --report_to none --logging_steps 25 "
    "--save_steps 50 --save_total_limit 1"
)
_CONTEXT_TOKENS = 8

console = Console()


@dataclass(frozen=True)
class Stage:
    """One step of the demo, and the file whose presence says that it is done."""

    title: str
    done: Path
    run: Callable[[], object]


def main() -> int:
    """Runs what is not done yet, then shows and checks the results."""
    began = time.monotonic()
    stages = _stages()
    for number, stage in enumerate(stages, start=1):
        if stage.done.exists():
            console.print(f"[bold]\\[{number}/{len(stages)}][/] {stage.title}: done before, reused")
            continue
        console.print(f"[bold]\\[{number}/{len(stages)}][/] {stage.title}")
        stage_began = time.monotonic()
        stage.run()
        console.print(f"      {time.monotonic() - stage_began:.0f} s")
    failures = _report()
    console.print(f"{time.monotonic() - began:.0f} s in all")
    for failure in failures:
        console.print(f"[red]failed:[/] {failure}")
    return 1 if failures else 0


def _stages() -> list[Stage]:
    corpus, tokenizer, blocks, alm, shards = (
        FOLDER / name for name in ("corpus/python.jsonl", "tokenizer", "blocks", "alm", "shards")
    )
    stages = [
        Stage(
            "the language reference and docstrings of this Python, as a corpus", corpus, lambda: write_corpus(corpus)
        ),
        Stage("a byte-level BPE of its own", tokenizer / "tokenizer.json", lambda: _train_tokenizer(corpus, tokenizer)),
        Stage(
            "text to blocks of 512 tokens",
            blocks / "_manifest.json",
            lambda: _command(
                f"pipeline.tokenize_corpus --input {corpus} --tokenizer {tokenizer} --output {blocks} "
                "--split_bytes 500000"
            ),
        ),
        Stage(
            "an auto-regressive LM in either direction",
            alm / "backward/all_results.json",
            lambda: _command(
                f"trainer.train_alm --blocks {blocks} --output_dir {alm} --config_overrides {_ALM} "
                f"--max_steps 120 --learning_rate 3e-3 {_TRAINING}"
            ),
        ),
        Stage(
            "per-token perplexities into hardness shards",
            shards / "_manifest.json",
            lambda: _command(f"pipeline.score_corpus --input {blocks} --alm {alm} --output {shards}"),
        ),
    ]
    for alpha in ALPHAS:
        stages.append(_pretraining(alpha, shards))
    return stages


def _pretraining(alpha: str, shards: Path) -> Stage:
    output = _mlm_folder(alpha)
    return Stage(
        f"a masked LM with alpha = {alpha}",
        output / "all_results.json",
        lambda: _command(
            f"trainer.pretrain --shards {shards} --alpha {alpha} --output_dir {output} --model_type roberta "
            f"--config_overrides {_MLM} --max_steps 150 --learning_rate 2e-3 {_TRAINING}"
        ),
    )


def _mlm_folder(alpha: str) -> Path:
    return FOLDER / f"mlm-alpha-{alpha}"


def _command(line: str) -> None:
    console.print(f"      python -m {line}", style="dim", highlight=False)
    code = subprocess.run([sys.executable, "-m", *shlex.split(line)], check=False).returncode
    if code:
        console.print(f"[red]this command ended with exit code {code}[/]; what is done stays, run `make demo` again")
        sys.exit(code)


def _train_tokenizer(corpus: Path, folder: Path) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    with corpus.open(encoding="utf-8") as lines:
        backend.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    backend.add_special_tokens(["<mask>"])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    ).save_pretrained(folder)


def _report() -> list[str]:
    """Prints results and examples; returns what the demo promised and did not show."""
    corpus = ShardCorpus([str(FOLDER / "shards")])
    training, held_out = hold_out(corpus.row_groups())
    unigram = unigram_perplexity(_ids(corpus, training), _ids(corpus, held_out), corpus.vocabulary)
    alm = {
        direction: json.loads((FOLDER / "alm" / direction / "all_results.json").read_text())
        for direction in ("forward", "backward")
    }
    mlm = {alpha: json.loads((_mlm_folder(alpha) / "all_results.json").read_text()) for alpha in ALPHAS}
    tokenizer = load_tokenizer(str(FOLDER / "tokenizer"))
    _show_results(unigram, alm, mlm)
    _show_tokens(corpus, held_out, tokenizer)
    console.print(f"Everything lies in {FOLDER}: corpus/, tokenizer/, blocks/, alm/, shards/ and the two models.")
    console.print(f"See the masks: python -m trainer.replay --shards {FOLDER}/shards --alpha 0.001 --rows 0:1")
    failures = [
        f"the {direction} ALM's perplexity {results['eval_perplexity']:.1f} is not below the unigram's {unigram:.1f}"
        for direction, results in alm.items()
        if not results["eval_perplexity"] < unigram
    ]
    return failures + [
        f"alpha = {alpha}: the loss on alpha = 0 masks does not exceed that on uniform masks"
        for alpha, results in mlm.items()
        if not results["eval_hardness_loss"] > results["eval_uniform_loss"]
    ]


def unigram_perplexity(
    training: npt.NDArray[np.int64], held_out: npt.NDArray[np.int64], vocabulary: Vocabulary
) -> float:
    """Exp of the mean NLL of held-out ordinary tokens under their add-one smoothed frequencies in training blocks."""
    is_special = vocabulary.special_mask()
    counts = np.bincount(training[~is_special[training]], minlength=vocabulary.size) + 1.0
    counts[is_special] = 0.0
    ordinary = held_out[~is_special[held_out]]
    return math.exp(-np.log(counts[ordinary] / counts.sum()).mean())


def _ids(corpus: ShardCorpus, groups: Sequence[RowGroup]) -> npt.NDArray[np.int64]:
    return np.concatenate([corpus.read(group).input_ids for group in groups]).astype(np.int64)


def _show_results(unigram: float, alm: dict[str, dict[str, float]], mlm: dict[str, dict[str, float]]) -> None:
    table = Table(title="Held-out blocks: language models")
    for column in ("model", "perplexity", "next token right"):
        table.add_column(column, justify="left" if column == "model" else "right")
    table.add_row("unigram", f"{unigram:.1f}", "")
    for direction, results in alm.items():
        table.add_row(f"ALM, {direction}", f"{results['eval_perplexity']:.1f}", f"{results['eval_accuracy']:.1%}")
    console.print(table)
    table = Table(title="Held-out blocks: masked LMs, loss in nats a masked token (accuracy)")
    for column in ("trained with", "uniform masks", "hardness masks (alpha = 0)", "its own masks"):
        table.add_column(column, justify="left" if column == "trained with" else "right")
    for alpha, results in mlm.items():
        cells = [
            f"{results[f'eval_{name}_loss']:.3f} ({results[f'eval_{name}_accuracy']:.1%})"
            for name in ("uniform", "hardness", "own")
        ]
        table.add_row(f"alpha = {alpha}", *cells)
    console.print(table)


def _show_tokens(corpus: ShardCorpus, held_out: Sequence[RowGroup], tokenizer: PreTrainedTokenizerBase) -> None:
    content = _concatenated([corpus.read(group) for group in held_out])
    assert content.forward_perplexity is not None
    assert content.backward_perplexity is not None
    mean = (content.forward_perplexity.astype(np.float64) + content.backward_perplexity) / 2
    order = np.argsort(np.where(mean > 0, mean, np.inf), axis=None, kind="stable")
    eligible = int((mean > 0).sum())
    table = Table(title="Held-out tokens in their context, and the mean of their two perplexities")
    table.add_column("", justify="left")
    table.add_column("perplexity", justify="right")
    table.add_column("context")
    for label, positions in (("hardest", order[eligible - 10 : eligible][::-1]), ("easiest", order[:10])):
        for flat in positions:
            row, column = np.unravel_index(flat, mean.shape)
            table.add_row(
                label, f"{mean[row, column]:,.1f}", _in_context(content.input_ids[row], int(column), tokenizer)
            )
        table.add_section()
    console.print(table)


def _concatenated(contents: Sequence[ShardContent]) -> ShardContent:
    columns = [dict(content.columns()) for content in contents]
    return ShardContent(**{name: np.concatenate([column[name] for column in columns]) for name in columns[0]})


def _in_context(ids: npt.NDArray[np.unsignedinteger], column: int, tokenizer: PreTrainedTokenizerBase) -> str:
    def text(start: int, stop: int) -> str:
        decoded: str = tokenizer.decode(ids[max(1, start) : stop].tolist())
        return escape(decoded.replace("\n", "⏎"))

    before, token = text(column - _CONTEXT_TOKENS, column), text(column, column + 1)
    return f"{before}[bold]«{token}»[/]{text(column + 1, min(511, column + 1 + _CONTEXT_TOKENS))}"


if __name__ == "__main__":
    sys.exit(main())
