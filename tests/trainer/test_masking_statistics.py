"""What the sampler and the corruption do over many draws, held against oracles that share no code with them.

Seeds are fixed, so every test is deterministic. A bound of 4.5 on |z| would fail by chance once in 150,000 positions; a
bound of 1e-4 on a p-value, once in 10,000 tests.
"""

import math

import numpy as np
import pytest
from scipy import stats

from trainer import masking

pytestmark = pytest.mark.filterwarnings("error")  # no overflow, no invalid value, whatever the perplexities

LENGTH = 20  # M = 3: few enough ordered draws to enumerate all of them
MAX_Z = 4.5
MIN_P_VALUE = 1e-4
ROWS, RUNS = 100, 1000  # 1e5 draws

_ORDINARY = np.arange(LENGTH - 2)
LAWS = {  # forward and backward perplexities of the tokens between the frames
    "mild": (1 + _ORDINARY**2 / 2, 1 + 3.0 * _ORDINARY[::-1]),
    "three decades": (1.5**_ORDINARY, 1.5**_ORDINARY),
    "one outlier": (np.where(_ORDINARY == 5, 1e6, 1.0 + _ORDINARY), 1.0 + _ORDINARY % 4),
}


def framed(perplexities):
    return np.concatenate([[0.0], perplexities, [0.0]])


def weights_of_eq_4(forward, backward, alpha):
    """(P(X) + alpha) up to a factor, for one row, from the formulas of the paper."""
    mean = [(f + b) / 2 for f, b in zip(forward.tolist(), backward.tolist(), strict=True)]
    norm = math.fsum(mean)
    return [0.0 if m == 0 else 1.0 if alpha == math.inf else m / norm + alpha for m in mean]


def exact_joint_inclusion(weights, count):
    """P(i and j are both drawn) [T, T], the diagonal P(i is drawn), summed over all ordered draws of `count`."""
    joint = np.zeros((len(weights), len(weights)))

    def visit(drawn, probability):
        if len(drawn) == count:
            joint[np.ix_(drawn, drawn)] += probability
            return
        left = [i for i, weight in enumerate(weights) if weight > 0 and i not in drawn]
        total = math.fsum(weights[i] for i in left)
        for i in left:
            visit([*drawn, i], probability * weights[i] / total)

    visit([], 1.0)
    return joint


def draw_sequentially(weights, count, draws, rng):
    """Renormalise, draw one, remove it, `count` times: bool [draws, T]. No logarithm, no noise of ours."""
    left = np.tile(np.asarray(weights), (draws, 1))
    included = np.zeros(left.shape, dtype=bool)
    every = np.arange(draws)
    for _ in range(count):
        cumulative = left.cumsum(axis=1)
        at = (cumulative <= rng.random((draws, 1)) * cumulative[:, -1:]).sum(axis=1)
        included[every, at] = True
        left[every, at] = 0.0
    return included


def as_inclusion(positions, length):
    """int64 [B, M] -> bool [B, T]; -1 lands in a column that is cut off."""
    included = np.zeros((len(positions), length + 1), dtype=bool)
    np.put_along_axis(included, positions % (length + 1), True, axis=1)
    return included[:, :length]


def draw_many(forward, backward, alpha, seeds, epochs, *, rows=ROWS):
    """The sampler's draws for distinct rows of one law, once for each seed and epoch: bool [draws, T]."""
    length = len(forward)
    input_ids = np.arange(rows * length).reshape(rows, length)
    tiled = np.tile(forward, (rows, 1)), np.tile(backward, (rows, 1))
    draws = [masking.draw(*tiled, input_ids, alpha, seed, epoch) for seed in seeds for epoch in epochs]
    return as_inclusion(np.concatenate(draws), length)


def joint_counts(included):
    counts = included.astype(np.float64)
    return counts.T @ counts


def assert_frequencies(counts, draws, probabilities):
    """Max |z| over everything that can vary; the certain must be certain."""
    expected = draws * probabilities
    spread = np.sqrt(expected * (1 - probabilities))
    varies = spread > 3  # fewer than about 10 expected cases are not normal
    np.testing.assert_allclose(counts[~varies], expected[~varies], atol=20)
    np.testing.assert_array_equal(counts[probabilities == 0], 0)
    assert varies.any()
    assert np.abs((counts - expected)[varies] / spread[varies]).max() < MAX_Z


