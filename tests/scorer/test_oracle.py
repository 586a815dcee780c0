"""Stored perplexities against the paper's Eq. (1) and (2), computed by brute force in float64.

Nothing of `scorer` is used on the oracle's side: plain transformers models, plain pyarrow, softmax written out. The
text is WikiText, the tokenizer RoBERTa's, and the shards come out of the real command.
"""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline import score_corpus

IN_THREADS = ("--direct_running_mode", "in_memory")

pytestmark = pytest.mark.slow  # 10 s, most of it the command

ROBERTA_SPECIAL_IDS = [0, 1, 2, 3, 50264]  # <s> <pad> </s> <unk> <mask>
TOLERANCE = 2.0**-11 + 1e-4  # BitRound's half unit of 10 bits of mantissa, and float32
BLOCKS = 3


def save_random_gpt2(folder, direction, reading_direction, seed):
    """Two layers, 32 dimensions, RoBERTa's 50,265 ids; weights large enough that perplexities span decades."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=50265, n_positions=512, n_embd=32, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)
    model.config.reading_direction = reading_direction
    model.save_pretrained(folder / direction)


@pytest.fixture(scope="module")
def alm(tmp_path_factory, real_data):
    folder = tmp_path_factory.mktemp("alm")
    save_random_gpt2(folder, "forward", "left_to_right", seed=1)
    save_random_gpt2(folder, "backward", "right_to_left", seed=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(real_data / "tokenizer" / name, folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory, real_data, alm):
    """The first articles of WikiText-2's test split, scored by the command: two shards or more."""
    corpus = tmp_path_factory.mktemp("corpus") / "wikitext.jsonl"
    lines = (real_data / "corpus" / "wikitext2_raw_test.jsonl").read_bytes().splitlines(keepends=True)
    corpus.write_bytes(b"".join(lines[:4]))
    output = tmp_path_factory.mktemp("shards") / "shards"
    arguments = ["--input", str(corpus), "--alm", str(alm), "--tokenizer", str(real_data / "tokenizer")]
    arguments += ["--output", str(output), "--split_bytes", "20000", "--device", "cpu", "--micro_batch", "4"]
    assert score_corpus.main([*arguments, *IN_THREADS]) == 0
    return output


@pytest.fixture(scope="module")
def table(shards):
    """All rows as NumPy arrays, in the manifest's order, read by pyarrow alone."""
    names = [shard["name"] for shard in json.loads((shards / "_manifest.json").read_text())["shards"]]
    assert len(names) > 1
    tables = [pq.read_table(shards / name) for name in names]
    columns = {}
    for name in ("input_ids", "forward_perplexity", "backward_perplexity"):
        columns[name] = np.array([row for table in tables for row in table[name].to_pylist()])
    assert len(columns["input_ids"]) > BLOCKS
    return columns


@pytest.fixture(scope="module")
def chosen(table):
    """Blocks of different shards, one of which has a document separator inside."""
    ids = table["input_ids"]
    with_separator = int(np.flatnonzero((ids[:, 1:-1] == 2).any(axis=1))[0])
    return sorted({0, with_separator, len(ids) - 1})


