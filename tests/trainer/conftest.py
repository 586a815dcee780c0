"""Synthetic folders of shards, made by formula in milliseconds, and tiny models; real ones come from tests/conftest."""

import hashlib
import json
import logging
import sys

import numpy as np
import pytest

from scorer.console import run_command
from scorer.shard_writing import write_shard
from scorer.shards import ShardContent, ShardMetadata
from scorer.vocabulary import Vocabulary

TINY_ROBERTA = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64"
TINY_GPT2 = "n_layer=1,n_embd=32,n_head=2"


def make_vocabulary(size=50265, mask=True, name="synthetic"):
    """RoBERTa's layout."""
    specials = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | ({"<mask>": size - 1} if mask else {})
    digest = hashlib.sha256(f"{name} {size} {mask}".encode()).hexdigest()
    return Vocabulary(size, specials, 0, 2, size - 1 if mask else None, digest, digest)


def make_content(shard, blocks, vocabulary, scored=True):
    """Rows that say where they are from: ids[1] is 10 + shard, ids[2:4] the row in base 1000; so do perplexities."""
    rows, t = np.arange(blocks)[:, None], np.arange(512)[None]
    ids = 4 + (7919 * rows + 104_729 * t * t + 31 * t + 13 * shard) % (vocabulary.size - 5)
    ids[:, 0], ids[:, -1] = 0, 2
    ids[:, 1:2], ids[:, 2:3], ids[:, 3:4] = 10 + shard, 10 + rows // 100, 10 + rows % 100
    special = np.isin(ids, list(vocabulary.special_ids.values()))
    scores = [np.where(special, 0, 1 + (ids * factor) % 1009).astype(np.float32) for factor in (37, 53)]
    return ShardContent(ids.astype(vocabulary.id_dtype), *(scores if scored else ()))


@pytest.fixture(scope="session")
def write_shards(tmp_path_factory):
    """Makes a complete folder: write_shards([300, 0, 70]) has three shards of so many blocks."""

    def write(blocks, folder=None, scored=True, vocabulary=None, first=0):
        folder = folder or tmp_path_factory.mktemp("synthetic")
        vocabulary = vocabulary or make_vocabulary()
        alm = {"forward_sha256": "f" * 64, "backward_sha256": "b" * 64} if scored else None
        entries = []
        for index, count in enumerate(blocks):
            content = make_content(first + index, count, vocabulary, scored)
            metadata = ShardMetadata(
                vocabulary=vocabulary,
                alm=alm,
                split=[],
                documents=1,
                blocks=count,
                rejected_documents=0,
                leftover_tokens=0,
                clamped_values=0,
                device=None,
                dtype=None,
                micro_batch=None,
                versions={},
                content_sha256=content.sha256(),
            )
            name = f"shard-{index:05d}-of-{len(blocks):05d}.parquet"
            write_shard(str(folder / name), [content], metadata)
            data = (folder / name).read_bytes()
            entries.append(
                {
                    "name": name,
                    "blocks": count,
                    "bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "content_sha256": content.sha256(),
                }
            )
        manifest = {
            "format_version": 1,
            "block_length": 512,
            "documents": len(blocks),
            "blocks": sum(blocks),
            "tokens": 510 * sum(blocks),
            "rejected_documents": 0,
            "leftover_tokens": 0,
            "tokenizer": {
                "vocabulary_sha256": vocabulary.vocabulary_sha256,
                "tokenizer_sha256": vocabulary.tokenizer_sha256,
            },
            "alm": alm,
            "shards": entries,
        }
        (folder / "_manifest.json").write_text(json.dumps(manifest))
        return folder

    return write


@pytest.fixture(scope="session")
def synthetic_vocabulary():
    """Makes vocabularies: synthetic_vocabulary(size, mask=False)."""
    return make_vocabulary


@pytest.fixture
def run_in_process(monkeypatch, capsys):
    """Runs a command's main as `python -m` would: (exit code, standard output, standard error)."""

    handlers = logging.getLogger().handlers[:]

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_command(main)
        output = capsys.readouterr()
        return exit_.value.code, output.out, output.err

    yield run
    logging.getLogger().handlers[:] = handlers  # the command's own writes to this test's standard error


@pytest.fixture(scope="session")
def quick():
    """Flags that every small run has: one process on the CPU, a batch of 4 blocks, no progress bars."""
    return [
        *("--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--global_batch_size", "4"),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "16", "--warmup_steps", "0"),
    ]


@pytest.fixture(scope="session")
def tiny_roberta():
    """Flags of a fresh RoBERTa of one layer."""
    return ["--model_type", "roberta", "--config_overrides", TINY_ROBERTA]


@pytest.fixture(scope="session")
def tiny_gpt2():
    """Flags of a fresh GPT-2 of one layer."""
    return ["--model_type", "gpt2", "--config_overrides", TINY_GPT2]
