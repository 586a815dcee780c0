"""Putting shards, receipts and the manifest where readers find them: whole, once, and accounted for.

A shard's receipt is published just before the shard. Whatever dies in between leaves a receipt that is written again,
a temporary file that nobody reads, or a shard that the next run accepts; never half a shard.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.plan import Plan, Split
from pipeline.tokenization import Account
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
    read_receipts,
    receipt_path,
)
from scorer.shard_writing import ShardBuffer, write_shard
from scorer.shards import ShardMetadata, ShardReader
from scorer.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_PUBLISH_ATTEMPTS = 3


@dataclass(frozen=True)
class Draft:
    """A shard before it is published."""

    split: Split
    rows: ShardBuffer
    account: Account
    clamped_values: int


@dataclass(frozen=True)
class Provenance:
    """What all shards of a job have in common in their footers."""

    vocabulary: Vocabulary
    alm: Mapping[str, str] | None
    device: str | None
    dtype: str | None
    micro_batch: int | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class PublishedShard:
    """A shard that is in its place and was read back; small, because all of them meet where the manifest is made."""

    index: int
    entry: ShardEntry
    """The shard as the manifest lists it."""
    documents: int
    rejected_documents: int
    leftover_tokens: int

    @classmethod
    def of(cls, index: int, receipt: Receipt) -> PublishedShard:
        """What a shard's receipt says, less its rejects."""
        return cls(index, receipt.entry, receipt.documents, receipt.rejected_documents, receipt.leftover_tokens)


def find_published(folder: str, split: Split) -> PublishedShard | None:
    """The shard of a split if it is published and its bytes are those of its receipt.

    A damaged shard is renamed aside; with it, or with one that is missing, the manifest goes, since the folder is no
    longer complete.
    """
    path = files.join(folder, split.shard)
    receipt = read_receipt(folder, split.index)
    if receipt is not None and _has_bytes(path, receipt.entry):
        return PublishedShard.of(split.index, receipt)
    files.remove(files.join(folder, MANIFEST_NAME))
    if not files.exists(path):
        return None
    aside = files.set_aside(path)
    logger.warning("%s does not have the bytes of its receipt; renamed to %s, and made again", path, aside)
    return None


def look_again(folder: str, shard: PublishedShard) -> PublishedShard:
    """Holds a shard to what was published of it, just before the manifest vouches for it.

    Raises:
        ShardError: it was lost or damaged since.
    """
    if not _has_bytes(files.join(folder, shard.entry.name), shard.entry):
        raise ShardError(
            f"{files.join(folder, shard.entry.name)} was lost or damaged since it was published: run the same command "
            "again; it makes the shard anew"
        )
    return shard


def _has_bytes(path: str, entry: ShardEntry) -> bool:
    try:
        return files.sha256(path) == (entry.sha256, entry.bytes)
    except FileNotFoundError:
        return False


def publish_split(folder: str, draft: Draft, provenance: Provenance) -> PublishedShard:
    """Writes a split's receipt and shard, and reads the shard back.

    Where another attempt at the same split was faster, its shard stays and is vouched for.

    Raises:
        StorageError: there is no space, or no permission.
    """
    split, rows = draft.split, draft.rows
    metadata = _metadata(draft, provenance)
    path, promised = files.join(folder, split.shard), receipt_path(folder, split.index)
    for _ in range(_PUBLISH_ATTEMPTS):
        with files.staged(path) as temporary:
            write_shard(temporary, rows.row_groups(), metadata)
            try:
                receipt = _receipt(draft, metadata, files.sha256(temporary))
                files.replace(promised, files.to_json(receipt.to_json()))
                files.publish_staged(temporary, path)
            except FileNotFoundError:
                continue  # another driver finished and swept our temporary file away
        sha256, length = files.sha256(path)
        if sha256 != receipt.sha256:
            # Another attempt on other hardware was first: same blocks, scores within the stated error. Vouch for it.
            content_sha256 = _same_blocks_sha256(path, rows)
            receipt = replace(receipt, sha256=sha256, bytes=length, content_sha256=content_sha256)
            files.replace(promised, files.to_json(receipt.to_json()))
        return PublishedShard.of(split.index, receipt)
    raise ShardError(f"{path} could not be published: its temporary files keep vanishing from the folder")


