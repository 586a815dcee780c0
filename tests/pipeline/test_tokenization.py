"""Blocks give the corpus back: byte for byte, whatever is written in it, and with every token accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.corpus import FileRange, TextFormat
from pipeline.plan import Split
from pipeline.tokenization import Account, BlockStream, DocumentEncoder, SplitTokenizer, pack
from scorer.errors import ConfigurationError
from scorer.tokenizer import describe, load_tokenizer
from scorer.vocabulary import Vocabulary

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@dataclass(frozen=True)
class Tokenized:
    """All blocks of a split, and its account."""

    input_ids: Any
    account: Account


def read_whole(blocks: BlockStream) -> Tokenized:
    """Takes all blocks, and holds their form to the contract on the way."""
    pieces = list(blocks)
    assert all(len(piece) == 256 for piece in pieces[:-1])
    assert all(len(piece) for piece in pieces)
    return Tokenized(np.concatenate([np.empty((0, 512), np.uint16), *pieces]), blocks.account)


@dataclass(frozen=True)
class Kit:
    """A byte-level tokenizer, what shards know of it, and the encoder under test."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    encoder: DocumentEncoder

    @property
    def special_ids(self) -> set[int]:
        return {self.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}

    @property
    def separator(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids("</s>"))

    def decode(self, ids: Any) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def tokenize(self, path: Path, text_format: TextFormat | None = None) -> Tokenized:
        splitter = SplitTokenizer(
            f"{path.parent}/", text_format or TextFormat(), load_tokenizer(self.tokenizer.name_or_path), self.vocabulary
        )
        return read_whole(splitter.tokenize(Split(0, "shard", (FileRange(path.name, 0, path.stat().st_size),))))


def make_kit(folder: Path) -> Kit:
    vocabulary = describe(load_tokenizer(str(folder)))
    return Kit(
        AutoTokenizer.from_pretrained(folder), vocabulary, DocumentEncoder(load_tokenizer(str(folder)), vocabulary)
    )


