"""Eq. (3), Eq. (4), the draw and the corruption, one behaviour a test. Frequencies: see test_masking_statistics.py.

The golden file pins draws over versions of numpy and of this project. Masks that change make runs incomparable, so
it is rewritten only on purpose: `PYTHONPATH=. python tests/trainer/test_masking.py`.
"""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from scorer.errors import ConfigurationError
from scorer.vocabulary import Vocabulary
from trainer import masking
from trainer.masking import HardnessCollator, MaskingVocabulary, draw, probabilities

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # no overflow, no invalid value

GOLDEN = Path(__file__).with_name("golden_draws.json")
ALPHAS = [0.0, 0.001, 0.005, math.inf]
repeatable = settings(derandomize=True, deadline=None, max_examples=50)


def vocabulary(size=1000, mask_id=999):
    """RoBERTa's layout: four special tokens first, the mask token last."""
    specials = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | ({} if mask_id is None else {"<mask>": mask_id})
    return Vocabulary(size, specials, 0, 2, mask_id, "vocabulary", "tokenizer")


def example_rows(rows=3, length=64, size=1000):
    """Framed rows and their perplexities by formula, exact in float32: (input_ids, forward, backward), each [B, T]."""
    b, t = np.arange(rows)[:, None], np.arange(length)[None]
    input_ids = 4 + (7919 * b + 104_729 * t * t + 31 * t) % (size - 5)
    forward = 1 + ((37 * t + 11 * b) % 97) ** 2 / 8
    backward = 1 + ((53 * t + 29 * b) % 89) ** 2 / 4
    special = np.broadcast_to((t == 0) | (t == length - 1) | ((t + 5 * b) % 23 == 22), input_ids.shape)
    return np.where(special, 2 * (t > 0), input_ids), np.where(special, 0, forward), np.where(special, 0, backward)


def as_features(input_ids, forward, backward, **more):
    """One dict a row, in the shards' own dtypes, as a reader yields them."""
    columns = {
        "input_ids": input_ids.astype(np.uint16),
        "forward_perplexity": forward.astype(np.float32),
        "backward_perplexity": backward.astype(np.float32),
    }
    return [{name: values[row] for name, values in columns.items()} | more for row in range(len(input_ids))]


