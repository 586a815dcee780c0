"""The flags that say how a run masks, alpha over a run, and that replay shows what a run with these flags masks."""

import dataclasses
import itertools
import json
import math
import random
import shutil

import numpy as np
import pytest

from scorer.errors import ConfigurationError
from scorer.tokenizer import load_tokenizer
from tests.trainer.test_masking import as_features, example_rows, vocabulary
from trainer import replay
from trainer.batches import Batch
from trainer.masking import STRATEGIES, AlphaSchedule, HardnessCollator, Masking, Ngrams, Words
from trainer.masking.arguments import MaskingArguments
from trainer.reader import open_corpus
from trainer.stream import TrainingStream

ALPHA = {"alpha", "relative_alpha", "alpha_schedule", "alpha_end"}
TAKES = {
    "hardness": {*ALPHA, "hardness"},
    "random": set(),
    "topk": {"hardness"},
    "whole-word": set(),
    "hardness-whole-word": {*ALPHA, "hardness"},
    "span": set(),
    "pmi": {"pmi_ngrams"},
}
"""Which settings say anything to a strategy."""

OTHER = {
    "masking_strategy": "hardness-whole-word",
    "alpha": 0.5,
    "relative_alpha": True,
    "alpha_schedule": "cosine",
    "alpha_end": 0.1,
    "hardness": "geometric",
    "pmi_ngrams": "list.txt",
}
"""A value of each setting that is not its default."""

takes_alpha = pytest.mark.parametrize("strategy", [name for name in TAKES if "alpha" in TAKES[name]])


def needs(strategy):
    """What a strategy cannot do without."""
    return {"pmi_ngrams": "list.txt"} if strategy == "pmi" else {}


