"""What both trainers share around Hugging Face's Trainer: the recipe's batch, resuming, and where results go."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from scorer import files
from scorer.errors import ConfigurationError
from scorer.manifest import TOKENIZER_FOLDER
from scorer.tokenizer import fingerprint, load_tokenizer
from scorer.vocabulary import require_same_vocabulary
from trainer.reader import RowGroup, ShardCorpus
from trainer.stored_output import CHECKPOINT_PREFIX, COMPLETE_MARK, StoredOutput
from trainer.stream import POOL_BLOCKS, TrainingStream, steps_per_epoch
from trainer.stream_trainer import StreamTrainer

_OPTIMIZATION_FLAGS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "fp16",
    "label_smoothing_factor",
    "learning_rate",
    "max_grad_norm",
    "optim_args",
    "warmup_steps",
    "weight_decay",
)


@dataclass
class RecipeArguments(TrainingArguments):
    """Hugging Face's TrainingArguments with what every run over shards needs."""

    global_batch_size: int = field(
        default=2560,
        metadata={"help": "blocks an optimizer step, over all devices; gradient accumulation follows from it"},
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "steps, or below 1 a share of the run"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two log entries"})
    # HfArgumentParser wants None first.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="tensorboard", metadata={"help": "where metrics are logged"}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "these models use all of their parameters"}
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "processes that read and mask; default: 2 with a GPU, else none (a thread reads ahead)"},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay off: the collator needs the perplexities"}
    )
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "must stay: the stream is in the run's order already"}
    )

    stored_output: StoredOutput | None = field(default=None, init=False)
    """Where `output_dir` is a URL: what it is then, beside a local folder."""

    def __post_init__(self) -> None:
        """Checks what Trainer would not."""
        if not self.output_dir:
            raise ConfigurationError("--output_dir is missing: the folder for checkpoints, the model and the results")
        if files.local_path(self.output_dir) is None:
            self.stored_output = StoredOutput.at(self.output_dir)
            self.output_dir: str = self.stored_output.folder
        if self.global_batch_size < 1:
            raise ConfigurationError(f"--global_batch_size {self.global_batch_size}: expected at least 1")
        if self.remove_unused_columns or self.train_sampling_strategy != "sequential":
            raise ConfigurationError(
                "leave --remove_unused_columns off and --train_sampling_strategy sequential: the perplexities are "
                "unused by the model, and the order is the stream's"
            )
        if self.ddp_backend is not None and "WORLD_SIZE" not in os.environ:
            raise ConfigurationError(
                f"--ddp_backend {self.ddp_backend} is for several processes: start them with "
                "torchrun --nproc_per_node N -m MODULE, or leave it out"
            )
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if torch.cuda.is_available() and not self.use_cpu else 0
        super().__post_init__()
        # Pinned memory is for copies to an accelerator; without one torch warns of it at every loader.
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False

    @property
    def output_url(self) -> str:
        """`--output_dir` as it was given."""
        return self.output_dir if self.stored_output is None else self.stored_output.url

    def below(self, name: str) -> Self:
        """The same recipe for a folder in this one's output folder."""
        own = copy.copy(self)
        own.output_dir = os.path.join(self.output_dir, name)
        own.stored_output = None if self.stored_output is None else self.stored_output.below(name)
        return own


def parse(arguments: Sequence[str], module: str, *types: type) -> tuple[Any, ...]:
    """Parses command-line flags into dataclasses; an unknown or missing flag ends with the usage, exit code 2.

    Raises:
        ConfigurationError: a value that a dataclass refuses.
    """
    parser = HfArgumentParser(types, prog=f"python -m {module}", allow_abbrev=False)
    try:
        parsed: tuple[Any, ...] = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigurationError(str(error)) from error
    if not all(item.should_log for item in parsed if isinstance(item, RecipeArguments)):
        logging.getLogger("trainer").setLevel(logging.WARNING)  # one process speaks for all
    return parsed