class TestProbabilities:
    @pytest.mark.parametrize("alpha", ["0", "1/1000", "1/200", "3"])
    def test_are_eq_3_and_eq_4_in_exact_arithmetic(self, alpha):
        _, forward, backward = example_rows()
        ours = probabilities(forward, backward, float(Fraction(alpha)))
        for row in range(len(ours)):
            mean = [(Fraction(f) + Fraction(b)) / 2 for f, b in zip(forward[row], backward[row], strict=True)]
            hardness = [m / sum(mean) for m in mean]
            shifted = [p + Fraction(alpha) if p > 0 else Fraction(0) for p in hardness]
            np.testing.assert_allclose(ours[row], [float(s / sum(shifted)) for s in shifted], rtol=1e-12, atol=0)

    def test_average_the_perplexities_and_not_their_logarithms(self):
        # Means 50.5 and 10 of arithmetic; the geometric ones would be 10 and 10.
        forward, backward = np.array([[0.0, 1.0, 10.0]]), np.array([[0.0, 100.0, 10.0]])
        np.testing.assert_allclose(probabilities(forward, backward, 0.0), [[0, 50.5 / 60.5, 10 / 60.5]], rtol=1e-15)

    @pytest.mark.parametrize("alpha", [*ALPHAS, 1e-300, 1e308])
    def test_sum_to_one_and_leave_special_positions_at_zero(self, alpha):
        _, forward, backward = example_rows()
        ours = probabilities(forward, backward, alpha)
        np.testing.assert_allclose([math.fsum(row) for row in ours], 1, rtol=1e-14)
        np.testing.assert_array_equal(ours > 0, forward > 0)

    def test_are_uniform_over_eligible_positions_at_alpha_inf(self):
        _, forward, backward = example_rows()
        eligible = forward > 0
        expected = eligible / eligible.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probabilities(forward, backward, math.inf), expected, rtol=1e-15)

    @repeatable
    @given(st.lists(st.floats(1, 1e30), min_size=1, max_size=40), st.floats(0, 1e3))
    def test_mix_hardness_with_a_uniform_share_of_n_alpha_over_1_plus_n_alpha(self, perplexities, alpha):
        row = np.array([[0.0, *perplexities]])
        n = len(perplexities)
        share = n * alpha / (1 + n * alpha)
        uniform = (row > 0) / n
        expected = (1 - share) * probabilities(row, row, 0.0) + share * uniform
        np.testing.assert_allclose(probabilities(row, row, alpha), expected, rtol=1e-9)

    @pytest.mark.parametrize(("alpha", "percent"), [(0.001, 34), (0.005, 72)])
    def test_give_uniform_draws_the_share_that_the_paper_implies(self, alpha, percent):
        """512 eligible tokens, one of which has all the hardness: the others share what is uniform."""
        row = np.ones((1, 512))
        row[0, 0] = 1e30
        assert round(100 * 512 * probabilities(row, row, alpha)[0, 1]) == percent

    def test_are_zero_where_no_token_is_eligible(self):
        zeros = np.zeros((2, 8))
        for alpha in ALPHAS:
            np.testing.assert_array_equal(probabilities(zeros, zeros, alpha), zeros)

    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_survive_a_row_of_the_largest_perplexities(self, alpha):
        largest = np.full((1, 512), math.exp(80), dtype=np.float32)
        np.testing.assert_allclose(probabilities(largest, largest, alpha), 1 / 512, rtol=1e-12)

    @pytest.mark.parametrize("alpha", [-1e-9, -math.inf, math.nan])
    def test_refuse_an_alpha_for_which_eq_4_is_undefined(self, alpha):
        row = np.ones((1, 4))
        with pytest.raises(ConfigurationError, match="alpha"):
            probabilities(row, row, alpha)
        with pytest.raises(ConfigurationError, match="alpha"):
            draw(row, row, np.ones((1, 4), dtype=int), alpha, 0, 0)


