"""Shards of object stores, on a local disk for as long as they are needed.

    shard-00007-of-00042.parquet ──download──▶ <sha256>.<bytes>.part ──hash is right──▶ <sha256>.parquet ──▶ evicted

One folder a machine, shared by all processes and runs on it. A file is named by the hash that the manifest has for
it, so that folders and runs which share shards share files. Whoever holds the lock of a `.part` downloads it; it goes
with its process, however that ends. A `.part` takes the room of all its bytes from the beginning. Where there is no
more room, the files go that were used, or named as needed, longest ago; on Linux and macOS a file that is being read
stays until it is closed.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from scorer import files
from scorer.errors import ConfigurationError, HardnessError, ShardError, StorageError
from scorer.manifest import ShardEntry

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "HARDNESS_CACHE"
"""Environment variable: the folder of the cache."""
GIGABYTES_VARIABLE = "HARDNESS_CACHE_GB"
"""Environment variable: what the cache may take."""
DEFAULT_GIGABYTES = 20.0
NOT_LISTED = (
    "is not the file that the manifest lists (SHA-256 differs): run the command that wrote the folder again; it makes "
    "damaged shards anew"
)
"""Of a shard."""
_PREFETCHING_THREADS = 4
_DOWNLOAD_ATTEMPTS = 3
_LOCK_SECONDS = 0.2


@dataclass(frozen=True)
class StoredShard:
    """A shard in an object store, and what the manifest says of it."""

    path: str
    entry: ShardEntry


def cache_folder() -> Path:
    """The folder of this machine for copies of what lies in object stores.

    Raises:
        ConfigurationError: it is to be in one itself.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get(FOLDER_VARIABLE) or os.path.join(home, "hardness-masking")
    if "://" in folder:
        raise ConfigurationError(f"{FOLDER_VARIABLE}={folder}: expected a folder on a local disk")
    return Path(folder)


