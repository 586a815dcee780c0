"""`trainer.simulate` says what each alpha would mask: held to loops over the definitions and to exact probabilities.

Seeds are fixed, so every test is deterministic. A bound of 4.5 standard errors would fail by chance once in 150,000
numbers.
"""

import json
import math
import shutil
import statistics
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from scorer.errors import ConfigurationError
from scorer.shards import ShardContent
from trainer import simulate as command
from trainer.block_sample import choose_rows
from trainer.masking import draw
from trainer.reader import RowGroup, ShardCorpus
from trainer.simulation import simulate

pytestmark = pytest.mark.filterwarnings("error:.*encountered in:RuntimeWarning")

MASKED, EPOCHS = 77, 6
MAX_Z = 4.5
DEFAULT_ALPHAS = ["inf", 0.005, 0.001, 0.0005, 0.0001, 0.0]


class MemoryCorpus:
    """What `simulate` needs of a ShardCorpus, over rows in memory: one shard of row groups of 256 blocks."""

    folders = ("memory",)

    def __init__(self, input_ids, forward, backward, vocabulary_size=1000):
        self.vocabulary = SimpleNamespace(size=vocabulary_size)
        self._columns = np.asarray(input_ids, np.uint16), np.float32(forward), np.float32(backward)

    def row_groups(self):
        blocks = len(self._columns[0])
        return [[RowGroup(0, i, 0, min(256, blocks - 256 * i)) for i in range(-(-blocks // 256))]]

    def read(self, group):
        rows = slice(256 * group.index, 256 * group.index + len(group))
        return ShardContent(*(column[rows] for column in self._columns))


def random_ids(blocks, seed=0):
    """Distinct rows, so that each has noise of its own."""
    return np.random.default_rng(seed).integers(10, 999, (blocks, 512))


def framed(rows):
    """[B, 510] perplexities between the frame's zeros."""
    return np.pad(np.asarray(rows, dtype=np.float64), ((0, 0), (1, 1)))


def heavy_tailed_corpus(blocks, seed=0):
    """Separators here and there, two blocks of few eligible tokens, and perplexities over three decades."""
    rng = np.random.default_rng(seed)
    perplexities = [framed(1 + rng.pareto(1.0, (blocks, 510))) for _ in range(2)]
    hidden = rng.random((blocks, 512)) < 0.02
    hidden[1, 61:] = hidden[2, 5:] = True
    return MemoryCorpus(random_ids(blocks), *(np.where(hidden, 0, values) for values in perplexities))


class TestMeasuresAreThoseOfTheDefinitions:
    """Everything again, block by block and position by position; only the draws are the trainer's."""

    alpha, seed, blocks = 0.001, 5, 12

    @pytest.fixture(scope="class")
    def rows(self):
        content = heavy_tailed_corpus(self.blocks).read(RowGroup(0, 0, 0, self.blocks))
        masks = {
            alpha: [
                [{int(p) for p in row if p >= 0} for row in draw(*self._columns(content), alpha, self.seed, epoch)]
                for epoch in range(EPOCHS)
            ]
            for alpha in (self.alpha, math.inf)
        }
        rows = []
        for b in range(self.blocks):
            mean = (content.forward_perplexity[b].astype(float) + content.backward_perplexity[b].astype(float)) / 2
            own, uniform = ([epoch[b] for epoch in masks[alpha]] for alpha in (self.alpha, math.inf))
            rows.append(
                SimpleNamespace(ids=content.input_ids[b].tolist(), mean=mean.tolist(), own=own, uniform=uniform)
            )
        return rows

    @staticmethod
    def _columns(content):
        return content.forward_perplexity, content.backward_perplexity, content.input_ids

    @pytest.fixture(scope="class")
    def found(self):
        return simulate(heavy_tailed_corpus(self.blocks), [self.alpha], 1000, self.seed)

    @pytest.fixture(scope="class")
    def outcome(self, found):
        return found.outcomes[0]

    @staticmethod
    def _decile_counts(row):
        eligible = sorted((p for p in range(512) if row.mean[p] > 0), key=lambda p: row.mean[p])
        counts = [0] * 10
        for rank, position in enumerate(eligible):
            counts[10 * rank // len(eligible)] += sum(position in mask for mask in row.own)
        return [count / EPOCHS for count in counts]

    def test_masked_tokens_per_decile_and_their_standard_errors(self, rows, outcome):
        columns = list(zip(*map(self._decile_counts, rows), strict=True))
        expected = [statistics.fmean(column) for column in columns]
        errors = [statistics.stdev(column) / math.sqrt(len(rows)) for column in columns]
        assert outcome.mean.masked_tokens_per_decile == pytest.approx(expected, rel=1e-9)
        assert outcome.standard_error.masked_tokens_per_decile == pytest.approx(errors, rel=1e-9)

    def test_overlap_with_uniform_masks_of_the_same_epoch(self, rows, outcome):
        shares = [
            sum(len(own & uniform) for own, uniform in zip(row.own, row.uniform, strict=True)) / sum(map(len, row.own))
            for row in rows
        ]
        assert outcome.mean.overlap_with_uniform == pytest.approx(statistics.fmean(shares), rel=1e-9)
        error = statistics.stdev(shares) / math.sqrt(len(rows))
        assert outcome.standard_error.overlap_with_uniform == pytest.approx(error, rel=1e-9)

    def test_share_masked_again_in_the_next_epoch(self, rows, outcome):
        shares = [
            sum(len(row.own[epoch] & row.own[epoch - 1]) / len(row.own[epoch]) for epoch in range(1, EPOCHS))
            for row in rows
        ]
        assert outcome.mean.masked_again == pytest.approx(statistics.fmean(shares) / (EPOCHS - 1), rel=1e-9)

    def test_effective_candidates_are_exp_of_the_entropy_of_eq_4(self, rows, outcome):
        candidates = []
        for row in rows:
            norm = math.fsum(row.mean)
            weights = [mean / norm + self.alpha for mean in row.mean if mean > 0]
            law = [weight / math.fsum(weights) for weight in weights]
            candidates.append(math.exp(-math.fsum(p * math.log(p) for p in law)))
        assert outcome.mean.effective_candidates == pytest.approx(statistics.fmean(candidates), rel=1e-9)

    def test_most_masked_types_with_their_shares_of_own_and_of_uniform_masks(self, rows, found, outcome):
        own, uniform = (
            Counter(row.ids[p] for row in rows for mask in getattr(row, name) for p in mask)
            for name in ("own", "uniform")
        )
        ranked = sorted(own, key=lambda id_: (-own[id_], id_))[:10]
        assert [kind.id for kind in outcome.top_types] == ranked
        assert [kind.share for kind in outcome.top_types] == pytest.approx([own[i] / own.total() for i in ranked])
        expected = [uniform[i] / uniform.total() for i in ranked]
        assert [kind.uniform_share for kind in outcome.top_types] == pytest.approx(expected)
        assert outcome.top_types_share == pytest.approx(sum(own[i] for i in ranked) / own.total())
        most = sum(count for _, count in uniform.most_common(10))
        assert found.uniform_top_types_share == pytest.approx(most / uniform.total())

    def test_eligible_and_masked_tokens_and_the_level_of_chance(self, rows, found):
        eligible = [sum(mean > 0 for mean in row.mean) for row in rows]
        masked = [len(row.own[0]) for row in rows]
        assert sorted(masked)[:3] == sorted([*(n for n in eligible if n < MASKED), MASKED])[:3]
        assert found.blocks == self.blocks
        assert found.eligible_tokens == pytest.approx(statistics.fmean(eligible))
        assert found.masked_tokens == pytest.approx(statistics.fmean(masked))
        chances = [m / n for m, n in zip(masked, eligible, strict=True)]
        assert found.chance_overlap == pytest.approx(statistics.fmean(chances))


def law_of_hard_tokens(weights, sizes, count):
    """P(how many of the last class are drawn) in `count` draws, one after the other, over all paths of class counts."""
    states = {(0,) * len(sizes): 1.0}
    for _ in range(count):
        following = Counter()
        for drawn, probability in states.items():
            left = [w * (size - d) for w, size, d in zip(weights, sizes, drawn, strict=True)]
            total = math.fsum(left)
            for i, weight in enumerate(left):
                if weight:
                    following[*drawn[:i], drawn[i] + 1, *drawn[i + 1 :]] += probability * weight / total
        states = following
    law = Counter()
    for drawn, probability in states.items():
        law[drawn[-1]] += probability
    return law


@pytest.mark.parametrize("alpha", [0.0, 0.001, 0.01, math.inf])
def test_decile_counts_are_those_of_drawing_one_token_after_the_other(alpha):
    """A tenth of the tokens is 40 times as hard as the others: exact mean and variance of what the draws take of it."""
    blocks, easy, hard = 400, 459, 51
    rng = np.random.default_rng(1)
    perplexities = framed(rng.permuted(np.tile([2.0] * easy + [80.0] * hard, (blocks, 1)), axis=1))
    found = simulate(MemoryCorpus(random_ids(blocks), perplexities, perplexities), [alpha], blocks, seed=3)
    norm = 2 * easy + 80 * hard
    weights = (1.0, 1.0) if alpha == math.inf else (2 / norm + alpha, 80 / norm + alpha)
    law = law_of_hard_tokens(weights, (easy, hard), MASKED)
    mean = math.fsum(count * p for count, p in law.items())
    deviation = math.sqrt(math.fsum((count - mean) ** 2 * p for count, p in law.items()) / (blocks * EPOCHS))

    outcome = found.outcomes[0]
    counts = outcome.mean.masked_tokens_per_decile
    assert abs(counts[9] - mean) < MAX_Z * deviation
    assert math.fsum(counts) == pytest.approx(MASKED)
    # Its standard error estimates the true one, with a relative error of 1 / sqrt(2 (blocks - 1)).
    bound = MAX_Z / math.sqrt(2 * (blocks - 1))
    assert outcome.standard_error.masked_tokens_per_decile[9] == pytest.approx(deviation, rel=bound)
    # The easy ones are alike, wherever their deciles are cut: each ninth of them has 51 tokens.
    for count, error in zip(counts[:9], outcome.standard_error.masked_tokens_per_decile, strict=False):
        assert abs(count - (MASKED - mean) / 9) < MAX_Z * error


class TestKnownCases:
    def test_half_of_the_hardness_in_one_token_leaves_two_roots_of_the_others_as_candidates(self):
        """Entropy (ln 2 + ln (2 (n - 1))) / 2, by hand."""
        perplexities = framed([[509.0, *[1.0] * 509]])
        found = simulate(MemoryCorpus(random_ids(1), perplexities, perplexities), [0.0], 1, seed=1)
        assert found.outcomes[0].mean.effective_candidates == pytest.approx(2 * math.sqrt(509))

    def test_equally_hard_tokens_have_the_same_masks_at_every_alpha(self):
        perplexities = framed(np.full((20, 510), 7.0))
        found = simulate(MemoryCorpus(random_ids(20), perplexities, perplexities), [0.0, 0.001, math.inf], 20, seed=1)
        for outcome in found.outcomes:
            assert outcome.mean.overlap_with_uniform == 1
            assert outcome.mean.effective_candidates == pytest.approx(510)
            assert outcome.mean.masked_tokens_per_decile == found.outcomes[0].mean.masked_tokens_per_decile

    def test_uniform_share_is_n_alpha_over_one_plus_n_alpha(self):
        perplexities = framed(np.full((2, 510), 7.0))
        corpus = MemoryCorpus(random_ids(2), perplexities, perplexities)
        found = simulate(corpus, [0.0, 0.001, 0.005, math.inf], 2, seed=1)
        shares = [outcome.mean.uniform_share for outcome in found.outcomes]
        assert shares == pytest.approx([0, 0.51 / 1.51, 2.55 / 3.55, 1])

    def test_where_fewer_than_77_are_eligible_all_of_them_are_masked_every_time(self):
        perplexities = np.zeros((2, 512))
        perplexities[:, 100:105] = 1, 2, 3, 4, 5
        found = simulate(MemoryCorpus(random_ids(2), perplexities, perplexities), [0.001], 2, seed=1)
        mean = found.outcomes[0].mean
        assert mean.masked_tokens_per_decile == (1, 0, 1, 0, 1, 0, 1, 0, 1, 0)  # ranks 0 to 4 of 5
        assert (mean.overlap_with_uniform, mean.masked_again, found.chance_overlap) == (1, 1, 1)
        assert (found.eligible_tokens, found.masked_tokens) == (5, 5)

    def test_a_type_that_is_always_the_hardest_leads_with_all_of_its_tokens(self):
        rng = np.random.default_rng(2)
        ids, perplexities = random_ids(50), framed(1 + rng.random((50, 510)))
        ids[:, 200:220] = 5
        perplexities[:, 200:220] = 1e9
        found = simulate(MemoryCorpus(ids, perplexities, perplexities), [0.0], 50, seed=1)
        first = found.outcomes[0].top_types[0]
        assert (first.id, first.share) == (5, pytest.approx(20 / 77))
        assert first.uniform_share == pytest.approx(20 / 510, rel=0.1)

    def test_pure_hardness_overlaps_with_uniform_masks_more_than_chance_because_noise_is_shared(self):
        outcome = simulate(heavy_tailed_corpus(60), [0.0], 60, seed=1).outcomes[0]
        assert MASKED / 510 + 10 * outcome.standard_error.overlap_with_uniform < outcome.mean.overlap_with_uniform < 0.8

    def test_blocks_without_an_eligible_token_are_left_out(self):
        perplexities = framed(np.full((4, 510), 7.0))
        perplexities[[0, 2]] = 0
        found = simulate(MemoryCorpus(random_ids(4), perplexities, perplexities), [0.0], 4, seed=1)
        assert (found.blocks, found.masked_tokens) == (2, MASKED)

    def test_perplexities_at_the_clamp_overflow_nothing(self):
        perplexities = framed(np.full((3, 510), 1.0))
        perplexities[:, 5] = math.exp(80)
        found = simulate(MemoryCorpus(random_ids(3), perplexities, perplexities), [0.0, 1e-30], 3, seed=1)
        assert found.outcomes[0].mean.effective_candidates == pytest.approx(1)
        assert found.outcomes[0].mean.masked_tokens_per_decile[9] >= 1


class FakeCorpus(SimpleNamespace):
    """Shards of so many blocks, none of which can be read."""

    def row_groups(self):
        return [
            [
                RowGroup(shard, index, 0, min(256, blocks - 256 * index))
                for shard, blocks in enumerate(self.blocks)
                for index in range(-(-blocks // 256))
            ]
        ]


def per_shard(blocks, wanted):
    """How many blocks each shard gives."""
    counts = Counter()
    for group, rows in choose_rows(FakeCorpus(blocks=blocks), wanted).items():
        assert rows[0] >= 0
        assert rows[-1] < len(group)
        assert (np.diff(rows) > 0).all()
        counts[group.shard] += len(rows)
    return counts


class TestSample:
    def test_a_small_corpus_is_taken_whole(self):
        assert per_shard([300, 0, 70, 600], 1024) == {0: 300, 2: 70, 3: 600}
        assert per_shard([1] * 20, 1000) == dict.fromkeys(range(20), 1)

    def test_each_shard_gives_in_proportion_to_its_blocks(self):
        blocks = [430, 437, 178, 3621]
        counts = per_shard(blocks, 1024)
        assert counts.total() == 1024
        for shard, size in enumerate(blocks):
            assert abs(counts[shard] - 1024 * size / sum(blocks)) <= 1

    def test_rows_are_evenly_spaced_from_end_to_end(self):
        chosen = choose_rows(FakeCorpus(blocks=[1000]), 100)
        places = np.concatenate([256 * group.index + rows for group, rows in chosen.items()])
        assert len(places) == 100
        assert set(np.diff(places)) <= set(range(8, 13))
        assert places[0] in range(3, 7)  # as much before the first as after the last
        assert 999 - places[-1] in range(3, 7)

    def test_no_more_than_32_shards_and_128_row_groups_are_touched_of_ten_thousand(self):
        chosen = choose_rows(FakeCorpus(blocks=[1500] * 10_000), 1024)
        shards = sorted({group.shard for group in chosen})
        assert len(shards) == 32
        assert set(np.diff(shards)) <= {312, 313}
        assert len(chosen) <= 128
        assert sum(map(len, chosen.values())) == 1024

    def test_no_more_than_128_row_groups_are_touched_of_one_shard(self):
        chosen = choose_rows(FakeCorpus(blocks=[1_000_000]), 1024)
        assert len(chosen) == 128
        assert sum(map(len, chosen.values())) == 1024

    def test_a_shard_that_is_most_of_the_corpus_is_most_of_the_sample(self):
        counts = per_shard([100] * 60 + [60_000] + [100] * 60, 1024)
        assert counts[60] / counts.total() == pytest.approx(60_000 / 72_000, abs=1 / 32)
        assert len(counts) <= 32

    def test_shards_without_blocks_are_never_touched(self):
        assert set(per_shard([0, 8] * 100, 50)) <= set(range(1, 200, 2))

    def test_the_sample_is_the_same_each_time(self):
        first, second = (choose_rows(FakeCorpus(blocks=[900] * 50), 300) for _ in range(2))
        assert {group: rows.tolist() for group, rows in first.items()} == {
            group: rows.tolist() for group, rows in second.items()
        }


@pytest.fixture(scope="module")
def shards(write_shards, tokenizer_folder, synthetic_vocabulary):
    """Makes folders of scored shards with their tokenizer: shards([30, 40])."""

    def make(blocks, **options):
        folder = write_shards(blocks, vocabulary=synthetic_vocabulary(500), **options)
        shutil.copytree(tokenizer_folder, folder / "tokenizer")
        return folder

    return make


@pytest.fixture(scope="module")
def folder(shards):
    return shards([30, 0, 20])


@pytest.fixture
def run(capsys):
    """Runs the command and returns what it prints."""

    def run(*arguments):
        capsys.readouterr()
        assert command.main([*map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


class TestJson:
    def test_is_one_object_and_nothing_else(self, run, folder):
        printed = json.loads(run("--shards", folder, "--json"))
        assert printed["shards"] == [str(folder)]
        assert (printed["corpus_shards"], printed["sampled_shards"]) == (3, 2)
        assert (printed["corpus_blocks"], printed["sampled_blocks"]) == (50, 50)
        assert (printed["seed"], printed["epochs"]) == (42, EPOCHS)
        assert printed["masked_tokens"] == MASKED
        assert [row["alpha"] for row in printed["alphas"]] == DEFAULT_ALPHAS
        for row in printed["alphas"]:
            assert len(row["masked_tokens_per_decile"]) == 10
            assert sum(row["masked_tokens_per_decile"]) == pytest.approx(MASKED)
            assert len(row["top_types"]) == 10
            assert row["standard_error"]["effective_candidates"] < row["effective_candidates"]

    def test_token_types_are_decoded_with_the_tokenizer_beside_the_shards(self, run, folder, tokenizer_folder):
        vocabulary = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]["vocab"]
        spelled = {id_: token.replace("Ġ", " ") for token, id_ in vocabulary.items() if token.strip("Ġ").isascii()}
        printed = json.loads(run("--shards", folder, "--json"))
        kinds = [kind for row in printed["alphas"] for kind in row["top_types"] if kind["id"] in spelled]
        assert len(kinds) > 20
        for kind in kinds:
            assert kind["token"] == spelled[kind["id"]]

    def test_is_the_same_each_time_and_another_with_another_seed(self, run, folder):
        first, second, other = (run("--shards", folder, "--json", "--seed", seed) for seed in (1, 1, 2))
        assert first == second != other

    def test_an_alphas_numbers_do_not_depend_on_the_others(self, run, folder):
        together = json.loads(run("--shards", folder, "--json", "--alphas", 0, "inf", 0.01))["alphas"]
        for row in together:
            alone = json.loads(run("--shards", folder, "--json", "--alphas", row["alpha"]))["alphas"]
            assert alone == [row]

    def test_an_alpha_given_twice_is_there_once(self, run, folder):
        printed = json.loads(run("--shards", folder, "--json", "--alphas", 0.001, "inf", "1e-3", "inf"))
        assert [row["alpha"] for row in printed["alphas"]] == [0.001, "inf"]

    def test_several_folders_are_one_corpus(self, run, shards, folder):
        other = shards([25], first=7)
        printed = json.loads(run("--shards", folder, other, "--json"))
        assert printed["shards"] == [str(folder), str(other)]
        assert (printed["corpus_shards"], printed["corpus_blocks"], printed["sampled_blocks"]) == (4, 75, 75)

    def test_standard_errors_of_one_block_are_null(self, run, folder):
        printed = json.loads(run("--shards", folder, "--json", "--blocks", 1))
        assert printed["sampled_blocks"] == 1
        assert [row["standard_error"] for row in printed["alphas"]] == [None] * 6


class TestTable:
    def test_has_the_numbers_of_the_json_in_100_columns(self, run, folder, monkeypatch):
        monkeypatch.setenv("COLUMNS", "60")
        printed = json.loads(run("--shards", folder, "--json"))
        lines = run("--shards", folder).splitlines()
        assert max(map(len, lines)) <= 100
        assert "50 of 50 blocks" in lines[0]
        for row in printed["alphas"]:
            name = row["alpha"] if row["alpha"] == "inf" else f"{row['alpha']:g}"
            measures, types = (line.split() for line in lines[2:] if line.split()[:1] == [name])
            counts = [f"{count:.1f}" for count in row["masked_tokens_per_decile"]]
            shares = [row["uniform_share"], row["overlap_with_uniform"], row["masked_again"]]
            percents = [part for share in shares for part in (f"{100 * share:.1f}", "%")]
            assert measures == [name, *counts, *percents, f"{row['effective_candidates']:.0f}"]
            uniform = sum(kind["uniform_share"] for kind in row["top_types"])
            assert types[1:5] == [f"{100 * row['top_types_share']:.1f}", "%", f"{100 * uniform:.1f}", "%"]
            assert json.dumps(row["top_types"][0]["token"], ensure_ascii=False) in " ".join(types[5:])

    def test_says_what_columns_mean_what_chance_gives_and_how_exact_it_is(self, run, folder):
        printed = run("--shards", folder)
        chance = json.loads(run("--shards", folder, "--json"))["chance_overlap"]
        for word in ("decile", "n alpha / (1 + n alpha)", f"chance {100 * chance:.1f} %", "exp(entropy", "Too low"):
            assert word in printed
        assert "standard errors" in printed
        assert "unknown, of one block" in run("--shards", folder, "--blocks", 1)

    def test_tokens_that_look_like_markup_are_shown_as_they_are(self, run, folder, monkeypatch):
        monkeypatch.setattr(command, "_spell", lambda tokenizer, id_: "[bold]")
        assert '"[bold]" "[bold]"' in run("--shards", folder)


class TestPlot:
    def test_writes_a_png_beside_the_table_without_pyplot(self, run, folder, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # whose import then fails
        path = tmp_path / "new" / "alphas.png"
        assert "Too low" in run("--shards", folder, "--plot", path)
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.stat().st_size > 10_000
        assert [child.name for child in path.parent.iterdir()] == ["alphas.png"]

    def test_goes_with_json_and_with_a_single_alpha(self, run, folder, tmp_path):
        path = tmp_path / "one.png"
        assert json.loads(run("--shards", folder, "--plot", path, "--json", "--alphas", 0))
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_matplotlib_is_not_imported_without_it(self, run, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "trainer.simulation_plot", None)
        assert run("--shards", folder)


def test_hashes_no_more_than_32_shards(run, shards, monkeypatch):
    folder, touched = shards([2] * 40), set()
    opened = ShardCorpus.open
    monkeypatch.setattr(ShardCorpus, "open", lambda self, shard: touched.add(shard) or opened(self, shard))
    printed = json.loads(run("--shards", folder, "--json"))
    assert len(touched) == printed["sampled_shards"] == 32
    assert (printed["corpus_shards"], printed["sampled_blocks"]) == (40, 64)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alphas", "-0.1"], "alpha = -0.1"),
        (["--alphas", "0", "nan"], "alpha = nan"),
        (["--alphas", "much"], "much"),
        (["--alphas"], "--alphas"),
        (["--blocks", "0"], "0 blocks to sample"),
        (["--blocks", "-5"], "-5 blocks to sample"),
        (["--plot", "alphas.jpg"], "alphas.jpg: expected the name of a PNG file"),
        (["--alpha", "1"], "--alpha"),
    ],
)
def test_wrong_flags_exit_2_and_say_why(run_in_process, folder, flags, message):
    code, printed, error = run_in_process(command.main, "--shards", folder, "--json", *flags)
    assert code == 2
    assert printed == ""
    assert message in error


class TestWrongFolders:
    """Each is named, and with it the way out."""

    @pytest.fixture
    def refused(self, run_in_process):
        def refused(folder):
            code, printed, error = run_in_process(command.main, "--shards", folder, "--json")
            assert (code, printed) == (2, "")
            assert str(folder) in error
            assert "Traceback" not in error
            return error

        return refused

    def test_one_that_is_not_there(self, refused, tmp_path):
        assert "there is no folder" in refused(tmp_path / "nowhere")

    def test_one_without_a_manifest(self, refused, tmp_path):
        assert "run the command that writes them again" in refused(tmp_path)

    def test_one_of_block_shards_without_perplexities(self, refused, shards):
        assert "score them with pipeline.score_corpus first" in refused(shards([4], scored=False))

    def test_one_without_the_tokenizer(self, refused, write_shards):
        assert "has no folder tokenizer" in refused(write_shards([4]))

    def test_one_of_no_blocks(self, refused, shards):
        assert "no eligible token in 0 sampled blocks" in refused(shards([0, 0]))


def test_a_relative_folder_without_a_tokenizer_is_not_looked_up_on_a_hub(write_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    write_shards([4], folder=tmp_path / "shards")
    monkeypatch.setattr(command, "load_tokenizer", lambda _: pytest.fail("looked up"))
    with pytest.raises(ConfigurationError, match="shards has no folder tokenizer"):
        command.main(["--shards", "shards"])


def test_blocks_of_special_tokens_alone_have_nothing_to_mask():
    nothing = np.zeros((3, 512))
    with pytest.raises(ConfigurationError, match="no eligible token in 3 sampled blocks"):
        simulate(MemoryCorpus(random_ids(3), nothing, nothing), [0.0], 3, seed=1)


def test_progress_ends_with_the_whole_sample():
    perplexities = framed(np.full((600, 510), 7.0))
    seen = []
    corpus = MemoryCorpus(random_ids(600), perplexities, perplexities)
    simulate(corpus, [0.0], 600, 1, lambda *progress: seen.append(progress))
    assert seen == [(256, 600), (512, 600), (600, 600)]