class TestDraw:
    def test_budget_is_15_percent_and_77_of_512(self):
        assert masking.budget(512) == 77
        assert [masking.budget(length) for length in (1, 20, 64)] == [0, 3, 10]

    @repeatable
    @given(
        st.lists(st.one_of(st.just(0.0), st.floats(1, 2.0**115, width=32)), min_size=1, max_size=60),
        st.sampled_from([*ALPHAS, 1e308]),
        st.integers(-(2**63), 2**64 - 1),
        st.integers(0, 10),
    )
    def test_gives_distinct_eligible_positions_ascending_as_many_as_there_are(self, perplexities, alpha, seed, epoch):
        perplexity = np.array([perplexities], dtype=np.float32)
        eligible = set(np.flatnonzero(perplexity[0]).tolist())
        row = draw(perplexity, perplexity, np.arange(perplexity.size)[None], alpha, seed, epoch)[0]
        drawn = row[row >= 0].tolist()
        assert row.dtype == np.int64
        assert len(row) == masking.budget(len(perplexities))
        assert len(drawn) == min(len(row), len(eligible))
        assert drawn == sorted(set(drawn) & eligible)
        assert row.tolist() == drawn + [-1] * (len(row) - len(drawn))

    @pytest.mark.parametrize("alpha", [*ALPHAS, 1e308])
    def test_takes_all_eligible_positions_and_then_minus_one_where_fewer_than_m(self, alpha):
        perplexity = np.zeros((2, 40))  # M = 6
        perplexity[0, [3, 17, 30]] = 1.0, 1e30, 5.0
        positions = draw(perplexity, perplexity, np.arange(80).reshape(2, 40), alpha, 0, 0)
        assert positions.tolist() == [[3, 17, 30, -1, -1, -1], [-1] * 6]

    @pytest.mark.parametrize("alpha", [*ALPHAS, 1e308])
    def test_no_special_position_is_ever_drawn(self, alpha):
        input_ids, forward, backward = example_rows(rows=50)
        for seed in range(100):
            positions = draw(forward, backward, input_ids, alpha, seed, 0)
            assert (np.take_along_axis(forward, positions, axis=1) > 0).all()

    @pytest.mark.parametrize("alpha", [1e12, 1e308])
    def test_a_huge_alpha_is_as_good_as_inf(self, alpha):
        input_ids, forward, backward = example_rows(rows=50)
        np.testing.assert_array_equal(
            draw(forward, backward, input_ids, alpha, 1, 0), draw(forward, backward, input_ids, math.inf, 1, 0)
        )

    def test_gives_the_same_positions_in_any_batch_and_order(self):
        input_ids, forward, backward = example_rows(rows=12)
        expected = draw(forward, backward, input_ids, 0.001, 5, 2)
        for chosen in ([0], [11], range(11, -1, -1), [3, 3, 7], range(5)):
            rows = list(chosen)
            ours = draw(forward[rows], backward[rows], input_ids[rows], 0.001, 5, 2)
            np.testing.assert_array_equal(ours, expected[rows])

    @pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32])
    def test_gives_the_same_positions_for_any_dtype(self, dtype):
        input_ids, forward, backward = example_rows()
        expected = draw(forward, backward, input_ids, 0.001, 5, 2)
        ours = draw(forward.astype(np.float32), backward.astype(np.float32), input_ids.astype(dtype), 0.001, 5, 2)
        np.testing.assert_array_equal(ours, expected)

    def test_gives_the_same_positions_for_seeds_and_epochs_of_numpy(self):
        input_ids, forward, backward = example_rows()
        np.testing.assert_array_equal(
            draw(forward, backward, input_ids, 0.0, np.int64(5), np.int64(2)),
            draw(forward, backward, input_ids, 0.0, 5, 2),
        )

    @pytest.mark.parametrize("alpha", [0.005, math.inf])
    @pytest.mark.parametrize("changed", ["seed", "epoch", "one id", "order of ids"])
    def test_another_seed_epoch_or_block_gives_another_mask(self, changed, alpha):
        input_ids, forward, backward = example_rows(rows=1, length=512)
        other_ids = input_ids.copy()
        if changed == "one id":
            other_ids[0, 100] += 1
        if changed == "order of ids":
            other_ids[0, [100, 101]] = other_ids[0, [101, 100]]
        one = draw(forward, backward, input_ids, alpha, 1, 1)[0]
        other = draw(forward, backward, other_ids, alpha, 1 + (changed == "seed"), 1 + (changed == "epoch"))[0]
        # Independent uniform masks share 15 %, about 12 of 77; hard ones more.
        assert len(set(one) & set(other)) < 45

    def test_seed_and_epoch_are_not_interchangeable(self):
        input_ids, forward, backward = example_rows(rows=1, length=512)
        one, other = (draw(forward, backward, input_ids, math.inf, *key) for key in [(1, 2), (2, 1)])
        assert len(set(one[0]) & set(other[0])) < 45

    def test_neighbouring_alphas_share_almost_all_positions(self):
        input_ids, forward, backward = example_rows(rows=50, length=512)
        one, other = (draw(forward, backward, input_ids, alpha, 1, 0) for alpha in (0.0050, 0.0051))
        shared = sum(len(set(a) & set(b)) for a, b in zip(one.tolist(), other.tolist(), strict=True))
        assert 0.98 * one.size < shared < one.size

    def test_all_alphas_give_the_same_mask_where_all_perplexities_are_equal(self):
        input_ids, forward, _ = example_rows(rows=20)
        equal = 7.0 * (forward > 0)
        masks = [draw(equal, equal, input_ids, alpha, 1, 0) for alpha in [*ALPHAS, 1e6]]
        for mask in masks[1:]:
            np.testing.assert_array_equal(mask, masks[0])

    def test_an_alm_of_another_scale_gives_the_same_mask(self):
        """Noise is common to all ALMs, and Eq. (3) takes the scale out: powers of two, so not even rounding differs."""
        input_ids, forward, backward = example_rows(rows=20)
        np.testing.assert_array_equal(
            draw(1024 * forward, 1024 * backward, input_ids, 0.001, 1, 0),
            draw(forward, backward, input_ids, 0.001, 1, 0),
        )


