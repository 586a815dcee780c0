"""What can go wrong says what, where, and the way out: one paragraph, the right exit code, no traceback."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline import score_corpus, status, tokenize_corpus, verify

IN_THREADS = ("--direct_running_mode", "in_memory")
Run = Callable[..., tuple[int, str]]


def error_of(err: str) -> str:
    """The one message of a failed command: a paragraph of its own, last on standard error."""
    assert "Traceback" not in err
    assert 'File "' not in err
    _, found, message = err.rpartition("error: ")
    assert found, err
    assert message.endswith("\n")
    assert "\n\n" not in message.strip()
    return message.strip()


@pytest.fixture
def tokenize(run_command: Run, corpus_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> Run:
    """tokenize_corpus with good flags, of which some are replaced."""

    def run(
        *more: object,
        input: object = corpus_folder,
        tokenizer: object = tokenizer_folder,
        output: object = tmp_path / "output",
    ) -> tuple[int, str]:
        inputs = input if isinstance(input, list) else [input]
        flags = ["--input", *inputs, "--tokenizer", tokenizer, "--output", output, *IN_THREADS]
        return run_command(tokenize_corpus.main, *flags, *more)

    return run


@pytest.fixture
def score(run_command: Run, block_folder: Path, alm_folder: Path, tmp_path: Path) -> Run:
    """score_corpus with good flags, of which some are replaced."""

    def run(
        *more: object,
        input: object = block_folder,
        alm: object = alm_folder,
        output: object = tmp_path / "output",
        device: str = "cpu",
    ) -> tuple[int, str]:
        inputs = input if isinstance(input, list) else [input]
        flags = ["--input", *inputs, "--alm", alm, "--output", output, "--device", device, *IN_THREADS]
        return run_command(score_corpus.main, *flags, *more)

    return run


@pytest.fixture
def check_refused(tmp_path: Path) -> Callable[..., None]:
    """Exit code 2, a message with all the words, and not a single shard in the output."""

    def check(result: tuple[int, str], *words: object, code: int = 2) -> None:
        found, err = result
        message = error_of(err)
        assert found == code, message
        for word in words:
            assert str(word) in message, message
        assert list(tmp_path.glob("output/*.parquet")) == []

    return check


Check = Callable[..., None]


# --- Inputs


def test_missing_inputs_are_named(tokenize: Run, check_refused: Check, tmp_path: Path, corpus_folder: Path) -> None:
    check_refused(tokenize(input=tmp_path / "nowhere" / "*.jsonl"), "nowhere/*.jsonl", "pattern")
    check_refused(tokenize(input=tmp_path / "nowhere.txt"), "nowhere.txt", "check the path")
    check_refused(tokenize(input=[corpus_folder, tmp_path / "nowhere.txt"]), "nowhere.txt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "table.csv").write_text("a,b\n")
    check_refused(tokenize(input=tmp_path / "folder"), "folder", ".jsonl.gz")


def test_a_link_to_nowhere_is_named(tokenize: Run, check_refused: Check, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "good.txt").write_text("text\n")
    (tmp_path / "folder" / "lost.txt").symlink_to("/nowhere")
    check_refused(tokenize(input=tmp_path / "folder"), "lost.txt")


def test_unknown_suffixes_are_refused(tokenize: Run, check_refused: Check, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n")
    check_refused(tokenize(input=tmp_path / "table.csv"), "table.csv", ".txt", ".jsonl")
    check_refused(tokenize(input=tmp_path / "*.csv"), "table.csv", ".txt", ".jsonl")


@pytest.mark.parametrize("is_begun", [False, True])
def test_unfinished_block_shards_are_no_input(
    score: Run, check_refused: Check, blocks: Path, tmp_path: Path, is_begun: bool
) -> None:
    """Nor does what lies beside them (rejects, a tokenizer's merges.txt) pass for text."""
    (blocks / "_manifest.json").unlink()
    if is_begun:
        (blocks / "_rejects.jsonl").unlink()
    check_refused(score(input=blocks), blocks, "_manifest.json")


def test_block_shards_are_no_text(tokenize: Run, check_refused: Check, block_folder: Path) -> None:
    check_refused(tokenize(input=block_folder), block_folder)


def test_split_bytes_is_refused_with_block_shards(score: Run, check_refused: Check, block_folder: Path) -> None:
    check_refused(score("--split_bytes", 1000), "--split_bytes", block_folder)


def test_hardness_shards_are_not_scored_again(score: Run, check_refused: Check, hardness_folder: Path) -> None:
    check_refused(score(input=hardness_folder), hardness_folder, "scored already")


def test_block_shards_are_not_mixed(score: Run, check_refused: Check, block_folder: Path, corpus_folder: Path) -> None:
    check_refused(score(input=[block_folder, corpus_folder]), block_folder, "only --input")


@pytest.mark.parametrize("damage", ["flipped", "missing", "exchanged"])
def test_damaged_block_shards_are_an_error_that_names_the_shard(
    score: Run, blocks: Path, tmp_path: Path, damage: str, flip_bit: Callable[..., None]
) -> None:
    first, second = sorted(blocks.glob("*.parquet"))[:2]
    if damage == "flipped":
        flip_bit(first, first.stat().st_size // 2)
    elif damage == "missing":
        first.unlink()
    else:
        shutil.copy(second, first)
    code, err = score(input=blocks)
    assert code in (1, 2)
    assert first.name in error_of(err)
    assert not (tmp_path / "output" / "_manifest.json").exists()


# --- Flags


@pytest.mark.parametrize(
    "flag", ["--splitbytes", "--split_byte", "--split", "--outpu", "--micro-batch", "--alpha", "stray"]
)
def test_unknown_and_abbreviated_flags_are_refused(tokenize: Run, check_refused: Check, flag: str) -> None:
    more = [flag] if flag == "stray" else [flag, 5]
    code, err = tokenize("--txt_document", "line", *more)
    assert code == 2
    assert flag in error_of(err)


def test_beams_options_pass_and_a_misspelt_one_does_not(tokenize: Run, check_refused: Check, tmp_path: Path) -> None:
    check_refused(tokenize("--direct_num_worker", 1), "--direct_num_worker")
    code, err = tokenize("--direct_num_workers", 1, "--runner", "FnApiRunner")
    assert code == 0, err


@pytest.mark.parametrize("flags", [("--split_bytes", "0"), ("--split_bytes", "many"), ("--txt_document", "page")])
def test_values_out_of_range_are_refused(tokenize: Run, flags: tuple[str, str]) -> None:
    code, err = tokenize(*flags)
    assert code == 2
    assert flags[0] in error_of(err)
    assert flags[1] in error_of(err)


def test_encodings_without_ascii_line_endings_are_refused_with_the_way_out(tokenize: Run, check_refused: Check) -> None:
    for encoding in ("utf-16", "utf-16-le", "UTF-32", "cp037"):
        check_refused(tokenize("--encoding", encoding), "--encoding", encoding, "iconv", "UTF-8")
    for encoding in ("klingon", "hex", "rot13"):
        check_refused(tokenize("--encoding", encoding), "--encoding", encoding, "encoding that Python knows")


@pytest.mark.parametrize("flags", [("--micro_batch", "0"), ("--mantissa_bits", "24"), ("--dtype", "float64")])
def test_scoring_values_out_of_range_are_refused(score: Run, flags: tuple[str, str]) -> None:
    code, err = score(*flags)
    assert code == 2
    assert flags[0] in error_of(err)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "cudax", "cpux", "cpu:1:2"])
