"""`python -m pipeline.verify DIR`: every checksum, count, range and fingerprint of a finished folder.

    plan ── manifest ── receipts ── files ── footers ── values

Each shard is held to what all of these say of it, and each of these to its neighbours. Checksums find what changed
after the job; whoever changes a shard and its checksums alike is found by its footer and values, which the plan binds.
A file is read once where it fits into memory, and row group by row group where it does not. With `--quick` no values
are read: of each shard its size and footer, many at a time, by range requests where it lies in an object store.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from pipeline.plan import PLAN_NAME, Plan, Split, plan_path, read_plan
from pipeline.publication import merge_rejects
from pipeline.wellformed import wrong_types
from scorer import files
from scorer.console import first_line, run_command
from scorer.errors import ConfigurationError, HardnessError, ShardError
from scorer.manifest import (
    MANIFEST_NAME,
    REJECTS_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    Receipt,
    ShardEntry,
    read_manifest,
    receipt_path,
)
from scorer.shards import FORMAT_VERSION, PERPLEXITY_COLUMNS, ROW_GROUP_BLOCKS, ShardContent, ShardReader, shard_name
from scorer.tokenizer import fingerprint, load_tokenizer
from scorer.vocabulary import Vocabulary

_HELD_BYTES = 64 << 20
"""A larger shard is hashed first and then read again, row group by row group."""
_QUICK_THREADS = 16
"""Nearly all that a quick look does in an object store is waiting."""
_COUNTS = ("documents", "blocks", "tokens", "rejected_documents", "leftover_tokens")

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """Something that is wrong, and with what."""

    where: str
    """The name of a shard, or of another file in the folder."""
    what: str
    """With the row, where there is one."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def main(arguments: Sequence[str]) -> int:
    """Runs the command; exit code 1 and the reasons on any fault."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.verify",
        description="Checks a finished folder of shards: every checksum, count, range and fingerprint.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="what a job was given as --output")
    parser.add_argument("--quick", action="store_true", help="names, sizes, counts and footers; no values, no hashes")
    flags = parser.parse_args(list(arguments))
    if not files.is_folder(flags.folder):
        raise ConfigurationError(f"there is no folder {flags.folder}")
    # A line is a fault, however long: the bar's console would else break it at the terminal's width.
    console = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)
    found, faulty = 0, set()
    for fault in find_faults(flags.folder, console, flags.quick):
        console.print(f"fault: {fault}")
        found += 1
        faulty.add(fault.where)
    if found:
        console.print(
            f"{flags.folder}: {found:,} fault(s) in {len(faulty):,} file(s); "
            "remove these files and run the job that wrote the folder again"
        )
        return 1
    manifest = read_manifest(flags.folder)
    print(
        f"{flags.folder} {'looks' if flags.quick else 'is'} sound: {len(manifest.shards):,} shards, "
        f"{manifest.blocks:,} blocks, {manifest.tokens:,} tokens"
        f"{' (their values were not read: leave --quick out for that)' if flags.quick else ''}"
    )
    return 0


def find_faults(folder: str, console: Console | None = None, quick: bool = False) -> Iterator[Fault]:
    """Yields every fault of a folder, each naming the file and, where there is one, the row.

    Args:
        folder: what a job was given as --output.
        console: shows a progress bar where it is a terminal.
        quick: whether to leave out what needs more of a shard than its size and its footer.
    """
    manifest = yield from _load(MANIFEST_NAME, lambda: read_manifest(folder))
    plan = yield from _load(PLAN_NAME, lambda: _read_plan(folder))
    vocabulary = None if plan is None else (yield from _load(PLAN_NAME, lambda: _read_vocabulary(plan)))
    if manifest is None or plan is None or vocabulary is None:
        return
    yield from _folder_faults(folder, manifest, plan, vocabulary)
    entries = {entry.name: entry for entry in manifest.shards}

    def check(split: Split) -> tuple[Receipt | None, list[Fault]]:
        faults: list[Fault] = []
        receipt = _collected(_load(split.shard, partial(_read_receipt, folder, split)), faults)
        of_shard = _ShardCheck(folder, plan, vocabulary, split, entries.get(split.shard), receipt, quick)
        return receipt, faults + [Fault(split.shard, what) for what in of_shard.faults()]

    receipts = []
    has_bar = console is not None and console.is_terminal
    with ThreadPoolExecutor(_QUICK_THREADS) as pool:
        checked: Iterable[tuple[Receipt | None, list[Fault]]] = (pool.map if quick else map)(check, plan.splits)
        total = len(plan.splits)
        for receipt, faults in track(
            checked, "verifying", total=total, console=console, disable=not has_bar, transient=True
        ):
            yield from faults
            if receipt is not None:
                receipts.append(receipt)
    if len(receipts) == len(plan.splits):
        yield from _account_faults(folder, receipts)


def _load(where: str, read: Callable[[], T | None]) -> Generator[Fault, None, T | None]:
    """Returns what `read` gives, or None after a fault that says why it cannot be used."""
    try:
        value = read()
    except FileNotFoundError:
        value = None
    except (HardnessError, OSError) as error:
        yield Fault(where, str(error))
        return None
    if value is None:
        yield Fault(where, "missing")
        return None
    wrong = [] if isinstance(value, bytes) else list(wrong_types(value))
    for what in wrong:
        yield Fault(where, what)
    return None if wrong else value


def _collected(loading: Generator[Fault, None, T | None], faults: list[Fault]) -> T | None:
    """What a `_load` returns; what it yields is added to `faults`."""
    while True:
        try:
            faults.append(next(loading))
        except StopIteration as end:
            value: T | None = end.value
            return value


def _read_plan(folder: str) -> Plan | None:
    """Like `read_plan`, and holds its version and the names of its shards to what jobs write.

    Raises:
        ShardError: it cannot be a plan that a job wrote.
    """
    plan = read_plan(folder)
    if plan is None:
        return None
    version = files.read_json(plan_path(folder)).get("format_version")
    if version != FORMAT_VERSION:
        raise ShardError(f"it is of format {version}, expected {FORMAT_VERSION}")
    for index, split in enumerate(plan.splits):
        expected = shard_name(index, len(plan.splits))
        if split.shard != expected:
            raise ShardError(f"splits[{index}] is for {split.shard!r}, expected {expected!r}")
    return plan


def _read_vocabulary(plan: Plan) -> Vocabulary:
    """The tokenizer of a plan.

    Raises:
        ShardError: its ids cannot be those of a tokenizer.
    """
    try:
        vocabulary = Vocabulary.from_json(plan.configuration.tokenizer)
        ids = [*vocabulary.special_ids.values(), vocabulary.start_id, vocabulary.end_id]
        if not all(0 <= id_ < vocabulary.size for id_ in ids):
            raise ShardError(f"its tokenizer has special tokens beyond its {vocabulary.size} ids")
    except (AttributeError, TypeError) as error:
        raise ShardError(f"its tokenizer cannot be read: {error!r}") from error
    return vocabulary


def _read_receipt(folder: str, split: Split) -> Receipt:
    """Like `scorer.manifest.read_receipt`, but says what is wrong with it.

    Raises:
        ShardError: it is missing or cannot be read.
    """
    path = receipt_path(folder, split.index)
    try:
        value = files.read_json(path)
        receipt = Receipt.from_json(value)
        for key, said in receipt.to_json().items():
            if key in value and value[key] != said:
                raise ShardError(f"its receipt {path} says {key} {value[key]!r:.60}, the rest of it {said!r:.60}")
    except FileNotFoundError as error:
        raise ShardError(f"its receipt {path} is missing") from error
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ShardError(f"its receipt {path} cannot be read: {error!r}") from error
    return receipt


def _folder_faults(folder: str, manifest: Manifest, plan: Plan, vocabulary: Vocabulary) -> Iterator[Fault]:
    """Holds the lists of shards, and the tokenizers, to each other."""
    planned = [split.shard for split in plan.splits]
    listed = [entry.name for entry in manifest.shards]
    there = {name for name in files.names(folder) if name.endswith(".parquet")}
    for name in sorted({*planned} - {*listed}):
        yield Fault(name, f"{MANIFEST_NAME} does not list it, the plan does")
    for name in sorted({*listed} - {*planned}):
        yield Fault(name, f"{MANIFEST_NAME} lists it, the plan does not")
    for name in sorted(there - {*listed, *planned}):
        yield Fault(name, f"not in {MANIFEST_NAME}")
    if listed != planned and sorted(listed) != sorted({*listed}):
        yield Fault(MANIFEST_NAME, "it lists a shard twice")
    elif listed != planned and {*listed} == {*planned}:
        yield Fault(MANIFEST_NAME, "it lists the shards in another order than the plan")
    if dict(manifest.tokenizer) != vocabulary.fingerprints or manifest.alm != plan.configuration.alm:
        yield Fault(MANIFEST_NAME, "it has other fingerprints than the plan")
    saved = files.join(folder, TOKENIZER_FOLDER)
    try:
        if not files.is_folder(saved):
            yield Fault(f"{TOKENIZER_FOLDER}/", "missing")
        elif fingerprint(load_tokenizer(saved)) != vocabulary.fingerprints:
            yield Fault(f"{TOKENIZER_FOLDER}/", "it is another tokenizer than the plan's")
    except Exception as error:  # libraries raise whatever they stumble over in a damaged file
        yield Fault(f"{TOKENIZER_FOLDER}/", f"it cannot be loaded: {first_line(error)}")


def _account_faults(folder: str, receipts: list[Receipt]) -> Iterator[Fault]:
    """Holds the manifest's counts, as they stand in the file, and the rejects to the receipts."""
    written = files.read_json(files.join(folder, MANIFEST_NAME))
    for name in _COUNTS:
        counted = sum(getattr(receipt, name) for receipt in receipts)
        if written.get(name) != counted:
            yield Fault(MANIFEST_NAME, f"it says {written.get(name)} {name}, the receipts {counted}")
    rejects = yield from _load(REJECTS_NAME, lambda: files.read_bytes(files.join(folder, REJECTS_NAME)))
    expected = b"".join(merge_rejects(receipts))
    if rejects is not None and rejects != expected:
        lines = zip_longest(rejects.splitlines(keepends=True), expected.splitlines(keepends=True))
        number = next(number for number, (line, other) in enumerate(lines, 1) if line != other)
        yield Fault(REJECTS_NAME, f"line {number} is not what the receipts say")


