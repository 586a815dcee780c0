"""`python -m pipeline.verify DIR`: every checksum, count, range and fingerprint of a finished folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import track

from pipeline.plan import Plan, read_plan
from pipeline.publication import merge_rejects
from scorer import files
from scorer.console import run_command
from scorer.errors import ConfigurationError, HardnessError, ShardError
from scorer.manifest import (
    MANIFEST_NAME,
    REJECTS_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    Receipt,
    ShardEntry,
    read_manifest,
    read_receipt,
)
from scorer.shards import PERPLEXITY_COLUMNS, ShardContent, ShardMetadata, ShardReader
from scorer.tokenizer import fingerprint, load_tokenizer
from scorer.vocabulary import Vocabulary


def main(arguments: Sequence[str]) -> int:
    """Runs the command; exit code 1 and the reasons on any fault."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.verify",
        description="Checks a finished folder of shards: every checksum, count, range and fingerprint.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="what a job was given as --output")
    flags = parser.parse_args(list(arguments))
    if not files.is_folder(flags.folder):
        raise ConfigurationError(f"there is no folder {flags.folder}")
    found = 0
    for fault in find_faults(flags.folder):
        print(f"fault: {fault}", file=sys.stderr)
        found += 1
    if found:
        print(f"{flags.folder}: {found} fault(s); run the job that wrote it again to mend them", file=sys.stderr)
        return 1
    manifest = read_manifest(flags.folder)
    print(f"{flags.folder} is sound: {len(manifest.shards)} shards, {manifest.blocks} blocks, {manifest.tokens} tokens")
    return 0


def find_faults(folder: str) -> Iterator[str]:
    """Yields every fault of a folder, each naming the shard and, where there is one, the row."""
    try:
        manifest, plan = read_manifest(folder), read_plan(folder)
        if plan is None:
            raise ShardError(f"{folder} has no plan")
    except HardnessError as error:
        yield str(error)
        return
    yield from _folder_faults(folder, manifest, plan)
    for index, entry in track(list(enumerate(manifest.shards)), "verifying", disable=not sys.stderr.isatty()):
        for fault in _shard_faults(folder, index, entry, plan):
            yield f"{entry.name}: {fault}"


def _folder_faults(folder: str, manifest: Manifest, plan: Plan) -> Iterator[str]:
    listed = [entry.name for entry in manifest.shards]
    if listed != [split.shard for split in plan.splits]:
        yield f"{MANIFEST_NAME} lists other shards than the plan"
    for name in files.names(folder):
        if name.endswith(".parquet") and name not in listed:
            yield f"{name}: not in the manifest"
    found = [read_receipt(folder, index) for index in range(len(listed))]
    receipts = [receipt for receipt in found if receipt is not None]
    if len(receipts) == len(listed):
        yield from _account_faults(folder, receipts)
    vocabulary = Vocabulary.from_json(plan.configuration.tokenizer)
    if dict(manifest.tokenizer) != vocabulary.fingerprints or manifest.alm != plan.configuration.alm:
        yield f"{MANIFEST_NAME} has other fingerprints than the plan"
    try:
        if fingerprint(load_tokenizer(files.join(folder, TOKENIZER_FOLDER))) != vocabulary.fingerprints:
            yield f"{TOKENIZER_FOLDER}/ holds another tokenizer than the plan's"
    except HardnessError as error:
        yield str(error)


def _account_faults(folder: str, receipts: list[Receipt]) -> Iterator[str]:
    """Holds the manifest's counts, as they stand in the file, and the rejects to the receipts."""
    written = files.read_json(files.join(folder, MANIFEST_NAME))
    for name in ("documents", "blocks", "tokens", "rejected_documents", "leftover_tokens"):
        counted = sum(getattr(receipt, name) for receipt in receipts)
        if written.get(name) != counted:
            yield f"{MANIFEST_NAME} says {written.get(name)} {name}, the receipts {counted}"
    path = files.join(folder, REJECTS_NAME)
    if not files.exists(path):
        yield f"{REJECTS_NAME} is missing"
    elif files.read_bytes(path) != b"".join(merge_rejects(receipts)):
        yield f"{REJECTS_NAME} does not list the rejects of the receipts"


