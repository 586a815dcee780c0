"""Shards are plain Parquet: every common reader sees the same rows in the same order as we do."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.dataset
import pytest

from pipeline import score_corpus, tokenize_corpus
from scorer.shards import ShardReader

IN_THREADS = ("--direct_running_mode", "in_memory")

pandas = pytest.importorskip("pandas")
duckdb = pytest.importorskip("duckdb")
polars = pytest.importorskip("polars")
datasets = pytest.importorskip("datasets")

Arrays = dict[str, npt.NDArray[Any]]
DTYPES = {"input_ids": np.uint16, "forward_perplexity": np.float32, "backward_perplexity": np.float32}


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path, tokenizer_folder: Path, alm_folder: Path
) -> dict[str, Path]:
    """Block shards and hardness shards of the small corpus: two each, the first of two row groups."""
    folder = tmp_path_factory.mktemp("readers")
    found = {kind: folder / kind for kind in ("blocks", "hardness")}
    flags = ["--input", corpus_folder, "--tokenizer", tokenizer_folder, "--output", found["blocks"]]
    assert tokenize_corpus.main([*map(str, flags), "--split_bytes", "250000", *IN_THREADS]) == 0
    flags = ["--input", found["blocks"], "--alm", alm_folder, "--output", found["hardness"], "--device", "cpu"]
    assert score_corpus.main([*map(str, flags), *IN_THREADS]) == 0
    return found


@pytest.fixture(params=["blocks", "hardness"])
def paths(request: pytest.FixtureRequest, folders: dict[str, Path]) -> list[str]:
    """The shards of a folder, in the manifest's order."""
    folder = folders[request.param]
    shards = json.loads((folder / "_manifest.json").read_bytes())["shards"]
    assert [shard["blocks"] > 256 for shard in shards] == [True, False]
    return [str(folder / shard["name"]) for shard in shards]


def read_with_pyarrow(paths: list[str]) -> Arrays:
    table = pyarrow.dataset.dataset(paths).to_table()
    return {
        name: table[name].combine_chunks().flatten().to_numpy().reshape(-1, table[name].type.list_size)
        for name in table.column_names
    }


def read_with_pandas(paths: list[str]) -> Arrays:
    frame = pandas.concat([pandas.read_parquet(path) for path in paths])
    return {name: np.stack(list(frame[name])) for name in frame.columns}


def read_with_duckdb(paths: list[str]) -> Arrays:
    with duckdb.connect() as connection:
        relation = connection.read_parquet(paths)
        kinds = dict(zip(relation.columns, map(str, relation.types), strict=True))
        rows = relation.fetchall()
    dtypes = {"USMALLINT[]": np.uint16, "FLOAT[]": np.float32}
    return {name: np.array([row[i] for row in rows], dtypes[kind]) for i, (name, kind) in enumerate(kinds.items())}


def read_with_polars(paths: list[str]) -> Arrays:
    frame = polars.read_parquet(paths)
    return {name: frame[name].to_numpy() for name in frame.columns}


def read_with_datasets(paths: list[str]) -> Arrays:
    stream = datasets.load_dataset("parquet", data_files=paths, split="train", streaming=True)
    assert {name: np.dtype(feature.feature.dtype) for name, feature in stream.features.items()} == {
        name: DTYPES[name] for name in stream.features
    }
    rows = list(stream)
    return {name: np.array([row[name] for row in rows], dtype=DTYPES[name]) for name in stream.features}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`datasets` counts its loads over the network unless it is told to be offline."""

    def refuse(*_: object) -> None:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "read", [read_with_pyarrow, read_with_pandas, read_with_duckdb, read_with_polars, read_with_datasets]
)
def test_other_readers_see_the_same_rows_in_the_same_order(
    paths: list[str], read: Callable[[list[str]], Arrays]
) -> None:
    found = read(paths)
    ours: dict[str, list[npt.NDArray[Any]]] = {}
    for path in paths:
        with ShardReader(path) as reader:
            for name, values in reader.read().columns():
                ours.setdefault(name, []).append(values)
    assert list(found) == list(ours)
    for name, parts in ours.items():
        expected = np.concatenate(parts)
        assert found[name].dtype == expected.dtype == DTYPES[name]
        assert found[name].shape[1] == 512
        np.testing.assert_array_equal(found[name], expected)
