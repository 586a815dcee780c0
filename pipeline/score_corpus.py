"""`python -m pipeline.score_corpus`: text or block shards to hardness shards.

plan ─▶ skip what is published ─▶ tokenize (or read blocks) ─▶ score ─▶ publish ─▶ manifest
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence

import apache_beam as beam
import torch
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from pipeline import jobs
from pipeline.jobs import BlockInput, TextInput
from pipeline.options import command_parser, parse, text_format
from pipeline.plan import Configuration, Plan, adopt_plan, read_plan
from pipeline.publication import Provenance
from pipeline.scoring import AlmHandler, Score, ScoringSettings
from pipeline.transforms import PUBLISHED, PlannedSplits, Publish, ReadBlockShard, Tokenize, WriteManifest
from scorer import files
from scorer.alm import DTYPES, check_alm, fingerprint_alm, require_device
from scorer.console import run_command
from scorer.errors import ConfigurationError
from scorer.manifest import TOKENIZER_FOLDER
from scorer.shards import DEFAULT_MANTISSA_BITS
from scorer.tokenizer import fingerprint, load_tokenizer
from scorer.vocabulary import Vocabulary, require_same_vocabulary

logger = logging.getLogger(__name__)

_LOCAL_RUNNERS = ("FnApiRunner", "DirectRunner", "BundleBasedDirectRunner", "PrismRunner")


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    flags, options = parse(_parser(), arguments)
    corpus = jobs.find_input(flags.input, flags.split_bytes, text_format(flags))
    for warning in check_alm(flags.alm):
        logger.warning("%s", warning)
    tokenizer = load_tokenizer(_tokenizer_path(flags, corpus))
    vocabulary = jobs.read_vocabulary(tokenizer, flags, corpus)
    _check_tokenizer(flags.alm, vocabulary)
    settings = _settings(flags, options)
    alm = fingerprint_alm(flags.alm)
    configuration = Configuration(
        kind="hardness",
        tokenizer=vocabulary.to_json(),
        alm=alm,
        dtype=settings.dtype,
        mantissa_bits=flags.mantissa_bits,
        **corpus.configuration(),
    )
    plan = adopt_plan(flags.output, Plan(configuration, corpus.splits()))
    jobs.prepare_output(flags.output, tokenizer, vocabulary)
    provenance = Provenance(
        vocabulary,
        alm,
        settings.device.partition(":")[0],
        settings.dtype,
        settings.micro_batch,
        flags.mantissa_bits,
        jobs.versions(),
    )
    read = (
        ReadBlockShard(corpus.root, corpus.fingerprints)
        if isinstance(corpus, BlockInput)
        else Tokenize(flags.output, corpus.root, corpus.text_format, vocabulary)
    )

    def build(pipeline: beam.Pipeline) -> None:
        splits = pipeline | PlannedSplits(flags.output, plan)
        published = (
            splits.missing
            | "Tokenize" >> beam.ParDo(read)
            | "Score" >> Score(AlmHandler(settings, vocabulary, flags.output))
            | "Publish" >> beam.ParDo(Publish(flags.output, provenance))
        )
        (splits[PUBLISHED], published) | WriteManifest(flags.output, plan)

    jobs.summarize(flags.output, jobs.run_job(flags.output, plan, options, build))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("pipeline.score_corpus", "Scores every token of a corpus with a bidirectional ALM.")
    parser.add_argument("--alm", required=True, metavar="DIR", help="holds forward/ and backward/")
    parser.add_argument("--tokenizer", metavar="NAME", help="a folder or a hub name (default: the ALM's)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="(default: the plan's; else bfloat16 on cuda, else float32)"
    )
    parser.add_argument("--micro_batch", type=int, default=8, help="blocks a forward pass")
    parser.add_argument(
        "--mantissa_bits",
        type=int,
        default=DEFAULT_MANTISSA_BITS,
        choices=range(1, 24),
        metavar="BITS",
        help="of the stored perplexities, 1 to 23",
    )
    return parser


def _tokenizer_path(flags: argparse.Namespace, corpus: TextInput | BlockInput) -> str:
    if flags.tokenizer is not None:
        return str(flags.tokenizer)
    if isinstance(corpus, BlockInput):
        return files.join(corpus.root, TOKENIZER_FOLDER)
    return str(flags.alm)


def _check_tokenizer(folder: str, vocabulary: Vocabulary) -> None:
    """Refuses an ALM of another vocabulary, and warns of what is merely suspicious."""
    check_alm(folder, vocabulary.size)
    if not files.exists(files.join(folder, "tokenizer_config.json")):
        logger.warning("%s has no tokenizer of its own to hold the corpus's against", folder)
        return
    same = require_same_vocabulary(
        fingerprint(load_tokenizer(folder)),
        vocabulary.fingerprints,
        f"the ALM {folder} and the tokenizer",
        "score with the ALM's own tokenizer (leave --tokenizer out)",
    )
    if not same:
        logger.warning("merges or pre-tokenizer of the tokenizer differ from those the ALM was trained with")


def _settings(flags: argparse.Namespace, options: PipelineOptions) -> ScoringSettings:
    """Resolves device and dtype, and says which."""
    if flags.micro_batch < 1:
        raise ConfigurationError(f"--micro_batch {flags.micro_batch}: expected at least 1")
    device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigurationError(f"--device {device}: expected cpu, cuda or cuda:N")
    if options.view_as(StandardOptions).runner in _LOCAL_RUNNERS:
        require_device(device)
    existing = read_plan(flags.output)
    planned = existing.configuration.dtype if existing else None
    dtype = flags.dtype or planned or ("bfloat16" if device.startswith("cuda") else "float32")
    logger.info("scoring on %s in %s, %d blocks a forward pass", device, dtype, flags.micro_batch)
    return ScoringSettings(flags.alm, device, dtype, flags.micro_batch)


if __name__ == "__main__":
    run_command(main)