@pytest.fixture(scope="session", params=["small", "roberta"])
def kit(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Kit:
    if request.param == "small":
        return make_kit(tokenizer_folder)
    return make_kit(request.getfixturevalue("real_data") / "tokenizer")


def stress_texts(stress: Path) -> list[str]:
    """Everything in the folder that is valid text, whole and line by line, in order of first appearance."""
    texts: list[str] = json.loads((stress / "blns.json").read_text())
    texts += (stress / "blns.txt").read_text().split("\n")
    for path in sorted((stress / "synthetic").iterdir()):
        for part in [path.read_bytes(), *path.read_bytes().split(b"\n")[:50]]:
            try:
                texts.append(part.decode())
            except UnicodeDecodeError:
                continue
    return list(dict.fromkeys(text for text in texts if text.strip(" \t\n\r\x0b\x0c")))


def unframe(split: Tokenized, kit: Kit) -> list[int]:
    """The token stream, without the frames."""
    ids = split.input_ids
    assert ids.shape[1] == 512
    assert (ids[:, 0] == kit.tokenizer.convert_tokens_to_ids("<s>")).all()
    assert (ids[:, 511] == kit.separator).all()
    return list(ids[:, 1:511].reshape(-1).tolist())


def stream_of(texts: list[str], kit: Kit) -> list[int]:
    """doc₁ </s> doc₂ </s> …, encoded by transformers; the texts hold nothing that looks like a special token."""
    encoded = [kit.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [id_ for ids in encoded if ids for id_ in [*ids, kit.separator]]


# --- The layout


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.one_of(st.integers(0, 1300), st.integers(0, 300_000)), max_size=6))
def test_unframed_blocks_and_leftover_are_the_stream(lengths: list[int]) -> None:
    vocabulary = Vocabulary(500, {"<s>": 0, "</s>": 2}, 0, 2, None, "", "")
    pieces = [np.arange(10, 10 + length, dtype=np.uint16) % 400 + 5 for length in lengths]
    stream = [int(id_) for piece in pieces for id_ in piece]
    packed = pack([piece.astype(np.uint16) for piece in pieces], vocabulary)
    groups = []
    while True:
        try:
            groups.append(next(packed))
        except StopIteration as end:
            leftover = end.value
            break
    assert all(len(group) == 256 for group in groups[:-1])
    assert all(len(group) for group in groups)
    blocks = np.concatenate([np.empty((0, 512), np.uint16), *groups])
    assert blocks.dtype == np.uint16
    assert blocks.shape == (len(stream) // 510, 512)
    assert leftover == len(stream) % 510
    assert blocks[:, 1:511].reshape(-1).tolist() == stream[: len(stream) - leftover]
    assert set(blocks[:, 0].tolist()) <= {0}
    assert set(blocks[:, 511].tolist()) <= {2}


def test_blocks_of_a_corpus_are_its_documents_with_separators(kit: Kit, corpus_folder: Path) -> None:
    texts = [json.loads(line)["text"] for line in (corpus_folder / "a.jsonl").read_text().splitlines()]
    expected = stream_of(texts, kit)
    split = kit.tokenize(corpus_folder / "a.jsonl")
    found = unframe(split, kit)
    assert found == expected[: len(found)]
    assert len(expected) - len(found) == split.account.leftover_tokens < 510
    assert (split.account.documents, split.account.rejected_documents) == (300, 0)
    assert split.account.source == [{"file": "a.jsonl", "start": 0, "end": (corpus_folder / "a.jsonl").stat().st_size}]


def test_separators_stay_at_the_edges_of_a_run(kit: Kit, tmp_path: Path) -> None:
    odd = next(text for text in ("xx", "xy", "x x", "x y z") if len(stream_of([text], kit)) % 2 == 1)
    texts = ["x"] * 255 + [odd] + ["x"] * 600
    assert len(stream_of(["x"], kit)) == 2
    path = tmp_path / "file.txt"
    path.write_text("\n\n".join(texts))
    split = kit.tokenize(path)
    expected = stream_of(texts, kit)
    assert unframe(split, kit) == expected[: 510 * len(split.input_ids)]
    assert split.input_ids[0, 510] == kit.separator  # last of the run, before the frame's own
    assert (split.input_ids[:, 1] == kit.separator).any()


def test_fewer_than_510_tokens_give_no_block_and_are_counted(kit: Kit, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("one two\n\nthree\n")
    split = kit.tokenize(path)
    assert split.input_ids.shape == (0, 512)
    assert split.account.leftover_tokens == len(stream_of(["one two", "three"], kit))
    assert split.account.documents == 2


def test_exactly_510_tokens_give_one_block_and_no_leftover(kit: Kit, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("\n\n".join(["x"] * 255))
    split = kit.tokenize(path)
    assert len(split.input_ids) == 1
    assert split.account.leftover_tokens == 0


def test_empty_documents_give_nothing_and_are_not_counted(kit: Kit, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["", "one", "", "", "two", ""]))
    split = kit.tokenize(path)
    assert (split.account.documents, split.account.rejected_documents) == (2, 0)
    assert split.account.leftover_tokens == len(stream_of(["one", "two"], kit))


def test_rejects_are_listed_with_their_place(kit: Kit, real_data: Path) -> None:
    split = kit.tokenize(real_data / "stress" / "synthetic" / "bad.jsonl")
    assert [reject.line for reject in split.account.rejects] == [4, 5, 6, 7, 8, 10, 12, 13]
    assert all(reject.file == "bad.jsonl" and reject.reason for reject in split.account.rejects)
    assert split.account.documents == 4  # of five good ones, one is empty
    assert split.account.rejected_documents == 8
    assert split.account.lines == {"bad.jsonl": 14}


# --- Byte-exact round trips


def assert_round_trip(texts: list[str], kit: Kit) -> None:
    for text, ids in zip(texts, kit.encoder.encode(texts), strict=True):
        assert ids is not None, text[:100]
        assert not kit.special_ids & set(ids.tolist()), text[:100]
        assert kit.decode(ids) == text


@pytest.mark.slow
def test_stress_texts_come_back_byte_for_byte(kit: Kit, real_data: Path) -> None:
    texts = stress_texts(real_data / "stress")
    assert len(texts) > 600
    assert_round_trip(texts, kit)


@pytest.mark.slow
def test_stress_texts_come_back_out_of_blocks(kit: Kit, real_data: Path, tmp_path: Path) -> None:
    texts = stress_texts(real_data / "stress")
    filler = "x " * 600  # at least 510 tokens, so that what is left over is part of it
    path = tmp_path / "stress.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, filler]))
    split = kit.tokenize(path)
    assert (split.account.documents, split.account.rejected_documents) == (len(texts) + 1, 0)
    stream = unframe(split, kit)
    found: list[list[int]] = [[]]
    for id_ in stream:
        if id_ == kit.separator:
            found.append([])
        else:
            found[-1].append(id_)
    assert len(found) == len(texts) + 1
    assert [kit.decode(ids) for ids in found[:-1]] == texts
    assert set(stream) & kit.special_ids == {kit.separator}


def test_txt_files_of_the_stress_folder_come_back_out_of_blocks(kit: Kit, real_data: Path) -> None:
    path = real_data / "stress" / "synthetic" / "one_huge_line.txt"
    split = kit.tokenize(path)
    text = path.read_bytes().decode().removesuffix("\n")
    decoded = kit.decode(unframe(split, kit))
    assert text.startswith(decoded)
    ids = kit.encoder.encode([text])[0]
    assert ids is not None
    assert len(ids) + 1 == 510 * len(split.input_ids) + split.account.leftover_tokens


@pytest.mark.parametrize(
    "text",
    [
        *SPECIAL,
        "a <mask> b",
        " <mask>",
        "<mask> ",
        "  <mask>  \n<mask>",
        "<s></s><s></s>",
        "x</s></s>y",
        "<pad><pad>",
        "Ġ<mask>Ġ",
        "<|endoftext|>",
        "<ma<mask>sk>",
        "<mask",
        "\u200b<unk>\u00ad",
    ],
)
def test_text_that_looks_like_a_special_token_is_text(kit: Kit, text: str) -> None:
    assert_round_trip([text], kit)


special_looking = st.lists(
    st.sampled_from([*SPECIAL, " ", "\n", "Ġ", "a", "é", "\u2028", "\x00", "👩‍👧"]) | st.text(max_size=4)
)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(max_size=40) | special_looking.map("".join), max_size=8))
def test_any_text_comes_back_byte_for_byte(kit: Kit, texts: list[str]) -> None:
    assert_round_trip(texts, kit)


