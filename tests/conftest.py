"""Small real things for the tests: a byte-level BPE, an ALM of two random GPT-2s, folders of shards made with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline import score_corpus, tokenize_corpus
from scorer import files
from tests.object_store import S3Server, Weather

ROOT = Path(__file__).parent.parent
IN_THREADS = ("--direct_running_mode", "in_memory")
"""Jobs of a few blocks: worker processes would take longer to start than to work."""
BUCKET_NUMBERS = count(1)
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(params=["local", "file URL", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty folder on each kind of file system, as a user would write it."""
    if request.param == "memory":
        path = f"memory://{uuid.uuid4().hex}"
        files.make_folder(path)
        yield path
        files.remove_folder(path)
    else:
        yield str(tmp_path) if request.param == "local" else f"file://{tmp_path}"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data: tokenizer/, corpus/, stress/."""
    folder = os.environ.get("HARDNESS_TEST_DATA")
    if not folder:
        pytest.skip("HARDNESS_TEST_DATA names no folder of real data")
    return Path(folder)


def make_sentences(count: int, seed: int) -> list[str]:
    """English-looking sentences from a small vocabulary, more frequent words first."""
    generator = np.random.default_rng(seed)
    words = ["".join(generator.choice(list("etaoinshrdlu"), generator.integers(2, 9))) for _ in range(300)]
    weights = 1 / np.arange(1, len(words) + 1)
    chosen = generator.choice(words, (count, 12), p=weights / weights.sum())
    return [" ".join(row).capitalize() + "." for row in chosen]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 500 ids, with RoBERTa's special tokens in RoBERTa's places (the mask last)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=499,
        special_tokens=SPECIAL_TOKENS[:-1],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(make_sentences(400, seed=0), trainer)
    backend.add_special_tokens(SPECIAL_TOKENS[-1:])
    names = ["bos_token", "pad_token", "eos_token", "unk_token", "mask_token"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **dict(zip(names, SPECIAL_TOKENS, strict=True)), cls_token="<s>", sep_token="</s>"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def save_alm(folder: Path, tokenizer_folder: Path, vocabulary_size: int = 500, seed: int = 0) -> Path:
    """Two random GPT-2s of one layer, with weights large enough that perplexities spread over decades."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary_size, n_positions=512, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2
    )
    for direction, reading in (("forward", "left_to_right"), ("backward", "right_to_left")):
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0)
        model.config.reading_direction = reading
        model.save_pretrained(folder / direction)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def alm_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A small ALM over the small tokenizer."""
    return save_alm(tmp_path_factory.mktemp("alm"), tokenizer_folder)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 300 kB of text: `a.jsonl` with a document a line, and `b.txt` with documents between blank lines."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = [" ".join(make_sentences(8, seed)) for seed in range(1, 500)]
    lines = [json.dumps({"text": text}) for text in documents[:300]]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "b.txt").write_text("\n\n".join(documents[300:]) + "\n")
    return folder


@pytest.fixture(scope="session")
def block_folder(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path, tokenizer_folder: Path) -> Path:
    """Block shards of the small corpus."""
    output = tmp_path_factory.mktemp("blocks") / "blocks"
    arguments = ["--input", str(corpus_folder), "--tokenizer", str(tokenizer_folder), "--output", str(output)]
    assert tokenize_corpus.main([*arguments, "--split_bytes", "100000", *IN_THREADS]) == 0
    return output


@pytest.fixture(scope="session")
def hardness_folder(tmp_path_factory: pytest.TempPathFactory, block_folder: Path, alm_folder: Path) -> Path:
    """Hardness shards of the small corpus."""
    output = tmp_path_factory.mktemp("shards") / "shards"
    arguments = ["--input", str(block_folder), "--alm", str(alm_folder), "--output", str(output), "--device", "cpu"]
    assert score_corpus.main([*arguments, *IN_THREADS]) == 0
    return output


@pytest.fixture(scope="session")
def run_module() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m MODULE ARGUMENTS…` as a user would, in a process of its own."""

    def run(module: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server, which tests may kill."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a new bucket; the environment leads every client to its server, and nowhere else."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    s3_server.start()
    name = f"bucket-{next(BUCKET_NUMBERS)}"
    s3_server.make_bucket(name)
    # fsspec keeps file systems by their arguments, and would find those of another environment.
    files = fsspec.get_filesystem_class("s3")
    files.clear_instance_cache()
    yield name
    files.clear_instance_cache()


@pytest.fixture
def weather(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Weather]:
    """Fair weather between the clients and the bucket's server, until the test changes it."""
    weather = Weather(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", weather.endpoint)
    yield weather
    weather.close()
