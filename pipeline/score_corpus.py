"""`python -m pipeline.score_corpus`: text or block shards to hardness shards.

plan ─▶ skip what is published ─▶ tokenize (or read blocks) ─▶ score ─▶ publish ─▶ manifest
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from pipeline.failures import Tolerance
from pipeline.inputs import BlockInput, TextInput, find_input, read_vocabulary
from pipeline.job import LOCAL_RUNNERS, Job, assemble_crew, versions
from pipeline.options import command_parser, parse, text_format
from pipeline.plan import Configuration, Plan, read_plan
from pipeline.preview import preview
from pipeline.publication import Provenance
from pipeline.scoring import FLOAT8, AlmScorer, Scorer, Scoring
from scorer import files
from scorer.alm import DTYPES, check_alm, fingerprint_alm
from scorer.console import run_command
from scorer.devices import device_count, require_device
from scorer.errors import ConfigurationError
from scorer.manifest import TOKENIZER_FOLDER
from scorer.shards import DEFAULT_MANTISSA_BITS
from scorer.tokenizer import fingerprint, load_tokenizer
from scorer.vocabulary import Vocabulary, require_same_vocabulary

logger = logging.getLogger(__name__)

_MICRO_BATCH = {"cpu": 8, "cuda": 64}
"""Blocks. On a CPU neither speed nor bytes depend on it."""


def main(arguments: Sequence[str], scorer: Scorer | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the command line.
        scorer: scores in place of an ALM; `--alm` and what goes with it are then no flags, `--tokenizer` is needed
            for text.
    """
    flags, options = parse(_parser(has_scorer=scorer is not None), arguments)
    corpus = find_input(flags.input, flags.split_bytes, text_format(flags))
    if scorer is None:
        for warning in check_alm(flags.alm):
            logger.warning("%s", warning)
    tokenizer = load_tokenizer(_tokenizer_path(flags, corpus))
    vocabulary = read_vocabulary(tokenizer, flags, corpus)
    scorer = scorer or _alm_scorer(flags, options, vocabulary)
    configuration = Configuration(
        kind="hardness",
        tokenizer=vocabulary.to_json(),
        alm=dict(scorer.alm),
        dtype=scorer.dtype,
        mantissa_bits=flags.mantissa_bits,
        **corpus.configuration(),
    )
    job = Job(
        folder=files.absolute(flags.output),
        corpus=corpus,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        plan=Plan(configuration, corpus.splits()),
        step=Scoring(scorer, vocabulary, flags.mantissa_bits),
        provenance=Provenance(vocabulary, scorer.alm, scorer.device, scorer.dtype, scorer.micro_batch, versions()),
        crew=assemble_crew(options, getattr(scorer, "device_name", scorer.device)),
        tolerance=Tolerance.parse(flags.max_rejected_documents),
    )
    if flags.dry_run:
        preview(job)
    else:
        job.run(options)
    return 0


def _parser(has_scorer: bool) -> argparse.ArgumentParser:
    parser = command_parser("pipeline.score_corpus", "Scores every token of a corpus with a bidirectional ALM.")
    parser.add_argument("--tokenizer", metavar="NAME", help="a folder or a hub name (default: the ALM's)")
    parser.add_argument(
        "--mantissa_bits",
        type=int,
        default=DEFAULT_MANTISSA_BITS,
        choices=range(1, 24),
        metavar="BITS",
        help="of the stored perplexities, 1 to 23",
    )
    if has_scorer:
        return parser
    parser.add_argument("--alm", required=True, metavar="DIR", help="holds forward/ and backward/")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES, FLOAT8],
        help="(default: the plan's; else bfloat16 on cuda, else float32; float8 moves masks by about 1 %%)",
    )
    parser.add_argument(
        "--micro_batch", type=int, help="blocks a forward pass on a GPU (default: 64; a CPU takes what its caches hold)"
    )
    return parser


def _tokenizer_path(flags: argparse.Namespace, corpus: TextInput | BlockInput) -> str:
    if flags.tokenizer is not None:
        return str(flags.tokenizer)
    if isinstance(corpus, BlockInput):
        return files.join(corpus.root, TOKENIZER_FOLDER)
    if "alm" not in flags:
        raise ConfigurationError("--tokenizer is missing: expected a folder or a hub name")
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


def _alm_scorer(flags: argparse.Namespace, options: PipelineOptions, vocabulary: Vocabulary) -> AlmScorer:
    """Holds the ALM to the vocabulary, resolves device and dtype, and says which."""
    _check_tokenizer(flags.alm, vocabulary)
    device = flags.device or ("cuda" if device_count() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigurationError(f"--device {device}: expected cpu, cuda or cuda:N")
    if options.view_as(StandardOptions).runner in LOCAL_RUNNERS:
        require_device(device)
    existing = read_plan(flags.output)
    planned = existing.configuration.dtype if existing else None
    dtype = flags.dtype or planned or ("bfloat16" if device.startswith("cuda") else "float32")
    micro_batch = _MICRO_BATCH[device.partition(":")[0]] if flags.micro_batch is None else flags.micro_batch
    if micro_batch < 1:
        raise ConfigurationError(f"--micro_batch {micro_batch}: expected at least 1")
    logger.info("scoring on %s in %s", device, dtype)
    return AlmScorer(files.absolute(flags.alm), fingerprint_alm(flags.alm), device, dtype, micro_batch)


if __name__ == "__main__":
    run_command(main)
