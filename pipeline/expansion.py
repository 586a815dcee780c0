"""From what a user names as `--input` to files: folders, globs, and files that are spelled in several ways."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from scorer.errors import ConfigurationError
from scorer.files import looks_like_glob
from scorer.stores import connect


def expand(patterns: Iterable[str], suffixes: tuple[str, ...]) -> dict[str, int]:
    """Resolves files, folders and globs to files, in the order given, sorted within each, without repetition.

    A folder stands for every file below it whose name ends in one of `suffixes`. A local file that is spelled in two
    ways (`./b`, `a/../b`, through a link to its folder) is one file.

    Returns:
        Bytes of each file, by its path; from listings where there are any.

    Raises:
        ConfigurationError: a path is missing, or a glob or folder holds no file.
    """
    sizes: dict[str, int] = {}
    known: set[str] = set()
    folders: dict[str, tuple[str, str]] = {}
    for pattern in patterns:
        filesystem, stripped = connect(pattern)
        for path, size_ in sorted(_listed(filesystem, stripped, pattern, suffixes).items()):
            is_local_path = isinstance(filesystem, LocalFileSystem)
            spelled, real = _spellings(path, folders) if is_local_path else (filesystem.unstrip_protocol(path),) * 2
            if real not in known:
                known.add(real)
                sizes[spelled] = size_
    return sizes


def _listed(filesystem: Any, stripped: str, pattern: str, suffixes: tuple[str, ...]) -> dict[str, int]:
    """What one pattern stands for, with sizes."""
    if filesystem.isdir(stripped):
        found = {
            path: info
            for path, info in filesystem.find(stripped, detail=True).items()
            if path.lower().endswith(suffixes) and not _is_hidden(path.removeprefix(stripped))
        }
        lacking = f"the folder {pattern} holds no file that ends in {', '.join(suffixes)}"
    elif filesystem.exists(stripped) or not looks_like_glob(stripped):
        found = {stripped: filesystem.info(stripped)} if filesystem.exists(stripped) else {}
        lacking = f"there is no {pattern}: check the path"
    else:
        matches = filesystem.glob(stripped, detail=True).items()
        found = {path: info for path, info in matches if info["type"] == "file" or not filesystem.isdir(path)}
        lacking = f"no file matches {pattern}: check the folder and the pattern (and quote it for the shell)"
    if not found:
        raise ConfigurationError(lacking)
    try:
        # Listings call a link to nowhere an empty file, and some stores give no sizes.
        return {
            path: filesystem.size(path) if info.get("islink") or info["size"] is None else int(info["size"])
            for path, info in found.items()
        }
    except FileNotFoundError as error:
        raise ConfigurationError(f"{error.filename or error} is not there: is it a broken link?") from error


def _is_hidden(path: str) -> bool:
    """What begins with '_' or '.' is a job's own account or hidden, as every Parquet reader has it."""
    return any(name.startswith(("_", ".")) for name in path.split("/"))


def _spellings(path: str, folders: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """A local path without '.' and '..', and the path by which it is known however its folder was reached.

    `folders` remembers both for folders that were met before.
    """
    folder, name = os.path.split(path)
    if folder not in folders:
        plain, real = os.path.normpath(folder), os.path.realpath(folder)
        # Behind a link, '..' leads elsewhere than it reads.
        folders[folder] = (plain if os.path.realpath(plain) == real else real, real)
    plain, real = folders[folder]
    return os.path.join(plain, name), os.path.join(real, name)