class TestMaskingArguments:
    def test_know_every_strategy(self):
        assert TAKES.keys() == STRATEGIES.keys()
        assert OTHER.keys() == {field.name for field in dataclasses.fields(MaskingArguments)}

    def test_are_the_papers_by_default(self):
        arguments = MaskingArguments()
        assert arguments.masking(None) == Masking("hardness", hardness="arithmetic", relative_alpha=False)
        assert arguments.schedule(100) == AlphaSchedule(0.001, None, 100, "constant")

    @pytest.mark.parametrize("strategy", TAKES)
    def test_are_complete_with_what_the_strategy_needs(self, strategy):
        assert MaskingArguments(masking_strategy=strategy, **needs(strategy)).masking_strategy == strategy

    @pytest.mark.parametrize(
        ("strategy", "setting"),
        [(name, setting) for name, taken in TAKES.items() for setting in OTHER if setting in taken],
    )
    def test_take_what_the_strategy_takes(self, strategy, setting):
        more = {"alpha_schedule": {"alpha_end": 0.1}, "alpha_end": {"alpha_schedule": "linear"}}.get(setting, {})
        given = {**needs(strategy), setting: OTHER[setting], **more}
        assert getattr(MaskingArguments(masking_strategy=strategy, **given), setting) == OTHER[setting]

    @pytest.mark.parametrize(
        ("strategy", "setting"),
        [
            (name, setting)
            for name, taken in TAKES.items()
            for setting in OTHER
            if setting not in taken and setting != "masking_strategy"
        ],
    )
    def test_refuse_what_the_strategy_would_ignore_and_name_flag_and_way_out(self, strategy, setting):
        with pytest.raises(ConfigurationError) as error:
            MaskingArguments(masking_strategy=strategy, **{**needs(strategy), setting: OTHER[setting]})
        assert f"--masking_strategy {strategy} takes no --{setting}: leave it out" in str(error.value)
        assert "hardness and hardness-whole-word" in str(error.value)

    def test_refuse_an_ignored_alpha_even_if_it_is_the_default_one(self):
        with pytest.raises(ConfigurationError, match="takes no --alpha:"):
            MaskingArguments(masking_strategy="random", alpha=0.001)

    def test_name_all_ignored_flags_at_once(self):
        given = {setting: OTHER[setting] for setting in (*ALPHA, "hardness", "pmi_ngrams")}
        flags = "--alpha, --relative_alpha, --alpha_schedule, --alpha_end, --hardness, --pmi_ngrams"
        with pytest.raises(ConfigurationError, match=f"takes no {flags}: "):
            MaskingArguments(masking_strategy="whole-word", **given)

    def test_refuse_pmi_without_a_list(self):
        with pytest.raises(ConfigurationError, match=r"--masking_strategy pmi needs --pmi_ngrams FILE"):
            MaskingArguments(masking_strategy="pmi")

    @takes_alpha
    @pytest.mark.parametrize(
        ("given", "why"),
        [
            ({"alpha": -0.1}, "alpha = -0.1"),
            ({"alpha": math.nan}, "alpha = nan"),
            ({"alpha_end": 0.1}, "--alpha_end 0.1 needs --alpha_schedule linear or cosine"),
            ({"alpha_schedule": "linear"}, "--alpha_schedule linear needs --alpha_end"),
            ({"alpha_schedule": "cosine", "alpha_end": -1.0}, "alpha = -1.0"),
            ({"alpha_schedule": "cosine", "alpha_end": math.nan}, "alpha = nan"),
            ({"alpha_schedule": "linear", "alpha_end": math.inf}, "no way to or from inf"),
            ({"alpha": math.inf, "alpha_schedule": "cosine", "alpha_end": 0.1}, "no way to or from inf"),
        ],
    )
    def test_refuse_an_alpha_that_eq_4_or_the_schedule_is_not_defined_for(self, strategy, given, why):
        with pytest.raises(ConfigurationError) as error:
            MaskingArguments(masking_strategy=strategy, **given)
        assert why in str(error.value)

    @pytest.mark.parametrize("setting", ["masking_strategy", "hardness"])
    def test_refuse_a_name_that_no_entry_has_and_list_those_that_are(self, setting):
        with pytest.raises(ConfigurationError, match=r"'unheard-of': expected one of \w+"):
            MaskingArguments(**{setting: "unheard-of"}).masking(None)

    @pytest.mark.parametrize(
        ("given", "title"),
        [
            ({}, "hardness, alpha = 0.001"),
            ({"alpha": math.inf}, "hardness, alpha = inf"),
            ({"masking_strategy": "span"}, "span"),
            (
                {"alpha": 0.0, "alpha_end": 0.005, "alpha_schedule": "linear", "relative_alpha": True},
                "hardness, alpha = 0.0 to 0.005 (linear) over n",
            ),
        ],
    )
    def test_have_a_title(self, given, title):
        assert MaskingArguments(**given).title() == title

    @pytest.mark.parametrize("strategy", TAKES)
    def test_make_the_masking_that_they_name(self, strategy, tmp_path, tokenizer_folder):
        (tmp_path / "list.txt").write_text("los angeles\n")
        given = {setting: value for setting, value in OTHER.items() if setting in TAKES[strategy]}
        if strategy == "pmi":
            given["pmi_ngrams"] = str(tmp_path / "list.txt")
        arguments = MaskingArguments(masking_strategy=strategy, **given)
        masking = arguments.masking(load_tokenizer(str(tokenizer_folder)))
        assert masking.strategy == strategy
        assert masking.hardness == given.get("hardness", "arithmetic")
        assert masking.relative_alpha == given.get("relative_alpha", False)
        assert arguments.needs_tokenizer == (strategy in {"whole-word", "hardness-whole-word", "span", "pmi"})
        assert (masking.words is not None) == arguments.needs_tokenizer
        assert (masking.ngrams is not None) == (strategy == "pmi")


