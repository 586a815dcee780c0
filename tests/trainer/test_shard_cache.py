"""The cache of shards: each is fetched once, held to its hash, and gone when there is no more room.

Shards are random bytes here, for the cache reads no Parquet. `memory://` stands for a store where one process is
enough, and its downloads are counted; where there are several, the weather before an S3 server counts them.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from torch.utils.data import DataLoader, Dataset

from scorer import files
from scorer.errors import ConfigurationError, ShardError, StorageError
from scorer.manifest import ShardEntry
from trainer import shard_cache
from trainer.shard_cache import ShardCache, StoredShard

ROOT = Path(__file__).parents[2]
BYTES = 10_000
"""Of a shard, where it does not matter."""
DEADLINE = 60.0


def shard_bytes(number, size=BYTES):
    return random.Random(number).randbytes(size)


def shard_at(root, number, data):
    entry = ShardEntry(f"shard-{number}.parquet", 1, len(data), hashlib.sha256(data).hexdigest(), "")
    return StoredShard(f"{root}/{entry.name}", entry)


class Store:
    """A folder in `memory://`, and every download from it."""

    def __init__(self):
        self.root = f"memory://{uuid.uuid4().hex}"
        self.memory = fsspec.filesystem("memory")
        self.downloads = []
        """Numbers of shards, as their downloads began."""
        self.harm = []
        """Of the next downloads: what is done to the file that came."""
        self.while_downloading = lambda number: None

    def add(self, number, size=BYTES):
        shard = shard_at(self.root, number, shard_bytes(number, size))
        self.memory.pipe_file(shard.path, shard_bytes(number, size))
        return shard

    def get_file(self, path, local):
        number = int(path.rpartition("-")[2].removesuffix(".parquet"))
        self.downloads.append(number)
        self.while_downloading(number)
        with self.memory.open(path) as stream:
            Path(local).write_bytes(stream.read())
        if self.harm:
            self.harm.pop(0)(Path(local))


@pytest.fixture
def store(monkeypatch):
    store = Store()
    monkeypatch.setattr(MemoryFileSystem, "get_file", store.get_file)
    yield store
    files.remove_folder(store.root)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def cache(folder):
    return ShardCache(folder, 100 * BYTES)


def read(cache, shard):
    with cache.open(shard) as stream:
        return stream.read()


def taken(folder):
    """Bytes of all files of a cache."""
    return sum(map(size_of, folder.iterdir()))


def kept(folder, shards):
    """Numbers of the shards whose files are in a cache."""
    names = {path.name for path in folder.iterdir()}
    return [number for number, shard in enumerate(shards) if f"{shard.entry.sha256}.parquet" in names]


def file_of(cache, shard):
    return cache.folder / f"{shard.entry.sha256}.parquet"


def leftovers(folder):
    """Files that are no shards."""
    return [path.name for path in folder.iterdir() if path.suffix != ".parquet" and path.name != ".lock"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def last_used(path, seconds_ago):
    """Clocks of file systems tick in milliseconds, and tests are faster."""
    then = time.time() - seconds_ago
    os.utime(path, (then, then))


def wait_until(is_so):
    deadline = time.monotonic() + DEADLINE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def size_of(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def in_threads(call, items):
    """Calls all at once."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(call, items))


