"""`python -m benchmarks.bare_loop`: the shards of a job in one loop, without Beam, supervisor, plan or manifest.

The flags are those of `benchmarks.trivial_job`, so that the two can be held against each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.trivial_scorer import TrivialScorer
from pipeline.inputs import find_text, read_vocabulary
from pipeline.job import versions
from pipeline.options import command_parser, parse, text_format
from pipeline.publication import Provenance
from pipeline.scoring import Scoring
from pipeline.shard_making import Recipe
from pipeline.sources import TextSource
from scorer import files
from scorer.console import run_command
from scorer.manifest import RECEIPTS_FOLDER
from scorer.shards import DEFAULT_MANTISSA_BITS
from scorer.tokenizer import load_tokenizer


def main(arguments: Sequence[str]) -> int:
    """Runs the loop."""
    parser = command_parser("benchmarks.bare_loop", "The shards of a job in one loop, without a job.")
    parser.add_argument("--tokenizer", required=True)
    flags, _ = parse(parser, arguments)
    corpus = find_text(flags.input, flags.split_bytes, text_format(flags))
    vocabulary = read_vocabulary(load_tokenizer(flags.tokenizer), flags, corpus)
    scorer = TrivialScorer()
    recipe = Recipe(
        flags.output,
        TextSource(corpus.root, corpus.text_format, flags.tokenizer, vocabulary),
        Scoring(scorer, vocabulary, DEFAULT_MANTISSA_BITS),
        Provenance(vocabulary, scorer.alm, scorer.device, scorer.dtype, scorer.micro_batch, versions()),
    )
    files.make_folder(files.join(flags.output, RECEIPTS_FOLDER))
    maker = recipe.open()
    for split in corpus.splits():
        maker.make(split, careful=False)
    return 0


if __name__ == "__main__":
    run_command(main)
