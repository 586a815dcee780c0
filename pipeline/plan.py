"""The plan: which bytes go into which shard, decided once, and everything that determines what the shards mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.corpus import DEFAULT_ENCODING, FileRange, RowGroup
from scorer import files
from scorer.errors import ConfigurationError, ShardError
from scorer.manifest import Manifest
from scorer.shards import FORMAT_VERSION, shard_name

PLAN_NAME = "_plan.json"
DEFAULT_SPLIT_BYTES = 16 << 20
ASSUMED_COMPRESSION_RATIO = 3
"""How much text a compressed byte stands for when splits are filled; gzip on English gives 2.5 to 3."""

Kind = Literal["blocks", "hardness"]


@dataclass(frozen=True)
class Split:
    """The unit of work, of resume and of verification: what becomes one shard."""

    index: int
    shard: str
    ranges: tuple[FileRange, ...]
    """In corpus order. For block shards as input: the one shard, with its rows as the range."""


@dataclass(frozen=True)
class Configuration:
    """What determines the meaning of the shards; a resume with another one is refused."""

    kind: Kind
    source: Literal["text", "block shards"]
    tokenizer: Mapping[str, Any]
    """Vocabulary.to_json: fingerprints, special ids, frame tokens."""
    alm: Mapping[str, str] | None
    dtype: str | None
    mantissa_bits: int | None
    split_bytes: int | None
    text_field: str | None
    txt_document: str | None
    max_document_bytes: int | None
    encoding: str | None
    input_files: Mapping[str, int | str]
    """Size of each input file, or the content fingerprint of each block shard."""


@dataclass(frozen=True)
class Plan:
    """What `_plan.json` holds."""

    configuration: Configuration
    splits: tuple[Split, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan's JSON object."""
        return {
            "format_version": FORMAT_VERSION,
            "configuration": asdict(self.configuration),
            "splits": [
                {"shard": split.shard, "ranges": [[range_.file, range_.start, range_.end] for range_ in split.ranges]}
                for split in self.splits
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`; plans from before there was a choice of encoding have UTF-8."""
        encoding = DEFAULT_ENCODING if value["configuration"].get("source") == "text" else None
        return cls(
            Configuration(**{"encoding": encoding, **value["configuration"]}),
            tuple(
                Split(index, split["shard"], tuple(FileRange(*range_) for range_ in split["ranges"]))
                for index, split in enumerate(value["splits"])
            ),
        )


def plan_path(folder: str) -> str:
    """Where the plan of `folder` lies."""
    return files.join(folder, PLAN_NAME)


def read_plan(folder: str) -> Plan | None:
    """The plan of a folder of shards, or None where there is none yet.

    Raises:
        ShardError: there is one that cannot be read.
    """
    try:
        return Plan.from_json(files.read_json(plan_path(folder)))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{plan_path(folder)} cannot be read ({error!r}): choose another --output, or remove this folder"
        ) from error


def adopt_plan(folder: str, planned: Plan) -> Plan:
    """Publishes a new plan, or takes the one that is there if it means the same.

    Raises:
        ConfigurationError: the folder's plan has another configuration; the message says what differs.
    """
    if files.exists(folder) and not files.is_folder(folder):
        raise ConfigurationError(f"--output {folder} is a file: expected a folder, or a name that is free")
    existing = read_plan(folder)
    if existing is None:
        if any(name.endswith(".parquet") for name in files.names(folder)):
            raise ConfigurationError(f"{folder} holds Parquet files but no {PLAN_NAME}: choose an empty --output")
        files.make_folder(folder)
        files.publish(plan_path(folder), files.to_json(planned.to_json()))
        existing = read_plan(folder)
        assert existing is not None
    require_same(folder, existing, planned)
    return existing


def require_same(folder: str, existing: Plan, planned: Plan) -> None:
    """Holds what is asked for to what a folder was begun with.

    Raises:
        ConfigurationError: it is another configuration; the message says what differs.
    """
    if differences := _differences(existing.configuration, planned.configuration):
        raise ConfigurationError(
            f"{folder} was begun with another configuration: {'; '.join(differences)}. "
            "Run with the same flags and corpus to go on, or choose another --output"
        )


def common_folder(paths: Iterable[str]) -> str:
    """The longest folder that holds all the files; names in plans and shards are relative to it."""
    folders = [path.split("/")[:-1] for path in paths]
    shared = folders[0]
    for folder in folders[1:]:
        agreeing = 0
        while agreeing < min(len(shared), len(folder)) and shared[agreeing] == folder[agreeing]:
            agreeing += 1
        shared = shared[:agreeing]
    if not shared:
        raise ConfigurationError("the inputs lie in different stores: give each its own --output")
    return "/".join(shared) + "/"


def split_files(
    sizes: Mapping[str, int],
    split_bytes: int,
    is_whole: Callable[[str], bool] = lambda _: False,
    row_groups: Mapping[str, Sequence[RowGroup]] | None = None,
) -> tuple[Split, ...]:
    """Cuts a corpus into splits of about `split_bytes` of text, in file order.

    Small files are packed together. Large ones are cut anywhere: a document belongs to the split that holds its first
    byte, or its row. Compressed files and web archives are never cut.

    Args:
        sizes: bytes of each file, by relative name, in corpus order.
        split_bytes: text a split.
        is_whole: says by its name whether a file is one document, and so is not cut.
        row_groups: of each Parquet file; its ranges count rows.
    """
    packing = _Packing(split_bytes)
    for file, size in sizes.items():
        whole = FileRange(file, 0, size)
        if row_groups and file in row_groups:
            packing.add_cut(file, [(group.rows, group.text_bytes) for group in row_groups[file]])
        elif whole.is_whole or is_whole(file):
            packing.add_whole(whole, size * (ASSUMED_COMPRESSION_RATIO if whole.is_compressed else 1))
        else:
            packing.add_cut(file, [(size, size)])
    count = len(packing.splits)
    return tuple(Split(index, shard_name(index, count), tuple(ranges)) for index, ranges in enumerate(packing.splits))


class _Packing:
    """Fills one split after the other."""

    def __init__(self, split_bytes: int):
        self._split_bytes = split_bytes
        self._filled = 0
        self.splits: list[list[FileRange]] = [[]]

    def add_whole(self, whole: FileRange, text_bytes: int) -> None:
        if text_bytes and self._filled and self._filled + text_bytes > self._split_bytes:
            self._begin_split()
        self.splits[-1].append(whole)
        self._filled += text_bytes

    def add_cut(self, file: str, runs: Iterable[tuple[int, int]]) -> None:
        """Adds a file of several runs, each of so many units (bytes or rows) that hold so many bytes of text."""
        start = 0
        for units, text_bytes in runs:
            run_end = start + units
            while start < run_end:
                if self._filled >= self._split_bytes:
                    self._begin_split()
                room = self._split_bytes - self._filled
                taken = min(run_end - start, max(1, units * room // max(text_bytes, 1)))
                self._append(FileRange(file, start, start + taken))
                self._filled += -(-taken * text_bytes // units)
                start += taken

    def _append(self, range_: FileRange) -> None:
        before = self.splits[-1][-1] if self.splits[-1] else None
        if before is not None and (before.file, before.end) == (range_.file, range_.start):
            self.splits[-1][-1] = FileRange(range_.file, before.start, range_.end)
        else:
            self.splits[-1].append(range_)

    def _begin_split(self) -> None:
        self.splits.append([])
        self._filled = 0


def split_block_shards(manifest: Manifest) -> tuple[Split, ...]:
    """One split a block shard, of the same name."""
    return tuple(
        Split(index, shard.name, (FileRange(shard.name, 0, shard.blocks),))
        for index, shard in enumerate(manifest.shards)
    )


def _differences(planned: Configuration, asked: Configuration) -> list[str]:
    found = []
    for name, before in asdict(planned).items():
        now = asdict(asked)[name]
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            shown = ", ".join(f"{key} {before.get(key, 'absent')} → {now.get(key, 'absent')}" for key in keys[:3])
            found.append(f"{name} ({shown}{', …' if len(keys) > 3 else ''})")
        else:
            found.append(f"{name} was {before}, now {now}")
    return found