@pytest.mark.parametrize("alpha", [0.0, 0.001, 0.005, 0.1, math.inf])
@pytest.mark.parametrize("law", LAWS)
class TestInclusionFollowsSequentialDrawing:
    def test_over_seeds(self, law, alpha):
        self._check(law, alpha, seeds=range(RUNS), epochs=[0])

    def test_over_epochs(self, law, alpha):
        self._check(law, alpha, seeds=[20], epochs=range(RUNS))

    @staticmethod
    def _check(law, alpha, seeds, epochs):
        forward, backward = map(framed, LAWS[law])
        included = draw_many(forward, backward, alpha, seeds, epochs)
        exact = exact_joint_inclusion(weights_of_eq_4(forward, backward, alpha), masking.budget(LENGTH))
        assert len(included) == 100_000
        assert_frequencies(included.sum(axis=0), len(included), np.diagonal(exact))


@pytest.mark.parametrize("alpha", [0.0, 0.005, math.inf])
def test_pairs_of_positions_are_drawn_as_by_sequential_drawing(alpha):
    forward, backward = map(framed, LAWS["mild"])
    included = draw_many(forward, backward, alpha, range(RUNS), [3])
    exact = exact_joint_inclusion(weights_of_eq_4(forward, backward, alpha), masking.budget(LENGTH))
    assert_frequencies(joint_counts(included), len(included), exact)


def test_the_two_oracles_agree():
    weights = weights_of_eq_4(*map(framed, LAWS["three decades"]), 0.005)
    included = draw_sequentially(weights, 3, 100_000, np.random.default_rng(1))
    assert_frequencies(joint_counts(included), len(included), exact_joint_inclusion(weights, 3))


def test_alpha_inf_is_uniform_over_eligible_positions_singly_and_in_pairs():
    forward, backward = map(framed, LAWS["one outlier"])
    included = draw_many(forward, backward, math.inf, range(RUNS), [0])
    eligible, budget = LENGTH - 2, masking.budget(LENGTH)
    expected = np.zeros((LENGTH, LENGTH))
    expected[1:-1, 1:-1] = budget * (budget - 1) / (eligible * (eligible - 1))
    np.fill_diagonal(expected[1:-1, 1:-1], budget / eligible)
    assert_frequencies(joint_counts(included), len(included), expected)


def hard_block():
    """512 positions: 510 log-normal perplexities (sigma = 2, from 1 to 500) in scrambled order, framed."""
    sorted_perplexities = 1 + np.exp(2 * stats.norm.ppf((np.arange(510) + 0.5) / 510))
    return framed(sorted_perplexities[np.arange(510) * 7 % 510]), framed(sorted_perplexities[np.arange(510) * 11 % 510])


@pytest.mark.parametrize("alpha", [0.0, 0.001, 0.005])
def test_full_blocks_follow_sequential_drawing(alpha):
    forward, backward = hard_block()
    weights = weights_of_eq_4(forward, backward, alpha)
    ours = draw_many(forward, backward, alpha, seeds=range(10), epochs=range(10), rows=200)
    oracle = draw_sequentially(weights, 77, 3_000, np.random.default_rng(2))
    assert (ours.sum(axis=1) == 77).all()
    assert not ours[:, [0, -1]].any()
    # Two samples of one law: the variances of their frequencies add.
    pooled = (ours.sum(axis=0) + oracle.sum(axis=0))[1:-1] / (len(ours) + len(oracle))
    spread = np.sqrt(pooled * (1 - pooled) * (1 / len(ours) + 1 / len(oracle)))
    assert np.abs((ours.mean(axis=0) - oracle.mean(axis=0))[1:-1] / spread).max() < MAX_Z


def test_full_blocks_are_uniform_at_alpha_inf():
    included = draw_many(*hard_block(), math.inf, seeds=range(10), epochs=range(10), rows=200)
    assert_frequencies(included.sum(axis=0), len(included), framed(np.full(510, 77 / 510)))


