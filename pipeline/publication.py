"""Putting shards, receipts and the manifest where readers find them: whole, once, and accounted for.

A shard's receipt is published just before the shard. Whatever dies in between leaves a receipt that is written again,
a temporary file that nobody reads, or a shard that the next run accepts; never half a shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.plan import Plan, Split
from pipeline.tokenization import TokenizedSplit
from scorer import files
from scorer.errors import ShardError
from scorer.manifest import (
    MANIFEST_NAME,
    RECEIPTS_FOLDER,
    REJECTS_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    Receipt,
    ShardEntry,
    read_manifest,
    read_receipt,
    receipt_path,
)
from scorer.shards import PERPLEXITY_COLUMNS, ShardContent, ShardMetadata, ShardReader, encode_shard, round_mantissa
from scorer.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_PUBLISH_ATTEMPTS = 3


@dataclass(frozen=True)
class ScoredSplit:
    """A tokenized split with the perplexities of its blocks, in memory between scoring and publication."""

    tokenized: TokenizedSplit
    forward_perplexity: npt.NDArray[np.float32]
    """float32 [N, 512], exp(nats), not rounded yet; 0 at special tokens."""
    backward_perplexity: npt.NDArray[np.float32]
    """float32 [N, 512], likewise."""
    clamped_values: int


@dataclass(frozen=True)
class Provenance:
    """What all shards of a job have in common in their footers."""

    vocabulary: Vocabulary
    alm: Mapping[str, str] | None
    device: str | None
    dtype: str | None
    micro_batch: int | None
    mantissa_bits: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class PublishedShard:
    """A shard that is in its place and was read back."""

    index: int
    receipt: Receipt

    @property
    def entry(self) -> ShardEntry:
        """The shard as the manifest lists it."""
        receipt = self.receipt
        return ShardEntry(receipt.shard, receipt.blocks, receipt.bytes, receipt.sha256, receipt.content_sha256)


def find_published(folder: str, split: Split) -> PublishedShard | None:
    """The shard of a split if it is published and its bytes are those of its receipt.

    A damaged shard is renamed aside, and the manifest with it removed, since the folder is no longer complete.
    """
    path = files.join(folder, split.shard)
    if not files.exists(path):
        return None
    receipt = read_receipt(folder, split.index)
    if receipt is not None and (receipt.sha256, receipt.bytes) == files.sha256(path):
        return PublishedShard(split.index, receipt)
    files.remove(files.join(folder, MANIFEST_NAME))
    aside = files.set_aside(path)
    logger.warning("%s does not have the bytes of its receipt; renamed to %s, and made again", path, aside)
    return None


def publish_split(folder: str, result: TokenizedSplit | ScoredSplit, provenance: Provenance) -> PublishedShard:
    """Writes a split's receipt and shard, and reads the shard back.

    Where another attempt at the same split was faster, its shard stays and is vouched for.
    """
    tokenized = result.tokenized if isinstance(result, ScoredSplit) else result
    content, clamped = _content(result, provenance.mantissa_bits)
    metadata = _metadata(tokenized, content, clamped, provenance)
    data = encode_shard(content, metadata)
    receipt = _receipt(tokenized, metadata, data)
    path = files.join(folder, tokenized.split.shard)
    for _ in range(_PUBLISH_ATTEMPTS):
        try:
            files.replace(receipt_path(folder, tokenized.split.index), files.to_json(receipt.to_json()))
            files.publish(path, data)
        except FileNotFoundError:
            continue  # another driver finished and swept our temporary file away
        sha256, length = files.sha256(path)
        if sha256 != receipt.sha256:
            # Another attempt on other hardware was first: same blocks, scores within the stated error. Vouch for it.
            content_sha256 = _same_blocks_sha256(path, content)
            receipt = replace(receipt, sha256=sha256, bytes=length, content_sha256=content_sha256)
            files.replace(receipt_path(folder, tokenized.split.index), files.to_json(receipt.to_json()))
        return PublishedShard(tokenized.split.index, receipt)
    raise ShardError(f"{path} could not be published: its temporary files keep vanishing from the folder")


def write_manifest(folder: str, plan: Plan, published: Iterable[PublishedShard]) -> Manifest:
    """Merges the rejects, tidies up, and publishes the manifest, last.

    Raises:
        ShardError: a planned shard is missing.
    """
    shards = sorted(published, key=lambda shard: shard.index)
    missing = {split.shard for split in plan.splits} - {shard.receipt.shard for shard in shards}
    if missing or len(shards) != len(plan.splits):
        raise ShardError(_missing_message(folder, missing, len(plan.splits)))
    receipts = [shard.receipt for shard in shards]
    files.keep_or_replace(files.join(folder, REJECTS_NAME), merge_rejects(receipts))
    for swept in (folder, files.join(folder, RECEIPTS_FOLDER), files.join(folder, TOKENIZER_FOLDER)):
        files.remove_temporaries(swept)
    manifest = Manifest(
        documents=sum(receipt.documents for receipt in receipts),
        rejected_documents=sum(receipt.rejected_documents for receipt in receipts),
        leftover_tokens=sum(receipt.leftover_tokens for receipt in receipts),
        tokenizer=Vocabulary.from_json(plan.configuration.tokenizer).fingerprints,
        alm=plan.configuration.alm,
        shards=[shard.entry for shard in shards],
    )
    files.keep_or_replace(files.join(folder, MANIFEST_NAME), files.to_json(manifest.to_json()))
    return manifest


def check_published(folder: str, plan: Plan) -> Manifest:
    """The driver's own look after the job: every planned shard is in the manifest and on disk, at its size.

    Raises:
        ShardError: a runner lost something without saying so.
    """
    manifest = read_manifest(folder)
    listed = {shard.name: shard.bytes for shard in manifest.shards}
    missing = {
        split.shard
        for split in plan.splits
        if split.shard not in listed
        or not files.exists(files.join(folder, split.shard))
        or files.size(files.join(folder, split.shard)) != listed[split.shard]
    }
    if missing:
        raise ShardError(_missing_message(folder, missing, len(plan.splits)))
    return manifest


def _missing_message(folder: str, missing: set[str], planned: int) -> str:
    some = ", ".join(sorted(missing)[:3])
    return f"{folder}: {len(missing)} of {planned} planned shards are missing ({some}…); run the same command again"


def _content(result: TokenizedSplit | ScoredSplit, mantissa_bits: int) -> tuple[ShardContent, int]:
    if isinstance(result, TokenizedSplit):
        return ShardContent(result.input_ids), 0
    perplexities = {name: round_mantissa(getattr(result, name), mantissa_bits) for name in PERPLEXITY_COLUMNS}
    return ShardContent(result.tokenized.input_ids, **perplexities), result.clamped_values


def _metadata(
    tokenized: TokenizedSplit, content: ShardContent, clamped_values: int, provenance: Provenance
) -> ShardMetadata:
    return ShardMetadata(
        vocabulary=provenance.vocabulary,
        alm=provenance.alm,
        split=tokenized.source,
        documents=tokenized.documents,
        blocks=len(tokenized.input_ids),
        rejected_documents=tokenized.rejected_documents,
        leftover_tokens=tokenized.leftover_tokens,
        clamped_values=clamped_values,
        device=provenance.device,
        dtype=provenance.dtype,
        micro_batch=provenance.micro_batch,
        versions=provenance.versions,
        content_sha256=content.sha256(),
    )


def _receipt(tokenized: TokenizedSplit, metadata: ShardMetadata, data: bytes) -> Receipt:
    return Receipt(
        shard=tokenized.split.shard,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        content_sha256=metadata.content_sha256,
        documents=metadata.documents,
        blocks=metadata.blocks,
        rejected_documents=metadata.rejected_documents,
        leftover_tokens=metadata.leftover_tokens,
        lines=tokenized.lines,
        rejects=tokenized.rejects,
    )


def _same_blocks_sha256(path: str, ours: ShardContent) -> str:
    """The content fingerprint of a sound published shard that holds the same blocks as ours."""
    with ShardReader(path) as reader:
        published = reader.read()
    content_sha256 = published.sha256()
    if content_sha256 != reader.metadata.content_sha256 or not np.array_equal(published.input_ids, ours.input_ids):
        raise ShardError(f"{path} was published by another attempt with other blocks: did the corpus change meanwhile?")
    return content_sha256


def merge_rejects(receipts: list[Receipt]) -> bytes:
    """JSON lines in plan order, their line numbers made absolute by the lines of the splits before."""
    lines_before: Counter[str] = Counter()
    merged = []
    for receipt in receipts:
        for reject in receipt.rejects:
            before = lines_before[reject.file] if reject.unit == "line" else 0
            absolute = replace(reject, line=reject.line + before)
            merged.append(json.dumps(absolute.to_json(), ensure_ascii=False) + "\n")
        lines_before.update(receipt.lines)
    return "".join(merged).encode()
