"""The generator: published vectors, uniformity, and independence of whatever should not matter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainer import noise
from trainer.noise import Stream

pytestmark = pytest.mark.filterwarnings("error")

GAMMA = 0x9E3779B97F4A7C15
MIN_P_VALUE = 1e-4  # seeds are fixed; by chance, one such test in 10,000 would fail
MAX_Z = 4.5  # likewise, one in 150,000

words = st.integers(0, 2**64 - 1)
repeatable = settings(derandomize=True, deadline=None, max_examples=50)


def constant_bits(word):
    return lambda keys, stream, count: np.full((len(keys), count), word, dtype=np.uint64)


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_mix_gives_the_published_outputs_of_splitmix64(seed, outputs):
    states = [(seed + n * GAMMA) % 2**64 for n in (1, 2, 3)]
    assert noise.mix(np.array(states, dtype=np.uint64)).tolist() == outputs


@repeatable
@given(st.lists(words, min_size=2, max_size=50, unique=True))
def test_mix_is_injective(distinct):
    assert len(set(noise.mix(np.array(distinct, dtype=np.uint64)).tolist())) == len(distinct)


def test_keys_tell_order_and_number_of_parts_apart():
    parts = [(), (0,), (0, 0), (0, 1), (1, 0), (1,), (1, 1), (-1,), (2**32,), (2**63,)]
    assert len({int(noise.key(*each)[0]) for each in parts}) == len(parts)


@repeatable
@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 1000), st.lists(words, min_size=1, max_size=5))
def test_a_key_is_the_same_alone_and_in_a_batch(seed, epoch, digests):
    batch = noise.key(seed, epoch, np.array(digests, dtype=np.uint64))
    alone = [noise.key(seed, epoch, np.array([digest], dtype=np.uint64))[0] for digest in digests]
    np.testing.assert_array_equal(batch, alone)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64, ">u2"])
def test_digest_ignores_dtype_and_memory_layout(dtype):
    input_ids = np.arange(60, dtype=np.int64).reshape(5, 12) * 1001
    expected = noise.digest(input_ids)
    np.testing.assert_array_equal(noise.digest(input_ids.astype(dtype)), expected)
    np.testing.assert_array_equal(noise.digest(np.asfortranarray(input_ids.astype(dtype))), expected)


def test_digest_tells_apart_rows_that_differ_in_one_id_or_in_order():
    row = np.arange(512)
    changed = np.tile(row, (512, 1))
    np.fill_diagonal(changed, 5000)
    swapped = np.tile(row, (511, 1))
    swapped[np.arange(511), np.arange(511)], swapped[np.arange(511), np.arange(1, 512)] = row[1:], row[:-1]
    assert len(np.unique(noise.digest(np.vstack([row[None], changed, swapped])))) == 1 + 512 + 511


@pytest.mark.parametrize("word", [0, 1, 2**11, 2**63 - 1, 2**63, 2**64 - 2**11 - 1, 2**64 - 2**11, 2**64 - 1])
def test_uniform_stays_inside_the_open_interval_at_the_extremes(monkeypatch, word):
    monkeypatch.setattr(noise, "bits", constant_bits(word))
    value = noise.uniform(np.zeros(1, dtype=np.uint64), Stream.SELECTION, 1)[0, 0]
    assert 0 < value < 1
    assert value == pytest.approx((word + 0.5) / 2**64, rel=0, abs=2.0**-52)


@repeatable
@given(words)
def test_uniform_follows_the_upper_bits(word):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "bits", constant_bits(word))
        value = noise.uniform(np.zeros(1, dtype=np.uint64), Stream.SELECTION, 1)[0, 0]
    assert value == pytest.approx((word + 0.5) / 2**64, rel=0, abs=2.0**-52)


@pytest.mark.parametrize("stream", Stream)
def test_uniform_passes_kolmogorov_smirnov_along_positions_seeds_and_rows(stream):
    along_positions = noise.uniform(noise.key(7), stream, 100_000)
    along_seeds = np.concatenate([noise.uniform(noise.key(seed, 0), stream, 10) for seed in range(10_000)])
    along_rows = noise.uniform(noise.key(7, 0, np.arange(100_000, dtype=np.uint64)), stream, 1)
    for sample in (along_positions, along_seeds, along_rows):
        assert sample.dtype == np.float64
        assert sample.size == 100_000
        assert 0 < sample.min() < sample.max() < 1
        assert stats.kstest(sample.ravel(), "uniform").pvalue > MIN_P_VALUE


@pytest.mark.parametrize(
    "pair",
    [
        "neighbouring positions",
        "consecutive seeds",
        "consecutive epochs",
        "consecutive rows",
        "selection and corruption",
        "corruption and replacement",
    ],
)
def test_noise_of_neighbours_is_uncorrelated(pair):
    """The correlation of n independent pairs has standard deviation 1 / sqrt(n)."""
    keys = noise.key(3, 0, np.arange(1_000, dtype=np.uint64))
    one = noise.uniform(keys, Stream.CORRUPTION, 100)
    other = {
        "neighbouring positions": lambda: noise.uniform(keys, Stream.CORRUPTION, 101)[:, 1:],
        "consecutive seeds": lambda: noise.uniform(
            noise.key(4, 0, np.arange(1_000, dtype=np.uint64)), Stream.CORRUPTION, 100
        ),
        "consecutive epochs": lambda: noise.uniform(
            noise.key(3, 1, np.arange(1_000, dtype=np.uint64)), Stream.CORRUPTION, 100
        ),
        "consecutive rows": lambda: np.roll(one, 1, axis=0),
        "selection and corruption": lambda: noise.uniform(keys, Stream.SELECTION, 100),
        "corruption and replacement": lambda: noise.uniform(keys, Stream.REPLACEMENT, 100),
    }[pair]()
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) * np.sqrt(one.size) < MAX_Z


@repeatable
@given(words, st.integers(1, 2**31))
def test_integers_are_below_their_bound_and_monotone_in_the_bits(word, below):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "bits", constant_bits(word))
        value = noise.integers(np.zeros(1, dtype=np.uint64), Stream.REPLACEMENT, 1, below)
    assert value.dtype == np.int64
    assert value[0, 0] == (word >> 32) * below >> 32 < below


@pytest.mark.parametrize("below", [2, 3, 995, 50_260])
def test_integers_are_uniform(below):
    values = noise.integers(noise.key(1, np.arange(1_000, dtype=np.uint64)), Stream.REPLACEMENT, 500, below)
    assert stats.chisquare(np.bincount(values.ravel(), minlength=below)).pvalue > MIN_P_VALUE


def test_a_longer_row_of_noise_starts_with_the_shorter_one():
    keys = noise.key(1, np.arange(3, dtype=np.uint64))
    np.testing.assert_array_equal(noise.bits(keys, Stream.ORDER, 10), noise.bits(keys, Stream.ORDER, 20)[:, :10])


@repeatable
@given(st.integers(0, 200), st.integers(0, 2**64 - 1), st.integers(0, 100))
def test_permutation_is_a_permutation(length, seed, epoch):
    order = noise.permutation(length, seed, epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(length))


def test_permutation_is_pinned_and_differs_by_each_of_its_parts():
    orders = [noise.permutation(10, *parts).tolist() for parts in [(0, 0), (0, 1), (1, 0)]]
    assert orders == [
        [6, 5, 8, 3, 9, 2, 7, 0, 4, 1],
        [4, 5, 2, 1, 6, 0, 7, 9, 8, 3],
        [6, 5, 3, 7, 2, 0, 8, 4, 9, 1],
    ]


def test_every_order_of_four_is_equally_likely():
    orders = [tuple(noise.permutation(4, seed, 0).tolist()) for seed in range(10_000)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > MIN_P_VALUE