@pytest.mark.parametrize("enormous", [1e30, 3e34, math.exp(80)])
def test_an_enormous_perplexity_is_always_drawn_and_leaves_the_rest_uniform(enormous):
    perplexity = framed(np.where(_ORDINARY == 5, enormous, 1.0)).astype(np.float32)
    included = draw_many(perplexity, perplexity, 0.0, range(RUNS), [0])
    expected = framed(np.where(_ORDINARY == 5, 1.0, (masking.budget(LENGTH) - 1) / (LENGTH - 3)))
    assert included[:, 6].all()
    assert_frequencies(included.sum(axis=0), len(included), expected)


def test_hardest_first_where_decades_lie_between():
    """1e30, 1e20 and 1e10 among ones: the three of them are the mask, but for odds of 1e-9."""
    perplexity = framed(np.ones(LENGTH - 2))
    perplexity[[4, 9, 14]] = 1e10, 1e30, 1e20
    included = draw_many(perplexity, perplexity, 0.0, range(RUNS), [0])
    np.testing.assert_array_equal(np.flatnonzero(included.all(axis=0)), [4, 9, 14])
    assert included.sum() == 3 * len(included)


VOCABULARY_SIZE = 1000
SPECIAL_IDS = [0, 1, 2, 3, 999]
MASK_ID = 999
ORDINARY_IDS = np.setdiff1d(np.arange(VOCABULARY_SIZE), SPECIAL_IDS)
VOCABULARY = masking.MaskingVocabulary(MASK_ID, ORDINARY_IDS)
# A random token is the true one once in 995 cases, and then looks as if it had stayed.
ACTION_SHARES = np.array([0.8, 0.1 * (1 - 1 / len(ORDINARY_IDS)), 0.1 + 0.1 / len(ORDINARY_IDS)])


def corrupted_blocks(rows, alpha, seed):
    """Positions drawn from scrambled hard blocks: flat arrays of hardness, true id and corrupted id of each."""
    rng = np.random.default_rng(seed)
    law = sum(hard_block()) / 2
    perplexity = np.stack([framed(rng.permutation(law[1:-1])) for _ in range(rows)])
    input_ids = rng.choice(ORDINARY_IDS, perplexity.shape)
    positions = masking.draw(perplexity, perplexity, input_ids, alpha, seed, 0)
    corrupted, _ = masking.corrupt(input_ids, positions, VOCABULARY, seed, 0)
    taken = [np.take_along_axis(values, positions, axis=1).ravel() for values in (perplexity, input_ids, corrupted)]
    return tuple(taken)


def action_counts(true_ids, corrupted_ids):
    """How many were masked, replaced by another token, and left."""
    masked, kept = (corrupted_ids == MASK_ID).sum(), (corrupted_ids == true_ids).sum()
    return np.array([masked, len(true_ids) - masked - kept, kept])


def assert_shares(true_ids, corrupted_ids):
    counts = action_counts(true_ids, corrupted_ids)
    assert stats.chisquare(counts, len(true_ids) * ACTION_SHARES).pvalue > MIN_P_VALUE, counts / len(true_ids)


@pytest.mark.parametrize("alpha", [0.0, 0.005, math.inf])
def test_corruption_is_80_10_10_in_every_decile_of_hardness(alpha):
    hardness, true_ids, corrupted_ids = corrupted_blocks(1000, alpha, seed=5)
    for decile in np.array_split(np.argsort(hardness, kind="stable"), 10):
        assert len(decile) == 7_700
        assert_shares(true_ids[decile], corrupted_ids[decile])


def test_corruption_is_80_10_10_over_seeds_and_over_epochs_of_one_row():
    input_ids = ORDINARY_IDS[np.arange(512) * 3 % 995][None]
    positions = np.arange(1, 511)[None]
    for keys in [[(seed, 0) for seed in range(50)], [(0, epoch) for epoch in range(50)]]:
        corrupted = np.concatenate([masking.corrupt(input_ids, positions, VOCABULARY, *key)[0] for key in keys])
        assert_shares(np.tile(input_ids[:, 1:-1], (50, 1)).ravel(), corrupted[:, 1:-1].ravel())


