"""`trainer.replay` says from outside a run what it masks: held to what the stream and the collator give the model."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from scorer.errors import ConfigurationError
from trainer import replay
from trainer.masking import HardnessCollator
from trainer.reader import ShardCorpus, open_corpus
from trainer.stream import TrainingStream

KEYS = {"epoch", "shard", "row", "alpha", "masked_positions", "input_ids"}


@pytest.fixture
def lines(capsys):
    """Runs the command with --json and parses what it prints."""

    def run(*arguments):
        capsys.readouterr()
        assert replay.main([*map(str, arguments), "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture(scope="module")
def two_shards(hardness_folder):
    """Ids of the first two shards, read by pyarrow."""
    names = [entry["name"] for entry in json.loads((hardness_folder / "_manifest.json").read_text())["shards"]]
    return [np.array(pq.read_table(hardness_folder / name)["input_ids"].to_pylist()) for name in names[:2]]


def test_prints_a_json_line_for_each_epoch_and_row(lines, hardness_folder):
    printed = lines("--shards", hardness_folder, "--alpha", 0.001, "--seed", 1, "--epochs", "1:3", "--rows", "5:8")
    assert [(line["epoch"], line["row"]) for line in printed] == [(e, r) for e in (1, 2) for r in (5, 6, 7)]
    for line in printed:
        assert set(line) == KEYS
        assert line["alpha"] == 0.001
        assert line["shard"] == 0
        assert len(line["input_ids"]) == 512


def test_masks_77_positions_in_ascending_order_and_no_special_one(lines, hardness_folder, two_shards):
    for line in lines("--shards", hardness_folder, "--alpha", 0, "--shard", 1, "--rows", "0:10"):
        positions, row = line["masked_positions"], two_shards[1][line["row"]]
        assert len(positions) == 77
        assert positions == sorted(set(positions))
        assert not np.isin(row[positions], [0, 1, 2, 3, 499]).any()


def test_ids_differ_from_the_shards_at_masked_positions_alone(lines, hardness_folder, two_shards):
    masked = 0
    for line in lines("--shards", hardness_folder, "--alpha", 0.001, "--shard", 1, "--rows", "0:10"):
        seen, row = np.array(line["input_ids"]), two_shards[1][line["row"]]
        assert set(np.flatnonzero(seen != row)) <= set(line["masked_positions"])
        masked += (seen == 499).sum()
    assert 0.7 * 770 < masked < 0.9 * 770


@pytest.mark.parametrize("alpha", ["0", "0.001", "inf"])
def test_gives_what_the_run_gives_the_model_for_the_same_block_and_epoch(lines, hardness_folder, alpha):
    """Batches as Trainer collates them, over two epochs; the block is found in the stream by its perplexities."""
    seed, batch_size = 7, 8
    corpus, groups, _ = open_corpus([str(hardness_folder)], None, perplexities=True)
    per_epoch = sum(map(len, groups)) // batch_size
    stream = TrainingStream(corpus, groups, batch_size, 2 * per_epoch, seed)
    collator = HardnessCollator(corpus.vocabulary, float(alpha), seed)
    content = corpus.read(corpus.row_groups()[0][0])
    rows = range(3)
    places = {content.input_ids[row].tobytes(): row for row in rows}
    printed = {
        (line["epoch"], line["row"]): line
        for line in lines(
            "--shards", hardness_folder, "--alpha", alpha, "--seed", seed, "--epochs", "0:2", "--rows", "0:3"
        )
    }
    met = set()
    for start in range(0, len(stream), batch_size):
        features = stream.__getitems__(range(start, start + batch_size))
        batch = collator(features)
        for i, feature in enumerate(features):
            row = places.get(feature["input_ids"].tobytes())
            if row is not None:
                line = printed[feature["epoch"], row]
                assert line["input_ids"] == batch["input_ids"][i].tolist()
                assert line["masked_positions"] == np.flatnonzero(batch["labels"][i].numpy() >= 0).tolist()
                met.add((feature["epoch"], row))
    assert len(met) >= 4  # an epoch may leave a block to its last partial batch


def test_counts_shards_over_the_folders_in_order(lines, write_shards):
    first, second = write_shards([4, 5]), write_shards([6], first=2)
    common = ("--alpha", 0.001, "--seed", 3)
    (line,) = lines("--shards", first, second, *common, "--shard", 2, "--rows", "5:6")
    (alone,) = lines("--shards", second, *common, "--shard", 0, "--rows", "5:6")
    assert line["shard"] == 2
    assert line == alone | {"shard": 2}


def test_alpha_inf_is_a_string_in_json(lines, write_shards):
    (line,) = lines("--shards", write_shards([2]), "--alpha", "inf")
    assert line["alpha"] == "inf"


def test_defaults_are_the_first_row_of_the_first_epoch_with_trainers_seed(lines, write_shards):
    folder = write_shards([2])
    everything = ("--seed", 42, "--epochs", "0:1", "--shard", 0, "--rows", "0:1")
    assert lines("--shards", folder, "--alpha", 0.1) == lines("--shards", folder, "--alpha", 0.1, *everything)


def test_a_masks_seed_and_epoch_change_it(lines, write_shards):
    folder = write_shards([1])
    draws = [
        tuple(line["masked_positions"])
        for seed in (1, 2)
        for line in lines("--shards", folder, "--alpha", 0.1, "--seed", seed, "--epochs", "0:2")
    ]
    assert len(set(draws)) == 4


def test_without_json_prints_readable_text(capsys, hardness_folder):
    assert replay.main(["--shards", str(hardness_folder), "--alpha", "0", "--rows", "2"]) == 0
    printed = capsys.readouterr().out
    assert "epoch 0, shard 0, row 2: 77 positions, hardness, alpha = 0.0" in printed
    assert "<mask>" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "0:5"], "rows 0 to 3"),
        (["--rows", "4:5"], "rows 0 to 3"),
        (["--shard", "2"], "shards 0 to 1"),
        (["--shard", "-1"], "shards 0 to 1"),
        (["--alpha", "-1"], "alpha = -1"),
        (["--alpha", "nan"], "alpha = nan"),
        (["--rows", "a:b"], "half-open range"),
        (["--epochs", "0-3"], "half-open range"),
        (["--alpa", "1"], "--alpa"),
    ],
)
def test_wrong_flags_exit_2_and_say_why(run_in_process, write_shards, flags, message):
    code, printed, error = run_in_process(replay.main, "--shards", write_shards([4, 4]), "--alpha", 0, *flags, "--json")
    assert code == 2
    assert printed == ""
    assert message in error


@pytest.mark.parametrize("flags", [["--rows", "3:1"], ["--rows", "2:2"], ["--epochs", "3:1"]])
def test_an_empty_range_exits_2(run_in_process, write_shards, flags):
    code, printed, error = run_in_process(replay.main, "--shards", write_shards([4]), "--alpha", 0, *flags, "--json")
    assert code == 2
    assert printed == ""
    assert flags[1] in error


def test_block_shards_have_nothing_to_replay(write_shards):
    with pytest.raises(ConfigurationError, match="block shards"):
        replay.main(["--shards", str(write_shards([4], scored=False)), "--alpha", "0", "--json"])


def test_replay_is_a_generator_over_the_python_api_too(write_shards):
    corpus = ShardCorpus([str(write_shards([4]))])
    masked = list(replay.replay(corpus, HardnessCollator(corpus.vocabulary, math.inf, 1), 0, range(1, 3), range(2)))
    assert [(item["epoch"], item["row"], item["alpha"]) for item in masked] == [
        (epoch, row, "inf") for epoch in range(2) for row in (1, 2)
    ]
