"""One run of a job: guarded, reported, stopped cleanly, and held to its plan afterwards.

plan ─▶ skip what is published ─▶ make shards (tokenize, score, publish) ─▶ manifest
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from transformers import PreTrainedTokenizerBase

from pipeline.engines.placement import watched
from pipeline.engines.runners import place
from pipeline.engines.watching import Watch
from pipeline.estimate import estimate, require_room
from pipeline.failures import Tolerance, forget_set_aside
from pipeline.inputs import BlockInput, TextInput
from pipeline.lease import holding
from pipeline.plan import Plan, adopt_plan
from pipeline.progress import STALLED_SECONDS, measure, reporting_progress
from pipeline.publication import Provenance, check_published, remove_temporaries
from pipeline.shard_making import PackedRecipe, Recipe, Step
from pipeline.supervision import Crew, Limits, close_all
from pipeline.transforms import PUBLISHED, MakeShards, PlannedSplits, WriteManifest
from scorer import files
from scorer.devices import device_count, require_device
from scorer.errors import ConfigurationError, HardnessError
from scorer.manifest import RECEIPTS_FOLDER, TOKENIZER_FOLDER, Manifest
from scorer.tokenizer import fingerprint, load_tokenizer
from scorer.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

LOCAL_RUNNERS = ("FnApiRunner", "DirectRunner", "BundleBasedDirectRunner", "PrismRunner")
_VERSIONED = ("numpy", "pyarrow", "tokenizers", "torch", "transformers")
_TALKERS = ("portable_runner", "subprocess_server")
"""Modules of Beam's that log, by no logger of their own, what a job server says, and each second without an answer."""
_SHARDS_AT_A_TIME_ON_CUDA = 3
"""One is scored while another is tokenized and a third is written."""


