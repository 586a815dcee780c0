"""The steps of both jobs as Beam transforms; one element is one shard, from its split to its publication.

DoFns live here, in an installed module, so that workers on other machines can import them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import apache_beam as beam

from pipeline.corpus import TextFormat
from pipeline.plan import Plan, Split
from pipeline.publication import (
    Provenance,
    PublishedShard,
    ScoredSplit,
    find_published,
    publish_split,
    write_manifest,
)
from pipeline.tokenization import SplitTokenizer, TokenizedSplit
from scorer import files
from scorer.errors import ShardError
from scorer.manifest import TOKENIZER_FOLDER, read_receipt
from scorer.shards import ShardReader
from scorer.tokenizer import load_tokenizer
from scorer.vocabulary import Vocabulary

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


class Tokenize(beam.DoFn):
    """Text splits to blocks, with the tokenizer that the job saved in its output folder."""

    def __init__(self, folder: str, root: str, text_format: TextFormat, vocabulary: Vocabulary):
        self._folder = folder
        self._root = root
        self._format = text_format
        self._vocabulary = vocabulary

    def setup(self) -> None:
        """Loads the tokenizer, once a worker."""
        tokenizer = load_tokenizer(files.join(self._folder, TOKENIZER_FOLDER))
        self._tokenizer = SplitTokenizer(self._root, self._format, tokenizer, self._vocabulary)

    def process(self, element: Split) -> Iterator[TokenizedSplit]:
        """One split."""
        yield self._tokenizer.tokenize(element)


class ReadBlockShard(beam.DoFn):
    """Block shards as they are, with their account of documents and rejects."""

    def __init__(self, block_folder: str, fingerprints: Mapping[str, str]):
        self._folder = block_folder
        self._fingerprints = fingerprints

    def process(self, element: Split) -> Iterator[TokenizedSplit]:
        """One split, which is one block shard."""
        with ShardReader(files.join(self._folder, element.shard)) as reader:
            metadata, content = reader.metadata, reader.read(perplexities=False)
        receipt = read_receipt(self._folder, element.index)
        if receipt is None or content.sha256() != self._fingerprints[element.shard]:
            raise ShardError(
                f"{files.join(self._folder, element.shard)} or its receipt is not what the manifest lists: "
                "run tokenize_corpus again; it makes damaged shards anew"
            )
        yield TokenizedSplit(
            split=element,
            input_ids=content.input_ids,
            source=metadata.split,
            documents=metadata.documents,
            leftover_tokens=metadata.leftover_tokens,
            rejected_documents=metadata.rejected_documents,
            lines=receipt.lines,
            rejects=receipt.rejects,
        )


class Publish(beam.DoFn):
    """Blocks or scored blocks to a shard in its place, and its receipt."""

    def __init__(self, folder: str, provenance: Provenance):
        self._folder = folder
        self._provenance = provenance

    def process(self, element: TokenizedSplit | ScoredSplit) -> Iterator[PublishedShard]:
        """One split."""
        yield publish_split(self._folder, element, self._provenance)


class WriteManifest(beam.PTransform):
    """The end of a job: every published shard, old and new, into the manifest."""

    def __init__(self, folder: str, plan: Plan):
        super().__init__()
        self._folder = folder
        self._plan = plan

    def expand(self, published: Iterable[beam.PCollection]) -> beam.PCollection:
        """Applies the transform."""
        return (
            published
            | "Old and new shards" >> beam.Flatten()
            | "All shards" >> beam.combiners.ToList()
            | "Manifest"
            >> beam.Map(lambda shards, folder, plan: write_manifest(folder, plan, shards), self._folder, self._plan)
        )
