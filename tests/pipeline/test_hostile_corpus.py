"""A corpus that is out to break the job: the good in it comes through, the bad is named, memory stays bounded."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import pytest
import zstandard
from transformers import AutoTokenizer

from pipeline import verify

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MEGABYTE = 1_000_000
LINE_BYTES = 300 * MEGABYTE
BOMB_BYTES = 500 * MEGABYTE
MAX_EXTRA_BYTES = 100 * MEGABYTE
"""That hostile files may add to a worker's peak: a document of 16 MiB is held while it is read, some copies over, but
not a third of the long line nor a fifth of a bomb."""
TOO_LONG = "longer than --max_document_bytes 16777216"
END_ID = 2


@dataclass
class Expected:
    """What should become of one file."""

    good: list[tuple[int, str]] = field(default_factory=list)
    """Offset and text of each document that has one."""
    rejects: list[tuple[int, str]] = field(default_factory=list)
    """Line, and a pattern that the reason matches."""


# --- Good and bad documents of small files, by Python's own reading


def read_jsonl(data: bytes) -> Expected:
    expected, offset = Expected(), 0
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", data), 1):
        try:
            value = json.loads(line.decode()) if line.strip() else {"text": ""}
            value["text"].encode()
            expected.good += [(offset, value["text"])] if value["text"] else []
        except UnicodeDecodeError:
            expected.rejects.append((number, "not UTF-8"))
        except UnicodeEncodeError:
            expected.rejects.append((number, "a lone surrogate"))
        except RecursionError:
            expected.rejects.append((number, "JSON nested too deeply"))
        except ValueError:
            expected.rejects.append((number, "not JSON"))
        except (AttributeError, KeyError, TypeError):
            expected.rejects.append((number, "expected text in the field 'text'|expected a JSON object"))
        offset += len(line)
    return expected


def read_txt(data: bytes) -> Expected:
    """Documents are runs of lines that are not blank; a byte order mark is none of the text."""
    expected = Expected()
    offset = len("\ufeff".encode()) if data.startswith("\ufeff".encode()) else 0
    lines = []
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", data[offset:]), 1):
        lines.append((number, offset, line))
        offset += len(line)
    for is_blank, group in groupby(lines, key=lambda item: not item[2].strip()):
        if is_blank:
            continue
        run = list(group)
        number, begin, _ = run[0]
        joined = b"".join(line for _, _, line in run)
        try:
            expected.good.append((begin, re.sub(rb"\r?\n\Z", b"", joined).decode()))
        except UnicodeDecodeError:
            expected.rejects.append((number, "not UTF-8"))
    return expected


# --- Hostile files, written piece by piece


def long_line(stream: BinaryIO, form: str, length: int) -> Expected:
    """A good document, one of `length` bytes on one line, and another good one."""
    opening, closing, gap = (b'{"text": "', b'"}', b"\n") if form == "jsonl" else (b"", b"", b"\n\n")
    first, last = (opening + text + closing + gap for text in (b"before it", b"after it"))
    stream.write(first + opening)
    piece = b"a" * MEGABYTE
    for _ in range(length // MEGABYTE):
        stream.write(piece)
    stream.write(closing + gap + last)
    behind = len(first) + len(opening) + length + len(closing + gap)
    good = [(0, "before it"), (behind, "after it")]
    return Expected(good, [(1 + len(gap), re.escape(TOO_LONG))])


def nested(stream: BinaryIO) -> Expected:
    """JSON that is nested more deeply than any parser goes, alone and beside a text; and some that is not too deep."""
    depth = 200_000
    lines = [
        '{"text": "before it"}',
        "[" * depth,
        '{"text": ' * depth,
        '{"text": "beside it", "more": ' + "[" * depth + "]" * depth + "}",
        '{"text": "not too deep", "more": ' + "[" * 200 + "]" * 200 + "}",
        '{"text": "after it"}',
    ]
    stream.write("".join(f"{line}\n" for line in lines).encode())
    offsets = [sum(len(line) + 1 for line in lines[:index]) for index in range(len(lines))]
    good = [(offsets[0], "before it"), (offsets[4], "not too deep"), (offsets[5], "after it")]
    return Expected(good, [(number, "JSON nested too deeply") for number in (2, 3, 4)])


OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("wb"),
    ".gz": lambda path: gzip.GzipFile(path, "wb", compresslevel=1),
    ".zst": lambda path: zstandard.open(path, "wb"),
}


def write_hostile(folder: Path) -> dict[str, Expected]:
    """Writes the hostile files; what is expected of each, by name."""
    folder.mkdir()
    expected = {}
    with (folder / "nested.jsonl").open("wb") as stream:
        expected["nested.jsonl"] = nested(stream)
    for form in ("jsonl", "txt"):
        for suffix, name, length in (
            ("", "line", LINE_BYTES),
            (".gz", "line", LINE_BYTES),
            (".gz", "bomb", BOMB_BYTES),
            (".zst", "bomb", BOMB_BYTES),
        ):
            path = folder / f"{name}.{form}{suffix}"
            with OPENERS[suffix](path) as stream:
                expected[path.name] = long_line(stream, form, length)
    return expected


def copy_stress(stress: Path, folder: Path) -> dict[str, Expected]:
    """Copies all stress files, JSON twice: as it is, which is no JSON lines, and with a line a text."""
    folder.mkdir()
    for path in [*stress.glob("*.txt"), *stress.glob("synthetic/*")]:
        shutil.copyfile(path, folder / path.name)
    for path in stress.glob("*.json"):
        shutil.copyfile(path, folder / f"{path.stem}-array.jsonl")
        texts = json.loads(path.read_bytes())
        (folder / f"{path.stem}-lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    readers = {".jsonl": read_jsonl, ".txt": read_txt}
    return {path.name: readers[path.suffix](path.read_bytes()) for path in folder.iterdir()}


# --- The job, and what it left


@dataclass(frozen=True)
class Job:
    exit_code: int
    output: str
    peaks: dict[int, int]
    """Of each worker process, in bytes."""


def run_job(inputs: Iterable[Path], tokenizer: Path, output: Path) -> Job:
    """Runs the real command, and watches its workers."""
    command = [sys.executable, "-m", "pipeline.tokenize_corpus", "--input", *inputs]
    command += ["--tokenizer", tokenizer, "--output", output, "--direct_num_workers", "2"]
    log = output.with_suffix(".log")
    peaks: dict[int, int] = {}
    with log.open("wb") as stream:
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=stream, stderr=stream)
        try:
            while process.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        peaks[child.pid] = max(peaks.get(child.pid, 0), peak_memory(child.pid))
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    return Job(process.returncode, log.read_text(), peaks)


def peak_memory(pid: int) -> int:
    """The most bytes that a process held at any time, as the kernel kept count."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def stream_of(arrays: dict[str, Any]) -> list[int]:
    ids: list[int] = arrays["input_ids"][:, 1:511].reshape(-1).tolist()
    return ids