def assemble_crew(options: PipelineOptions, device: str = "cpu") -> Crew:
    """Decides how many workers a machine runs, from Beam's options; on a cluster it is one where Beam runs one.

    `--direct_running_mode multi_processing` (our default) stands for worker processes of our own, which are replaced
    when they die and take splits as they become free, as Beam's own are not. `in_memory` stands for threads.

    Raises:
        ConfigurationError: more workers than devices were asked for.
    """
    threads = _SHARDS_AT_A_TIME_ON_CUDA if device.startswith("cuda") else 1
    if options.view_as(StandardOptions).runner not in LOCAL_RUNNERS:
        return Crew(processes=1, threads=threads, cores=None)
    direct = options.view_as(DirectOptions)
    wanted = direct.direct_num_workers
    if wanted < 0:
        raise ConfigurationError(f"--direct_num_workers {wanted}: expected 0 (as many as there are) or more")
    cores = len(os.sched_getaffinity(0))
    there = cores
    if device.startswith("cuda"):
        there = device_count() if device == "cuda" else 1
        if wanted > there:
            raise ConfigurationError(
                f"--direct_num_workers {wanted} with --device {device}, but there are {there} device(s) for them: "
                "each worker has one for itself"
            )
        if not there:
            require_device(device)
    workers = wanted or there
    if direct.direct_running_mode != "multi_processing":
        if wanted > 1 and device.startswith("cuda"):
            raise ConfigurationError(
                f"--direct_running_mode {direct.direct_running_mode} scores on one device: leave it out, or "
                "--direct_num_workers"
            )
        return Crew(processes=0, threads=max(workers, threads), cores=None)
    return Crew(processes=workers, threads=threads, cores=max(1, cores // workers))


@dataclass(frozen=True)
class Job:
    """Everything that is decided before a job begins."""

    folder: str
    """Of the shards."""
    corpus: TextInput | BlockInput
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    plan: Plan
    """As this run would make it."""
    step: Step
    provenance: Provenance
    crew: Crew
    tolerance: Tolerance

    def run(self, options: PipelineOptions) -> Manifest:
        """Does what the folder's plan still has to be done, and holds the folder to it afterwards.

        Raises:
            ConfigurationError: the folder was begun with another configuration, another driver is at work in it, or
                the shards will not fit on its disk.
            HardnessError: the job failed, with the message of whatever failed in a worker.
        """
        if options.view_as(StandardOptions).runner in LOCAL_RUNNERS:
            # One thread of Beam's hands out the splits; the crew does the work.
            direct = options.view_as(DirectOptions)
            direct.direct_running_mode, direct.direct_num_workers = "in_memory", 1
        placement = place(options, self.folder)
        plan = adopt_plan(self.folder, self.plan)
        with holding(self.folder):
            _prepare_folder(self.folder, self.tokenizer, self.vocabulary)
            limits = Limits(self.tolerance, len(plan.splits), self._require_room(plan))
            source = self.corpus.source(self.folder, self.vocabulary)
            recipe = PackedRecipe.of(Recipe(self.folder, source, self.step, self.provenance))

            pipeline = beam.Pipeline(options=options)
            splits = pipeline | PlannedSplits(self.folder, plan)
            made = splits.missing | "Tokenize, score, publish" >> beam.ParDo(MakeShards(recipe, self.crew, limits))
            (splits[PUBLISHED], made) | WriteManifest(self.folder, self.tolerance)

            with (
                reporting_progress(self.folder, plan),
                _workers_ended(self.folder, plan),
                _without_tracebacks(),
                watched(self.folder, placement),
                Watch(placement).looking() as watch,
            ):
                _run(pipeline, watch)
            manifest = check_published(self.folder, plan)
        _summarize(self.folder, manifest)
        return manifest

    def _require_room(self, plan: Plan) -> int:
        """Bytes that must be free before a shard is begun, after a look at whether all that are missing will fit."""
        missing = len({split.shard for split in plan.splits} - set(files.names(self.folder)))
        if not missing:
            return 0
        estimated = estimate(self.corpus, plan, self.tokenizer, self.vocabulary)
        return require_room(self.folder, estimated.shard_bytes / len(plan.splits), missing)


def versions() -> dict[str, str]:
    """Versions of the libraries that the bytes of a shard may depend on."""
    return {name: version(name) for name in _VERSIONED}


def _prepare_folder(folder: str, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
    """Makes the folder ready for workers and trainers, and removes what earlier runs left unfinished.

    Raises:
        ConfigurationError: the folder holds another tokenizer.
    """
    files.make_folder(files.join(folder, RECEIPTS_FOLDER))
    saved = files.join(folder, TOKENIZER_FOLDER)
    if not files.exists(files.join(saved, "tokenizer_config.json")):
        files.put_folder(saved, tokenizer.save_pretrained)
    if fingerprint(load_tokenizer(saved)) != vocabulary.fingerprints:
        raise ConfigurationError(f"{saved} holds another tokenizer: choose another --output")
    remove_temporaries(folder, older_than=STALLED_SECONDS)
    forget_set_aside(folder)


def _summarize(folder: str, manifest: Manifest) -> None:
    """Says what a finished job left behind."""
    logger.info(
        "%s is complete: %d shards, %d documents, %d blocks, %d tokens, %d left over, %d documents rejected",
        folder,
        len(manifest.shards),
        manifest.documents,
        manifest.blocks,
        manifest.tokens,
        manifest.leftover_tokens,
        manifest.rejected_documents,
    )


def _run(pipeline: beam.Pipeline, watch: Watch) -> None:
    """Runs a pipeline, and makes an error of ours of what the runner made of it."""
    try:
        pipeline.run().wait_until_finish()
    except HardnessError as error:
        raise type(error)(re.sub(r" \[while running '.*'\]$", "", str(error))) from error
    except Exception as error:
        if re.search(r"^KeyboardInterrupt\b|: KeyboardInterrupt\b", str(error), re.MULTILINE):
            raise KeyboardInterrupt from error
        ours = watch.explain(error)
        if ours is None:
            raise  # with the worker's traceback, which is in its message
        raise ours from error


@contextmanager
def _workers_ended(folder: str, plan: Plan) -> Iterator[None]:
    """Leaves no worker and nothing half-written behind, however the body ends."""
    try:
        yield
    except BaseException:
        close_all()
        with suppress(HardnessError, OSError):  # what failed is what matters
            remove_temporaries(folder)
            progress = measure(folder, plan)
            logger.info("stopped with %d of %d shards in %s", progress.done, progress.planned, folder)
        raise
    close_all()


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keeps Beam and its job servers from logging what `_run` reports by its message."""
    of_dofns, of_engines, hook = (
        logging.getLogger("apache_beam.runners.common"),
        logging.getLogger(),
        threading.excepthook,
    )

    def drop(_: logging.LogRecord) -> bool:
        return False

    def drop_chatter(record: logging.LogRecord) -> bool:
        return record.module not in _TALKERS

    def drop_lost_connections(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, grpc.RpcError):
            hook(arguments)

    of_dofns.addFilter(drop)
    of_engines.addFilter(drop_chatter)
    threading.excepthook = drop_lost_connections
    try:
        yield
    finally:
        of_dofns.removeFilter(drop)
        of_engines.removeFilter(drop_chatter)
        threading.excepthook = hook