class TestDownload:
    def test_a_shard_is_downloaded_once_and_read_many_times(self, cache, folder, store):
        shard = store.add(0)
        for _ in range(3):
            assert read(cache, shard) == shard_bytes(0)
        assert read(ShardCache(folder, BYTES), shard) == shard_bytes(0)
        assert store.downloads == [0]
        assert leftovers(folder) == []

    def test_shards_of_the_same_bytes_are_one_file(self, cache, folder, store):
        """Of two folders, of which one is a copy."""
        shard = store.add(0)
        other = StoredShard(f"{store.root}/elsewhere.parquet", shard.entry)
        assert read(cache, shard) == read(cache, other)
        assert store.downloads == [0]

    @pytest.mark.parametrize("harm", [flip, cut, empty])
    def test_one_that_breaks_on_its_way_is_fetched_again(self, cache, folder, store, harm):
        shard = store.add(0)
        store.harm = [harm]
        assert read(cache, shard) == shard_bytes(0)
        assert store.downloads == [0, 0]
        assert leftovers(folder) == []

    def test_a_store_that_keeps_giving_other_bytes_is_an_error_that_names_the_shard(self, cache, folder, store):
        shard = store.add(7)
        sound = store.memory.cat_file(shard.path)
        store.memory.pipe_file(shard.path, shard_bytes(8))
        with pytest.raises(ShardError, match=r"shard-7\.parquet is not the file that the manifest lists"):
            cache.open(shard)
        assert 1 < len(store.downloads) < 10
        assert list(folder.glob("*.parquet")) == leftovers(folder) == []
        store.memory.pipe_file(shard.path, sound)
        assert read(cache, shard) == shard_bytes(7)

    def test_a_shard_that_is_gone_is_an_error_that_names_it(self, cache, folder, store):
        shard = store.add(7)
        store.memory.rm_file(shard.path)
        with pytest.raises(ShardError, match=r"shard-7\.parquet is missing"):
            cache.open(shard)
        assert leftovers(folder) == []

    @pytest.mark.parametrize("harm", [flip, cut, empty, os.unlink])
    def test_a_file_that_was_damaged_since_is_fetched_again(self, cache, folder, store, harm):
        shard = store.add(0)
        cache.fetch(shard)
        harm(file_of(cache, shard))
        assert read(ShardCache(folder, BYTES), shard) == shard_bytes(0)
        assert store.downloads == [0, 0]
        assert leftovers(folder) == []

    def test_a_sound_file_of_another_process_is_hashed_once(self, cache, folder, store, monkeypatch):
        shard = store.add(0)
        cache.fetch(shard)
        other, digest, hashed = ShardCache(folder, BYTES), hashlib.file_digest, []

        def file_digest(stream, name):
            hashed.append(stream.name)
            return digest(stream, name)

        monkeypatch.setattr(hashlib, "file_digest", file_digest)
        assert all(read(other, shard) == shard_bytes(0) for _ in range(3))
        assert len(hashed) == 1


