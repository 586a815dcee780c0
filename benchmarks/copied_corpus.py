"""Corpora of any size, out of copies of the documents of a small one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.python_corpus import write_corpus
from pipeline.corpus import FileRange, RangeReader, TextFormat


@dataclass(frozen=True)
class CopiedCorpus:
    """A corpus of copies."""

    files: tuple[Path, ...]
    documents: int
    text_bytes: int
    """UTF-8 of the documents, without JSON around them."""
    file_bytes: int


def read_documents(paths: Sequence[Path], scratch: Path) -> list[str]:
    """The texts of some files, in any form that the pipeline reads; without files, those of `python_corpus`."""
    if not paths:
        paths = [scratch / "python.jsonl"]
        write_corpus(paths[0])
    texts = []
    for path in paths:
        range_ = FileRange(path.name, 0, path.stat().st_size)
        texts += [document.text for document in RangeReader(f"{path.parent}/", range_, TextFormat()) if document.text]
    return texts


def copies(texts: Sequence[str], text_bytes: int, seed: int = 0) -> Iterator[tuple[int, str]]:
    """Texts in ever new orders until there are so many bytes; each begins with its running number."""
    generator = np.random.default_rng(seed)
    number = 0
    while True:
        for index in generator.permutation(len(texts)):
            text = f"{number} {texts[index]}"
            yield number, text
            number += 1
            text_bytes -= len(text.encode())
            if text_bytes <= 0:
                return


def write_copies(texts: Sequence[str], folder: Path, text_bytes: int, file_bytes: int = 64_000_000) -> CopiedCorpus:
    """Writes JSON lines into files of about `file_bytes` each, `part-000.jsonl` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    written = documents = total = 0
    stream = None
    for number, text in copies(texts, text_bytes):
        if stream is None or written >= file_bytes:
            if stream is not None:
                stream.close()
            paths.append(folder / f"part-{len(paths):03d}.jsonl")
            stream = paths[-1].open("wb")
            written = 0
        written += stream.write((json.dumps({"id": number, "text": text}, ensure_ascii=False) + "\n").encode())
        documents += 1
        total += len(text.encode())
    if stream is not None:
        stream.close()
    return CopiedCorpus(tuple(paths), documents, total, sum(path.stat().st_size for path in paths))
