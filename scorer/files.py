"""Every path that a user can give passes through here, and from here through fsspec.

Local folders publish by a temporary file, fsync and a hard link that never overwrites; object stores by one
conditional upload to the final key. Readers therefore see a file whole or not at all, and the first writer wins.
What stores fail to answer in passing is asked again (`scorer.stores`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from scorer.errors import ConfigurationError, StorageError
from scorer.stores import connect

if TYPE_CHECKING:
    from scorer.compression import Compression

_CHUNK_BYTES = 1 << 20
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
"""What no other attempt at the same file would mend: no space, no permission, a broken disk."""
_REPLACE_ATTEMPTS = 3
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_READ_AT_ONCE = 256
_STALE_SECONDS = 6 * 3600.0
"""After which nobody uploads a file any more that was begun in a folder for temporary files."""


def local_path(path: str) -> str | None:
    """`path` as the operating system knows it, or None where it lies in an object store."""
    filesystem, stripped = connect(path)
    return stripped if isinstance(filesystem, LocalFileSystem) else None


def free_bytes(folder: str) -> int | None:
    """Free space of the disk that holds `folder` (or will hold it), or None where that is an object store."""
    path = local_path(folder)
    if path is None:
        return None
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def staging_folder(folder: str) -> str:
    """The local folder in which what is published in `folder` is made: itself, or one among the temporary files."""
    return local_path(folder) or os.path.join(tempfile.gettempdir(), f"hardness-masking-{os.getuid()}")


def sweep_staging(folder: str) -> None:
    """Removes what killed writers left on this machine of files that were to be published in a store."""
    if local_path(folder) is None:
        remove_temporaries(staging_folder(folder), _STALE_SECONDS)


def absolute(path: str) -> str:
    """The same place, whatever folder a process on whatever machine works in."""
    return local_path(path) or path


def looks_like_glob(path: str) -> bool:
    """Says whether a path may be a pattern; a name may look like one."""
    return _GLOB_CHARACTERS.search(path) is not None


def join(folder: str, *names: str) -> str:
    """Joins path or URL segments with '/'."""
    return "/".join([folder.removesuffix("/"), *names])


def exists(path: str) -> bool:
    """Says whether there is a file or folder at `path`."""
    filesystem, stripped = connect(path)
    return bool(filesystem.exists(stripped))


def is_folder(path: str) -> bool:
    """Says whether `path` is a folder."""
    filesystem, stripped = connect(path)
    return bool(filesystem.isdir(stripped))


def size(path: str) -> int:
    """Bytes of the file at `path`."""
    filesystem, stripped = connect(path)
    return int(filesystem.size(stripped))


def modified(path: str) -> float:
    """Seconds since the epoch at which `path` was last written."""
    filesystem, stripped = connect(path)
    return _modified(filesystem.info(stripped))


def names(folder: str) -> list[str]:
    """The sorted names of what lies directly in `folder`; empty where there is no such folder."""
    return sorted(listing(folder))


@dataclass(frozen=True)
class Entry:
    """A file or folder, as a listing has it."""

    bytes: int
    modified: float
    """Seconds since the epoch."""


def listing(folder: str) -> dict[str, Entry]:
    """What lies directly in `folder`, by name, from one request; empty where there is no such folder."""
    filesystem, stripped = connect(folder)
    try:
        found = filesystem.ls(stripped, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    entries = {str(info["name"]).rstrip("/"): Entry(int(info.get("size") or 0), _modified(info)) for info in found}
    entries.pop(stripped.rstrip("/"), None)  # a file, or an object that some tools make to stand for a folder
    return {name.rpartition("/")[2]: entry for name, entry in entries.items()}


def _modified(info: Mapping[str, Any]) -> float:
    """Each store has its own name for when an object was written."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
        if value is not None:
            return float(value)
    return 0.0


def open_binary(path: str, compression: Compression | None = None) -> BinaryIO:
    """Opens `path` for reading bytes, through a decompressor where `compression` names one.

    A decompressed stream cannot seek, and raises `ArchiveError` where the archive is cut or damaged.
    """
    filesystem, stripped = connect(path)
    stream = cast(BinaryIO, filesystem.open(stripped, "rb"))
    if compression is None:
        return stream
    from scorer.compression import decompressed  # noqa: PLC0415  (a machine that only scores or trains may lack it)

    return decompressed(stream, compression)


def read_bytes(path: str) -> bytes:
    """The whole content of a small file; of one that is just being replaced, the old or the new, and no mixture."""
    filesystem, stripped = connect(path)
    return bytes(filesystem.cat_file(stripped))