def test_corruption_of_the_hardest_position_is_80_10_10():
    """The hardest of a row is the first drawn: 1e30 among ones."""
    rows = 20_000
    input_ids = ORDINARY_IDS[np.random.default_rng(6).integers(0, len(ORDINARY_IDS), (rows, LENGTH))]
    perplexity = np.ones((rows, LENGTH))
    hardest = np.arange(rows) % LENGTH
    perplexity[np.arange(rows), hardest] = 1e30
    positions = masking.draw(perplexity, perplexity, input_ids, 0.0, 1, 0)
    assert (positions == hardest[:, None]).any(axis=1).all()
    corrupted, _ = masking.corrupt(input_ids, positions, VOCABULARY, 1, 0)
    assert_shares(input_ids[np.arange(rows), hardest], corrupted[np.arange(rows), hardest])


def test_neighbouring_positions_are_corrupted_independently():
    """Nine joint outcomes of two neighbours against the product of the shares."""
    rows = 2_000
    input_ids = ORDINARY_IDS[np.random.default_rng(7).integers(0, len(ORDINARY_IDS), (rows, 64))]
    corrupted, _ = masking.corrupt(input_ids, np.tile(np.arange(64), (rows, 1)), VOCABULARY, 0, 0)
    action = np.where(corrupted == MASK_ID, 0, np.where(corrupted == input_ids, 2, 1))
    pairs = np.bincount((3 * action[:, 0::2] + action[:, 1::2]).ravel(), minlength=9)
    expected = np.outer(ACTION_SHARES, ACTION_SHARES).ravel() * pairs.sum()
    assert stats.chisquare(pairs, expected).pvalue > MIN_P_VALUE


def test_replacements_are_uniform_over_the_ordinary_ids():
    """True ids are all special here, so that every replacement shows; 100,000 of them over 995 ids."""
    input_ids = np.full((2_000, 512), 2)
    input_ids[:, 0] = np.arange(len(input_ids))  # tells the rows apart
    corrupted, _ = masking.corrupt(input_ids, np.tile(np.arange(1, 512), (len(input_ids), 1)), VOCABULARY, 9, 0)
    drawn = corrupted[:, 1:]
    counts = np.bincount(drawn[(drawn != 2) & (drawn != MASK_ID)], minlength=VOCABULARY_SIZE)
    assert counts.sum() > 100_000
    assert (counts[SPECIAL_IDS] == 0).all()
    assert stats.chisquare(counts[ORDINARY_IDS]).pvalue > MIN_P_VALUE


def test_replacements_do_not_depend_on_which_position_they_stand_at():
    """Lower against upper half of the ids, at even against odd positions."""
    input_ids = np.full((2_000, 64), 2)
    input_ids[:, 0] = np.arange(len(input_ids))
    corrupted, _ = masking.corrupt(input_ids, np.tile(np.arange(1, 64), (len(input_ids), 1)), VOCABULARY, 3, 0)
    rows, columns = np.nonzero((corrupted != 2) & (corrupted != MASK_ID) & (np.arange(64) > 0))
    is_low = corrupted[rows, columns] < np.median(ORDINARY_IDS)
    table = np.histogram2d(columns % 2, is_low, bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > MIN_P_VALUE


@pytest.mark.parametrize("alpha", [0.0, math.inf])
def test_whether_a_position_is_drawn_says_nothing_about_its_corruption(alpha):
    """Positions drawn in epoch 0, corrupted as if all had been: drawn and undrawn ones are masked equally often."""
    rows = 5_000
    input_ids = ORDINARY_IDS[np.random.default_rng(8).integers(0, len(ORDINARY_IDS), (rows, LENGTH))]
    perplexity = np.tile(framed(LAWS["mild"][0]), (rows, 1))
    is_drawn = as_inclusion(masking.draw(perplexity, perplexity, input_ids, alpha, 0, 0), LENGTH)
    corrupted, _ = masking.corrupt(input_ids, np.tile(np.arange(LENGTH), (rows, 1)), VOCABULARY, 0, 0)
    for chosen in (is_drawn, ~is_drawn):
        assert_shares(input_ids[chosen], corrupted[chosen])
