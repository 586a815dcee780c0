"""The steps of both jobs as Beam transforms; one element is one shard, from its split to its publication.

DoFns live here, in an installed module, so that workers on other machines can import them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import apache_beam as beam
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue

from pipeline.failures import SetAside, Tolerance
from pipeline.plan import Plan, Split, plan_path, read_plan
from pipeline.publication import PublishedShard, find_published, look_again, write_manifest
from pipeline.shard_making import PackedRecipe
from pipeline.supervision import Crew, Limits, Outcome, Supervisor
from scorer.errors import CorpusError, ShardError
from scorer.manifest import Manifest

PUBLISHED = "published"
"""Output tag for splits whose shard is already there."""


class PlannedSplits(beam.PTransform):
    """The plan's splits, spread over the workers; what is published already goes to the output `PUBLISHED`."""

    def __init__(self, folder: str, plan: Plan):
        super().__init__()
        self._folder = folder
        self._plan = plan

    def expand(self, begin: beam.Pipeline) -> beam.pvalue.DoOutputsTuple:
        """Applies the transform."""
        return (
            begin
            | "Plan" >> beam.Create(self._plan.splits)
            | "Spread" >> beam.Reshuffle()
            | "Skip what is published"
            >> beam.ParDo(SkipPublished(self._folder)).with_outputs(PUBLISHED, main="missing")
        )


class SkipPublished(beam.DoFn):
    """Splits without a sound shard; the others' shards go to `PUBLISHED`, re-hashed."""

    def __init__(self, folder: str):
        self._folder = folder

    def process(self, element: Split) -> Iterator[Split | beam.pvalue.TaggedOutput]:
        """One split."""
        published = find_published(self._folder, element)
        yield element if published is None else beam.pvalue.TaggedOutput(PUBLISHED, published)


class MakeShards(beam.DoFn):
    """Splits to published shards, by the worker processes of this machine; several splits are in flight at a time.

    Gives what became of each split, a `PublishedShard` or a `SetAside`, in whatever order they are done.
    """

    def __init__(self, recipe: PackedRecipe, crew: Crew, limits: Limits):
        self._recipe = recipe
        self._crew = crew
        self._limits = limits

    def setup(self) -> None:
        """Workers start with the first split."""
        self._supervisor = Supervisor(self._recipe, self._crew, self._limits)

    def process(self, element: Split) -> Iterator[Outcome]:
        """One split; gives what other splits became meanwhile."""
        yield from self._supervisor.submit(element)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Waits for the splits of the bundle that are still in flight."""
        for outcome in self._supervisor.drain():
            yield GlobalWindows.windowed_value(outcome)

    def teardown(self) -> None:
        """Ends the workers."""
        self._supervisor.close()


class WriteManifest(beam.PTransform):
    """The end of a job: every published shard, old and new, into the manifest."""

    def __init__(self, folder: str, tolerance: Tolerance):
        super().__init__()
        self._folder = folder
        self._tolerance = tolerance

    def expand(self, outcomes: Iterable[beam.PCollection]) -> beam.PCollection:
        """Applies the transform."""
        return (
            outcomes
            | "Old and new shards" >> beam.Flatten()
            | "When all are there" >> beam.Reshuffle()
            | "Hash once more" >> beam.Map(_look_again, self._folder)
            | "All shards" >> beam.GroupBy(_one_group)  # of few stages: on a cluster, each starts a process a slot
            | "Manifest" >> beam.Map(_finish, self._folder, self._tolerance)
        )


def _look_again(outcome: Outcome, folder: str) -> Outcome:
    return look_again(folder, outcome) if isinstance(outcome, PublishedShard) else outcome


def _one_group(_: Outcome) -> int:
    return 0


def _finish(group: tuple[int, Iterable[Outcome]], folder: str, tolerance: Tolerance) -> Manifest:
    """Writes the manifest if nothing stands against it."""
    outcomes = list(group[1])
    plan = read_plan(folder)
    if plan is None:
        raise ShardError(f"{plan_path(folder)} is gone: run the same command again")
    set_aside = [outcome for outcome in outcomes if isinstance(outcome, SetAside)]
    if set_aside:
        raise CorpusError(
            f"{len(set_aside)} of {len(plan.splits)} splits failed and were set aside; all others are published. "
            f"{set_aside[0].describe()}. Mend the cause, then run the same command again: it tries them again"
        )
    published = [outcome for outcome in outcomes if isinstance(outcome, PublishedShard)]
    rejected = sum(shard.rejected_documents for shard in published)
    tolerance.check(rejected, rejected + sum(shard.documents for shard in published))
    return write_manifest(folder, plan, published)
