"""Command-line flags of the jobs: ours here, Beam's own passed through and held to what Beam declares."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

# The private parser is the only one that takes the value providers that some of Beam's option classes declare.
from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

from pipeline.corpus import DEFAULT_ENCODING, DEFAULT_MAX_DOCUMENT_BYTES, TextFormat
from pipeline.plan import DEFAULT_SPLIT_BYTES
from scorer.errors import ConfigurationError

_DEFAULTS = {
    "--runner": "FnApiRunner",  # Beam's local runner, in this process; its DirectRunner would download another one
    "--direct_running_mode": "multi_processing",
    "--direct_num_workers": "0",  # one a core or GPU
}
"""Of Beam's options, where ours differ from Beam's own."""


def command_parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser for `python -m module`, with the flags that every job of the pipeline has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog="Any option of Apache Beam may follow, as in --runner FlinkRunner --parallelism 8.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or quoted globs")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of shards; run again to resume")
    parser.add_argument("--start_token", help="frames blocks on the left (default: bos, else cls)")
    parser.add_argument("--end_token", help="frames blocks on the right, separates documents (default: eos, else sep)")
    parser.add_argument(
        "--split_bytes", type=_positive, default=None, help=f"text a shard, in bytes (default: {DEFAULT_SPLIT_BYTES})"
    )
    parser.add_argument("--text_field", default="text", help="the field of a JSON line, or Parquet column, of the text")
    parser.add_argument(
        "--txt_document", choices=["blank-line", "line", "file"], default="blank-line", help="what a .txt document is"
    )
    parser.add_argument(
        "--max_rejected_documents",
        metavar="LIMIT",
        help="end with an error beyond so many bad documents, as 100 or 1%% (default: no limit)",
    )
    parser.add_argument(
        "--max_document_bytes",
        type=_positive,
        default=DEFAULT_MAX_DOCUMENT_BYTES,
        help="longer documents are rejected",
    )
    parser.add_argument(
        "--encoding", default=DEFAULT_ENCODING, help="of the text, as Python names it; its line endings must be ASCII's"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="say what would be done and how long it would take; write nothing"
    )
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, PipelineOptions]:
    """Parses our flags, and hands the rest to Beam.

    Raises:
        ConfigurationError: a flag that neither of us knows; Beam alone would swallow it in silence.
    """
    ours, rest = parser.parse_known_args(list(arguments))
    given = {argument.split("=")[0] for argument in rest}
    rest = [*rest, *(f"{flag}={value}" for flag, value in _DEFAULTS.items() if flag not in given)]
    if "--direct_running_mode" in given and "--direct_num_workers" not in given:
        rest = [*rest, "--direct_num_workers=1"]
    beams = _BeamArgumentParser(allow_abbrev=False, add_help=False, conflict_handler="resolve")
    for options in _descendants(PipelineOptions):
        if "_add_argparse_args" in vars(options):
            options._add_argparse_args(beams)
    _, unknown = beams.parse_known_args(rest)
    if unknown:
        raise ConfigurationError(f"unknown flag {' '.join(unknown)}: see {parser.prog} --help, and Beam's options")
    return ours, PipelineOptions(rest)


def text_format(flags: argparse.Namespace) -> TextFormat:
    """The flags that say how files are cut into documents."""
    return TextFormat(flags.text_field, flags.txt_document, flags.max_document_bytes, flags.encoding)


def _descendants(options: type) -> list[Any]:
    children: list[Any] = options.__subclasses__()
    return children + [grandchild for child in children for grandchild in _descendants(child)]


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected a whole number of at least 1")
    return number