def test_ids_of_plain_text_are_those_of_transformers(kit: Kit, corpus_folder: Path) -> None:
    texts = (corpus_folder / "b.txt").read_text().split("\n\n")[:50]
    for text, ids in zip(texts, kit.encoder.encode(texts), strict=True):
        assert ids is not None
        assert ids.tolist() == kit.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ids_do_not_depend_on_the_batch(kit: Kit, real_data: Path) -> None:
    texts = stress_texts(real_data / "stress")[:200]
    together = kit.encoder.encode(texts)
    for text, ids in zip(texts, together, strict=True):
        (alone,) = kit.encoder.encode([text])
        assert alone is not None
        assert ids is not None
        assert alone.tolist() == ids.tolist()


def test_padding_and_truncation_of_the_tokenizer_are_ignored(kit: Kit, tmp_path: Path, corpus_folder: Path) -> None:
    padded = load_tokenizer(kit.tokenizer.name_or_path)
    padded.backend_tokenizer.enable_padding(length=64, pad_id=1, pad_token="<pad>")
    padded.backend_tokenizer.enable_truncation(8)
    padded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is not None
    loaded = load_tokenizer(str(tmp_path))
    vocabulary = describe(loaded)
    assert vocabulary.fingerprints == kit.vocabulary.fingerprints
    texts = ["short", "long " * 50, *(corpus_folder / "b.txt").read_text().split("\n\n")[:5]]
    for ids, expected in zip(DocumentEncoder(loaded, vocabulary).encode(texts), kit.encoder.encode(texts), strict=True):
        assert ids is not None
        assert expected is not None
        assert ids.tolist() == expected.tolist()


def test_ids_are_uint16_where_they_fit_and_uint32_elsewhere(kit: Kit) -> None:
    (ids,) = kit.encoder.encode(["text"])
    assert ids is not None
    assert ids.dtype == np.uint16
    assert Vocabulary(65_536, {}, 0, 2, None, "", "").id_dtype == np.uint16
    assert Vocabulary(65_537, {}, 0, 2, None, "", "").id_dtype == np.uint32


# --- Other tokenizers


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT's kind: lower case, WordPiece, [CLS] and [SEP] instead of bos and eos."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklm[]", "##a", "##b", "cab", "mask", "sep"]
    backend = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )
    folder = tmp_path_factory.mktemp("wordpiece")
    tokenizer.save_pretrained(folder)
    return folder