def softmax(logits):
    """[…, V] -> […, V], written out."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@torch.no_grad()
def inverse_probabilities(model, ids):
    """1 / p(ids[t] | ids[:t]) for t from 1; NaN at 0, which has no context."""
    probabilities = softmax(model(input_ids=torch.tensor([ids.tolist()])).logits[0].numpy())
    values = [1 / probabilities[t - 1, ids[t]] for t in range(1, len(ids))]
    return np.array([np.nan, *values])


@torch.no_grad()
def inverse_probability_after(model, context, token):
    """1 / p(token | context), the model shown nothing but the context."""
    return 1 / softmax(model(input_ids=torch.tensor([context])).logits[0, -1].numpy())[token]


@pytest.fixture(scope="module")
def forward_model(alm):
    return GPT2LMHeadModel.from_pretrained(alm / "forward").double().eval()


@pytest.fixture(scope="module")
def backward_model(alm):
    return GPT2LMHeadModel.from_pretrained(alm / "backward").double().eval()


def assert_same_where_ordinary(stored, expected, ids):
    ordinary = ~np.isin(ids, ROBERTA_SPECIAL_IDS)
    assert np.abs(stored[ordinary] / expected[ordinary] - 1).max() <= TOLERANCE
    assert expected[ordinary].max() / expected[ordinary].min() > 1e6  # the test looks at decades, not at a plateau


def test_forward_perplexity_is_the_inverse_probability_given_the_left_context(table, chosen, forward_model):
    for row in chosen:
        ids = table["input_ids"][row]
        assert_same_where_ordinary(table["forward_perplexity"][row], inverse_probabilities(forward_model, ids), ids)


def test_backward_perplexity_is_the_inverse_probability_given_the_right_context(table, chosen, backward_model):
    for row in chosen:
        ids = table["input_ids"][row]
        expected = inverse_probabilities(backward_model, ids[::-1])[::-1]
        assert_same_where_ordinary(table["backward_perplexity"][row], expected, ids)


@pytest.mark.parametrize("position", [1, 2, 100, 300, 509, 510])
def test_forward_perplexity_needs_nothing_to_the_right(table, chosen, forward_model, position):
    row = table["input_ids"][chosen[0]].tolist()
    expected = inverse_probability_after(forward_model, row[:position], row[position])
    assert table["forward_perplexity"][chosen[0]][position] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("position", [1, 2, 211, 411, 509, 510])
def test_backward_perplexity_needs_nothing_to_the_left(table, chosen, backward_model, position):
    row = table["input_ids"][chosen[0]].tolist()
    context = [row[t] for t in range(511, position, -1)]
    expected = inverse_probability_after(backward_model, context, row[position])
    assert table["backward_perplexity"][chosen[0]][position] == pytest.approx(expected, rel=TOLERANCE)


def test_the_two_directions_do_not_share_a_model(table):
    ordinary = ~np.isin(table["input_ids"], ROBERTA_SPECIAL_IDS)
    logs = [np.log(table[name][ordinary]) for name in ("forward_perplexity", "backward_perplexity")]
    assert abs(np.corrcoef(*logs)[0, 1]) < 0.9


@pytest.mark.parametrize("name", ["forward_perplexity", "backward_perplexity"])
def test_perplexity_is_0_at_special_tokens_and_at_least_1_elsewhere(table, name):
    special = np.isin(table["input_ids"], ROBERTA_SPECIAL_IDS)
    assert special[:, [0, -1]].all()
    assert special[:, 1:-1].any()  # separators inside blocks
    assert (table[name][special] == 0).all()
    assert (table[name][~special] >= 1).all()
    assert np.isfinite(table[name]).all()


def test_blocks_are_the_tokenizers_ids_of_the_text_between_frames(table, shards, real_data):
    """Byte for byte: decoding the runs without frames and separators gives the articles back."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - only here

    tokenizer = Tokenizer.from_file(str(real_data / "tokenizer" / "tokenizer.json"))
    lines = (real_data / "corpus" / "wikitext2_raw_test.jsonl").read_text().splitlines()[:4]
    texts = [json.loads(line)["text"] for line in lines]
    first = pq.read_table(next(iter(sorted(shards.glob("shard-00000-*.parquet")))))["input_ids"].to_pylist()
    run = [token for block in first for token in block[1:-1]]
    assert [block[0] for block in first] == [0] * len(first)
    assert [block[-1] for block in first] == [2] * len(first)
    documents = []
    for token in run:
        if token == 2 or not documents:
            documents.append([])
        if token != 2:
            documents[-1].append(token)
    decoded = [tokenizer.decode(document, skip_special_tokens=False) for document in documents]
    for text, found in zip(texts, decoded, strict=False):
        assert text.startswith(found) if found == decoded[-1] else text == found