def leaving_the_group(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """A command that is done leaves its process group, as torch asks: else the interpreter's end may abort in it.

    One that fails does not: it would wait for processes that wait for it.
    """

    def run(arguments: Sequence[str]) -> int:
        code = main(arguments)
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        return code

    return run


def load_corpus_tokenizer(corpus: ShardCorpus, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of the shards' folder, or another one that has the same vocabulary.

    Raises:
        ConfigurationError: it is missing or of another vocabulary.
    """
    path = name or files.join(corpus.folders[0], TOKENIZER_FOLDER)
    tokenizer = load_tokenizer(path)
    require_same_vocabulary(
        corpus.manifests[0].tokenizer,
        fingerprint(tokenizer),
        f"the shards in {corpus.folders[0]} and the tokenizer {path}",
        "pass the tokenizer that the corpus was tokenized with, or leave --tokenizer_name out",
    )
    return tokenizer


def plan_stream(arguments: RecipeArguments, corpus: ShardCorpus, groups: Sequence[RowGroup]) -> TrainingStream:
    """Fixes the run's length from the global batch, and lays its blocks out as one stream.

    Sets `gradient_accumulation_steps`, `max_steps` and `num_train_epochs` of the arguments: to Trainer the whole run
    is one epoch over the stream, so that it resumes by skipping positions and not by reading them.

    Raises:
        ConfigurationError: the batch does not divide, or is larger than the corpus, or the shards have no room.
    """
    at_once = arguments.train_batch_size * arguments.world_size
    accumulation, rest = divmod(arguments.global_batch_size, at_once)
    if rest or accumulation < 1:
        raise ConfigurationError(
            f"--global_batch_size {arguments.global_batch_size} is no multiple of {at_once} = "
            f"--per_device_train_batch_size {arguments.per_device_train_batch_size} x devices: change one of them"
        )
    if arguments.gradient_accumulation_steps not in (1, accumulation):
        raise ConfigurationError(
            f"--gradient_accumulation_steps {arguments.gradient_accumulation_steps} contradicts --global_batch_size, "
            f"from which {accumulation} follows: leave it out"
        )
    epoch = steps_per_epoch(sum(map(len, groups)), arguments.global_batch_size)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * epoch)
    corpus.require_room(2 * POOL_BLOCKS)  # one is read while the next is fetched
    arguments.gradient_accumulation_steps = accumulation
    arguments.max_steps = steps
    arguments.num_train_epochs = 1
    return TrainingStream(corpus, groups, arguments.global_batch_size, steps, arguments.seed)


class MarkComplete(TrainerCallback):
    """Marks a checkpoint once every process has written its part; Trainer itself writes checkpoints file by file.

    Old checkpoints go only after the new one is marked. Trainer would remove them before, and a crash in between
    would leave none; so it takes over `save_total_limit`.
    """

    def __init__(self, run: Mapping[str, Any], keep: int | None, stored: StoredOutput | None = None):
        """Takes what identifies the run, how many checkpoints to keep (None: all), and the store for them, if any."""
        self._run = dict(run)
        self._keep = keep
        self._stored = stored

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes the mark, and removes what is older than it may be."""
        args.distributed_state.wait_for_everyone()
        name = f"{CHECKPOINT_PREFIX}{state.global_step}"
        checkpoint = os.path.join(args.output_dir, name)
        if self._stored is not None:
            if state.is_local_process_zero and os.path.isdir(checkpoint):
                self._stored.push_checkpoint(name)
            args.distributed_state.wait_for_everyone()
        if not state.is_world_process_zero or not os.path.isdir(checkpoint):
            return
        files.replace(os.path.join(checkpoint, COMPLETE_MARK), files.to_json(self._run))
        if self._keep is not None:
            for old in _complete_checkpoints(args.output_dir)[: -max(1, self._keep)]:
                if str(old) != state.best_model_checkpoint:
                    (old / COMPLETE_MARK).unlink()  # first, so that a half-removed one is torn
                    shutil.rmtree(old)
        if self._stored is not None:
            self._stored.complete_checkpoint(name, self._keep, os.path.basename(state.best_model_checkpoint or ""))


def _complete_checkpoints(output_dir: str) -> list[Path]:
    """Marked checkpoints, oldest first."""
    found = Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*")
    folders = [path for path in found if (path / COMPLETE_MARK).exists()]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))


def newest_checkpoint(output_dir: str, run: Mapping[str, Any]) -> str | None:
    """The newest complete checkpoint of a run, or None.

    Raises:
        ConfigurationError: it is of another run; the message says what differs.
    """
    complete = _complete_checkpoints(output_dir)
    if not complete:
        return None
    newest = complete[-1]
    found = json.loads((newest / COMPLETE_MARK).read_text())
    # Through JSON, as the mark went: tuples become lists.
    wanted = json.loads(files.to_json(dict(run)))
    differing = [
        f"{key} was {_shown(found.get(key))}, now {_shown(value)}"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if differing:
        raise ConfigurationError(
            f"{newest} belongs to another run: {'; '.join(differing)}. "
            "Choose another --output_dir, or the same settings"
        )
    return str(newest)


def train(trainer: StreamTrainer, run: Mapping[str, Any]) -> dict[str, float]:
    """Trains from where the output folder stands, saves the model, evaluates, and writes `all_results.json`.

    Returns:
        The evaluation's metrics, on every process.
    """
    arguments = trainer.args
    stored = arguments.stored_output
    if stored is not None:
        with arguments.main_process_first(desc="fetching the newest checkpoint"):
            if arguments.local_process_index == 0:
                stored.fetch()
    checkpoint = newest_checkpoint(arguments.output_dir, run)
    if checkpoint is not None:
        done = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).global_step
        trainer.begin_at(done * arguments.global_batch_size)
    trainer.add_callback(MarkComplete(run, arguments.save_total_limit, stored))
    arguments.save_total_limit = None
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if checkpoint is None or not checkpoint.endswith(f"-{arguments.max_steps}"):  # else nothing was left to train
        trainer.save_metrics("train", result.metrics)
    metrics: dict[str, float] = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if stored is not None:
        if trainer.is_world_process_zero():
            stored.push_results()
        arguments.distributed_state.wait_for_everyone()
        if arguments.local_process_index == 0:
            stored.remove_copy()
    return metrics


def identify(
    corpus: ShardCorpus, groups: Sequence[RowGroup], arguments: RecipeArguments, model: PreTrainedModel, **more: Any
) -> dict[str, Any]:
    """What makes two runs the same run: the data and its order, the model, the schedule, and `more`."""
    rows = [[group.shard, group.index, group.start, group.stop] for group in groups]
    configuration = model.config.to_diff_dict()
    for volatile in ("_name_or_path", "transformers_version"):
        configuration.pop(volatile, None)
    return {
        "shards": corpus.fingerprint,
        "training_rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "model": configuration,
        "seed": arguments.seed,
        "global_batch_size": arguments.global_batch_size,
        "max_steps": arguments.max_steps,
        "lr_scheduler_type": str(arguments.lr_scheduler_type),
        "optim": str(arguments.optim),
        **{name: getattr(arguments, name) for name in _OPTIMIZATION_FLAGS},
        **more,
    }


def seed_everything(arguments: TrainingArguments) -> None:
    """Seeds the initial weights and dropout; masks and order have their own, keyed noise."""
    set_seed(arguments.seed)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}…"