def documents_of(ids: list[int]) -> Iterator[list[int]]:
    """The ids of each document; the last one may be cut, or empty where the cut is at its beginning."""
    document: list[int] = []
    for id_ in ids:
        if id_ == END_ID:
            yield document
            document = []
        else:
            document.append(id_)
    yield document


def in_split(split: dict[str, Any], expected: dict[str, Expected]) -> list[str]:
    """The good documents whose first byte lies in a split's ranges, in order; archives are whole."""
    texts = []
    for name, start, end in split["ranges"]:
        is_whole = name.endswith((".gz", ".zst"))
        good = expected[name.rpartition("/")[2]].good
        texts += [text for offset, text in good if is_whole or start <= offset < end]
    return texts


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_hostile_corpus_costs_neither_memory_nor_good_documents(
    real_data: Path, tmp_path: Path, read_shard: Callable[..., Any]
) -> None:
    stress, hostile = tmp_path / "corpus" / "stress", tmp_path / "corpus" / "hostile"
    stress.parent.mkdir()
    expected = copy_stress(real_data / "stress", stress)
    tame = run_job([stress], real_data / "tokenizer", tmp_path / "tame")
    assert tame.exit_code == 0, tame.output
    expected |= write_hostile(hostile)
    output = tmp_path / "blocks"
    job = run_job([hostile, stress], real_data / "tokenizer", output)
    assert job.exit_code == 0, job.output
    assert max(job.peaks.values()) <= max(tame.peaks.values()) + MAX_EXTRA_BYTES

    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizer")
    splits = json.loads((output / "_plan.json").read_bytes())["splits"]
    for split in splits:
        arrays, footer = read_shard(output / split["shard"])
        texts = in_split(split, expected)
        *whole, cut = (tokenizer.decode(ids) for ids in documents_of(stream_of(arrays)))
        assert whole == texts[: len(whole)], split
        assert texts[len(whole) :] == [] or texts[len(whole)].startswith(cut.rstrip("\ufffd")), split
        # What no block holds is fewer than 510 tokens at the end of the split, and they are counted.
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
        tokens = sum(len(ids) + 1 for ids in encoded)
        assert footer["leftover_tokens"] == tokens - footer["tokens"] < 510, split
        assert footer["documents"] == len(texts)
    assert sum(len(in_split(split, expected)) for split in splits) == sum(len(file.good) for file in expected.values())

    rejects = [json.loads(line) for line in (output / "_rejects.jsonl").read_text().splitlines()]
    found = {(reject["file"].rpartition("/")[2], reject["line"]): reject["reason"] for reject in rejects}
    wanted = {(name, line): reason for name, file in expected.items() for line, reason in file.rejects}
    assert len(found) == len(rejects)
    assert found.keys() == wanted.keys()
    for place, reason in wanted.items():
        assert re.match(reason, found[place]), (place, found[place])
    assert list(chain(*(output.glob(pattern) for pattern in ("*.tmp", ".*.tmp", "_set_aside/*")))) == []
    assert verify.main([str(output)]) == 0
