"""`python -m pipeline.tokenize_corpus`: text to block shards.

plan ─▶ skip what is published ─▶ tokenize ─▶ publish ─▶ manifest
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import jobs
from pipeline.failures import Tolerance
from pipeline.job import assemble_crew, run_job, summarize
from pipeline.options import command_parser, parse, text_format
from pipeline.plan import Configuration, Plan, adopt_plan
from pipeline.publication import Provenance
from pipeline.shard_making import KeepBlocks, Recipe
from pipeline.supervision import Limits
from scorer.console import run_command
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
    recipe = Recipe(
        folder=flags.output,
        source=corpus.source(flags.output, vocabulary),
        step=KeepBlocks(),
        provenance=Provenance(vocabulary, None, None, None, None, jobs.versions()),
    )
    limits = Limits(Tolerance.parse(flags.max_rejected_documents), len(plan.splits), 0)
    summarize(flags.output, run_job(plan, recipe, assemble_crew(options), limits, options))
    return 0


if __name__ == "__main__":
    run_command(main)