class ShardCache:
    """A bounded local folder of shards. Threads and processes may share it."""

    def __init__(self, folder: Path, limit: int):
        """Makes the folder.

        Args:
            folder: on a local disk.
            limit: bytes that it may take.

        Raises:
            ConfigurationError: it cannot be made or written to.
        """
        self.folder = folder
        self.limit = limit
        self._sound: set[str] = set()
        self._prefetcher: _Prefetcher | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.require_writable(str(folder))
        except (OSError, HardnessError) as error:
            raise ConfigurationError(
                f"shards of object stores cannot be cached in {folder}: {error}; {FOLDER_VARIABLE} names another folder"
            ) from error

    @classmethod
    def from_environment(cls) -> ShardCache:
        """The cache of this machine.

        Raises:
            ConfigurationError: its folder cannot be written to, or its limit is no number.
        """
        text = os.environ.get(GIGABYTES_VARIABLE, str(DEFAULT_GIGABYTES))
        try:
            limit = round(float(text) * 1e9)
        except (ValueError, OverflowError):
            limit = 0
        if limit <= 0:
            raise ConfigurationError(f"{GIGABYTES_VARIABLE}={text}: expected a number of gigabytes above 0")
        return cls(cache_folder(), limit)

    def require_room(self, needed: int) -> None:
        """Holds the cache to what a run has to keep at a time.

        Raises:
            ConfigurationError: its limit is lower, or its disk has less room.
        """
        if needed > self.limit:
            raise ConfigurationError(
                f"the shard cache in {self.folder} may take {self.limit / 1e6:,.1f} MB, and this run needs "
                f"{needed / 1e6:,.1f} MB of shards at a time: set {GIGABYTES_VARIABLE} higher"
            )
        there = sum(file.bytes for file in self._files())
        free = files.free_bytes(str(self.folder))
        if free is not None and free + there < needed:
            raise ConfigurationError(
                f"the disk of the shard cache {self.folder} has {free / 1e6:,.1f} MB free, and this run needs "
                f"{needed / 1e6:,.1f} MB of shards at a time: make room, or name another folder by {FOLDER_VARIABLE}"
            )

    def open(self, shard: StoredShard) -> BinaryIO:
        """Opens the local copy of a shard, which has the manifest's hash; fetches it first where it is not there.

        Raises:
            ShardError: what the store has is not the file in the manifest.
            StorageError: there is no room, or the store does not answer.
        """
        while True:
            stream = self._open_copy(shard.entry)
            if stream is not None:
                return stream
            self.fetch(shard)

    def prefetch(self, shards: Sequence[StoredShard]) -> None:
        """Names the shards that will be needed next, in that order; threads fetch them while others are read.

        Those that are there already count as used: else they would go before what has been read and is done with.
        """
        now = time.time_ns()
        for place, shard in enumerate(shards):
            with suppress(OSError):
                os.utime(self._path(shard.entry), ns=(now - place, now - place))
        if self._prefetcher is None or not self._prefetcher.is_here:  # a loader's fork has no threads
            self._prefetcher = _Prefetcher(self)
        self._prefetcher.want(shards)

    def holds(self, entry: ShardEntry) -> bool:
        """Says whether there is a file of a shard; `open` looks at its bytes."""
        return self._path(entry).exists()

    def fetch(self, shard: StoredShard, wait: bool = True) -> None:
        """Downloads a shard, unless it is there.

        Args:
            shard: which.
            wait: for another process that is at it, and for room that other downloads take; else it is left undone.

        Raises:
            ShardError: what the store has is not the file in the manifest.
            ConfigurationError: the shard alone is more than the cache may take.
            StorageError: there is no room, or the store does not answer.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # whoever wants room removes folders like this one
            while not self._try_to_fetch(shard, wait) and wait:
                time.sleep(_LOCK_SECONDS)
        except OSError as error:
            raise StorageError(
                f"{shard.path} cannot be cached in {self.folder}: {error}; {FOLDER_VARIABLE} names another folder"
            ) from error

    def _try_to_fetch(self, shard: StoredShard, wait: bool) -> bool:
        """Says whether the shard is there now."""
        part = self.folder / f"{shard.entry.sha256}.{shard.entry.bytes}.part"
        with _locked(part, wait) as is_ours:
            if not is_ours:
                return False
            if self.holds(shard.entry):
                part.unlink()
                return True
            try:
                self.require_room(shard.entry.bytes)
                if not self._make_room(part):
                    return False
                self._download(shard, part)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            self._sound.add(shard.entry.sha256)
            os.replace(part, self._path(shard.entry))
            return True

    def _download(self, shard: StoredShard, part: Path) -> None:
        for _ in range(_DOWNLOAD_ATTEMPTS):
            try:
                files.download(shard.path, str(part))
            except FileNotFoundError as error:
                raise ShardError(
                    f"{shard.path} is missing, and the manifest lists it: run the command that wrote the folder again"
                ) from error
            if files.sha256(str(part))[0] == shard.entry.sha256:
                return
            logger.warning("%s came with other bytes than the manifest's; fetching it again", shard.path)
        raise ShardError(f"{shard.path} {NOT_LISTED}")

    def _path(self, entry: ShardEntry) -> Path:
        return self.folder / f"{entry.sha256}.parquet"

    def _open_copy(self, entry: ShardEntry) -> BinaryIO | None:
        """The copy if there is one; what was not downloaded by this process is hashed at its first use."""
        path = self._path(entry)
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            return None
        with suppress(OSError):  # it was removed, or is another user's
            os.utime(path)
        if entry.sha256 not in self._sound:
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
                logger.warning("%s was damaged since it was fetched; fetching it again", path)
                stream.close()
                path.unlink(missing_ok=True)
                return None
            self._sound.add(entry.sha256)
            stream.seek(0)
        return stream

    def _make_room(self, part: Path) -> bool:
        """Removes what was used longest ago until all that is there, and all that is on its way, has room.

        Where other downloads leave none, `part` goes: of several that find so, one is the last, and has room.

        Returns:
            Whether there is room within the limit. If the disk has less, downloading will tell.
        """
        with _locked(self.folder / ".lock"):
            there = sorted(self._files(), key=lambda file: file.used)
            excess = sum(file.claim for file in there) - self.limit
            free = files.free_bytes(str(self.folder))
            lacking = 0 if free is None else sum(file.claim - file.bytes for file in there) - free
            for file in there:
                if max(excess, lacking) <= 0:
                    break
                if _remove(file.path):
                    excess -= file.claim
                    lacking -= file.claim
            if excess > 0:
                part.unlink()
            return excess <= 0

    def _files(self) -> Iterator[_File]:
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.name.endswith((".parquet", ".part")):
                    status = entry.stat()
                    claim = entry.name.split(".")[1]
                    whole = int(claim) if claim.isdigit() else 0
                    yield _File(Path(entry.path), status.st_mtime_ns, status.st_size, max(status.st_size, whole))


@dataclass(frozen=True)
class _File:
    """A file of the cache."""

    path: Path
    used: int
    """When it was used last, in nanoseconds."""
    bytes: int
    claim: int
    """Bytes that it will have."""


class _Prefetcher:
    """Threads of one process that fetch what will be needed. They end with it, in the middle of whatever they do."""

    def __init__(self, cache: ShardCache):
        self._cache = cache
        self._pid = os.getpid()
        self._wanted: deque[StoredShard] = deque()
        self._changed = threading.Condition()
        for number in range(_PREFETCHING_THREADS):
            threading.Thread(target=self._work, name=f"prefetch-{number}", daemon=True).start()

    @property
    def is_here(self) -> bool:
        """Whether its threads are this process's."""
        return self._pid == os.getpid()

    def want(self, shards: Sequence[StoredShard]) -> None:
        """Replaces what is to be fetched."""
        with self._changed:
            self._wanted = deque(shard for shard in shards if not self._cache.holds(shard.entry))
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted)
                shard = self._wanted.popleft()
            # Whoever needs the shard will meet the same error, and say it.
            with suppress(HardnessError, OSError):
                self._cache.fetch(shard, wait=False)


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a file's lock, which its process's death frees; yields False where another has it and `wait` is off."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(descriptor, wait):
                yield False
                return
            try:
                if _is_at(descriptor, path):  # else it was renamed or removed by the one before
                    yield True
                    return
            finally:  # closing alone would leave it to a process that was forked meanwhile
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    """Takes a lock. Waits in short turns, so that Ctrl-C is heard on every system."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not wait:
                return False
            time.sleep(_LOCK_SECONDS)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> bool:
    """Removes a file, unless it is a download that is going on."""
    if path.suffix != ".part":
        path.unlink(missing_ok=True)
        return True
    with _locked(path, wait=False) as is_ours:
        if is_ours:
            path.unlink(missing_ok=True)
        return is_ours