def read_many(paths: Iterable[str]) -> Iterator[bytes | None]:
    """The contents of many small files, in order; None where there is no such file.

    Of a store hundreds are asked for at once, since a request there is mostly waiting.
    """
    for some in _batches(paths, _READ_AT_ONCE):
        store, _ = connect(some[0])
        whole: Mapping[str, bytes | Exception] = {}
        if not isinstance(store, LocalFileSystem) and not looks_like_glob("".join(some)):  # cat takes patterns
            whole = store.cat([connect(path)[1] for path in some], on_error="return")
        for path in some:
            data = whole.get(connect(path)[1])
            try:
                yield data if isinstance(data, bytes) else read_bytes(path)
            except (FileNotFoundError, IsADirectoryError):
                yield None


def _batches(items: Iterable[str], count: int) -> Iterator[list[str]]:
    rest = iter(items)
    while batch := list(islice(rest, count)):
        yield batch


def read_json(path: str) -> Any:
    """Parses a small JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON.
    """
    return json.loads(read_bytes(path))


def to_json(value: Any) -> bytes:
    """The one JSON layout of this project: sorted keys, two spaces, UTF-8, a final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def sha256(path: str) -> tuple[str, int]:
    """The SHA-256 of a file as hex, and its length in bytes, read in pieces."""
    digest, length = hashlib.sha256(), 0
    with open_binary(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            length += len(chunk)
    return digest.hexdigest(), length


def make_folder(path: str) -> None:
    """Makes a folder and its parents; object stores have none and need none."""
    filesystem, stripped = connect(path)
    try:
        filesystem.makedirs(stripped, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"the folder {path} cannot be made: {error.strerror or error}") from error


def require_writable(folder: str) -> None:
    """Writes something small into a folder, and removes it.

    Raises:
        StorageError: that cannot be done.
    """
    path = join(folder, temporary_name("probe"))
    replace(path, b"")
    remove(path)


def put_folder(path: str, write: Callable[[str], object]) -> None:
    """Lets a library write a folder locally, and moves its files into place one by one, each whole."""
    make_folder(path)
    with tempfile.TemporaryDirectory() as scratch:
        write(scratch)
        for name in sorted(os.listdir(scratch)):
            replace(join(path, name), Path(scratch, name).read_bytes())


def publish(path: str, data: bytes) -> bool:
    """Writes `data` to `path` whole or not at all, and never over what is there.

    Returns:
        True if this call published; False if another writer was first (its file stays).

    Raises:
        FileNotFoundError: the temporary file vanished before it was linked (another driver finished and tidied up).
        StorageError: there is no space, or no permission.
    """
    with staged(path) as temporary:
        Path(temporary).write_bytes(data)
        # An upload whose answer was lost is made again, and finds itself.
        return publish_staged(temporary, path) or (local_path(path) is None and read_bytes(path) == data)


@contextmanager
def staged(path: str) -> Iterator[str]:
    """A local name under which to write what is to be published at `path`; nothing is left of it afterwards.

    It lies beside `path` where that is local, so that a link is enough to publish it.

    Raises:
        StorageError: what the body wrote did not fit, or was not allowed.
    """
    filesystem, stripped = connect(path)
    folder, name = os.path.split(stripped)
    is_local = isinstance(filesystem, LocalFileSystem)
    folder = folder if is_local else staging_folder(path)
    temporary = os.path.join(folder, temporary_name(name))
    try:
        if not is_local:
            os.makedirs(folder, mode=0o700, exist_ok=True)
        yield temporary
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        raise StorageError(
            f"{path} cannot be written: {os.strerror(error.errno)}"
            f"{'' if is_local else f' in {folder}, where it is made (TMPDIR names another folder)'}; make room or give "
            "permission, then run the same command again"
        ) from error
    finally:
        with suppress(OSError):  # without permission it stays, to be swept by a later run
            Path(temporary).unlink(missing_ok=True)


def publish_staged(temporary: str, path: str) -> bool:
    """Puts a file that was written under `staged(path)` into its place; what `publish` says holds for it too."""
    filesystem, stripped = connect(path)
    try:
        if not isinstance(filesystem, LocalFileSystem):
            _create(temporary, path)
            return True
        _sync(temporary)
        os.link(temporary, stripped)
    except FileExistsError:
        return False
    _sync(os.path.dirname(stripped) or ".")
    return True


def _create(temporary: str, path: str) -> None:
    """Uploads to a key that must be free; by one conditional request, where the store has such."""
    store, stripped = connect(path)
    try:
        store.put_file(temporary, stripped, mode="create")
    except (NotImplementedError, OSError) as error:
        if not isinstance(error, NotImplementedError) and error.errno != errno.ENOSYS:
            raise
        if store.exists(stripped):
            raise FileExistsError(path) from error
        store.put_file(temporary, stripped)


def keep_or_replace(path: str, pieces: Iterable[bytes]) -> None:
    """Like `replace`, from pieces that need not fit into memory; leaves a file alone that holds just that already."""
    with staged(path) as temporary:
        with open(temporary, "wb") as stream:
            stream.writelines(pieces)
        if not exists(path) or sha256(path) != sha256(temporary):
            _replace_by(temporary, path)


def replace(path: str, data: bytes) -> None:
    """Writes `data` to `path` whole or not at all, over what is there.

    Raises:
        StorageError: there is no space, no permission, or no longer a folder.
    """
    for _ in range(_REPLACE_ATTEMPTS):
        with staged(path) as temporary, suppress(FileNotFoundError):  # another driver finished and tidied up
            Path(temporary).write_bytes(data)
            _replace_by(temporary, path)
            return
    raise StorageError(f"{path} cannot be written: its folder is gone, or temporary files keep vanishing from it")


def _replace_by(temporary: str, path: str) -> None:
    filesystem, stripped = connect(path)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.put_file(temporary, stripped)
        return
    _sync(temporary)
    os.replace(temporary, stripped)
    _sync(os.path.dirname(stripped) or ".")


def set_aside(path: str) -> str:
    """Renames a damaged file to a name that no reader takes for a shard, and returns that name."""
    filesystem, stripped = connect(path)
    suffix = f".damaged-{uuid.uuid4().hex[:8]}"
    if isinstance(filesystem, LocalFileSystem):
        filesystem.mv(stripped, stripped + suffix)
    else:  # which cannot rename; and where the answer to a move is lost, a second one finds nothing to move
        filesystem.cp_file(stripped, stripped + suffix)
        remove(path)
    return path + suffix


def remove(path: str) -> None:
    """Removes a file if it is there.

    Raises:
        StorageError: there is no permission.
    """
    filesystem, stripped = connect(path)
    try:
        filesystem.rm_file(stripped)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{path} cannot be removed: {error.strerror or error}") from error


def remove_folder(path: str) -> None:
    """Removes a folder and all that is in it, if it is there."""
    filesystem, stripped = connect(path)
    with suppress(FileNotFoundError):
        if isinstance(filesystem, LocalFileSystem):
            filesystem.rm(stripped, recursive=True)
            return
        for file in filesystem.find(stripped):  # whose rm, and get, would take a '[' in the name for a pattern
            filesystem.rm_file(file)


def remove_temporaries(folder: str, older_than: float = 0.0) -> None:
    """Removes what killed writers left half-written directly in `folder`.

    Args:
        folder: a folder; nothing happens where there is none.
        older_than: seconds since something was last written to a file, from which on it counts as left.
    """
    for name in names(folder):
        path = join(folder, name)
        with suppress(FileNotFoundError):
            if is_temporary(name) and time.time() - modified(path) >= older_than:
                remove(path)


def temporary_name(name: str) -> str:
    """A name for an unfinished file, which no other writer has and no reader takes for anything."""
    return f".{name}.{uuid.uuid4().hex}.tmp"


def is_temporary(name: str) -> bool:
    """Says whether a name is one of `temporary_name`'s."""
    return name.startswith(".") and name.endswith(".tmp")


