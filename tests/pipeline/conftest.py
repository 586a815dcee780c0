"""What the pipeline's tests share: running commands in this process, looking at folders, and crafting faulty ones."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scorer.console import run_command as run_main

Arrays = dict[str, npt.NDArray[Any]]


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs a command's `main` as `python -m` would, without a new process: exit code, and standard error.

    Whatever would be a traceback in a terminal is an exception here.
    """
    handlers, level = list(logging.root.handlers), logging.root.level
    on_termination = signal.getsignal(signal.SIGTERM)

    def run(main: Callable[[Sequence[str]], int], *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_main(main)
        return int(exit_.value.code or 0), capfd.readouterr().err

    yield run
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    # A pool that a later test forks ends its processes by this signal; they would inherit our handler of it.
    signal.signal(signal.SIGTERM, on_termination)


@pytest.fixture(scope="session")
def state_of() -> Callable[[Path], dict[str, tuple[bytes, int]]]:
    """Bytes and mtime_ns of the shards, receipts and JSON files of a folder, by relative name."""

    def look(folder: Path) -> dict[str, tuple[bytes, int]]:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and "tokenizer" not in path.parts[-2:-1]]
        return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    return look


@pytest.fixture
def blocks(block_folder: Path, tmp_path: Path) -> Path:
    """A copy of the block shards of the small corpus, to be damaged."""
    return Path(shutil.copytree(block_folder, tmp_path / "blocks", copy_function=shutil.copy))


@pytest.fixture
def shards(hardness_folder: Path, tmp_path: Path) -> Path:
    """A copy of the hardness shards of the small corpus, as young as a copy is, to be damaged."""
    return Path(shutil.copytree(hardness_folder, tmp_path / "shards", copy_function=shutil.copy))


@pytest.fixture
def alm_copy(alm_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small ALM, to be damaged."""
    return Path(shutil.copytree(alm_folder, tmp_path / "alm"))


@pytest.fixture(scope="session")
def edit_json() -> Callable[[Path, Callable[[Any], object]], None]:
    """Changes a JSON file in place."""

    def edit(path: Path, change: Callable[[Any], object]) -> None:
        value = json.loads(path.read_bytes())
        change(value)
        path.write_text(json.dumps(value))

    return edit


@pytest.fixture(scope="session")
def read_shard() -> Callable[[Path], tuple[Arrays, dict[str, Any]]]:
    """Columns and footer of a shard, by pyarrow alone."""

    def read(path: Path) -> tuple[Arrays, dict[str, Any]]:
        table = pq.read_table(path)
        arrays = {
            name: table[name].combine_chunks().flatten().to_numpy().reshape(-1, 512).copy()
            for name in table.column_names
        }
        return arrays, json.loads(table.schema.metadata[b"hardness"])

    return read


@pytest.fixture(scope="session")
def content_sha256() -> Callable[[Arrays], str]:
    """`content_sha256` as DESIGN defines it."""

    def sha256(arrays: Arrays) -> str:
        digest = hashlib.sha256()
        for name, values in arrays.items():
            digest.update(f"{name} {values.dtype} {values.shape[0]}\n".encode())
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    return sha256


@pytest.fixture(scope="session")
def vouch(edit_json: Callable[..., None]) -> Callable[..., None]:
    """Makes receipt and manifest vouch for the shard file of an index as it lies there."""

    def write(folder: Path, index: int, **fields: Any) -> None:
        name = json.loads((folder / "_manifest.json").read_bytes())["shards"][index]["name"]
        data = (folder / name).read_bytes()
        fields |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        edit_json(folder / "_receipts" / f"{index:05d}.json", lambda receipt: receipt.update(fields))
        listed = {key: fields[key] for key in ("sha256", "bytes", "content_sha256", "blocks") if key in fields}
        edit_json(folder / "_manifest.json", lambda manifest: manifest["shards"][index].update(listed))

    return write


@pytest.fixture(scope="session")
def rewrite_shard(
    read_shard: Callable[..., Any], content_sha256: Callable[[Arrays], str], vouch: Callable[..., None]
) -> Callable[..., None]:
    """Changes values or footer of a shard such that every checksum, in the folder and in the file, fits the change."""

    def rewrite(
        folder: Path,
        index: int,
        change: Callable[[Arrays], object] = lambda _: None,
        change_footer: Callable[[dict[str, Any]], object] = lambda _: None,
    ) -> None:
        name = json.loads((folder / "_manifest.json").read_bytes())["shards"][index]["name"]
        arrays, footer = read_shard(folder / name)
        change(arrays)
        footer["content_sha256"] = content_sha256(arrays)
        change_footer(footer)
        columns = {
            column: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 512)
            for column, values in arrays.items()
        }
        table = pa.table(columns).replace_schema_metadata({b"hardness": json.dumps(footer).encode()})
        options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True, "row_group_size": 256}
        pq.write_table(table, folder / name, **options)
        vouch(folder, index, content_sha256=content_sha256(arrays))

    return rewrite


@pytest.fixture(scope="session")
def flip_bit() -> Callable[[Path, int], None]:
    """Flips one bit of a file, which keeps its size."""

    def flip(path: Path, position: int) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 1 << 3
        path.write_bytes(data)

    return flip


@pytest.fixture(scope="session")
def random_text() -> Callable[[int, int], str]:
    """Text of which nearly every letter is a token of its own under the small tokenizer."""

    def make(letters: int, seed: int) -> str:
        generator = np.random.default_rng(seed)
        return "".join(generator.choice(list("QXZJKVWY0123456789#%&"), letters))

    return make