def test_device_that_is_none_is_refused(score: Run, check_refused: Check, device: str) -> None:
    check_refused(score(device=device), "--device", device)


def test_cuda_is_refused_where_there_is_none(score: Run, check_refused: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_refused(score(device="cuda"), "--device cuda", "--device cpu")
    check_refused(score(device="cuda:3"), "--device cuda:3")


def test_missing_flags_are_named(run_command: Run, corpus_folder: Path, tmp_path: Path) -> None:
    code, err = run_command(score_corpus.main, "--input", corpus_folder, "--output", tmp_path / "output")
    assert code == 2
    assert "--alm" in error_of(err)
    assert not (tmp_path / "output").exists()


# --- The ALM and its tokenizer


@pytest.fixture(scope="session")
def other_tokenizer(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tokenizer with two ids exchanged."""
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path_factory.mktemp("other") / "tokenizer"))
    value = json.loads((folder / "tokenizer.json").read_bytes())
    vocabulary = value["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(value))
    return folder


def test_tokenizer_that_is_not_the_alms_is_refused(
    score: Run, check_refused: Check, corpus_folder: Path, other_tokenizer: Path, alm_folder: Path
) -> None:
    check_refused(
        score("--tokenizer", other_tokenizer, input=corpus_folder), alm_folder, "different tokenizers", "--tokenizer"
    )


def test_tokenizer_that_is_not_the_blocks_is_refused(
    score: Run, check_refused: Check, other_tokenizer: Path, alm_copy: Path, block_folder: Path
) -> None:
    for path in other_tokenizer.iterdir():
        shutil.copy(path, alm_copy / path.name)
    check_refused(score(alm=alm_copy), "different tokenizers")
    check_refused(score("--tokenizer", other_tokenizer, alm=alm_copy), block_folder, "different tokenizers")


def test_swapped_directions_are_refused(score: Run, check_refused: Check, alm_copy: Path) -> None:
    (alm_copy / "forward").rename(alm_copy / "x")
    (alm_copy / "backward").rename(alm_copy / "forward")
    (alm_copy / "x").rename(alm_copy / "backward")
    check_refused(score(alm=alm_copy), alm_copy, "right_to_left", "left_to_right", "swapped")


def test_missing_direction_is_refused(score: Run, check_refused: Check, alm_copy: Path) -> None:
    shutil.rmtree(alm_copy / "backward")
    check_refused(score(alm=alm_copy), alm_copy / "backward", "trainer.train_alm")


def test_missing_alm_is_refused(score: Run, check_refused: Check, tmp_path: Path, corpus_folder: Path) -> None:
    check_refused(score(alm=tmp_path / "nowhere"), tmp_path / "nowhere")
    result = score(alm=tmp_path / "nowhere", input=corpus_folder)
    check_refused(result, tmp_path / "nowhere")
    assert "ALM" in error_of(result[1])  # it was --alm that named it, not --tokenizer


def test_missing_reading_direction_is_only_a_warning(
    score: Run, alm_copy: Path, edit_json: Callable[..., None]
) -> None:
    edit_json(alm_copy / "forward" / "config.json", lambda config: config.pop("reading_direction"))
    code, err = score(alm=alm_copy)
    assert code == 0
    assert f"{alm_copy}/forward/config.json has no reading_direction" in err


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("n_positions", 256, ["256 positions", "512"]), ("vocab_size", 400, ["400 ids", "500"])],
)
def test_too_small_alm_is_refused(
    *,
    score: Run,
    check_refused: Check,
    alm_copy: Path,
    edit_json: Callable[..., None],
    key: str,
    value: int,
    words: list[str],
) -> None:
    edit_json(alm_copy / "backward" / "config.json", lambda config: config.update({key: value}))
    check_refused(score(alm=alm_copy), alm_copy / "backward", *words)


def change_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", ["no weights", "torn weights", "torn config", "unknown architecture", "lost tensor"])
def test_damaged_checkpoint_is_refused(
    score: Run, check_refused: Check, alm_copy: Path, edit_json: Callable[..., None], damage: str
) -> None:
    checkpoint = alm_copy / "forward"
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif damage == "torn config":
        config.write_bytes(config.read_bytes()[:50])
    elif damage == "unknown architecture":
        edit_json(config, lambda value: value.update(model_type="nobody_knows"))
    else:
        change_weights(checkpoint, lambda tensors: tensors.pop("transformer.h.0.mlp.c_fc.weight"))
    check_refused(score(alm=alm_copy), checkpoint)


def test_alm_that_returns_nan_fails_without_a_shard(score: Run, check_refused: Check, alm_copy: Path) -> None:
    change_weights(alm_copy / "forward", lambda tensors: tensors["transformer.wte.weight"].fill_(float("nan")))
    check_refused(score(alm=alm_copy), "NaN", "--dtype float32", code=1)


def test_tokenizer_without_frame_tokens_names_the_flag(tokenize: Run, check_refused: Check, tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "tokenizer")
    check_refused(tokenize(tokenizer=tmp_path / "tokenizer"), "--start_token")
    check_refused(tokenize("--start_token", "a", tokenizer=tmp_path / "tokenizer"), "--end_token")
    check_refused(tokenize("--start_token", "zzz", tokenizer=tmp_path / "tokenizer"), "zzz", "--start_token")


def test_missing_tokenizer_is_refused(tokenize: Run, check_refused: Check, tmp_path: Path) -> None:
    check_refused(tokenize(tokenizer=tmp_path / "nowhere"), tmp_path / "nowhere", "tokenizer.json")


# --- The output folder


@pytest.mark.parametrize("content", ["", "{", "[]", '{"configuration": {}}'])
def test_damaged_plan_fails_and_leaves_the_folder_alone(
    tokenize: Run, blocks: Path, run_command: Run, state_of: Callable[..., Any], content: str
) -> None:
    (blocks / "_plan.json").write_text(content)
    before = state_of(blocks)
    for result in (
        tokenize("--split_bytes", 100_000, output=blocks),
        run_command(status.main, blocks),
    ):
        code, err = result
        assert code == 1
        assert f"{blocks}/_plan.json" in error_of(err)
    code, err = run_command(verify.main, blocks)
    assert code == 1
    assert "_plan.json" in err
    assert state_of(blocks) == before


def test_another_configuration_is_refused_before_any_work(
    tokenize: Run, blocks: Path, state_of: Callable[..., Any]
) -> None:
    before = state_of(blocks)
    code, err = tokenize("--split_bytes", 5000, output=blocks)
    assert code == 2
    assert "split_bytes was 100000, now 5000" in error_of(err)
    assert state_of(blocks) == before


def test_output_that_is_a_file_is_refused(tokenize: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, err = tokenize(output=tmp_path / "file")
    assert code == 2
    assert str(tmp_path / "file") in error_of(err)


def test_folders_that_are_none_are_refused(run_command: Run, tmp_path: Path) -> None:
    for main in (status.main, verify.main):
        code, err = run_command(main, tmp_path / "nowhere")
        assert code == 2
        assert "nowhere" in error_of(err)


# --- Bad documents are no errors


def test_bad_documents_never_take_the_job_down(tokenize: Run, real_data: Path, tmp_path: Path) -> None:
    code, err = tokenize(input=real_data / "stress" / "synthetic")
    assert code == 0, err
    manifest = json.loads((tmp_path / "output" / "_manifest.json").read_bytes())
    rejects = [json.loads(line) for line in (tmp_path / "output" / "_rejects.jsonl").read_text().splitlines()]
    assert manifest["rejected_documents"] == len(rejects) == 8 + 2
    assert {reject["file"] for reject in rejects} == {"bad.jsonl", "invalid_utf8.txt", "kuhn_malformed.txt"}
    assert "10 documents rejected" in err


def test_a_cut_archive_is_named_on_the_console_and_listed(tokenize: Run, tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"text": f"{i} {i * i} {i**3}"}) + "\n" for i in range(5000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "whole.jsonl.gz").write_bytes(whole)
    code, err = tokenize(input=[tmp_path / "cut.jsonl.gz", tmp_path / "whole.jsonl.gz"])
    assert code == 0
    assert "cut.jsonl.gz is cut" in err
    manifest = json.loads((tmp_path / "output" / "_manifest.json").read_bytes())
    assert manifest["rejected_documents"] == 1
    assert 5000 + 2000 < manifest["documents"] < 5000 + 3000
    (reject,) = map(json.loads, (tmp_path / "output" / "_rejects.jsonl").read_text().splitlines())
    assert reject["file"] == "cut.jsonl.gz"
    assert reject["line"] == manifest["documents"] - 5000 + 1


def test_a_large_archive_is_named_on_the_console(tokenize: Run, tmp_path: Path) -> None:
    """Nothing but its size is looked at: a sparse file of 1.1 GiB, which is then no archive either."""
    with (tmp_path / "large.jsonl.gz").open("wb") as stream:
        stream.truncate(1_181_116_006)
    _, err = tokenize(input=tmp_path / "large.jsonl.gz")
    assert "large.jsonl.gz" in err.replace("large.jsonl.gz is cut", "")


def test_a_corpus_of_bad_documents_is_published_without_rows(tokenize: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{bad\n" * 10)
    code, _ = tokenize(input=tmp_path / "bad.jsonl")
    assert code == 0
    manifest = json.loads((tmp_path / "output" / "_manifest.json").read_bytes())
    assert [shard["blocks"] for shard in manifest["shards"]] == [0]
    assert (manifest["documents"], manifest["rejected_documents"]) == (0, 10)


# --- The contract of `python -m`


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["glob", "flag", "NaN", "verify"])
def test_commands_end_with_a_message_and_no_traceback(
    *,
    run_module: Callable[..., Any],
    fault: str,
    corpus_folder: Path,
    tokenizer_folder: Path,
    block_folder: Path,
    alm_copy: Path,
    tmp_path: Path,
) -> None:
    output = ["--output", tmp_path / "output"]
    tokenize = ["pipeline.tokenize_corpus", "--tokenizer", tokenizer_folder, *output]
    if fault == "glob":
        done = run_module(*tokenize, "--input", "/nowhere/*.txt")
        code, word = 2, "/nowhere/*.txt"
    elif fault == "flag":
        done = run_module(*tokenize, "--input", corpus_folder, "--split_byte", 5)
        code, word = 2, "--split_byte"
    elif fault == "NaN":
        change_weights(alm_copy / "backward", lambda tensors: tensors["transformer.wte.weight"].fill_(float("nan")))
        flags = ["--input", block_folder, "--alm", alm_copy, "--device", "cpu"]
        done = run_module("pipeline.score_corpus", *flags, *output)
        code, word = 1, "NaN"
    else:
        done = run_module("pipeline.verify", tmp_path / "output")
        code, word = 2, str(tmp_path / "output")
    assert done.returncode == code, done.stderr
    assert word in error_of(done.stderr)
    assert list(tmp_path.glob("output/*.parquet")) == []