def _shard_faults(folder: str, index: int, entry: ShardEntry, plan: Plan) -> Iterator[str]:
    path = files.join(folder, entry.name)
    if not files.exists(path):
        yield "missing"
        return
    sha256, length = files.sha256(path)
    if length != entry.bytes:
        yield f"{length} bytes, the manifest says {entry.bytes}"
    elif sha256 != entry.sha256:
        yield "its bytes are not those of the manifest (SHA-256 differs)"
    receipt = read_receipt(folder, index)
    if receipt is None:
        yield "no receipt that can be read"
    elif receipt.entry != entry:
        yield "the receipt and the manifest disagree"
    try:
        reader = ShardReader(path)
    except ShardError as error:
        yield str(error)
        return
    with reader:
        yield from _footer_faults(reader, entry, plan, index)
        if receipt is not None:
            yield from _count_faults(reader.metadata, receipt)
        yield from _content_faults(reader, entry)


def _count_faults(metadata: ShardMetadata, receipt: Receipt) -> Iterator[str]:
    for name in ("documents", "rejected_documents", "leftover_tokens"):
        if getattr(metadata, name) != getattr(receipt, name):
            yield f"its footer says {getattr(metadata, name)} {name}, its receipt {getattr(receipt, name)}"


def _footer_faults(reader: ShardReader, entry: ShardEntry, plan: Plan, index: int) -> Iterator[str]:
    metadata = reader.metadata
    if not len(reader) == metadata.blocks == entry.blocks:
        yield f"{len(reader)} rows, its footer says {metadata.blocks}, the manifest {entry.blocks}"
    if metadata.vocabulary != Vocabulary.from_json(plan.configuration.tokenizer):
        yield "its footer names another tokenizer than the plan"
    ranges = [asdict(range_) for range_ in plan.splits[index].ranges]
    if plan.configuration.source == "text" and metadata.split != ranges:
        yield "it was made from another split than the plan has for it"
    if metadata.alm != plan.configuration.alm or metadata.dtype != plan.configuration.dtype:
        yield "its footer names another ALM or dtype than the plan"


def _content_faults(reader: ShardReader, entry: ShardEntry) -> Iterator[str]:
    try:
        content = reader.read()
    except ShardError as error:
        yield str(error)
        return
    if not content.sha256() == reader.metadata.content_sha256 == entry.content_sha256:
        yield "its values are not those that were written (content SHA-256 differs)"
    for what, wrong in _wrong_values(content, reader.metadata):
        rows = np.flatnonzero(wrong.any(axis=1))
        if len(rows):
            column = int(np.flatnonzero(wrong[rows[0]])[0])
            yield f"row {rows[0]}, position {column}: {what} ({len(rows)} row(s) in all)"


def _wrong_values(content: ShardContent, metadata: ShardMetadata) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """What is wrong, and where: bool [N, 512]."""
    vocabulary = metadata.vocabulary
    ids = content.input_ids.astype(np.int64)
    yield "an id that the tokenizer does not have", ids >= vocabulary.size
    frame = np.zeros(ids.shape, dtype=bool)
    frame[:, 0], frame[:, -1] = ids[:, 0] != vocabulary.start_id, ids[:, -1] != vocabulary.end_id
    yield "not the frame token", frame
    is_special = vocabulary.special_mask()[np.minimum(ids, vocabulary.size - 1)]
    for name in PERPLEXITY_COLUMNS:
        values: npt.NDArray[Any] | None = getattr(content, name)
        if values is None:
            continue
        yield f"{name} is not finite", ~np.isfinite(values)
        yield f"{name} of an ordinary token is below 1", ~is_special & (values < 1)
        yield f"{name} of a special token is not 0", is_special & (values != 0)


if __name__ == "__main__":
    run_command(main)
