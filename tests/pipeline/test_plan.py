"""The plan: every byte in one split, and no second meaning for a folder that was begun."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pipeline import score_corpus, tokenize_corpus
from pipeline.plan import Plan, Split, common_folder, read_plan, split_files
from scorer import files
from scorer.errors import ConfigurationError, ShardError

IN_THREADS = ("--direct_running_mode", "in_memory")

file_sizes = st.lists(
    st.tuples(
        st.sampled_from(["txt", "jsonl", "txt.gz", "JSONL.GZ", "txt.zst", "warc", "Warc.Wet.zstd"]), st.integers(0, 400)
    ),
    max_size=12,
).map(lambda files: {f"{index}.{suffix}": size for index, (suffix, size) in enumerate(files)})


def ranges_of(splits: tuple[Split, ...]) -> list[tuple[str, int, int]]:
    return [(range_.file, range_.start, range_.end) for split in splits for range_ in split.ranges]


@given(sizes=file_sizes, split_bytes=st.integers(1, 300), can_cut=st.booleans())
def test_splits_cover_every_byte_once_in_order(sizes: dict[str, int], split_bytes: int, can_cut: bool) -> None:
    splits = split_files(sizes, split_bytes, lambda _: not can_cut)
    by_file = defaultdict(list)
    for file, start, end in ranges_of(splits):
        by_file[file].append((start, end))
    assert list(by_file) == [file for file in sizes if file in by_file]
    for file, size in sizes.items():
        bounds = by_file[file]
        assert [start for start, _ in bounds] == [0, *(end for _, end in bounds)][: len(bounds)]
        assert (bounds[-1][1] if bounds else 0) == size
        if not can_cut or file.lower().endswith((".gz", ".zst", ".zstd", ".warc")):
            assert len(bounds) <= 1
    order = list(sizes)
    assert all(order.index(first[0]) <= order.index(second[0]) for first, second in pairwise(ranges_of(splits)))


@given(sizes=file_sizes, split_bytes=st.integers(1, 300))
@example({"0.txt.gz": 1, "1.txt.gz": 0}, 1)
def test_shards_are_numbered_and_none_is_without_text(sizes: dict[str, int], split_bytes: int) -> None:
    splits = split_files(sizes, split_bytes)
    count = len(splits)
    assert count >= 1
    assert [split.index for split in splits] == list(range(count))
    assert [split.shard for split in splits] == [f"shard-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
    if any(sizes.values()):
        assert all(any(range_.end > range_.start for range_ in split.ranges) for split in splits)


@given(sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=20), split_bytes=st.integers(50, 3000))
def test_splits_of_plain_text_hold_about_split_bytes(sizes: list[int], split_bytes: int) -> None:
    splits = split_files({f"{i}.txt": size for i, size in enumerate(sizes)}, split_bytes)
    lengths = [sum(range_.end - range_.start for range_ in split.ranges) for split in splits]
    assert all(split_bytes / 2 <= length <= split_bytes * 1.5 for length in lengths[:-1])
    assert lengths[-1] <= split_bytes * 1.5


def test_small_files_are_packed_together() -> None:
    sizes = {f"{i:04d}.txt": 1000 for i in range(1000)}
    for is_whole in (True, False):
        splits = split_files(sizes, 100_000, lambda _, whole=is_whole: whole)
        assert len(splits) == 10
        assert all(len(split.ranges) == 100 for split in splits)
    archives = {f"{i:04d}.txt.gz": 1000 for i in range(300)}
    assert 5 <= len(split_files(archives, 100_000)) <= 12  # gzip's ratio on text is about 3


def test_a_large_archive_is_whole_in_one_split() -> None:
    splits = split_files({"a.txt": 10, "b.jsonl.gz": 10_000_000, "c.txt": 10}, 100)
    assert ("b.jsonl.gz", 0, 10_000_000) in ranges_of(splits)


@pytest.mark.parametrize("sizes", [{}, {"a.txt": 0}, {"a.txt": 0, "b.jsonl": 0, "c.txt.gz": 0}])
def test_empty_corpora_give_one_split(sizes: dict[str, int]) -> None:
    assert len(split_files(sizes, 100)) == 1


@pytest.mark.parametrize(
    ("paths", "folder"),
    [
        (["/data/a.txt"], "/data/"),
        (["/data/a.txt", "/data/b.txt"], "/data/"),
        (["/data/x/a.txt", "/data/xy/b.txt"], "/data/"),
        (["/data/x/y/a.txt", "/data/x/b.txt"], "/data/x/"),
        (["/a.txt", "/data/b.txt"], "/"),
        (["s3://bucket/x/a.txt", "s3://bucket/y/b.txt"], "s3://bucket/"),
    ],
)
def test_common_folder_is_the_longest_that_holds_all(paths: list[str], folder: str) -> None:
    assert common_folder(paths) == folder
    assert common_folder(reversed(paths)) == folder


def test_inputs_in_different_stores_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="different stores"):
        common_folder(["/data/a.txt", "s3://bucket/a.txt"])


@pytest.mark.parametrize("paths", [["/a.txt", "/b/c.txt"], ["s3://one/a.txt", "s3://two/b.txt"], ["memory:///a.txt"]])
def test_files_are_found_again_below_their_common_folder(paths: list[str]) -> None:
    try:
        root = common_folder(paths)
    except ConfigurationError:
        return
    assert [files.join(root, path.removeprefix(root)) for path in paths] == paths


# --- The plan of a folder


def test_plan_survives_its_json(block_folder: Path, hardness_folder: Path) -> None:
    for folder in (block_folder, hardness_folder):
        plan = read_plan(str(folder))
        assert plan is not None
        written = json.loads((folder / "_plan.json").read_bytes())
        assert plan.to_json() == written
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_plans_without_an_encoding_are_of_utf8(
    blocks: Path, shards: Path, edit_json: Callable[..., None], corpus_folder: Path, tokenizer_folder: Path
) -> None:
    for folder, encoding in ((blocks, "utf-8"), (shards, None)):
        edit_json(folder / "_plan.json", lambda plan: plan["configuration"].pop("encoding"))
        plan = read_plan(str(folder))
        assert plan is not None
        assert plan.configuration.encoding == encoding
    arguments = ["--input", str(corpus_folder), "--tokenizer", str(tokenizer_folder), "--split_bytes", "100000"]
    assert tokenize_corpus.main([*arguments, "--output", str(blocks), *IN_THREADS]) == 0


def test_plan_lists_the_splits_of_the_corpus(block_folder: Path, corpus_folder: Path) -> None:
    plan = json.loads((block_folder / "_plan.json").read_bytes())
    sizes = {name: (corpus_folder / name).stat().st_size for name in ("a.jsonl", "b.txt")}
    assert plan["configuration"]["input_files"] == sizes
    assert len(plan["splits"]) == -(-sum(sizes.values()) // 100_000)
    covered = [range_ for split in plan["splits"] for range_ in split["ranges"]]
    assert sum(end - start for _, start, end in covered) == sum(sizes.values())


@pytest.mark.parametrize(
    "value",
    ["", "{", "[]", "null", "5", "{}", '{"configuration": []}', '{"configuration": {}, "splits": []}', "\ufffd"],
)
def test_unreadable_plan_is_a_shard_error(tmp_path: Path, value: str) -> None:
    (tmp_path / "_plan.json").write_text(value)
    with pytest.raises(ShardError, match=r"_plan\.json"):
        read_plan(str(tmp_path))


def test_no_path_of_this_machine_and_no_time_is_written_into_a_folder(
    block_folder: Path,
    hardness_folder: Path,
    corpus_folder: Path,
    tokenizer_folder: Path,
    read_shard: Callable[..., Any],
) -> None:
    for folder in (block_folder, hardness_folder):
        texts = {path.name: path.read_text() for path in [*folder.glob("_*.json*"), *folder.glob("_receipts/*")]}
        texts |= {path.name: json.dumps(read_shard(path)[1]) for path in folder.glob("*.parquet")}
        assert len(texts) > 6
        for name, text in texts.items():
            for path in (corpus_folder, folder, tokenizer_folder, Path.home(), "/tmp", "file://"):
                assert f'"{path}' not in text, name
                assert len(str(path)) < 8 or str(path) not in text, name
            assert '"/' not in text, name
            assert '"time' not in text, name


# --- Another configuration is refused


@pytest.fixture
def tokenize(block_folder: Path, corpus_folder: Path, tokenizer_folder: Path) -> Callable[..., int]:
    """The command that wrote the block shards, with other flags."""

    def run(*more: object, input: Path = corpus_folder, tokenizer: Path = tokenizer_folder) -> int:
        arguments = ["--input", input, "--tokenizer", tokenizer, "--output", block_folder]
        defaults = [] if "--split_bytes" in more else ["--split_bytes", 100_000]
        return tokenize_corpus.main([*map(str, [*arguments, *defaults, *more]), *IN_THREADS])

    return run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--split_bytes", 50_000], ["split_bytes", "100000", "50000"]),
        (["--text_field", "body"], ["text_field", "'?text'?", "body"]),
        (["--txt_document", "line"], ["txt_document", "blank-line", "line"]),
        (["--max_document_bytes", 1000], ["max_document_bytes", "1000"]),
        (["--encoding", "latin-1"], ["encoding was utf-8, now iso8859-1"]),
        (["--start_token", "<unk>"], ["tokenizer", "start_id"]),
    ],
)
def test_other_flags_are_refused_by_name(
    tokenize: Callable[..., int], flags: list[object], words: list[str], block_folder: Path
) -> None:
    for word in words:
        with pytest.raises(ConfigurationError, match=word) as caught:
            tokenize(*flags)
    assert str(block_folder) in str(caught.value)
    assert "--output" in str(caught.value)


def test_a_changed_file_is_refused_by_name(
    tokenize: Callable[..., int], corpus_folder: Path, block_folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(corpus_folder, tmp_path / "elsewhere"))
    assert tokenize(input=copy) == 0  # the same corpus in another place is the same corpus
    with (copy / "b.txt").open("a") as stream:
        stream.write("more\n")
    with pytest.raises(ConfigurationError, match=r"b\.txt") as caught:
        tokenize(input=copy)
    assert "a.jsonl" not in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"b\.txt"):
        tokenize(input=copy / "a.jsonl")


def test_another_tokenizer_is_refused(
    tokenize: Callable[..., int], tokenizer_folder: Path, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    copy = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))

    def swap(value: dict[str, Any]) -> None:
        vocabulary = value["model"]["vocab"]
        first, second = list(vocabulary)[10:12]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit_json(copy / "tokenizer.json", swap)
    with pytest.raises(ConfigurationError, match="vocabulary_sha256"):
        tokenize(tokenizer=copy)


def test_padding_and_truncation_do_not_make_another_tokenizer(
    tokenize: Callable[..., int], tokenizer_folder: Path, tmp_path: Path
) -> None:
    backend = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.enable_padding(length=64)
    backend.enable_truncation(8)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="<mask>", cls_token="<s>", sep_token="</s>", **special
    ).save_pretrained(tmp_path / "tokenizer")
    assert tokenize(tokenizer=tmp_path / "tokenizer") == 0


@pytest.fixture
def score(hardness_folder: Path, block_folder: Path, alm_folder: Path) -> Callable[..., int]:
    """The command that wrote the hardness shards, with other flags."""

    def run(*more: object, alm: Path = alm_folder) -> int:
        arguments = ["--input", block_folder, "--alm", alm, "--output", hardness_folder, "--device", "cpu", *more]
        return score_corpus.main([*map(str, arguments), *IN_THREADS])

    return run


def test_another_alm_is_refused(score: Callable[..., int], alm_copy: Path, edit_json: Callable[..., None]) -> None:
    weights = load_file(alm_copy / "backward" / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + torch.ones_like(weights[name])
    save_file(weights, alm_copy / "backward" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"alm.*backward_sha256") as caught:
        score(alm=alm_copy)
    assert "forward_sha256" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dtype", "bfloat16"], ["dtype", "float32", "bfloat16"]),
        (["--mantissa_bits", 7], ["mantissa_bits", "10", "7"]),
    ],
)
def test_other_precision_is_refused(score: Callable[..., int], flags: list[object], words: list[str]) -> None:
    with pytest.raises(ConfigurationError, match=".*".join(words)):
        score(*flags)


def test_another_micro_batch_never_blocks_a_resume(score: Callable[..., int]) -> None:
    assert score("--micro_batch", 3) == 0


def test_kinds_of_shards_are_not_mixed(
    corpus_folder: Path, tokenizer_folder: Path, hardness_folder: Path, alm_folder: Path, block_folder: Path
) -> None:
    common = ["--input", str(corpus_folder), "--tokenizer", str(tokenizer_folder)]
    with pytest.raises(ConfigurationError, match=r"kind was hardness, now blocks"):
        tokenize_corpus.main([*common, "--output", str(hardness_folder)])
    with pytest.raises(ConfigurationError, match=r"kind was blocks, now hardness"):
        score_corpus.main([*common, "--alm", str(alm_folder), "--output", str(block_folder), "--device", "cpu"])


def test_parquet_files_without_a_plan_are_left_alone(
    corpus_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "somebody's.parquet").write_bytes(b"data")
    with pytest.raises(ConfigurationError, match="--output"):
        tokenize_corpus.main(
            ["--input", str(corpus_folder), "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path)]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["somebody's.parquet"]
