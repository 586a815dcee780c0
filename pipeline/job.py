"""One run of a job: guarded, reported, stopped cleanly, and held to its plan afterwards.

plan ─▶ skip what is published ─▶ make shards (tokenize, score, publish) ─▶ manifest
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions

from pipeline.failures import forget_set_aside
from pipeline.lease import holding
from pipeline.plan import Plan
from pipeline.progress import STALLED_SECONDS, describe_progress, measure, reporting_progress
from pipeline.publication import check_published, remove_temporaries
from pipeline.shard_making import Recipe
from pipeline.supervision import Crew, Limits, close_all
from pipeline.transforms import PUBLISHED, MakeShards, PlannedSplits, WriteManifest
from scorer import errors
from scorer.devices import device_count
from scorer.errors import ConfigurationError, HardnessError
from scorer.manifest import Manifest

logger = logging.getLogger(__name__)

LOCAL_RUNNERS = ("FnApiRunner", "DirectRunner", "BundleBasedDirectRunner", "PrismRunner")
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
    workers = wanted or there
    if direct.direct_running_mode != "multi_processing":
        return Crew(processes=0, threads=max(workers, threads), cores=None)
    return Crew(processes=workers, threads=threads, cores=max(1, cores // workers))


def run_job(plan: Plan, recipe: Recipe, crew: Crew, limits: Limits, options: PipelineOptions) -> Manifest:
    """Runs a job to its end, and holds the folder to the plan afterwards.

    Raises:
        HardnessError: the job failed, with the message of whatever failed in a worker.
        ConfigurationError: another driver is at work in the folder.
        ShardError: the runner reported success, but a planned shard is missing.
    """
    folder = recipe.folder
    if options.view_as(StandardOptions).runner in LOCAL_RUNNERS:
        # One thread of Beam's hands out the splits; the crew does the work.
        direct = options.view_as(DirectOptions)
        direct.direct_running_mode, direct.direct_num_workers = "in_memory", 1
    with holding(folder):
        remove_temporaries(folder, older_than=STALLED_SECONDS)
        forget_set_aside(folder)
        pipeline = beam.Pipeline(options=options)
        splits = pipeline | PlannedSplits(folder, plan)
        made = splits.missing | "Make shards" >> beam.ParDo(MakeShards(recipe, crew, limits))
        (splits[PUBLISHED], made) | WriteManifest(folder, plan, limits.tolerance)
        with reporting_progress(folder, plan), _workers_ended(folder, plan), _without_worker_tracebacks():
            _run(pipeline)
        return check_published(folder, plan)


def summarize(folder: str, manifest: Manifest) -> None:
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


def _run(pipeline: beam.Pipeline) -> None:
    """Runs a pipeline, and finds our own error in what the runner made of it."""
    try:
        pipeline.run().wait_until_finish()
    except HardnessError:
        raise
    except Exception as error:
        if re.search(r"^KeyboardInterrupt\b|: KeyboardInterrupt\b", str(error), re.MULTILINE):
            raise KeyboardInterrupt from error
        ours = _workers_error(error)
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
        remove_temporaries(folder)
        logger.info("stopped: %s are in %s", describe_progress(measure(folder, plan)), folder)
        raise
    close_all()


@contextmanager
def _without_worker_tracebacks() -> Iterator[None]:
    """Keeps Beam from logging a traceback for what `run_job` reports by its message."""
    logger_of_dofns = logging.getLogger("apache_beam.runners.common")

    def drop(_: logging.LogRecord) -> bool:
        return False

    logger_of_dofns.addFilter(drop)
    try:
        yield
    finally:
        logger_of_dofns.removeFilter(drop)


def _workers_error(error: Exception) -> HardnessError | None:
    """Finds our own error in what a runner made of it: workers report failures as the text of a traceback."""
    found = re.findall(r"scorer\.errors\.(\w+): (.*?)(?: \[while running|\n|$)", str(error))
    kind = getattr(errors, found[-1][0], None) if found else None
    return kind(found[-1][1]) if kind is not None else None