class TestLimit:
    def test_is_never_exceeded(self, folder, store):
        cache, seen = ShardCache(folder, 3 * BYTES), []
        store.while_downloading = lambda number: seen.append(taken(folder) + BYTES)
        shards = [store.add(number) for number in range(8)]
        for shard in [*shards, *shards]:
            read(cache, shard)
            seen.append(taken(folder))
        assert max(seen) == 3 * BYTES

    def test_holds_for_shards_of_many_sizes(self, folder, store):
        cache, sizes = ShardCache(folder, 30_000), random.Random(0)
        shards = [store.add(number, sizes.randint(1, 15_000)) for number in range(30)]
        for shard in sizes.choices(shards, k=100):
            assert read(cache, shard) == store.memory.cat_file(shard.path)
            assert taken(folder) <= 30_000

    def test_removes_what_was_used_longest_ago(self, folder, store):
        cache = ShardCache(folder, 3 * BYTES)
        shards = [store.add(number) for number in range(6)]
        for number, seconds_ago in enumerate((20, 40, 30)):
            cache.fetch(shards[number])
            last_used(file_of(cache, shards[number]), seconds_ago)
        read(cache, shards[3])
        assert kept(folder, shards) == [0, 2, 3]
        read(cache, shards[2])  # it would have been the next
        read(cache, shards[4])
        assert kept(folder, shards) == [2, 3, 4]

    def test_a_file_that_is_being_read_reads_on(self, folder, store):
        cache = ShardCache(folder, BYTES)
        first, second = store.add(0), store.add(1)
        with cache.open(first) as stream:
            head = stream.read(10)
            assert read(cache, second) == shard_bytes(1)
            assert not file_of(cache, first).exists()
            assert head + stream.read() == shard_bytes(0)

    def test_counts_downloads_that_go_on_with_all_of_their_bytes(self, folder, store):
        """Counted as far as they have come, each would find room that another one is about to fill."""
        cache = ShardCache(folder, 3 * BYTES)
        shards = [store.add(number) for number in range(8)]
        hashes = {shard.entry.sha256: number for number, shard in enumerate(shards)}
        together, lock, under_way, seen = threading.Event(), threading.Lock(), set(), []

        def download(number):
            with lock:
                under_way.add(number)
                files_ = [path for path in folder.iterdir() if path.suffix in (".parquet", ".part")]
                seen.append({hashes[path.name[:64]] for path in files_ if size_of(path)} | under_way)
                if len(under_way) > 3:
                    together.set()
            together.wait(0.1)
            with lock:
                under_way.discard(number)

        store.while_downloading = download
        in_threads(lambda shard: read(cache, shard), shards)
        assert set(store.downloads) == set(range(8))
        assert max(map(len, seen)) == 3
        assert taken(folder) <= 3 * BYTES

    def test_leaves_no_room_for_prefetching_that_a_reader_would_lack(self, folder, store):
        cache = ShardCache(folder, 2 * BYTES)
        shards = [store.add(number) for number in range(8)]
        for number, shard in enumerate(shards):
            cache.prefetch(shards[number:])
            assert read(cache, shard) == shard_bytes(number)
            assert taken(folder) <= 2 * BYTES

    def test_below_one_shard_is_an_error_that_names_the_way_out(self, folder, store):
        cache = ShardCache(folder, BYTES - 1)
        with pytest.raises(ConfigurationError, match="HARDNESS_CACHE_GB higher"):
            cache.open(store.add(0))
        assert store.downloads == []
        assert leftovers(folder) == []

    def test_what_killed_downloads_left_goes_like_anything_else(self, folder, store):
        cache = ShardCache(folder, 2 * BYTES)
        shards = [store.add(number) for number in range(3)]
        part = folder / f"{shards[2].entry.sha256}.{BYTES}.part"
        part.write_bytes(b"half")
        last_used(part, 100)
        for shard in shards[:2]:
            read(cache, shard)
        assert kept(folder, shards) == [0, 1]
        assert leftovers(folder) == []

    def test_is_the_disks_where_that_has_less_room(self, folder, store, monkeypatch):
        """What others fill of a disk, the cache gives up of its own."""
        cache = ShardCache(folder, 100 * BYTES)
        shards = [store.add(number) for number in range(6)]
        monkeypatch.setattr(files, "free_bytes", lambda _: 3 * BYTES - taken(folder))
        for number, shard in enumerate(shards):
            assert read(cache, shard) == shard_bytes(number)
            last_used(file_of(cache, shard), 100 - number)
        assert kept(folder, shards) == [3, 4, 5]


