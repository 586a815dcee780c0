"""The order of an epoch that takes its shards in pools: what is read when, what is fetched ahead, what it costs.

Orders are looked at without reading, so that a corpus is a list of row groups. Pools and windows are
far smaller than real ones; a pool still has several windows.
"""

import hashlib
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from scorer.errors import ConfigurationError
from scorer.shards import ShardContent
from trainer import noise, stream
from trainer.reader import RowGroup, ShardCorpus, hold_out, open_corpus
from trainer.stream import TrainingStream


def row_groups(sizes):
    """Of shards of so many blocks, in groups of 256."""
    return [
        RowGroup(shard, index, 0, min(256, blocks - 256 * index))
        for shard, blocks in enumerate(sizes)
        for index in range(-(-blocks // 256))
    ]


def blocks_of(groups):
    return {(group.shard, 256 * group.index + row) for group in groups for row in range(group.start, group.stop)}


class SmallPools:
    """Streams with pools and windows of other sizes; the settings hold until it is closed."""

    def __init__(self, pool_blocks, window_row_groups=1):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(stream, "POOL_BLOCKS", pool_blocks)
        self.patch.setattr(stream, "WINDOW_ROW_GROUPS", window_row_groups)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.patch.undo()

    @staticmethod
    def stream(sizes, seed=0, epochs=1):
        """Batches of one block: no epoch loses its end."""
        groups = row_groups(sizes)
        return TrainingStream(None, groups, 1, epochs * sum(map(len, groups)), seed)

    @staticmethod
    def groups(made):
        """(shard, row group) in the order of the run; of windows of one row group, whose blocks follow each other."""
        places = [made.origin(begin) for begin, _ in windows(made)]
        return [(shard, row // 256) for shard, row in places]


def windows(made):
    """The position at which each window of a run begins, and the window."""
    position = 0
    while position < len(made):
        window, begin, end = made._window_of(position)
        yield begin, window
        position = end


def places(made):
    """(shard, row) of all positions of a run: what `origin` says, for many at a time."""
    found = []
    for begin, window in windows(made):
        groups, targets = made._shuffle(window)
        rows = [(group.shard, 256 * group.index + row) for group in groups for row in range(len(group))]
        found += [row for _, row in sorted(zip(targets.tolist(), rows, strict=True))]
        assert found[begin] == made.origin(begin)
    assert found[-1] == made.origin(len(made) - 1)
    return found


def pools_of(groups, sizes, pool_blocks):
    """The pools that an order of row groups can have been made by, as sets of shards; an oracle of the docstring.

    A pool is closed wherever all of its shards have been read to their ends and it has its blocks.
    """
    last_use = {shard: place for place, (shard, _) in enumerate(groups)}
    found, shards = [], set()
    for place, (shard, _) in enumerate(groups):
        shards.add(shard)
        is_closed = all(last_use[other] <= place for other in shards)
        done = sum(sizes[other] for pool in [*found, shards] for other in pool)
        if is_closed and done >= (len(found) + 1) * pool_blocks:
            found.append(shards)
            shards = set()
    return [*found, shards] if shards else found


SIZES = st.lists(st.integers(0, 900), min_size=1, max_size=9).filter(any)


class TestOrder:
    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(SIZES, st.integers(1, 2000), st.integers(1, 5), st.integers(0, 99))
    def test_has_every_block_once_an_epoch(self, sizes, pool_blocks, window, seed):
        with SmallPools(pool_blocks, window) as small:
            made = small.stream(sizes, seed, epochs=2)
            length = len(made) // 2
            read = places(made)
        for epoch in (read[:length], read[length:]):
            assert len(epoch) == length
            assert set(epoch) == blocks_of(row_groups(sizes))

    @settings(derandomize=True, deadline=None, max_examples=150)
    @given(SIZES, st.integers(1, 2000), st.integers(0, 99))
    def test_reads_a_pool_to_its_end_before_the_next(self, sizes, pool_blocks, seed):
        """A pool is of shards that begin within its blocks: it has no more of them, but for the end of the last one."""
        with SmallPools(pool_blocks) as small:
            groups = small.groups(small.stream(sizes, seed))
        pools = pools_of(groups, sizes, pool_blocks)
        assert sum(map(len, pools)) == sum(blocks > 0 for blocks in sizes)
        for pool in pools:
            assert sum(sizes[shard] for shard in pool) < pool_blocks + max(sizes)

    def test_mixes_the_shards_of_a_pool(self):
        """Of 24 shards of 4 row groups in pools of 8: hardly ever do two row groups of a shard follow each other."""
        sizes = [1024] * 24
        with SmallPools(8 * 1024) as small:
            groups = small.groups(small.stream(sizes))
        assert [len(pool) for pool in pools_of(groups, sizes, 8 * 1024)] == [8, 8, 8]
        for start in (0, 32, 64):
            shards = [shard for shard, _ in groups[start : start + 32]]
            assert len(set(shards)) == 8
            assert sum(a == b for a, b in pairwise(shards)) < 10
            assert shards != sorted(shards)

    def test_puts_other_shards_together_in_other_epochs_and_under_other_seeds(self):
        sizes = [512] * 24
        with SmallPools(6 * 512) as small:
            groups = small.groups(small.stream(sizes, seed=0, epochs=2))
            others = small.groups(small.stream(sizes, seed=1))
        orders = (groups[:48], groups[48:], others)
        first, second, other = ({frozenset(pool) for pool in pools_of(order, sizes, 6 * 512)} for order in orders)
        assert len(first) == len(second) == len(other) == 4
        assert not first & second
        assert not first & other

    @pytest.mark.parametrize("pool_blocks", [12_001, 1 << 19])
    def test_of_one_pool_is_the_one_that_there_was_before_there_were_pools(self, pool_blocks):
        """Row groups in the order of (seed, epoch), 32 a window, blocks in that of (seed, epoch, window)."""
        groups, expected = row_groups([3000, 0, 70, 257, 8000]), []
        for epoch in range(2):
            order = [groups[i] for i in noise.permutation(len(groups), 7, epoch)]
            for index, start in enumerate(range(0, len(order), 32)):
                window = order[start : start + 32]
                rows = [(group.shard, 256 * group.index + row) for group in window for row in range(len(group))]
                targets = noise.permutation(len(rows), 7, epoch, index)
                expected += [row for _, row in sorted(zip(targets.tolist(), rows, strict=True))]
        with SmallPools(pool_blocks, 32) as small:
            made = small.stream([3000, 0, 70, 257, 8000], seed=7, epochs=2)
            assert places(made) == expected

    def test_of_one_pool_is_pinned(self):
        """By the code of before there were pools."""
        made = SmallPools.stream([3000, 0, 70, 257, 8000], seed=7, epochs=2)
        assert hashlib.sha256(np.array(places(made), dtype="<i8").tobytes()).hexdigest() == PINNED


PINNED = "c31c3a32d96fe9425539aa47940128c285eaec0fceda627e42edab6587bc8810"


class Named:
    """A corpus that notes what it is told to fetch, and has nothing to read."""

    def __init__(self):
        self.named = []

    def prefetch(self, shards):
        self.named.append(list(dict.fromkeys(shards)))

    def read_all(self, groups):
        return ((place, ShardContent(np.zeros((len(group), 1), np.uint16))) for place, group in enumerate(groups))


def upcoming(made):
    """For each window of a run: the position at which it begins, and the shards that are named when it is read."""
    return [(begin, list(dict.fromkeys(made._upcoming_shards(window)))) for begin, window in windows(made)]


class TestUpcomingShards:
    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(SIZES, st.integers(1, 2000), st.integers(0, 99))
    def test_are_those_of_the_following_blocks_in_the_order_of_their_first_use(self, sizes, pool_blocks, seed):
        """Also over the end of an epoch."""
        with SmallPools(pool_blocks) as small:
            made = small.stream(sizes, seed, epochs=3)
            shards = [shard for shard, _ in small.groups(made)]
            for place, (_, named) in enumerate(upcoming(made)):
                following = list(dict.fromkeys(shards[place:]))
                assert named == following[: len(named)]
                assert set(shards[place : place + 2]) <= set(named)  # the next window is read ahead

    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(SIZES, st.integers(1, 2000), st.integers(1, 4), st.integers(0, 99))
    def test_fit_into_two_pools_and_two_shards(self, sizes, pool_blocks, window, seed):
        """For so much room a run asks at its start."""
        with SmallPools(pool_blocks, window) as small:
            for _, named in upcoming(small.stream(sizes, seed, epochs=3)):
                assert sum(sizes[shard] for shard in named) <= 2 * pool_blocks + 2 * max(sizes)

    def test_are_what_is_left_of_the_pool_and_the_next_pool(self):
        sizes = [512] * 12
        with SmallPools(4 * 512) as small:
            made = small.stream(sizes, epochs=2)
            groups, named = small.groups(made), upcoming(made)
        pools = [pools_of(groups[start : start + 24], sizes, 4 * 512) for start in (0, 24)]
        pools = [*pools[0], *pools[1]]
        assert [len(pool) for pool in pools] == [4] * 6
        for place in range(48):
            here, *following = pools[place // 8 : place // 8 + 2]
            left = {shard for shard, _ in groups[place : 8 * (place // 8 + 1)]}
            assert left <= here
            assert set(named[place][1]) == left.union(*following)

    def test_are_named_for_each_window_before_it_is_read(self, monkeypatch):
        """On several cores for the one after it too."""
        for cores in (1, 2):
            monkeypatch.setattr(stream, "_cores", lambda count=cores: count)
            corpus, groups = Named(), row_groups([512] * 6)
            with SmallPools(1024) as small:
                made = TrainingStream(corpus, groups, 1, 2 * 6 * 512, seed=0)
                expected = [shards for _, shards in upcoming(made)]
                for begin, _ in upcoming(made):
                    made._window_rows(made._window_of(begin)[0])
                assert small
            assert corpus.named == expected


# Over an object store -------------------------------------------------------------------------------------------------

SHARDS, BLOCKS = 12, 40
EPOCHS = 3


@pytest.fixture(scope="module")
def local(write_shards):
    return write_shards([BLOCKS] * SHARDS)


@pytest.fixture
def remote(local, tmp_path, monkeypatch):
    """The same folder in `memory://`."""
    monkeypatch.setenv("HARDNESS_CACHE", str(tmp_path / "cache"))
    store, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/{local.name}"
    store.put(str(local), url, recursive=True)
    yield url
    store.rm(url, recursive=True)


@pytest.fixture
def downloads(monkeypatch):
    """Names of the files that are downloaded, one after the other, and how much was in the cache just before."""
    found, get_file = [], MemoryFileSystem.get_file

    def noted(self, path, local, **options):
        found.append((path.rpartition("/")[2], taken(Path(local).parent)))
        get_file(self, path, local, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", noted)
    return found


def taken(folder):
    sizes = []
    for path in folder.iterdir():
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # evicted meanwhile
            sizes.append(0)
    return sum(sizes)


def read_all(folder, epochs=EPOCHS):
    """Digests of all batches of a run, each with the epoch."""
    corpus = ShardCorpus([str(folder)])
    groups = [group for groups in corpus.row_groups() for group in groups]
    made = TrainingStream(corpus, groups, 8, epochs * SHARDS * BLOCKS // 8, seed=3)
    corpus.require_room(2 * stream.POOL_BLOCKS)
    for start in range(0, len(made), 8):
        batch = made.__getitems__(range(start, start + 8))
        yield batch.content.sha256()


def test_a_run_over_a_store_keeps_to_its_limit_and_downloads_each_shard_once_an_epoch(
    local, remote, downloads, tmp_path, monkeypatch
):
    """Room for two pools of two shards, and two shards, of twelve; no less is taken."""
    size = max(path.stat().st_size for path in local.glob("*.parquet"))
    with SmallPools(2 * BLOCKS, window_row_groups=1):
        expected = list(read_all(local))
        monkeypatch.setenv("HARDNESS_CACHE_GB", str(5 * size / 1e9))
        with pytest.raises(ConfigurationError, match="HARDNESS_CACHE_GB higher"):
            next(read_all(remote))
        monkeypatch.setenv("HARDNESS_CACHE_GB", str(6 * size / 1e9))
        read, most = [], 0
        for digest in read_all(remote):
            read.append(digest)
            most = max(most, taken(tmp_path / "cache"))
    assert read == expected
    assert max(most, *(before for _, before in downloads)) <= 6 * size
    names = [name for name, _ in downloads]
    assert len(names) <= EPOCHS * SHARDS
    assert set(names) == {path.name for path in local.glob("*.parquet")}
    # In an epoch each but what the one before has left.
    assert len(names) >= EPOCHS * SHARDS - (EPOCHS - 1) * 6


def test_a_run_over_a_store_that_fits_downloads_each_shard_once(local, remote, downloads):
    with SmallPools(2 * BLOCKS, window_row_groups=1):
        assert list(read_all(remote)) == list(read_all(local))
    assert sorted(name for name, _ in downloads) == sorted(path.name for path in local.glob("*.parquet"))


def test_held_out_blocks_of_a_store_are_those_of_a_local_folder(local, remote, downloads):
    blocks = []
    for folder in (remote, local):
        _, _, held_out = open_corpus([str(folder)], None, perplexities=True)
        blocks.append([held_out[position]["input_ids"].tobytes() for position in range(len(held_out))])
    assert blocks[0] == blocks[1]
    held_out = hold_out(ShardCorpus([str(local)]).row_groups())[1]
    assert len(downloads) == len({group.shard for group in held_out})
