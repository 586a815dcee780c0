"""Hugging Face's Trainer over a TrainingStream: where it begins to read, and how long it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback

from trainer.stream import TrainingStream


class StreamTrainer(Trainer):
    """Trainer that goes to its position in the stream by arithmetic, and logs what waiting for data costs.

    Trainer itself would skip batches by counting through all positions before its own: minutes for a large corpus.
    """

    def __init__(self, stream: TrainingStream, **settings: Any):
        """Takes the stream to train on, and Trainer's other settings."""
        super().__init__(train_dataset=stream, **settings)
        self._stream = stream
        self._first_position = 0
        self._clock = _Clock()
        self.add_callback(self._clock)

    def begin_at(self, position: int) -> None:
        """Reads from this position of the run on, and nothing before it."""
        self._first_position = position
        self.args.ignore_data_skip = position > 0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's, with random numbers of its own.

        A loader's iterator draws one; taken from the global generator it would shift dropout after a resume.
        """
        loader: DataLoader[Any] = super().get_train_dataloader()
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()  # accelerate wraps it
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Trainer's, on the clock."""
        self._clock.begin_step()
        return super().get_batch_samples(self._clock.timed(epoch_iterator), num_batches, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with `epoch` as passes over the corpus.

        While training also `progress`, the share of the run that is done, and `data_wait`, a share of step time.
        """
        self.state.epoch = self.state.global_step / self._stream.steps_per_epoch
        if "loss" in logs:
            logs["progress"] = self.state.global_step / self.state.max_steps
            logs["data_wait"] = self._clock.take_share()
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return _Positions(self._first_position, len(self._stream))


class _Positions(Sampler[int]):
    """Positions [begin, end) of the run; its length counts all of the run, since Trainer plans the run by it."""

    def __init__(self, begin: int, end: int):
        self._begin = begin
        self._end = end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._begin, self._end))

    def __len__(self) -> int:
        return self._end


class _Clock(TrainerCallback):
    """Seconds of steps, and of waiting for their data, since they were last asked for."""

    def __init__(self) -> None:
        self._waited = self._stepped = 0.0
        self._began = time.perf_counter()

    def begin_step(self) -> None:
        self._began = time.perf_counter()

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - began
            yield batch

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._stepped += time.perf_counter() - self._began

    def take_share(self) -> float:
        share = self._waited / self._stepped if self._stepped else 0.0
        self._waited = self._stepped = 0.0
        return share