def test_wordpiece_blocks_are_framed_by_cls_and_sep(wordpiece: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(wordpiece))
    vocabulary = describe(tokenizer)
    assert (vocabulary.start_id, vocabulary.end_id, vocabulary.mask_id) == (2, 3, 4)
    path = tmp_path / "file.txt"
    path.write_text("\n\n".join(["Cab a zzz b"] * 150))
    split = read_whole(
        SplitTokenizer(f"{tmp_path}/", TextFormat(), tokenizer, vocabulary).tokenize(
            Split(0, "shard", (FileRange("file.txt", 0, path.stat().st_size),))
        )
    )
    cab, a, b = (tokenizer.convert_tokens_to_ids(token) for token in ("cab", "a", "b"))
    assert split.input_ids.shape == (1, 512)
    assert split.input_ids[0, [0, 511]].tolist() == [2, 3]
    assert split.input_ids[0, 1:511].tolist() == [cab, a, 1, b, 3] * 102
    assert split.account.leftover_tokens == 150 * 5 - 510
    assert split.account.rejected_documents == 0


def test_wordpiece_unknown_tokens_are_special(wordpiece: Path) -> None:
    vocabulary = describe(load_tokenizer(str(wordpiece)))
    assert vocabulary.special_ids["[UNK]"] == 1
    assert vocabulary.special_mask()[1]


def test_wordpiece_special_looking_text_is_text(wordpiece: Path) -> None:
    tokenizer = load_tokenizer(str(wordpiece))
    encoder = DocumentEncoder(tokenizer, describe(tokenizer))
    for ids in encoder.encode(["[MASK]", "a [SEP] b", "[PAD][CLS]"]):
        assert ids is not None
        assert not {0, 2, 3, 4} & set(ids.tolist())


def test_a_special_token_out_of_plain_text_rejects_the_document(tmp_path: Path) -> None:
    """A word-level tokenizer has no other way to write `</s>` than the special id: the document cannot be used."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    path = tmp_path / "file.txt"
    path.write_text("a a\n\na </s> a\n\na b\n")
    split = read_whole(
        SplitTokenizer(f"{tmp_path}/", TextFormat(), tokenizer, describe(tokenizer)).tokenize(
            Split(0, "shard", (FileRange("file.txt", 0, path.stat().st_size),))
        )
    )
    assert [(reject.line, reject.offset) for reject in split.account.rejects] == [(3, 5)]
    assert "special token" in split.account.rejects[0].reason
    assert (split.account.documents, split.account.leftover_tokens) == (2, 6)


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., PreTrainedTokenizerBase]:
    """A byte-level tokenizer with some special tokens only."""

    def make(**special: str) -> PreTrainedTokenizerBase:
        vocabulary = {token: index for index, token in enumerate(["<a>", "<b>", "<c>", *"xyz"])}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), **special)
        tokenizer.save_pretrained(tmp_path / "some")
        return load_tokenizer(str(tmp_path / "some"))

    return make


def test_tokenizer_without_frame_tokens_is_refused_with_the_flag(without: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match="--start_token"):
        describe(without(eos_token="<b>"))
    with pytest.raises(ConfigurationError, match="--end_token"):
        describe(without(bos_token="<a>"))
    with pytest.raises(ConfigurationError, match="--start_token"):
        describe(without(eos_token="<b>"), start_token="<nowhere>")


def test_named_frame_tokens_are_special(without: Callable[..., Any]) -> None:
    vocabulary = describe(without(), start_token="<a>", end_token="<b>")
    assert (vocabulary.start_id, vocabulary.end_id, vocabulary.mask_id) == (0, 1, None)
    assert vocabulary.special_mask().tolist() == [True, True, False, False, False, False]


def test_bos_and_eos_come_before_cls_and_sep(without: Callable[..., Any]) -> None:
    vocabulary = describe(without(bos_token="<a>", cls_token="<b>", eos_token="<c>", sep_token="<b>"))
    assert (vocabulary.start_id, vocabulary.end_id) == (0, 2)


def test_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="fast") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_missing_and_broken_tokenizers_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "broken" / "tokenizer.json").write_text((tokenizer_folder / "tokenizer.json").read_text()[:1000])
    for name in ("empty", "broken", "missing"):
        with pytest.raises(ConfigurationError, match=name):
            load_tokenizer(str(tmp_path / name))
