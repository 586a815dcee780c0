"""`python -m pipeline.tokenize_corpus`: text to block shards.

plan ─▶ skip what is published ─▶ tokenize ─▶ publish ─▶ manifest
"""

from __future__ import annotations

from collections.abc import Sequence

import apache_beam as beam

from pipeline import jobs
from pipeline.options import command_parser, parse, text_format
from pipeline.plan import Configuration, Plan, adopt_plan
from pipeline.publication import Provenance
from pipeline.transforms import PUBLISHED, PlannedSplits, Publish, Tokenize, WriteManifest
from scorer.console import run_command
from scorer.shards import DEFAULT_MANTISSA_BITS
from scorer.tokenizer import load_tokenizer


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    parser = command_parser("pipeline.tokenize_corpus", "Tokenizes text into 512-token blocks.")
    parser.add_argument("--tokenizer", required=True, metavar="NAME", help="a folder, or a name on the hub")
    flags, options = parse(parser, arguments)

    corpus = jobs.find_text(flags.input, flags.split_bytes, text_format(flags))
    tokenizer = load_tokenizer(flags.tokenizer)
    vocabulary = jobs.read_vocabulary(tokenizer, flags, corpus)
    configuration = Configuration(
        kind="blocks",
        tokenizer=vocabulary.to_json(),
        alm=None,
        dtype=None,
        mantissa_bits=None,
        **corpus.configuration(),
    )
    plan = adopt_plan(flags.output, Plan(configuration, corpus.splits()))
    jobs.prepare_output(flags.output, tokenizer, vocabulary)
    provenance = Provenance(vocabulary, None, None, None, None, DEFAULT_MANTISSA_BITS, jobs.versions())

    def build(pipeline: beam.Pipeline) -> None:
        splits = pipeline | PlannedSplits(flags.output, plan)
        published = (
            splits.missing
            | "Tokenize" >> beam.ParDo(Tokenize(flags.output, corpus.root, corpus.text_format, vocabulary))
            | "Publish" >> beam.ParDo(Publish(flags.output, provenance))
        )
        (splits[PUBLISHED], published) | WriteManifest(flags.output, plan)

    jobs.summarize(flags.output, jobs.run_job(flags.output, plan, options, build))
    return 0


if __name__ == "__main__":
    run_command(main)
