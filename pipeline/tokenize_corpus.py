"""`python -m pipeline.tokenize_corpus`: text to block shards.

plan ─▶ skip what is published ─▶ tokenize ─▶ publish ─▶ manifest
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.failures import Tolerance
from pipeline.inputs import find_text, read_vocabulary
from pipeline.job import Job, assemble_crew, versions
from pipeline.options import command_parser, parse, text_format
from pipeline.plan import Configuration, Plan
from pipeline.preview import preview
from pipeline.publication import Provenance
from pipeline.shard_making import KeepBlocks
from scorer import files
from scorer.console import run_command
from scorer.tokenizer import load_tokenizer


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    parser = command_parser("pipeline.tokenize_corpus", "Tokenizes text into 512-token blocks.")
    parser.add_argument("--tokenizer", required=True, metavar="NAME", help="a folder, or a name on the hub")
    flags, options = parse(parser, arguments)

    corpus = find_text(flags.input, flags.split_bytes, text_format(flags))
    tokenizer = load_tokenizer(flags.tokenizer)
    vocabulary = read_vocabulary(tokenizer, flags, corpus)
    configuration = Configuration(
        kind="blocks",
        tokenizer=vocabulary.to_json(),
        alm=None,
        dtype=None,
        mantissa_bits=None,
        **corpus.configuration(),
    )
    job = Job(
        folder=files.absolute(flags.output),
        corpus=corpus,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        plan=Plan(configuration, corpus.splits()),
        step=KeepBlocks(),
        provenance=Provenance(vocabulary, None, None, None, None, versions()),
        crew=assemble_crew(options),
        tolerance=Tolerance.parse(flags.max_rejected_documents),
    )
    if flags.dry_run:
        preview(job)
    else:
        job.run(options)
    return 0


if __name__ == "__main__":
    run_command(main)
