"""Which blocks are trained on, in which order, and what the reader refuses."""

import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from scorer.errors import ConfigurationError, ShardError
from trainer import stream as stream_module
from trainer.masking import HardnessCollator
from trainer.reader import HeldOutBlocks, RowGroup, ShardCorpus, hold_out, open_corpus
from trainer.stream import TrainingStream, steps_per_epoch

ROOT = Path(__file__).parents[2]


def row_groups(folder_sizes):
    """Row groups of folders given as lists of shard sizes, in groups of 256: an oracle of its own."""
    folders, shard = [], 0
    for sizes in folder_sizes:
        folders.append([])
        for blocks in sizes:
            for index, start in enumerate(range(0, blocks, 256)):
                folders[-1].append(RowGroup(shard, index, 0, min(256, blocks - start)))
            shard += 1
    return folders


def rows_of(groups):
    return [(group.shard, 256 * group.index + row) for group in groups for row in range(group.start, group.stop)]


def place(feature):
    """(shard, row) as make_content wrote it into the ids."""
    ids = feature["input_ids"].astype(int)
    return ids[1] - 10, 100 * (ids[2] - 10) + ids[3] - 10


def places(stream, positions=None):
    return [place(stream[i]) for i in (range(len(stream)) if positions is None else positions)]


def make_stream(folders, batch_size=16, epochs=1, seed=42):
    corpus = ShardCorpus([str(folder) for folder in folders])
    training, held_out = hold_out(corpus.row_groups())
    steps = epochs * (sum(map(len, training)) // batch_size)
    return TrainingStream(corpus, training, batch_size, steps, seed), rows_of(training), rows_of(held_out)


@pytest.fixture(scope="module")
def folder(write_shards):
    """300 + 0 + 70 + 257 blocks: several shards, one of them empty, groups that are not full."""
    return write_shards([300, 0, 70, 257])


@pytest.fixture(scope="module")
def second_folder(write_shards):
    return write_shards([40, 130], first=4)


class TestHeldOut:
    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(st.lists(st.lists(st.integers(0, 3000), max_size=5), min_size=1, max_size=3))
    def test_is_the_last_64_or_1_percent_at_most_half_of_each_folder(self, folder_sizes):
        folders = row_groups(folder_sizes)
        training, held_out = hold_out(folders)
        expected_training, expected_held_out = [], []
        for groups in folders:
            rows = rows_of(groups)
            wanted = min(max(64, len(rows) // 100), len(rows) // 2)
            expected_training += rows[: len(rows) - wanted]
            expected_held_out += rows[len(rows) - wanted :]
        assert rows_of(training) == expected_training
        assert rows_of(held_out) == expected_held_out

    @pytest.mark.parametrize(
        ("blocks", "held_out"),
        [(0, 0), (1, 0), (2, 1), (3, 1), (127, 63), (128, 64), (129, 64), (6400, 64), (6500, 65), (100_000, 1000)],
    )
    def test_sizes(self, blocks, held_out):
        assert len(rows_of(hold_out(row_groups([[blocks]]))[1])) == held_out

    def test_a_group_that_the_border_cuts_is_in_both_with_its_own_rows(self):
        training, held_out = hold_out(row_groups([[256]]))
        assert training == [RowGroup(0, 0, 0, 192)]
        assert held_out == [RowGroup(0, 0, 192, 256)]

    def test_no_group_is_empty(self):
        training, held_out = hold_out(row_groups([[256, 64, 0, 128], [1]]))
        assert all(len(group) for group in [*training, *held_out])

    def test_blocks_are_read_in_plan_order_with_their_own_rows_and_epoch_0(self, folder, second_folder):
        corpus = ShardCorpus([str(folder), str(second_folder)])
        _, held_out = hold_out(corpus.row_groups())
        blocks = HeldOutBlocks(corpus, held_out)
        assert len(blocks) == 64 + 64
        assert [place(blocks[i]) for i in range(len(blocks))] == rows_of(held_out)
        assert {blocks[i]["epoch"] for i in (0, 63, 127)} == {0}
        assert place(blocks[3]) == rows_of(held_out)[3]  # and backwards
        with pytest.raises(IndexError):
            blocks[128]
        with pytest.raises(IndexError):
            blocks[-1]

    def test_folders_of_their_own_leave_all_of_the_training_folders_for_training(self, folder, second_folder):
        corpus, training, held_out = open_corpus([str(folder)], [str(second_folder)], perplexities=True)
        assert len(rows_of(training)) == 627
        assert len(corpus) == 4
        assert len(held_out) == 170
        assert {place(held_out[i])[0] for i in range(170)} == {4, 5}

    def test_a_single_block_leaves_nothing_to_evaluate_on(self, write_shards):
        with pytest.raises(ConfigurationError, match="no block to evaluate on"):
            open_corpus([str(write_shards([1]))], None, perplexities=True)


class TestEpoch:
    def test_visits_every_training_block_once_where_the_batch_divides(self, folder):
        stream, training, _ = make_stream([folder], batch_size=1)
        assert len(stream) == 627 - 64
        assert sorted(places(stream)) == sorted(training)

    @pytest.mark.parametrize("batch_size", [2, 16, 100, 563])
    def test_drops_its_last_partial_batch_and_repeats_nothing(self, folder, batch_size):
        stream, training, held_out = make_stream([folder], batch_size, epochs=2)
        length = 563 // batch_size * batch_size
        assert len(stream) == 2 * length
        for epoch in range(2):
            seen = places(stream, range(epoch * length, (epoch + 1) * length))
            assert len(set(seen)) == length
            assert set(seen) <= set(training)
            assert not set(seen) & set(held_out)

    def test_rows_carry_their_own_perplexities_and_epoch(self, folder):
        stream, _, _ = make_stream([folder], epochs=2)
        for position in (0, 1, 17, len(stream) // 2, len(stream) - 1):
            feature = stream[position]
            ids = feature["input_ids"].astype(np.int64)
            special = np.isin(ids, [0, 1, 2, 3, 50264])
            assert feature["epoch"] == position // (len(stream) // 2)
            for name, factor in (("forward_perplexity", 37), ("backward_perplexity", 53)):
                assert feature[name].dtype == np.float32
                np.testing.assert_array_equal(feature[name], np.where(special, 0, 1 + (ids * factor) % 1009))

    def test_runs_over_several_folders_shards_counted_in_order(self, folder, second_folder):
        stream, training, held_out = make_stream([folder, second_folder], batch_size=1)
        assert len(held_out) == 64 + 64
        assert sorted(places(stream)) == sorted(training)
        assert {shard for shard, _ in training} == {0, 2, 3, 4, 5}

    def test_a_batch_mixes_shards(self, folder, second_folder):
        stream, _, _ = make_stream([folder, second_folder], batch_size=32)
        for batch in range(3):
            assert len({shard for shard, _ in places(stream, range(32 * batch, 32 * batch + 32))}) >= 3

    def test_neighbours_in_a_shard_are_no_neighbours_in_the_epoch(self, folder):
        seen = places(make_stream([folder])[0])
        adjacent = sum(a[0] == b[0] and b[1] == a[1] + 1 for a, b in pairwise(seen))
        assert adjacent < 10  # about 1 in 560 by chance

    def test_an_epoch_longer_than_a_window_is_visited_once_too(self, write_shards):
        """40 row groups: a window of 32, and one of 8."""
        stream, training, _ = make_stream([write_shards([16] * 40)], batch_size=1)
        assert sorted(places(stream)) == sorted(training)

    @pytest.mark.parametrize(("blocks", "batch", "steps"), [(10, 10, 1), (19, 10, 1), (20, 10, 2)])
    def test_has_as_many_steps_as_whole_batches(self, blocks, batch, steps):
        assert steps_per_epoch(blocks, batch) == steps

    def test_of_fewer_blocks_than_a_batch_is_an_error(self, folder):
        with pytest.raises(ConfigurationError, match=r"563 blocks .* fewer than one global batch of 564"):
            make_stream([folder], batch_size=564)


class TestOrder:
    def test_is_a_pure_function_of_seed_and_epoch(self, folder):
        first, again = (places(make_stream([folder], epochs=2)[0]) for _ in range(2))
        assert first == again

    def test_differs_between_epochs_and_seeds(self, folder):
        seen = places(make_stream([folder], epochs=2)[0])
        other_seed = places(make_stream([folder], seed=43)[0])
        first, second = seen[:560], seen[560:]
        assert first != second
        assert first != other_seed
        assert sum(a == b for a, b in zip(first, second, strict=True)) < 10

    def test_does_not_depend_on_the_batch_size(self, folder):
        """Global batch g is positions [gB, (g + 1)B) of the epoch's order."""
        small, _, _ = make_stream([folder], batch_size=7, epochs=2)
        large, _, _ = make_stream([folder], batch_size=100, epochs=2)
        assert places(small, range(500)) == places(large, range(500))
        epoch_length = 563 // 7 * 7
        assert places(small, range(epoch_length, epoch_length + 500)) == places(large, range(500, 1000))

    def test_random_access_gives_what_sequential_access_gives(self, folder):
        sequential = places(make_stream([folder], epochs=2)[0])
        stream, _, _ = make_stream([folder], epochs=2)
        for position in [1119, 0, 559, 560, 3, 1118, 700, 1]:
            assert place(stream[position]) == sequential[position]
        asked = [5, 900, 6, 5]
        assert [place(feature) for feature in stream.__getitems__(asked)] == [sequential[i] for i in asked]

    def test_says_where_the_block_of_any_position_is_from_without_reading_it(self, folder, second_folder):
        stream, _, _ = make_stream([folder, second_folder], epochs=2)
        read = places(stream)
        unread, _, _ = make_stream([folder, second_folder], epochs=2)
        assert [unread.origin(position) for position in range(len(unread))] == read

    def test_a_batch_may_cross_windows_and_epochs(self, write_shards):
        folder = write_shards([256 * 33])  # windows of 8,192 and 256 - 64 blocks
        stream, _, _ = make_stream([folder], batch_size=48, epochs=2)
        one_by_one = [place(stream[position]) for position in range(8180, 8200)]
        again, _, _ = make_stream([folder], batch_size=48, epochs=2)
        assert [place(feature) for feature in again.__getitems__(range(8180, 8200))] == one_by_one
        border = len(stream) // 2
        assert [again[i]["epoch"] for i in (border - 1, border)] == [0, 1]
        assert [again[i]["step"] for i in (border - 1, border)] == [border // 48 - 1, border // 48]

    def test_batches_stay_as_they_are_when_their_window_is_written_over(self, write_shards):
        stream, _, _ = make_stream([write_shards([256 * 65])], epochs=1)
        early = stream.__getitems__(range(4))
        before = early.content.sha256()
        for position in (8192, 16384 - 1):  # the second and the third window
            stream[position]
        assert early.content.sha256() == before

    def test_a_read_that_fails_leaves_no_window_half_written(self, write_shards, monkeypatch):
        """On one core the next window is read into the memory of the last one, when it is asked for."""
        stream, _, _ = make_stream([write_shards([256 * 65])], epochs=1)
        monkeypatch.setattr(stream_module, "_cores", lambda: 1)
        expected = place(stream[5])
        read_all, fails = ShardCorpus.read_all, [True]

        def read_half(self, groups):
            for count, found in enumerate(read_all(self, groups)):
                if count == 16 and fails:
                    raise ShardError("cut")
                yield found

        monkeypatch.setattr(ShardCorpus, "read_all", read_half)
        with pytest.raises(ShardError, match="cut"):
            stream[8192]
        fails.clear()
        assert place(stream[5]) == expected

    def test_ends_where_the_run_ends(self, folder):
        stream, _, _ = make_stream([folder])
        for position in (len(stream), -1):
            with pytest.raises(IndexError):
                stream[position]

    def test_rows_are_the_callers_own(self, folder):
        stream, _, _ = make_stream([folder])
        stream[0]["input_ids"][:] = 0
        assert stream[0]["input_ids"].any()

    @pytest.mark.parametrize("workers", [1, 2])
    def test_is_the_same_for_any_number_of_loader_workers(self, folder, workers):
        stream, _, _ = make_stream([folder], epochs=2)
        loader = DataLoader(stream, batch_size=16, shuffle=False, num_workers=workers, collate_fn=list)
        loaded = [(place(feature), feature["epoch"]) for batch in loader for feature in batch]
        assert loaded == [(place(stream[i]), stream[i]["epoch"]) for i in range(len(stream))]

    def test_masks_are_the_same_for_any_number_of_loader_workers(self, folder, synthetic_vocabulary):
        stream, _, _ = make_stream([folder], batch_size=64)
        collator = HardnessCollator(synthetic_vocabulary(), alpha=0.001, seed=1)
        batches = [
            list(DataLoader(stream, batch_size=64, num_workers=workers, collate_fn=collator)) for workers in (0, 2)
        ]
        for alone, shared in zip(*batches, strict=True):
            assert (alone["input_ids"] == shared["input_ids"]).all()
            assert (alone["labels"] == shared["labels"]).all()


class TestRefusals:
    @pytest.fixture
    def copied(self, folder, tmp_path):
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    def test_a_damaged_shard_is_found_when_it_is_first_read(self, copied):
        path = copied / "shard-00002-of-00004.parquet"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        corpus = ShardCorpus([str(copied)])  # names and sizes are as they should be
        assert len(corpus.read(RowGroup(0, 0, 0, 256))) == 256
        with pytest.raises(ShardError, match=r"shard-00002-of-00004\.parquet is not the file that the manifest lists"):
            corpus.read(RowGroup(2, 0, 0, 70))

    def test_a_damaged_shard_stops_the_stream(self, copied):
        path = copied / "shard-00003-of-00004.parquet"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        stream, _, _ = make_stream([copied])
        with pytest.raises(ShardError, match="shard-00003"):
            list(map(stream.__getitem__, range(len(stream))))

    def test_a_missing_shard_is_an_error_at_the_start(self, copied):
        (copied / "shard-00002-of-00004.parquet").unlink()
        with pytest.raises(ShardError, match=r"shard-00002-of-00004\.parquet is missing"):
            ShardCorpus([str(copied)])

    def test_a_shard_of_another_size_is_an_error_at_the_start(self, copied):
        with (copied / "shard-00001-of-00004.parquet").open("ab") as stream:
            stream.write(b"x")
        with pytest.raises(ShardError, match=r"shard-00001-of-00004\.parquet has \d+ bytes, the manifest says \d+"):
            ShardCorpus([str(copied)])

    def test_a_sound_shard_under_another_ones_name_is_not_taken(self, write_shards):
        folder = write_shards([20, 20])
        first, second = sorted(folder.glob("*.parquet"))
        data = first.read_bytes()
        manifest = json.loads((folder / "_manifest.json").read_text())
        second.write_bytes(data)
        manifest["shards"][1]["bytes"] = len(data)
        (folder / "_manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ShardError, match="SHA-256 differs"):
            ShardCorpus([str(folder)]).read(RowGroup(1, 0, 0, 20))

    def test_a_folder_without_a_manifest_is_not_complete(self, copied):
        (copied / "_manifest.json").unlink()
        with pytest.raises(ConfigurationError, match=r"has no _manifest\.json.*not complete"):
            ShardCorpus([str(copied)])

    def test_a_torn_manifest_is_an_error(self, copied):
        text = (copied / "_manifest.json").read_text()
        (copied / "_manifest.json").write_text(text[: len(text) // 2])
        with pytest.raises(ShardError, match=r"_manifest\.json cannot be read"):
            ShardCorpus([str(copied)])

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(ConfigurationError, match=f"there is no folder {tmp_path}/nowhere"):
            ShardCorpus([f"{tmp_path}/nowhere"])

    def test_block_shards_where_perplexities_are_needed(self, write_shards):
        blocks = write_shards([10], scored=False)
        with pytest.raises(ConfigurationError, match=r"block shards without perplexities.*pipeline\.score_corpus"):
            ShardCorpus([str(blocks)])

    @pytest.mark.parametrize("scored", [True, False])
    def test_either_kind_will_do_where_only_ids_are_read(self, write_shards, scored):
        corpus = ShardCorpus([str(write_shards([10], scored=scored))], perplexities=False)
        content = corpus.read(RowGroup(0, 0, 2, 5))
        assert [name for name, _ in content.columns()] == ["input_ids"]
        assert len(content) == 3

    def test_folders_of_two_vocabularies(self, folder, write_shards, synthetic_vocabulary):
        other = write_shards([10], vocabulary=synthetic_vocabulary(400))
        with pytest.raises(ConfigurationError, match="different tokenizers"):
            ShardCorpus([str(folder), str(other)])
        with pytest.raises(ConfigurationError, match="different tokenizers"):
            open_corpus([str(folder)], [str(other)], perplexities=True)

    def test_no_shards_at_all(self, write_shards):
        empty = write_shards([])
        with pytest.raises(ConfigurationError, match=f"{empty} hold no shards"):
            ShardCorpus([str(empty)])

    def test_shards_without_a_block(self, write_shards):
        with pytest.raises(ConfigurationError):
            open_corpus([str(write_shards([0, 0]))], None, perplexities=True)


READ_AN_EPOCH = """
import re, sys
from scorer.shards import ShardReader
from trainer.masking import HardnessCollator
from trainer.reader import open_corpus
from trainer.stream import TrainingStream

corpus, groups, _ = open_corpus([sys.argv[1]], None, perplexities=True)
batch = 256
stream = TrainingStream(corpus, groups, batch, sum(map(len, groups)) // batch, seed=1)
collator = HardnessCollator(corpus.vocabulary, 0.001, 1)
rows = 0
for start in range(0, len(stream), batch):
    rows += len(collator(stream.__getitems__(range(start, start + batch)))["labels"])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(rows, peak[1])
"""


@pytest.mark.slow  # 20 s
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_corpus(write_shards):
    """3 and 30 windows of 8,192 blocks. The peak is VmHWM: ru_maxrss begins at that of the process that forked."""

    def peak_kilobytes(folder):
        finished = subprocess.run(
            [sys.executable, "-c", READ_AN_EPOCH, str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        rows, peak = map(int, finished.stdout.split())
        return rows, peak

    small = write_shards([2048])
    entry = json.loads((small / "_manifest.json").read_text())["shards"][0]
    peaks = {}
    for shards in (12, 120):
        folder = small.parent / f"{shards}-times-{small.name}"
        folder.mkdir()
        entries = [entry | {"name": f"shard-{i:05d}-of-{shards:05d}.parquet"} for i in range(shards)]
        for copy in entries:
            os.link(small / entry["name"], folder / copy["name"])
        manifest = json.loads((small / "_manifest.json").read_text()) | {"shards": entries}
        (folder / "_manifest.json").write_text(json.dumps(manifest))
        rows, peaks[shards] = peak_kilobytes(folder)
        assert rows == math.floor(shards * 2048 * 0.99 / 256) * 256
        shutil.rmtree(folder)
    assert peaks[120] < 1.1 * peaks[12]
