"""What shards know of a tokenizer: special ids, frames, and fingerprints that change when ids or spelling do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from scorer.errors import ConfigurationError
from scorer.tokenizer import describe, fingerprint, load_tokenizer
from scorer.vocabulary import Vocabulary, require_same_vocabulary


@pytest.fixture
def tokenizer(tokenizer_folder):
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture
def edited(tokenizer_folder, tmp_path):
    """Loads the small tokenizer after its tokenizer.json was changed."""

    def edit(change):
        folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "edited"))
        backend = json.loads((folder / "tokenizer.json").read_text())
        change(backend)
        (folder / "tokenizer.json").write_text(json.dumps(backend))
        return load_tokenizer(str(folder))

    return edit


class TestFingerprints:
    def test_are_two_sha256(self, tokenizer):
        found = fingerprint(tokenizer)
        assert found.keys() == {"vocabulary_sha256", "tokenizer_sha256"}
        assert all(len(bytes.fromhex(value)) == 32 for value in found.values())

    def test_are_stable_across_saving_and_loading(self, tokenizer, tmp_path):
        expected = fingerprint(tokenizer)
        for generation in range(2):
            folder = tmp_path / str(generation)
            tokenizer.save_pretrained(folder)
            tokenizer = load_tokenizer(str(folder))
            assert fingerprint(tokenizer) == expected

    def test_ignore_padding_truncation_and_use(self, tokenizer):
        expected = fingerprint(tokenizer)
        tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=4)
        assert fingerprint(tokenizer) == expected
        tokenizer.backend_tokenizer.enable_padding(length=512)
        tokenizer.backend_tokenizer.enable_truncation(128)
        tokenizer.model_max_length = 77
        tokenizer.padding_side = "left"
        assert fingerprint(tokenizer) == expected

    def test_ignore_padding_and_truncation_that_were_saved(self, tokenizer, edited):
        def pad(backend):
            backend["truncation"] = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}

        assert fingerprint(edited(pad)) == fingerprint(tokenizer)

    def test_ignore_whether_special_tokens_in_text_are_encoded(self, tokenizer):
        expected = fingerprint(tokenizer)
        tokenizer.backend_tokenizer.encode_special_tokens = True
        assert fingerprint(tokenizer) == expected

    def test_change_with_the_vocabulary(self, tokenizer, edited):
        def swap(backend):
            vocab = backend["model"]["vocab"]
            a, b = list(vocab)[-2:]
            vocab[a], vocab[b] = vocab[b], vocab[a]

        assert fingerprint(edited(swap))["vocabulary_sha256"] != fingerprint(tokenizer)["vocabulary_sha256"]

    def test_of_spelling_change_alone_with_merges(self, tokenizer, edited):
        def swap(backend):
            merges = backend["model"]["merges"]
            merges[0], merges[1] = merges[1], merges[0]

        found, original = fingerprint(edited(swap)), fingerprint(tokenizer)
        assert found["vocabulary_sha256"] == original["vocabulary_sha256"]
        assert found["tokenizer_sha256"] != original["tokenizer_sha256"]

    def test_of_spelling_change_alone_with_the_pre_tokenizer(self, tokenizer, edited):
        found = fingerprint(edited(lambda backend: backend["pre_tokenizer"].update(add_prefix_space=True)))
        original = fingerprint(tokenizer)
        assert found["vocabulary_sha256"] == original["vocabulary_sha256"]
        assert found["tokenizer_sha256"] != original["tokenizer_sha256"]

    def test_of_the_vocabulary_change_with_special_tokens(self, tokenizer):
        original = fingerprint(tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<new>", special=True)]})
        assert fingerprint(tokenizer)["vocabulary_sha256"] != original["vocabulary_sha256"]

    def test_of_the_vocabulary_change_where_an_ordinary_token_becomes_special(self, tokenizer):
        original = fingerprint(tokenizer)
        size = len(tokenizer)
        tokenizer.add_special_tokens({"sep_token": "e"})
        assert len(tokenizer) == size
        assert fingerprint(tokenizer)["vocabulary_sha256"] != original["vocabulary_sha256"]

    def test_do_not_change_with_the_order_of_keys_in_the_file(self, tokenizer, edited):
        def reverse(backend):
            items = list(backend["model"]["vocab"].items())
            backend["model"]["vocab"] = dict(reversed(items))

        assert fingerprint(edited(reverse)) == fingerprint(tokenizer)


SAME = {"vocabulary_sha256": "a" * 64, "tokenizer_sha256": "b" * 64}


class TestComparison:
    def test_of_equals_is_silent(self):
        assert require_same_vocabulary(SAME, dict(SAME), "x and y", "do this") is True

    def test_of_another_spelling_is_worth_a_warning(self):
        assert require_same_vocabulary(SAME, SAME | {"tokenizer_sha256": "c" * 64}, "x", "y") is False

    def test_of_another_vocabulary_is_refused_with_the_way_out(self):
        with pytest.raises(ConfigurationError, match=r"x and y belong to different tokenizers.*aaaa.*cccc.*: do this"):
            require_same_vocabulary(SAME, SAME | {"vocabulary_sha256": "c" * 64}, "x and y", "do this")


class TestDescription:
    def test_of_robertas_tokenizer(self, real_data):
        vocabulary = describe(load_tokenizer(str(real_data / "tokenizer")))
        assert vocabulary.size == 50265
        assert vocabulary.special_ids == {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 50264}
        assert (vocabulary.start_id, vocabulary.end_id, vocabulary.mask_id) == (0, 2, 50264)
        assert vocabulary.id_dtype == np.uint16
        ordinary = vocabulary.ordinary_ids()
        assert len(ordinary) == 50260
        assert (ordinary[0], ordinary[-1]) == (4, 50263)

    def test_of_bert_frames_with_cls_and_sep(self, tmp_path):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        vocabulary = describe(BertTokenizerFast(vocab={word: id_ for id_, word in enumerate(words)}))
        assert (vocabulary.start_id, vocabulary.end_id, vocabulary.mask_id) == (2, 3, 4)
        assert vocabulary.ordinary_ids().tolist() == [5, 6]

    @pytest.mark.parametrize("missing", ["start", "end"])
    def test_without_a_frame_token_names_the_flag(self, tokenizer, missing):
        backend = tokenizer.backend_tokenizer
        given = {"end": {"bos_token": "<s>"}, "start": {"eos_token": "</s>"}}[missing]
        bare = PreTrainedTokenizerFast(tokenizer_object=backend, **given)
        with pytest.raises(ConfigurationError, match=f"no {missing} .*--{missing}_token"):
            describe(bare)
        token = {"start": "<s>", "end": "</s>"}[missing]
        vocabulary = describe(bare, **{f"{missing}_token": token})
        assert (vocabulary.start_id, vocabulary.end_id) == (0, 2)
        assert vocabulary.mask_id is None

    def test_of_a_frame_token_that_is_not_in_the_vocabulary_names_it(self, tokenizer):
        with pytest.raises(ConfigurationError, match=r"'<nothing>'.*--start_token"):
            describe(tokenizer, start_token="<nothing>")

    def test_counts_a_frame_token_that_was_ordinary_as_special(self, tokenizer):
        vocabulary = describe(tokenizer, end_token="e")
        assert vocabulary.special_mask()[vocabulary.end_id]
        assert vocabulary.end_id not in vocabulary.ordinary_ids()

    def test_size_is_the_largest_id_plus_1_where_ids_have_gaps(self, edited):
        def leave_gap(backend):
            last = next(token for token in backend["added_tokens"] if token["content"] == "<mask>")
            last["id"] = 600
            backend["model"]["vocab"].pop("<mask>", None)

        try:
            tokenizer = edited(leave_gap)
        except ConfigurationError:
            pytest.skip("this version of tokenizers renumbers added tokens")
        vocabulary = describe(tokenizer)
        assert vocabulary.size == max(tokenizer.get_vocab().values()) + 1

    def test_survives_json(self, tokenizer):
        vocabulary = describe(tokenizer)
        assert Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary


class TestLoading:
    def test_of_a_missing_folder_names_it(self, tmp_path):
        with pytest.raises(ConfigurationError, match=f"no tokenizer at {tmp_path}/nowhere"):
            load_tokenizer(f"{tmp_path}/nowhere")

    def test_of_a_folder_without_a_tokenizer_names_it(self, tmp_path):
        with pytest.raises(ConfigurationError, match=f"no tokenizer at {tmp_path}"):
            load_tokenizer(str(tmp_path))

    def test_of_a_torn_tokenizer_names_it(self, tokenizer_folder, tmp_path):
        folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "torn"))
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text[: len(text) // 2])
        with pytest.raises(ConfigurationError, match=f"no tokenizer at {folder}"):
            load_tokenizer(str(folder))

    def test_gives_the_ids_of_the_file(self, tokenizer_folder, tokenizer):
        backend = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        text = "The cat <mask> sat.\n\n  ünïcode"
        assert tokenizer(text, add_special_tokens=False).input_ids == backend.encode(text, add_special_tokens=False).ids