class TestCorrupt:
    def test_changes_drawn_positions_only_and_labels_them_with_the_true_id(self):
        input_ids, forward, backward = example_rows(rows=200)
        positions = draw(forward, backward, input_ids, 0.001, 0, 0)
        corrupted, labels = masking.corrupt(input_ids, positions, MaskingVocabulary.of(vocabulary()), 0, 0)
        is_drawn = np.zeros(input_ids.shape, dtype=bool)
        np.put_along_axis(is_drawn, positions, True, axis=1)
        np.testing.assert_array_equal(labels, np.where(is_drawn, input_ids, -100))
        np.testing.assert_array_equal(corrupted[~is_drawn], input_ids[~is_drawn])
        assert (corrupted[is_drawn] != input_ids[is_drawn]).mean() == pytest.approx(0.9, abs=0.03)  # 4.5 sd, n = 2,000
        assert corrupted.dtype == labels.dtype == np.int64

    def test_puts_no_special_token_but_the_mask(self):
        input_ids, _, _ = example_rows(rows=200)
        everywhere = np.tile(np.arange(64), (200, 1))
        # Three ordinary ids among the special ones: a replacement that missed them would show at once.
        few = Vocabulary(8, {"<s>": 0, "</s>": 2, "<unk>": 5, "<pad>": 6, "<mask>": 7}, 0, 2, 7, "", "")
        corrupted, _ = masking.corrupt(input_ids + 100, everywhere, MaskingVocabulary.of(few), 0, 0)
        assert set(corrupted[corrupted < 100].tolist()) == {1, 3, 4, 7}

    def test_leaves_rows_without_a_drawn_position_as_they_are(self):
        input_ids, _, _ = example_rows()
        nothing = np.full((len(input_ids), 10), -1)
        corrupted, labels = masking.corrupt(input_ids, nothing, MaskingVocabulary.of(vocabulary()), 0, 0)
        np.testing.assert_array_equal(corrupted, input_ids)
        assert (labels == -100).all()

    def test_does_not_write_into_its_arguments(self):
        input_ids, forward, backward = example_rows()
        before = [values.copy() for values in (input_ids, forward, backward)]
        positions = draw(forward, backward, input_ids, 0.0, 0, 0)
        masking.corrupt(input_ids, positions, MaskingVocabulary.of(vocabulary()), 0, 0)
        for values, copy in zip((input_ids, forward, backward), before, strict=True):
            np.testing.assert_array_equal(values, copy)

    def test_of_a_position_depends_on_where_it_is_and_not_on_what_else_was_drawn(self):
        input_ids, forward, backward = example_rows(rows=200)
        known = MaskingVocabulary.of(vocabulary())
        everywhere = np.tile(np.arange(64), (200, 1))
        expected, _ = masking.corrupt(input_ids, everywhere, known, 3, 1)
        for alpha in ALPHAS:
            positions = draw(forward, backward, input_ids, alpha, 3, 1)
            for some in (positions, positions[:, ::-1], positions[:, :4]):
                corrupted, labels = masking.corrupt(input_ids, some, known, 3, 1)
                np.testing.assert_array_equal(corrupted[labels != -100], expected[labels != -100])

    def test_needs_a_mask_token(self):
        with pytest.raises(ConfigurationError, match="mask token"):
            MaskingVocabulary.of(vocabulary(mask_id=None))