@dataclass(frozen=True)
class _ShardCheck:
    """One shard, and all that is said of it."""

    folder: str
    plan: Plan
    vocabulary: Vocabulary
    """The plan's."""
    split: Split
    entry: ShardEntry | None
    """The manifest's."""
    receipt: Receipt | None
    quick: bool

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the shard."""
        yield from self._receipt_faults()
        path = files.join(self.folder, self.split.shard)
        try:
            stream, sha256, length = _open_sized(path) if self.quick else _open_hashed(path)
        except FileNotFoundError:
            yield "missing"
            return
        except OSError as error:
            yield f"it cannot be opened: {error}"
            return
        if self.entry is not None and length != self.entry.bytes:
            yield f"{length} bytes, the manifest says {self.entry.bytes}"
        elif self.entry is not None and sha256 not in (None, self.entry.sha256):
            yield "its bytes are not those of the manifest (SHA-256 differs)"
        try:
            with ShardReader(path, stream) as reader:
                yield from self._footer_faults(reader)
                if self.quick:
                    return
                is_whole = yield from _value_faults(reader, self.vocabulary)
                if is_whole:
                    yield from self._content_faults(reader)
        except ShardError as error:
            yield str(error)

    def _receipt_faults(self) -> Iterator[str]:
        if self.receipt is None:
            return
        if self.receipt.rejected_documents != len(self.receipt.rejects):
            yield (
                f"its receipt says {self.receipt.rejected_documents} rejected_documents, and lists "
                f"{len(self.receipt.rejects)}"
            )
        if self.entry is not None:
            vouched = asdict(self.receipt.entry)
            for name, value in asdict(self.entry).items():
                if vouched[name] != value:
                    yield f"its receipt says {name} {vouched[name]}, the manifest {value}"

    def _footer_faults(self, reader: ShardReader) -> Iterator[str]:
        metadata, configuration = reader.metadata, self.plan.configuration
        yield from (f"its footer's {what}" for what in wrong_types(metadata))
        if len(reader) != metadata.blocks:
            yield f"{len(reader)} rows, its footer says {metadata.blocks}"
        if self.entry is not None and len(reader) != self.entry.blocks:
            yield f"{len(reader)} rows, the manifest says {self.entry.blocks}"
        for name in ("documents", "rejected_documents", "leftover_tokens"):
            if self.receipt is not None and getattr(metadata, name) != getattr(self.receipt, name):
                yield f"its footer says {getattr(metadata, name)} {name}, its receipt {getattr(self.receipt, name)}"
        if self.entry is not None and self.quick and metadata.content_sha256 != self.entry.content_sha256:
            yield "its footer vouches for other values than the manifest (content SHA-256 differs)"
        if metadata.vocabulary != self.vocabulary:
            yield "its footer names another tokenizer than the plan"
        if metadata.alm != configuration.alm:
            yield "its footer names another ALM than the plan"
        if metadata.dtype != configuration.dtype:
            yield f"its footer names dtype {metadata.dtype}, the plan {configuration.dtype}"
        if configuration.source == "text" and metadata.split != [asdict(range_) for range_ in self.split.ranges]:
            yield "it was made from another split than the plan has for it"
        if configuration.source == "block shards":
            planned = [(range_.file, range_.start, range_.end) for range_ in self.split.ranges]
            if planned != [(self.split.shard, 0, len(reader))]:
                yield f"{len(reader)} rows, the plan has {planned} for it"

    def _content_faults(self, reader: ShardReader) -> Iterator[str]:
        content_sha256 = reader.content_sha256()
        said = {"its footer": reader.metadata.content_sha256}
        if self.entry is not None:
            said["the manifest"] = self.entry.content_sha256
        for who, value in said.items():
            if value != content_sha256:
                yield f"its values are not those that {who} vouches for (content SHA-256 differs)"
        if self.plan.configuration.source == "block shards":
            planned = self.plan.configuration.input_files.get(self.split.shard)
            if reader.content_sha256(perplexities=False) != planned:
                yield "its input_ids are not those of the block shard in the plan (content SHA-256 differs)"


def _open_sized(path: str) -> tuple[BinaryIO, None, int]:
    """Opens a file, and gives its length; nothing is read."""
    stream = files.open_binary(path)
    length = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    return stream, None, length


def _open_hashed(path: str) -> tuple[BinaryIO, str, int]:
    """Opens a file: its bytes from the beginning, their SHA-256, and their number. Small files are read only once."""
    stream = files.open_binary(path)
    head = stream.read(_HELD_BYTES)
    digest, length = hashlib.sha256(head), len(head)
    if length < _HELD_BYTES:
        stream.close()
        return io.BytesIO(head), digest.hexdigest(), length
    while chunk := stream.read(_HELD_BYTES):
        digest.update(chunk)
        length += len(chunk)
    stream.seek(0)
    return stream, digest.hexdigest(), length


def _value_faults(reader: ShardReader, vocabulary: Vocabulary) -> Generator[str, None, bool]:
    """Looks at every value, row group by row group. Returns False where one cannot be read; the others are."""
    is_whole = True
    first: dict[str, tuple[int, int]] = {}
    rows_with: Counter[str] = Counter()
    for index in range(reader.row_groups):
        try:
            content = reader.read_row_group(index)
        except ShardError as error:
            yield str(error)
            is_whole = False
            continue
        for what, wrong in _wrong_values(content, vocabulary):
            rows = np.flatnonzero(wrong.any(axis=1))
            if len(rows):
                rows_with[what] += len(rows)
                row = int(rows[0])
                first.setdefault(what, (index * ROW_GROUP_BLOCKS + row, int(np.flatnonzero(wrong[row])[0])))
    for what, (row, position) in first.items():
        yield f"row {row}, position {position}: {what} ({rows_with[what]} row(s) in all)"
    return is_whole


def _wrong_values(content: ShardContent, vocabulary: Vocabulary) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """What may be wrong with some rows, and where: bool [N, 512]."""
    ids = content.input_ids.astype(np.int64)
    is_known = ids < vocabulary.size
    yield "an id that the tokenizer does not have", ~is_known
    frame = np.zeros(ids.shape, dtype=bool)
    frame[:, 0], frame[:, -1] = ids[:, 0] != vocabulary.start_id, ids[:, -1] != vocabulary.end_id
    yield "not the frame token", frame
    is_special = is_known & vocabulary.special_mask()[np.where(is_known, ids, 0)]
    for name in PERPLEXITY_COLUMNS:
        values: npt.NDArray[Any] | None = getattr(content, name)
        if values is None:
            continue
        yield f"{name} is not finite", ~np.isfinite(values)
        yield f"{name} of an ordinary token is below 1", is_known & ~is_special & (values < 1)
        yield f"{name} of a special token is not 0", is_special & (values != 0)


if __name__ == "__main__":
    run_command(main)