class TestIdentity:
    """What two runs must share to be masked alike; a checkpoint of another run is refused."""

    def test_changes_with_every_setting(self, tmp_path):
        for name, content in [("one", "los angeles\n"), ("two", "los angeles\nhong kong\n")]:
            (tmp_path / name).write_text(content)
        way = {"alpha_schedule": "linear", "alpha_end": 0.1}
        changes = {
            "masking_strategy": [{"masking_strategy": strategy} for strategy in TAKES if strategy != "pmi"],
            "alpha": [{"alpha": alpha} for alpha in (0.0, 0.0011, 0.1 + 0.2, 0.3, math.inf)],
            "relative_alpha": [{"relative_alpha": True}],
            "alpha_schedule": [way, way | {"alpha_schedule": "cosine"}],
            "alpha_end": [way | {"alpha_end": 0.11}],
            "hardness": [{"hardness": of} for of in ("geometric", "forward", "backward")],
            "pmi_ngrams": [{"masking_strategy": "pmi", "pmi_ngrams": str(tmp_path / name)} for name in ("one", "two")],
        }
        assert changes.keys() == OTHER.keys()
        given = [{}, *(change for of_setting in changes.values() for change in of_setting if change != {})]
        identities = [json.dumps(MaskingArguments(**change).identity(), sort_keys=True) for change in given]
        alike = [(a, b) for i, a in enumerate(given) for j, b in enumerate(given[:i]) if identities[i] == identities[j]]
        assert alike == [({"masking_strategy": "hardness"}, {})]

    def test_changes_with_nothing_else(self, tmp_path):
        for name in ("one", "two"):
            (tmp_path / name).write_text("los angeles\n")
        one, two = (
            MaskingArguments(masking_strategy="pmi", pmi_ngrams=str(tmp_path / name)).identity()
            for name in ("one", "two")
        )
        assert one == two
        assert MaskingArguments().identity() == MaskingArguments(alpha=0.001).identity()
        assert set(one) == set(OTHER)

    def test_is_the_same_after_a_way_through_json(self):
        for alpha in (0.0, 0.1 + 0.2, math.inf):
            identity = MaskingArguments(alpha=alpha).identity()
            assert json.loads(json.dumps(identity, allow_nan=False)) == identity


class TestAlphaSchedule:
    def test_a_constant_is_the_same_at_every_step(self):
        assert [AlphaSchedule(0.005, steps=10).at(step) for step in (0, 5, 9, 1000)] == [0.005] * 4
        assert AlphaSchedule(math.inf).at(3) == math.inf

    @pytest.mark.parametrize(("start", "end"), [(0.0, 0.005), (0.1, 0.001), (1.0, 1.0)])
    @pytest.mark.parametrize(
        ("shape", "share"),
        [
            ("linear", lambda step: step / 100),
            ("cosine", lambda step: 0.5 - 0.5 * math.cos(math.pi * step / 100)),
        ],
    )
    def test_goes_from_start_to_end_at_the_last_step(self, shape, share, start, end):
        schedule = AlphaSchedule(start, end, 101, shape)
        assert schedule.at(0) == start
        assert schedule.at(50) == pytest.approx((start + end) / 2, rel=1e-12)
        assert schedule.at(100) == pytest.approx(end, rel=1e-12)
        for step in range(101):
            assert schedule.at(step) == pytest.approx(start + (end - start) * share(step), rel=1e-12)

    def test_cosine_is_flat_at_both_ends_and_steepest_in_the_middle(self):
        linear, cosine = (AlphaSchedule(0.0, 1.0, 101, shape) for shape in ("linear", "cosine"))
        assert cosine.at(1) < 0.03 * linear.at(1)
        assert 1 - cosine.at(99) < 0.03 * (1 - linear.at(99))
        assert cosine.at(51) - cosine.at(50) == pytest.approx(math.pi / 200, rel=1e-3)

    @pytest.mark.parametrize("shape", ["linear", "cosine"])
    def test_stays_at_the_end_after_the_last_step(self, shape):
        schedule = AlphaSchedule(0.1, 0.001, 11, shape)
        assert [schedule.at(step) for step in (10, 11, 10**6)] == [schedule.at(10)] * 3

    @pytest.mark.parametrize("shape", ["linear", "cosine"])
    def test_of_one_step_is_its_start(self, shape):
        assert AlphaSchedule(0.1, 0.001, 1, shape).at(0) == 0.1

    def test_refuses_a_shape_that_is_none(self):
        with pytest.raises(ConfigurationError, match="exponential"):
            AlphaSchedule(0.1, 0.001, 10, "exponential")

    @pytest.mark.parametrize(
        "given",
        [
            (0.1, 0.001, 10, "constant"),
            (0.1, None, 10, "linear"),
            (0.1, None, 10, "cosine"),
            (math.inf, 0.1, 10, "linear"),
            (0.1, math.inf, 10, "cosine"),
            (-0.1, 0.1, 10, "linear"),
            (0.1, -0.1, 10, "linear"),
            (math.nan, 0.1, 10, "cosine"),
            (0.1, math.nan, 10, "cosine"),
        ],
    )
    def test_refuses_ends_without_a_way_between_them(self, given):
        with pytest.raises(ConfigurationError, match="alpha"):
            AlphaSchedule(*given)