class TestPrefetch:
    @pytest.fixture
    def one_by_one(self, monkeypatch):
        monkeypatch.setattr(shard_cache, "_PREFETCHING_THREADS", 1)

    def test_fetches_in_the_order_of_need(self, cache, folder, store, one_by_one):
        shards = [store.add(number) for number in range(6)]
        cache.prefetch([shards[number] for number in (3, 1, 5, 0)])
        wait_until(lambda: kept(folder, shards) == [0, 1, 3, 5])
        assert store.downloads == [3, 1, 5, 0]
        assert all(read(cache, shards[number]) == shard_bytes(number) for number in (3, 1, 5, 0))
        assert len(store.downloads) == 4

    def test_by_several_threads_downloads_each_shard_once(self, cache, folder, store):
        shards = [store.add(number) for number in range(20)]
        for number, shard in enumerate(shards):
            cache.prefetch(shards[number:])  # names what is on its way again and again
            assert read(cache, shard) == shard_bytes(number)
        wait_until(lambda: len(kept(folder, shards)) == 20 and not leftovers(folder))
        assert sorted(store.downloads) == list(range(20))

    def test_goes_on_with_what_was_named_last(self, cache, folder, store, one_by_one):
        shards = [store.add(number) for number in range(4)]
        began, go = threading.Event(), threading.Event()

        def wait(_):
            began.set()
            go.wait(DEADLINE)

        store.while_downloading = wait
        cache.prefetch(shards[:3])
        assert began.wait(DEADLINE)
        cache.prefetch(shards[3:])
        go.set()
        wait_until(lambda: kept(folder, shards) == [0, 3])
        assert store.downloads == [0, 3]

    def test_leaves_what_is_there(self, cache, folder, store):
        shards = [store.add(number) for number in range(2)]
        read(cache, shards[0])
        cache.prefetch(shards)
        wait_until(lambda: kept(folder, shards) == [0, 1])
        assert store.downloads == [0, 1]

    def test_makes_room_of_what_is_done_with_and_not_of_what_is_needed_next(self, folder, store):
        """What was fetched long ago for now was used less lately than what was read just before, and must stay."""
        cache = ShardCache(folder, 4 * BYTES)
        shards = [store.add(number) for number in range(6)]
        for number, seconds_ago in ((2, 80), (3, 70), (0, 20), (1, 10)):  # 0 and 1 were fetched first, and read since
            cache.fetch(shards[number])
            last_used(file_of(cache, shards[number]), seconds_ago)
        cache.prefetch(shards[2:])
        wait_until(lambda: kept(folder, shards) == [2, 3, 4, 5])
        assert sorted(store.downloads) == list(range(6))

    def test_leaves_an_error_to_whoever_needs_the_shard(self, cache, folder, store, one_by_one):
        shards = [store.add(number) for number in range(4)]
        store.memory.rm_file(shards[0].path)
        store.memory.pipe_file(shards[1].path, shard_bytes(9))
        cache.prefetch(shards)
        wait_until(lambda: kept(folder, shards) == [2, 3])
        with pytest.raises(ShardError, match=r"shard-0\.parquet is missing"):
            cache.open(shards[0])
        with pytest.raises(ShardError, match=r"shard-1\.parquet is not the file"):
            cache.open(shards[1])
        assert read(cache, shards[2]) == shard_bytes(2)

    def test_a_reader_waits_for_the_download_of_its_shard_that_is_under_way(self, cache, store):
        shard = store.add(0)
        began = threading.Event()

        def wait(_):
            began.set()
            time.sleep(0.3)

        store.while_downloading = wait
        cache.prefetch([shard])
        assert began.wait(DEADLINE)
        assert read(cache, shard) == shard_bytes(0)
        assert store.downloads == [0]


class TestRefusals:
    def test_the_folder_and_the_limit_come_from_the_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HARDNESS_CACHE", str(tmp_path / "a" / "b"))
        monkeypatch.setenv("HARDNESS_CACHE_GB", "0.5")
        cache = ShardCache.from_environment()
        assert (cache.folder, cache.limit) == (tmp_path / "a" / "b", 500_000_000)
        assert cache.folder.is_dir()

    def test_by_default_it_is_where_caches_are(self, tmp_path, monkeypatch):
        monkeypatch.delenv("HARDNESS_CACHE", raising=False)
        monkeypatch.delenv("HARDNESS_CACHE_GB", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        cache = ShardCache.from_environment()
        assert cache.folder.is_relative_to(tmp_path)
        assert cache.limit == 20_000_000_000

    def test_a_folder_in_a_store_is_an_error(self, monkeypatch):
        monkeypatch.setenv("HARDNESS_CACHE", "s3://bucket/cache")
        with pytest.raises(
            ConfigurationError, match="HARDNESS_CACHE=s3://bucket/cache: expected a folder on a local d"
        ):
            ShardCache.from_environment()

    @pytest.mark.parametrize("gigabytes", ["0", "-1", "nan", "inf", "20 GB", "", "1e-10"])
    def test_a_limit_that_is_none_is_an_error(self, tmp_path, monkeypatch, gigabytes):
        monkeypatch.setenv("HARDNESS_CACHE", str(tmp_path))
        monkeypatch.setenv("HARDNESS_CACHE_GB", gigabytes)
        with pytest.raises(ConfigurationError, match=f"HARDNESS_CACHE_GB={gigabytes}: expected"):
            ShardCache.from_environment()

    @pytest.mark.parametrize("below", ["", "cache"])
    def test_a_file_where_the_folder_should_be_is_an_error(self, tmp_path, below):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigurationError, match=r"cannot be cached in .*; HARDNESS_CACHE names another folder"):
            ShardCache(tmp_path / "file" / below, BYTES)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_may_not_be_written_to_is_an_error(self, tmp_path):
        tmp_path.chmod(0o555)
        with pytest.raises(ConfigurationError, match=r"cannot be cached in .*; HARDNESS_CACHE names another folder"):
            ShardCache(tmp_path, BYTES)
        tmp_path.chmod(0o755)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_one_that_may_no_longer_be_written_to_is_an_error_of_storage(self, cache, folder, store):
        folder.chmod(0o555)
        with pytest.raises(StorageError, match=r"cannot be cached in .*Permission denied.*; HARDNESS_CACHE names"):
            cache.open(store.add(0))
        folder.chmod(0o755)

    def test_a_folder_that_was_removed_is_made_again(self, cache, folder, store):
        first, second = store.add(0), store.add(1)
        read(cache, first)
        shutil.rmtree(folder)
        assert read(cache, second) == shard_bytes(1)
        assert read(cache, first) == shard_bytes(0)

    def test_a_run_that_needs_more_than_the_limit_is_refused(self, folder):
        cache = ShardCache(folder, 2_000_000)
        cache.require_room(2_000_000)
        with pytest.raises(ConfigurationError, match=r"2\.0 MB, and this run needs 2\.1 MB .*HARDNESS_CACHE_GB"):
            cache.require_room(2_100_000)

    def test_a_run_that_needs_more_than_the_disk_has_is_refused(self, folder, store, monkeypatch):
        cache = ShardCache(folder, 100 * BYTES)
        read(cache, store.add(0))
        monkeypatch.setattr(files, "free_bytes", lambda _: 2 * BYTES)
        cache.require_room(3 * BYTES)  # what is there may go
        with pytest.raises(ConfigurationError, match="make room, or name another folder by HARDNESS_CACHE"):
            cache.require_room(3 * BYTES + 1)

    def test_a_disk_that_fills_is_an_error_that_says_where(self, cache, folder, store):
        """As a disk that is full after so many bytes."""
        shard = store.add(0, 100_000)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(StorageError, match=rf"shard-0\.parquet cannot be copied to {folder}.*make room"):
                cache.open(shard)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert leftovers(folder) == []
        assert read(cache, shard) == shard_bytes(0, 100_000)