@contextmanager
def local_folder(folder: str) -> Iterator[str]:
    """Gives a local path for a folder: itself where it is local, else a temporary copy.

    For libraries that only read local paths (`from_pretrained`).
    """
    filesystem, stripped = connect(folder)
    if isinstance(filesystem, LocalFileSystem):
        yield stripped
        return
    with tempfile.TemporaryDirectory() as copy:
        download_folder(folder, copy)
        yield copy


def download(path: str, local: str) -> None:
    """Copies a file of a store, all of it, to a local path.

    Raises:
        FileNotFoundError: there is none.
        StorageError: there is no room for it.
    """
    store, stripped = connect(path)
    try:
        store.get_file(stripped, local)
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        folder = os.path.dirname(local)
        raise StorageError(
            f"{path} cannot be copied to {folder}: {os.strerror(error.errno)}; make room there"
        ) from error


def download_folder(folder: str, local: str) -> None:
    """Copies all files of a folder of a store to a local one.

    Raises:
        StorageError: there is no room for them.
    """
    store, stripped = connect(folder)
    root = stripped.rstrip("/") + "/"
    for path in store.find(stripped):
        if not path.startswith(root) or path.endswith("/"):
            continue  # an object that some tools make to stand for a folder
        name = path.removeprefix(root)
        target = os.path.join(local, *name.split("/"))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        download(join(folder, name), target)


def upload_folder(local: str, folder: str, skipped: Collection[str] = ()) -> None:
    """Copies all files of a local folder to one of a store, over what is there.

    Args:
        local: what to copy.
        folder: where to.
        skipped: what to leave out, by the names of files and folders directly in `local`.
    """
    store, stripped = connect(folder)
    for path in sorted(Path(local).rglob("*")):
        name = path.relative_to(local)
        if path.is_file() and name.parts[0] not in skipped:
            store.put_file(str(path), join(stripped, *name.parts))


def _sync(path: str) -> None:
    """Makes a file's data durable, or a folder's names: fsync of a file does not cover its directory entry."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