class TestCollatorWithASchedule:
    SCHEDULE = AlphaSchedule(0.0, 0.1, 50, "cosine")

    def test_masks_each_row_of_a_batch_by_the_alpha_of_its_own_step(self):
        rows = example_rows(rows=9)
        steps, epochs = [49, 0, 25, 0, 49, 13, 25, 1, 80], [0, 1, 0, 0, 1, 2, 0, 0, 0]
        features = [
            feature | {"step": step, "epoch": epoch}
            for feature, step, epoch in zip(as_features(*rows), steps, epochs, strict=True)
        ]
        together = HardnessCollator(vocabulary(), self.SCHEDULE, seed=5).mask(Batch.of(features))
        for row, (feature, step) in enumerate(zip(features, steps, strict=True)):
            alone = HardnessCollator(vocabulary(), self.SCHEDULE.at(step), seed=5).mask(Batch.of([feature]))
            for field in dataclasses.fields(together):
                np.testing.assert_array_equal(getattr(together, field.name)[row], getattr(alone, field.name)[0])

    def test_has_another_mask_at_another_step_and_the_noise_of_a_constant_alpha(self):
        """Masks of step s are those of alpha = schedule.at(s), whatever the schedule, seed and epoch being equal."""
        rows = example_rows(rows=10, length=256)
        masks = []
        for step in (0, 10, 40):
            features = as_features(*rows, epoch=3, step=step)
            scheduled = HardnessCollator(vocabulary(), self.SCHEDULE, seed=5)(features)
            constant = HardnessCollator(vocabulary(), self.SCHEDULE.at(step), seed=5)(as_features(*rows, epoch=3))
            for name in ("input_ids", "labels"):
                np.testing.assert_array_equal(scheduled[name].numpy(), constant[name].numpy())
            masks.append(scheduled["labels"].numpy() >= 0)
        assert masks[0].sum() == masks[1].sum() == masks[2].sum() == 10 * round(0.15 * 256)
        shared = [(masks[i] & masks[j]).sum() for i, j in ((0, 1), (1, 2), (0, 2))]
        assert shared[2] < min(shared[:2]) < masks[0].sum()  # common noise: the nearer the alphas, the more

    def test_takes_a_row_without_step_for_one_of_the_first(self):
        rows = example_rows()
        collate = HardnessCollator(vocabulary(), self.SCHEDULE)
        np.testing.assert_array_equal(
            collate(as_features(*rows))["labels"].numpy(), collate(as_features(*rows, step=0))["labels"].numpy()
        )

    def test_changes_nothing_for_a_strategy_that_takes_no_alpha(self):
        rows = example_rows()
        collate = HardnessCollator(vocabulary(), self.SCHEDULE, masking=Masking("random"))
        one, other = (collate(as_features(*rows, step=step))["labels"].numpy() for step in (0, 40))
        np.testing.assert_array_equal(one, other)


STEPS, BATCH, SEED = 6, 4, 7


