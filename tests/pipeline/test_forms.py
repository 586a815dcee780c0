"""Every form of input through the whole command: the same documents give the same blocks."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from warcio.warcwriter import WARCWriter

from pipeline import tokenize_corpus, verify

IN_THREADS = ("--direct_running_mode", "in_memory")

Run = Callable[..., tuple[int, str]]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_txt(path: Path, texts: list[str]) -> None:
    path.write_text("\n\n".join(texts) + "\n")


def write_parquet(path: Path, texts: list[Any]) -> None:
    pq.write_table(pa.table({"id": range(len(texts)), "text": pa.array(texts)}), path, row_group_size=70)


def write_wet(path: Path, texts: list[str]) -> None:
    with path.open("wb") as stream:
        writer = WARCWriter(stream, gzip=path.suffix == ".gz")
        writer.write_record(writer.create_warcinfo_record(path.name, {"software": "none"}))
        for number, text in enumerate(texts):
            data = text.encode()
            uri, kind = f"http://example.org/{number}", "text/plain"
            body = io.BytesIO(data)
            writer.write_record(writer.create_warc_record(uri, "conversion", body, len(data), warc_content_type=kind))


def compressed(write: Callable[[Path, list[str]], None], compress: Callable[[bytes], bytes]) -> Callable[..., None]:
    def write_compressed(path: Path, texts: list[str]) -> None:
        write(path, texts)
        path.write_bytes(compress(path.read_bytes()))

    return write_compressed


zstd = zstandard.ZstdCompressor().compress
WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "a.txt": write_txt,
    "a.txt.gz": compressed(write_txt, gzip.compress),
    "a.txt.zst": compressed(write_txt, zstd),
    "a.jsonl.gz": compressed(write_jsonl, gzip.compress),
    "a.jsonl.zst": compressed(write_jsonl, zstd),
    "a.jsonl.zstd": compressed(write_jsonl, zstd),
    "a.parquet": write_parquet,
    "a.wet": write_wet,
    "a.warc": write_wet,
    "a.warc.wet.gz": write_wet,
    "a.warc.wet.zst": compressed(write_wet, zstd),
}


@pytest.fixture(scope="module")
def texts(corpus_folder: Path) -> list[str]:
    lines = (corpus_folder / "a.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] + (" ünd 日本 🙂" if number % 7 == 0 else "") for number, line in enumerate(lines)]


@pytest.fixture
def blocks_of(
    run_command: Run, tokenizer_folder: Path, tmp_path: Path, read_shard: Callable[..., Any]
) -> Callable[..., npt.NDArray[Any]]:
    """Tokenizes inputs into a folder of this name, checks it, and gives all of its blocks."""

    def run(name: str, *inputs: Path, flags: tuple[object, ...] = ()) -> npt.NDArray[Any]:
        output = tmp_path / "output" / name
        arguments = ["--input", *inputs, "--tokenizer", tokenizer_folder, "--output", output, *flags]
        code, err = run_command(tokenize_corpus.main, *arguments, *IN_THREADS)
        assert code == 0, err
        code, err = run_command(verify.main, output)
        assert code == 0, err
        return np.concatenate([read_shard(path)[0]["input_ids"] for path in sorted(output.glob("*.parquet"))])

    return run


@pytest.fixture
def expected(blocks_of: Callable[..., npt.NDArray[Any]], tmp_path: Path, texts: list[str]) -> npt.NDArray[Any]:
    write_jsonl(tmp_path / "expected.jsonl", texts)
    return blocks_of("expected", tmp_path / "expected.jsonl")


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_the_blocks_of_json_lines(
    blocks_of: Callable[..., Any], expected: npt.NDArray[Any], texts: list[str], tmp_path: Path, name: str
) -> None:
    WRITERS[name](tmp_path / name, texts)
    found = blocks_of("found", tmp_path / name)
    assert len(found) > 100
    np.testing.assert_array_equal(found, expected)


def test_text_in_another_encoding_gives_the_blocks_of_its_utf8(
    blocks_of: Callable[..., Any], texts: list[str], tmp_path: Path
) -> None:
    japanese = [text.replace("🙂", "").replace("ü", "表") for text in texts]
    write_txt(tmp_path / "utf8.txt", japanese)
    (tmp_path / "sjis.txt").write_bytes((tmp_path / "utf8.txt").read_text().encode("shift_jis"))
    found = blocks_of("found", tmp_path / "sjis.txt", flags=("--encoding", "shift_jis"))
    np.testing.assert_array_equal(found, blocks_of("expected", tmp_path / "utf8.txt"))


def test_a_folder_of_mixed_forms_is_one_corpus(
    blocks_of: Callable[..., Any], expected: npt.NDArray[Any], texts: list[str], tmp_path: Path
) -> None:
    """Names may repeat in other folders; what is hidden, or of no known form, is left out."""
    parts = np.array_split(np.array(texts, dtype=object), len(WRITERS))
    corpus = tmp_path / "corpus"
    for index, ((name, write), part) in enumerate(zip(WRITERS.items(), parts, strict=True)):
        (corpus / f"{index:02d}").mkdir(parents=True)
        write(corpus / f"{index:02d}" / name, list(part))
    for name in ("_temporary.txt", ".hidden.jsonl", "notes.md", "00/_a.parquet"):
        (corpus / name).write_text("not of the corpus")
    np.testing.assert_array_equal(blocks_of("found", corpus), expected)
    np.testing.assert_array_equal(blocks_of("again", corpus / "00" / ".." / "00", corpus), expected)


def test_every_document_of_a_cut_table_is_in_the_account(
    blocks_of: Callable[..., Any], texts: list[str], tmp_path: Path
) -> None:
    """Of several splits, with rejects in the later ones: their rows count from the beginning of the file."""
    rows: list[str | None] = [*texts]
    for row in (3, 100, 101, 299):
        rows[row] = None
    write_parquet(tmp_path / "a.parquet", rows)
    blocks_of("found", tmp_path / "a.parquet", flags=("--split_bytes", 20_000))
    output = tmp_path / "output" / "found"
    manifest = json.loads((output / "_manifest.json").read_bytes())
    assert len(manifest["shards"]) > 5
    assert (manifest["documents"], manifest["rejected_documents"]) == (len(texts) - 4, 4)
    rejects = [json.loads(line) for line in (output / "_rejects.jsonl").read_text().splitlines()]
    assert [(reject["file"], reject["row"]) for reject in rejects] == [("a.parquet", row) for row in (3, 100, 101, 299)]
    assert all(set(reject) == {"file", "row", "reason"} for reject in rejects)
    receipts = [json.loads(path.read_bytes()) for path in sorted((output / "_receipts").iterdir())]
    assert sum(receipt["lines"].get("a.parquet", 0) for receipt in receipts) == len(texts)


def test_rejects_say_line_row_or_record(blocks_of: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{bad\n')
    write_parquet(tmp_path / "b.parquet", ["good", None])
    write_wet(tmp_path / "c.wet", ["good"])
    data = (tmp_path / "c.wet").read_bytes()
    (tmp_path / "c.wet").write_bytes(data + data[data.index(b"WARC/", 10) :].replace(b"good", b"b\xff\xffd"))
    blocks_of("found", *(tmp_path / name for name in ("a.jsonl", "b.parquet", "c.wet")))
    lines = (tmp_path / "output" / "found" / "_rejects.jsonl").read_text().splitlines()
    found = [{key: value for key, value in json.loads(line).items() if key != "reason"} for line in lines]
    assert found == [
        {"file": "a.jsonl", "line": 2, "offset": 17},
        {"file": "b.parquet", "row": 1},
        {"file": "c.wet", "record": 3, "offset": len(data)},
    ]


def test_damaged_tables_and_missing_columns_are_refused_before_any_shard(
    run_command: Run, tokenizer_folder: Path, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "good.parquet", ["good"])
    write_parquet(tmp_path / "bad.parquet", ["bad"])
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "bad.parquet").read_bytes()[:-3])
    flags = ["--tokenizer", tokenizer_folder, "--output", tmp_path / "output"]
    code, err = run_command(tokenize_corpus.main, "--input", tmp_path / "*.parquet", *flags, *IN_THREADS)
    assert code == 2
    assert "bad.parquet cannot be read as Parquet" in err
    code, err = run_command(
        tokenize_corpus.main, "--input", tmp_path / "good.parquet", *flags, *IN_THREADS, "--text_field", "content"
    )
    assert code == 2
    for word in ("good.parquet", "'content'", "id, text", "--text_field"):
        assert word in err
    assert not (tmp_path / "output").exists()


def test_a_web_archive_without_text_is_named_on_the_console(
    run_command: Run, tokenizer_folder: Path, tmp_path: Path
) -> None:
    write_wet(tmp_path / "pages.warc.gz", [])
    flags = ["--tokenizer", tokenizer_folder, "--output", tmp_path / "output"]
    code, err = run_command(tokenize_corpus.main, "--input", tmp_path / "pages.warc.gz", *flags, *IN_THREADS)
    assert code == 0
    assert err.count("pages.warc.gz holds no record of plain text (found: 1 warcinfo)") == 1