def write_manifest(folder: str, plan: Plan, published: Iterable[PublishedShard]) -> Manifest:
    """Merges the rejects, tidies up, and publishes the manifest, last.

    Raises:
        ShardError: a planned shard is missing.
    """
    shards = sorted(published, key=lambda shard: shard.index)
    missing = {split.shard for split in plan.splits} - {shard.entry.name for shard in shards}
    if missing or len(shards) != len(plan.splits):
        raise ShardError(_missing_message(folder, missing, len(plan.splits)))
    files.keep_or_replace(files.join(folder, REJECTS_NAME), merge_rejects(_receipts(folder, plan)))
    remove_temporaries(folder)
    manifest = Manifest(
        documents=sum(shard.documents for shard in shards),
        rejected_documents=sum(shard.rejected_documents for shard in shards),
        leftover_tokens=sum(shard.leftover_tokens for shard in shards),
        tokenizer=Vocabulary.from_json(plan.configuration.tokenizer).fingerprints,
        alm=plan.configuration.alm,
        shards=[shard.entry for shard in shards],
    )
    files.keep_or_replace(files.join(folder, MANIFEST_NAME), [files.to_json(manifest.to_json())])
    return manifest


def remove_temporaries(folder: str, older_than: float = 0.0) -> None:
    """Removes what killed writers left in a folder of shards, if nothing was written to it for that many seconds."""
    for swept in (folder, files.join(folder, RECEIPTS_FOLDER), files.join(folder, TOKENIZER_FOLDER)):
        files.remove_temporaries(swept, older_than)


def _receipts(folder: str, plan: Plan) -> Iterator[Receipt]:
    """The receipts of all splits, one at a time, because their rejects may be many."""
    receipts = read_receipts(folder, (split.index for split in plan.splits))
    for split, receipt in zip(plan.splits, receipts, strict=True):
        if receipt is None:
            raise ShardError(f"{receipt_path(folder, split.index)} is gone or damaged: run the same command again")
        yield receipt


def check_published(folder: str, plan: Plan) -> Manifest:
    """The driver's own look after the job: every planned shard is in the manifest and on disk, at its size.

    Raises:
        ShardError: a runner lost something without saying so.
    """
    manifest = read_manifest(folder)
    listed = {shard.name: shard.bytes for shard in manifest.shards}
    present = files.listing(folder)

    def is_there(shard: str) -> bool:
        if shard in present and present[shard].bytes == listed[shard]:
            return True
        path = files.join(folder, shard)  # a store may list late what was just written
        return files.exists(path) and files.size(path) == listed[shard]

    missing = {split.shard for split in plan.splits if split.shard not in listed or not is_there(split.shard)}
    if missing:
        raise ShardError(_missing_message(folder, missing, len(plan.splits)))
    return manifest


def _missing_message(folder: str, missing: set[str], planned: int) -> str:
    some = ", ".join(sorted(missing)[:3])
    return f"{folder}: {len(missing)} of {planned} planned shards are missing ({some}…); run the same command again"


def _metadata(draft: Draft, provenance: Provenance) -> ShardMetadata:
    account = draft.account
    return ShardMetadata(
        vocabulary=provenance.vocabulary,
        alm=provenance.alm,
        split=account.source,
        documents=account.documents,
        blocks=len(draft.rows),
        rejected_documents=account.rejected_documents,
        leftover_tokens=account.leftover_tokens,
        clamped_values=draft.clamped_values,
        device=provenance.device,
        dtype=provenance.dtype,
        micro_batch=provenance.micro_batch,
        versions=provenance.versions,
        content_sha256=draft.rows.sha256(),
    )


def _receipt(draft: Draft, metadata: ShardMetadata, written: tuple[str, int]) -> Receipt:
    return Receipt(
        shard=draft.split.shard,
        sha256=written[0],
        bytes=written[1],
        content_sha256=metadata.content_sha256,
        documents=metadata.documents,
        blocks=metadata.blocks,
        rejected_documents=metadata.rejected_documents,
        leftover_tokens=metadata.leftover_tokens,
        lines=draft.account.lines,
        rejects=draft.account.rejects,
    )


def _same_blocks_sha256(path: str, ours: ShardBuffer) -> str:
    """The content fingerprint of a sound published shard that holds the same blocks as ours."""
    with ShardReader(path) as reader:
        is_same = len(reader) == len(ours) and all(
            np.array_equal(reader.read_row_group(index, perplexities=False).input_ids, group.input_ids)
            for index, group in enumerate(ours.row_groups())
        )
        if not is_same or reader.content_sha256() != reader.metadata.content_sha256:
            raise ShardError(
                f"{path} was published by another attempt with other blocks: did the corpus change meanwhile?"
            )
        return reader.metadata.content_sha256


def merge_rejects(receipts: Iterable[Receipt]) -> Iterator[bytes]:
    """JSON lines in plan order, their line numbers made absolute by the lines of the splits before."""
    lines_before: Counter[str] = Counter()
    for receipt in receipts:
        for reject in receipt.rejects:
            before = lines_before[reject.file] if reject.unit == "line" else 0
            absolute = replace(reject, line=reject.line + before)
            yield (json.dumps(absolute.to_json(), ensure_ascii=False) + "\n").encode()
        lines_before.update(receipt.lines)