@pytest.fixture(scope="module")
def shards(write_shards, synthetic_vocabulary, tokenizer_folder):
    """Blocks of random tokens of the small tokenizer, half of them held out, and the tokenizer in its place."""
    folder = write_shards([4, 20], vocabulary=synthetic_vocabulary(500))
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def ngram_list(shards, tokenizer_folder, tmp_path_factory):
    """Every second pair of neighbouring words in the blocks that letters alone spell."""
    words = Words.of(load_tokenizer(str(tokenizer_folder)))
    corpus, _, _ = open_corpus([str(shards)], None, perplexities=True)
    pairs = set()
    for shard in range(2):
        with corpus.open(shard) as reader:
            for row in reader.read().input_ids.tolist():
                found = words.split(row)
                pairs |= {" ".join(pair) for pair in itertools.pairwise(found)}
    lines = sorted(
        pair for pair in pairs if pair.replace(" ", "").isalpha() and pair.isascii() and pair.count(" ") == 1
    )
    assert len(lines) > 50
    path = tmp_path_factory.mktemp("ngrams") / "list.txt"
    path.write_text("\n".join(random.Random(0).sample(lines, len(lines) // 2)) + "\n")
    return path


def as_flags(strategy, ngram_list, **given):
    """MaskingArguments' settings as a command line has them."""
    given |= {"pmi_ngrams": str(ngram_list)} if strategy == "pmi" else {}
    flags = [f"--{name}={value}" for name, value in given.items() if value is not True]
    return ["--masking_strategy", strategy, *flags, *(f"--{name}" for name, value in given.items() if value is True)]


class TestReplay:
    @pytest.fixture
    def lines(self, capsys, shards):
        """Runs the command with --json over both epochs of a shard's rows: {(epoch, row): line}."""

        def run(*flags):
            capsys.readouterr()
            common = ["--shards", str(shards), "--seed", str(SEED), "--shard", "1", "--rows", "0:20", "--epochs", "0:2"]
            assert replay.main([*common, "--json", *map(str, flags)]) == 0
            printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            return {(line["epoch"], line["row"]): line for line in printed}

        return run

    @pytest.mark.parametrize(
        "case",
        [
            ("hardness", {}, 0.001),
            ("hardness", {"alpha": "inf"}, "inf"),
            ("hardness", {"alpha": 0.3, "relative_alpha": True, "hardness": "geometric"}, 0.3),
            ("random", {}, None),
            ("topk", {"hardness": "forward"}, None),
            ("whole-word", {}, None),
            ("hardness-whole-word", {"alpha": 0.05, "hardness": "backward"}, 0.05),
            ("span", {}, None),
            ("pmi", {}, None),
        ],
    )
    def test_shows_what_a_run_with_the_same_flags_masks(self, lines, shards, ngram_list, case):
        """Held to Masking itself, made by hand, over the blocks as a run reads them."""
        strategy, given, alpha = case
        printed = lines(*as_flags(strategy, ngram_list, **given))
        corpus, groups, _ = open_corpus([str(shards)], None, perplexities=True)
        tokenizer = load_tokenizer(str(shards / "tokenizer"))
        words = Words.of(tokenizer)
        masking = Masking(
            strategy,
            given.get("hardness", "arithmetic"),
            given.get("relative_alpha", False),
            words,
            Ngrams.read(str(ngram_list), tokenizer, words),
        )
        collator = HardnessCollator(corpus.vocabulary, float(alpha or 0), SEED, masking, at_positions=True)
        stream = TrainingStream(corpus, groups, BATCH, STEPS, SEED)
        met = set()
        for start in range(0, len(stream), BATCH):
            features = stream.__getitems__(range(start, start + BATCH))
            masked = collator.mask(features)
            for i, feature in enumerate(features):
                shard, row = stream.origin(start + i)
                if shard == 1:
                    line = printed[int(feature["epoch"]), row]
                    assert list(line) == ["epoch", "shard", "row", "alpha", "masked_positions", "input_ids"]
                    assert line["alpha"] == alpha
                    assert line["masked_positions"] == masked.positions[i][masked.is_valid[i]].tolist()
                    assert line["input_ids"] == masked.input_ids[i].tolist()
                    met.add((int(feature["epoch"]), row))
        assert len(met) >= 10

    def test_shows_different_masks_for_every_strategy(self, lines, ngram_list):
        masks = {
            strategy: [line["masked_positions"] for line in lines(*as_flags(strategy, ngram_list)).values()]
            for strategy in TAKES
        }
        for strategy, of_strategy in masks.items():
            assert masks.keys() - {strategy} == {other for other in masks if masks[other] != of_strategy}

    @takes_alpha
    @pytest.mark.parametrize("shape", ["linear", "cosine"])
    def test_of_a_schedule_shows_the_masks_of_a_step(self, lines, shards, strategy, shape):
        """A run reads its alpha from the steps of the stream; replay from --step and --max_steps."""
        flags = ["--masking_strategy", strategy, "--alpha", 0.0, "--alpha_end", 0.2, "--alpha_schedule", shape]
        corpus, groups, _ = open_corpus([str(shards)], None, perplexities=True)
        arguments = MaskingArguments(masking_strategy=strategy, alpha=0.0, alpha_end=0.2, alpha_schedule=shape)
        masking = arguments.masking(load_tokenizer(str(shards / "tokenizer")))
        collator = HardnessCollator(corpus.vocabulary, arguments.schedule(STEPS), SEED, masking)
        stream = TrainingStream(corpus, groups, BATCH, STEPS, SEED)
        alphas = []
        for step in (0, 2, STEPS - 1):
            printed = lines(*flags, "--step", step, "--max_steps", STEPS)
            share = step / (STEPS - 1)
            share = share if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * share)
            (alpha,) = {line["alpha"] for line in printed.values()}
            assert alpha == pytest.approx(0.2 * share, rel=1e-12)
            masked = collator.mask(stream.__getitems__(range(step * BATCH, (step + 1) * BATCH)))
            for i in range(BATCH):
                shard, row = stream.origin(step * BATCH + i)
                if shard == 1:
                    line = printed[step * BATCH // (stream.steps_per_epoch * BATCH), row]
                    assert line["masked_positions"] == masked.positions[i][masked.is_valid[i]].tolist()
                    alphas.append(alpha)
        assert len(set(alphas)) == 3

    @pytest.mark.parametrize("given", [[], ["--step", "1"], ["--max_steps", "10"]])
    def test_of_a_schedule_needs_the_step_and_the_steps_of_the_run(self, run_in_process, shards, given):
        flags = ["--shards", shards, "--alpha_schedule", "linear", "--alpha_end", "0.1", "--json", *given]
        code, printed, error = run_in_process(replay.main, *flags)
        assert (code, printed) == (2, "")
        assert "pass --step (from 0) and the run's --max_steps" in error

    @pytest.mark.parametrize(
        ("flags", "why"),
        [
            (["--masking_strategy", "span", "--alpha", "0.1"], "--masking_strategy span takes no --alpha"),
            (["--masking_strategy", "pmi"], "--pmi_ngrams FILE"),
            (["--masking_strategy", "pmi", "--pmi_ngrams", "/nowhere/list.txt"], "no n-gram list at /nowhere/list.txt"),
            (["--masking_strategy", "spans"], "whole-word"),
            (["--hardness", "harmonic"], "geometric"),
            (["--alpha_schedule", "exponential", "--alpha_end", "0.1"], "cosine"),
            (["--alpha_end", "0.1"], "--alpha_schedule linear or cosine"),
        ],
    )
    def test_of_flags_that_say_nothing_exits_2_and_says_why(self, run_in_process, shards, flags, why):
        code, printed, error = run_in_process(replay.main, "--shards", shards, *flags, "--json")
        assert (code, printed) == (2, "")
        assert why in error

    def test_as_text_names_the_strategy(self, capsys, shards):
        assert replay.main(["--shards", str(shards), "--masking_strategy", "whole-word"]) == 0
        printed = capsys.readouterr().out
        assert "epoch 0, shard 0, row 0: 7" in printed
        assert " positions, whole-word\n" in printed

    def test_needs_the_tokenizer_for_words_alone(self, run_in_process, write_shards):
        folder = write_shards([1])
        assert run_in_process(replay.main, "--shards", folder, "--json")[0] == 0
        code, _, error = run_in_process(replay.main, "--shards", folder, "--masking_strategy", "span", "--json")
        assert code == 2
        assert f"{folder}/tokenizer" in error