# The slow twin: Python integers, one row and one position at a time, from the definitions.

WORD = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15
SELECTION, CORRUPTION, REPLACEMENT = 0, 1, 2


def plain_mix(z):
    """SplitMix64's finalizer."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def plain_key(*parts):
    folded = 0
    for part in parts:
        folded = plain_mix((folded ^ plain_mix((part + GAMMA) & WORD)) + GAMMA & WORD)
    return folded


def plain_digest(row):
    return plain_mix(sum(plain_mix(token ^ (place * GAMMA & WORD)) for place, token in enumerate(row, start=1)) & WORD)


def plain_word(key, stream, position):
    counter = (position + (stream << 32)) * GAMMA
    return plain_mix(plain_mix((key + counter) & WORD))


def plain_uniform(key, stream, position):
    return (plain_word(key, stream, position) + 0.5) / 2**64


def plain_draw(forward, backward, row, alpha, *, seed, epoch):
    key = plain_key(seed, epoch, plain_digest(row))
    mean = [(f + b) / 2 for f, b in zip(forward, backward, strict=True)]
    norm = math.fsum(mean)
    log_weight = {i: 0.0 if alpha == math.inf else math.log(m / norm + alpha) for i, m in enumerate(mean) if m > 0}
    left = {i: w - math.log(-math.log(plain_uniform(key, SELECTION, i))) for i, w in log_weight.items()}
    drawn = []
    while left and len(drawn) < round(0.15 * len(row)):
        drawn.append(max(left, key=left.__getitem__))
        del left[drawn[-1]]
    return sorted(drawn)


def plain_corrupt(row, drawn, known, *, seed, epoch):
    key = plain_key(seed, epoch, plain_digest(row))
    corrupted = list(row)
    for position in drawn:
        action = plain_uniform(key, CORRUPTION, position)
        if action < 0.8:
            corrupted[position] = known.mask_id
        elif action < 0.9:
            word = plain_word(key, REPLACEMENT, position)
            corrupted[position] = known.ordinary_ids[(word >> 32) * len(known.ordinary_ids) >> 32]
    return corrupted


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 5), (2**63 + 1, 0), (-1, 3)])
def test_draw_and_corruption_equal_their_plain_twin(alpha, seed, epoch):
    input_ids, forward, backward = example_rows(rows=10, length=100)
    forward[9, 10:], backward[9, 10:] = 0, 0  # one row with fewer eligible positions than M
    known = MaskingVocabulary.of(vocabulary())
    positions = draw(forward, backward, input_ids, alpha, seed, epoch)
    corrupted, _ = masking.corrupt(input_ids, positions, known, seed, epoch)
    for row, ids in enumerate(input_ids.tolist()):
        drawn = plain_draw(forward[row].tolist(), backward[row].tolist(), ids, alpha, seed=seed, epoch=epoch)
        assert positions[row][positions[row] >= 0].tolist() == drawn
        assert corrupted[row].tolist() == plain_corrupt(ids, drawn, known, seed=seed, epoch=epoch)


def test_draw_equals_its_plain_twin_on_full_blocks_of_enormous_perplexities():
    input_ids, forward, _ = example_rows(rows=2, length=512, size=50_265)
    perplexity = np.where(forward > 0, 10.0 ** (np.arange(512) % 35), 0)
    positions = draw(perplexity, perplexity, input_ids, 0.0, seed=4, epoch=0)
    for row, ids in enumerate(input_ids.tolist()):
        assert positions[row].tolist() == plain_draw(*[perplexity[row].tolist()] * 2, ids, 0.0, seed=4, epoch=0)


def golden_draws():
    """What the golden file holds: for each case, the masked positions and what the model sees there, row by row."""
    cases = []
    for rows, length, size in [(3, 64, 1000), (1, 512, 50_265)]:
        input_ids, forward, backward = example_rows(rows, length, size)
        known = MaskingVocabulary.of(vocabulary(size, mask_id=size - 1))
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (2**40 + 3, 7)]:
            for alpha in ALPHAS:
                positions = draw(forward, backward, input_ids, alpha, seed, epoch)
                corrupted, _ = masking.corrupt(input_ids, positions, known, seed, epoch)
                cases.append(
                    {
                        "length": length,
                        "seed": seed,
                        "epoch": epoch,
                        "alpha": "inf" if alpha == math.inf else alpha,
                        "positions": positions.tolist(),
                        "corrupted_ids": np.take_along_axis(corrupted, positions, axis=1).tolist(),
                    }
                )
    return cases


def test_draws_are_those_of_the_golden_file():
    golden = json.loads(GOLDEN.read_text())
    ours = golden_draws()
    assert len(ours) == len(golden) == 32
    for case, expected in zip(ours, golden, strict=True):
        assert case == expected


class Rows(Dataset):
    """A map-style dataset of scored rows."""

    def __init__(self, features):
        self._features = features

    def __len__(self):
        return len(self._features)

    def __getitem__(self, index):
        return self._features[index]


class TestHardnessCollator:
    def test_gives_int64_tensors_of_what_draw_and_corrupt_give(self):
        rows = example_rows()
        batch = HardnessCollator(vocabulary(), 0.001, seed=4)(as_features(*rows, epoch=2))
        positions = draw(rows[1], rows[2], rows[0], 0.001, 4, 2)
        masked, labels = masking.corrupt(rows[0], positions, MaskingVocabulary.of(vocabulary()), 4, 2)
        assert set(batch) == {"input_ids", "labels"}
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        np.testing.assert_array_equal(batch["input_ids"].numpy(), masked)
        np.testing.assert_array_equal(batch["labels"].numpy(), labels)

    def test_seed_is_zero_unless_given(self):
        features = as_features(*example_rows(), epoch=0)
        one, other = (HardnessCollator(vocabulary(), 0.001, *seed)(features) for seed in [(), (0,)])
        assert torch.equal(one["labels"], other["labels"])

    @pytest.mark.parametrize(
        "convert", [np.asarray, np.ndarray.tolist, torch.from_numpy], ids=["numpy", "list", "torch"]
    )
    def test_takes_features_as_arrays_lists_or_tensors(self, convert):
        input_ids, forward, backward = example_rows()
        columns = {"input_ids": input_ids, "forward_perplexity": forward, "backward_perplexity": backward}
        features = [{name: convert(values[row]) for name, values in columns.items()} for row in range(len(input_ids))]
        collate = HardnessCollator(vocabulary(), 0.005)
        expected = collate(as_features(input_ids, forward, backward))
        ours = collate(features)
        assert torch.equal(ours["input_ids"], expected["input_ids"])
        assert torch.equal(ours["labels"], expected["labels"])

    @pytest.mark.parametrize("alpha", [0.0, math.inf])
    def test_masks_ignore_workers_batch_size_and_order(self, alpha):
        rows = example_rows(rows=13)
        features = as_features(*rows, epoch=1)
        collate = HardnessCollator(vocabulary(), alpha, seed=6)
        expected = collate(features)
        backwards = list(range(12, -1, -1))
        for workers, batch_size, order in [
            (0, 1, backwards),
            (0, 5, None),
            (1, 4, None),
            (2, 3, backwards),
            (2, 1, None),
        ]:
            loader = DataLoader(
                Rows(features),
                batch_size,
                sampler=order,
                num_workers=workers,
                collate_fn=collate,
                timeout=60 * (workers > 0),
            )
            batches = list(loader)
            for name in ("input_ids", "labels"):
                together = torch.cat([batch[name] for batch in batches])
                assert torch.equal(together, expected[name][order] if order else expected[name])

    def test_neither_reads_nor_moves_the_global_random_state(self):
        features = as_features(*example_rows(), epoch=0)
        collate = HardnessCollator(vocabulary(), 0.001)
        np.random.seed(1)
        torch.manual_seed(1)
        expected = collate(features)
        np.random.seed(2)
        torch.manual_seed(2)
        before = np.random.get_state()[1].copy(), torch.get_rng_state()
        assert torch.equal(collate(features)["input_ids"], expected["input_ids"])
        np.testing.assert_array_equal(np.random.get_state()[1], before[0])
        assert torch.equal(torch.get_rng_state(), before[1])

    def test_set_epoch_counts_where_features_do_not_say_theirs(self):
        rows = example_rows()
        collate = HardnessCollator(vocabulary(), 0.001)
        assert torch.equal(collate(as_features(*rows))["labels"], collate(as_features(*rows, epoch=0))["labels"])
        collate.set_epoch(3)
        silent = collate(as_features(*rows))["labels"]
        assert torch.equal(silent, collate(as_features(*rows, epoch=3))["labels"])
        assert not torch.equal(silent, collate(as_features(*rows, epoch=0))["labels"])

    @pytest.mark.parametrize("number", [int, np.int64, torch.tensor], ids=["int", "numpy", "torch"])
    def test_a_batch_that_crosses_epochs_masks_each_row_by_its_own(self, number):
        rows = example_rows(rows=6)
        collate = HardnessCollator(vocabulary(), 0.001)
        epochs = [1, 0, 0, 2, 1, 0]
        crossing = [
            feature | {"epoch": number(epoch)} for feature, epoch in zip(as_features(*rows), epochs, strict=True)
        ]
        batch = collate(crossing)
        for row, epoch in enumerate(epochs):
            alone = collate(as_features(*rows, epoch=epoch)[row : row + 1])
            assert torch.equal(batch["input_ids"][row], alone["input_ids"][0])
            assert torch.equal(batch["labels"][row], alone["labels"][0])

    @pytest.mark.parametrize(
        "missing", [["forward_perplexity"], ["backward_perplexity"], ["forward_perplexity", "backward_perplexity"]]
    )
    def test_missing_perplexities_name_themselves_and_remove_unused_columns(self, missing):
        features = as_features(*example_rows())
        for feature in features:
            for name in missing:
                del feature[name]
        with pytest.raises(ConfigurationError, match="remove_unused_columns=False") as error:
            HardnessCollator(vocabulary(), 0.001)(features)
        assert all(name in str(error.value) for name in missing)

    @pytest.mark.parametrize("alpha", [-0.001, -math.inf, math.nan])
    def test_refuses_an_alpha_for_which_eq_4_is_undefined(self, alpha):
        with pytest.raises(ConfigurationError, match="alpha"):
            HardnessCollator(vocabulary(), alpha)

    def test_refuses_a_tokenizer_without_mask_token(self):
        with pytest.raises(ConfigurationError, match="mask token"):
            HardnessCollator(vocabulary(mask_id=None), 0.001)


def test_a_hugging_face_trainer_feeds_the_collator_only_without_remove_unused_columns(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=1000, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    features = as_features(*example_rows(), epoch=0)
    collate = HardnessCollator(vocabulary(), 0.001)

    def first_batch(**options):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=3, use_cpu=True, report_to=[], **options
        )
        trainer = transformers.Trainer(
            transformers.RobertaForMaskedLM(config), arguments, data_collator=collate, train_dataset=Rows(features)
        )
        return next(iter(trainer.get_train_dataloader()))

    fed = first_batch(remove_unused_columns=False)
    expected = {tuple(row) for row in collate(features)["input_ids"].tolist()}
    assert {tuple(row) for row in fed["input_ids"].tolist()} == expected  # the Trainer shuffles
    with pytest.raises(ConfigurationError, match="remove_unused_columns=False"):
        first_batch()


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(case) for case in golden_draws())
    GOLDEN.write_text(f"[\n{lines}\n]\n")