# Processes ------------------------------------------------------------------------------------------------------------

READER = """
import json, logging, os, sys
from pathlib import Path
from scorer.manifest import ShardEntry
from trainer.shard_cache import ShardCache, StoredShard

logging.basicConfig(level=logging.WARNING)
what, folder, limit, listed = json.load(sys.stdin)
cache = ShardCache(Path(folder), limit)
shards = [StoredShard(path, ShardEntry(**entry)) for path, entry in listed]
if what == "prefetch":
    cache.prefetch(shards)
    while not list(Path(folder).glob("*.part")):
        pass
    sys.exit()
for _ in range(2):
    for shard in shards:
        with cache.open(shard) as stream:
            assert len(stream.read()) == shard.entry.bytes
"""


def start_reader(what, folder, limit, shards):
    """A process of its own; it waits for its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", READER], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    listed = [(shard.path, asdict(shard.entry)) for shard in shards]
    process.stdin.write(json.dumps([what, str(folder), limit, listed]))
    process.stdin.close()
    process.stdin = None
    return process


@pytest.fixture
def put(bucket, s3_server):
    """Puts a shard into the bucket, past the weather."""

    def put(number, size=BYTES):
        shard = shard_at(f"s3://{bucket}", number, shard_bytes(number, size))
        s3_server.client().put_object(Bucket=bucket, Key=shard.entry.name, Body=shard_bytes(number, size))
        return shard

    return put


@pytest.mark.slow  # 8 s: processes that import s3fs
def test_processes_that_want_the_same_shards_at_once_download_each_once(folder, put, weather):
    shards = [put(number) for number in range(6)]
    weather.slow(delay=0.2)
    readers = [start_reader("read", folder, 100 * BYTES, shards) for _ in range(4)]
    for reader in readers:
        assert not reader.communicate(timeout=DEADLINE)[1]
        assert reader.returncode == 0
    assert weather.done["GET"] == 6
    assert kept(folder, shards) == list(range(6))
    assert leftovers(folder) == []


@pytest.mark.slow
def test_processes_that_share_too_small_a_cache_all_get_done_and_keep_to_its_limit(folder, put, weather):
    """Room for two shards, and four that read: files go while others are about to open them."""
    shards = [put(number) for number in range(4)]
    orders = [shards, shards[::-1], shards[2:] + shards[:2], shards]
    readers = [start_reader("read", folder, 2 * BYTES, order) for order in orders]
    most = 0
    while any(reader.poll() is None for reader in readers):
        with suppress(FileNotFoundError):
            most = max(most, taken(folder))
        time.sleep(0.002)
    for reader in readers:
        assert not reader.communicate()[1]
        assert reader.returncode == 0
    assert 0 < most <= 2 * BYTES
    assert leftovers(folder) == []


@pytest.mark.slow
def test_a_download_whose_process_was_killed_is_taken_over(folder, put, weather):
    shard, size = put(0, 400_000), 400_000
    weather.slow(bandwidth=50_000)
    reader = start_reader("read", folder, size, [shard])
    wait_until(lambda: any(path.stat().st_size for path in folder.glob("*.part")))
    reader.kill()
    assert reader.communicate()[0] is None
    assert reader.returncode == -signal.SIGKILL
    (part,) = leftovers(folder)
    assert 0 < (folder / part).stat().st_size < size
    weather.clear()
    assert read(ShardCache(folder, size), shard) == shard_bytes(0, size)  # the limit has room for it once
    assert leftovers(folder) == []
    assert weather.done["GET"] == 2


@pytest.mark.slow
def test_one_that_waits_for_a_process_that_is_killed_takes_its_download_over(folder, put, weather):
    shard, size = put(0, 400_000), 400_000
    weather.slow(bandwidth=50_000)
    first = start_reader("read", folder, size, [shard])
    wait_until(lambda: any(path.stat().st_size for path in folder.glob("*.part")))
    found = []
    second = threading.Thread(target=lambda: found.append(read(ShardCache(folder, size), shard)))
    second.start()
    second.join(0.5)
    assert not found
    weather.clear()
    first.kill()
    first.communicate()
    second.join(DEADLINE)
    assert found == [shard_bytes(0, size)]
    assert leftovers(folder) == []


@pytest.mark.slow
def test_a_process_that_ends_in_mid_prefetch_ends_at_once_and_says_nothing(folder, put, weather):
    shards = [put(number, 400_000) for number in range(8)]
    weather.slow(bandwidth=5_000)
    reader = start_reader("prefetch", folder, 10_000_000, shards)
    assert reader.communicate(timeout=DEADLINE)[1] == ""
    assert reader.returncode == 0
    assert kept(folder, shards) == []


class Shards(Dataset):
    """Reads a shard an item, and names those that follow."""

    def __init__(self, cache, shards):
        self.cache, self.shards = cache, shards

    def __len__(self):
        return len(self.shards)

    def __getitem__(self, index):
        self.cache.prefetch(self.shards[index:])
        return read(self.cache, self.shards[index])


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_cache_that_its_process_has_used_works_in_the_forks_of_a_loader(folder, put, weather, is_busy):
    """Threads and connections stay behind in the parent, also in the middle of a download."""
    cache, shards = ShardCache(folder, 100 * BYTES), [put(number) for number in range(12)]
    read(cache, shards[0])
    if is_busy:
        weather.slow(delay=0.1)
    cache.prefetch(shards[1:] if is_busy else shards[1:2])
    if not is_busy:
        wait_until(lambda: kept(folder, shards) == [0, 1])
    loader = DataLoader(Shards(cache, shards), batch_size=None, num_workers=2, timeout=DEADLINE)
    assert list(loader) == [shard_bytes(number) for number in range(12)]
    assert read(cache, shards[11]) == shard_bytes(11)
    assert weather.done["GET"] == 12


@pytest.mark.parametrize("name", [".lock", "0.part"])
def test_a_lock_does_not_outlive_its_holder_in_a_fork(tmp_path, name):
    """A fork has the open file too, and the lock with it until somebody gives it up by name."""
    with shard_cache._locked(tmp_path / name) as is_ours:
        assert is_ours
        child = os.fork()
        if not child:
            time.sleep(DEADLINE)
            os._exit(0)
    try:
        with shard_cache._locked(tmp_path / name, wait=False) as is_ours:
            assert is_ours
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
