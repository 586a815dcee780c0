"""Object stores, as farms have them: requests that fail in passing are made again, the others say what is wrong.

    passing     connections that are refused, reset or cut; time-outs; 429, 5xx          again, for PATIENCE_SECONDS
    refused     credentials, permission, a bucket that is not there to write to          `AccessError`, at once
    answers     FileNotFoundError, FileExistsError                                       as they are

Which is which has to be told by names: the libraries of the stores (`s3fs`, `gcsfs`) are extras, and none may be here.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from scorer.console import first_line
from scorer.errors import AccessError, ConfigurationError, StorageError

logger = logging.getLogger(__name__)

PATIENCE_VARIABLE = "HARDNESS_STORE_PATIENCE"
"""Environment variable: seconds for which a request that fails in passing is made again."""
PATIENCE_SECONDS = 120.0
_FIRST_PAUSE, _LONGEST_PAUSE, _PAUSE_GROWTH = 0.25, 15.0, 1.7
_BLOCK_BYTES = 8 << 20
"""What a reader asks for at a time: on S3 a request costs as much time as 2 MB."""

_S3_CONFIGURATION = {"retries": {"total_max_attempts": 1}, "read_timeout": 60}
"""One attempt a request, for these libraries would else wait through each other's patience, and ours. And a minute for
an answer: s3fs's 15 s are over before a slow line has carried what the system's buffers took of an upload."""
_PASSING_ERRNOS = (errno.EBUSY, errno.EAGAIN, getattr(errno, "EREMOTEIO", errno.EBUSY))
_PASSING_STATUSES = (408, 409, 425, 429)
_PASSING_CODES = ("BadDigest", "IncompleteBody", "NoSuchUpload", "RequestTimeout", "XAmzContentSHA256Mismatch")
"""S3's names for a body that was cut on its way, and for an upload whose answer was lost and that is over by now."""
_PASSING_ERRORS = (
    "aiohttp.ClientError",
    "botocore.ConnectionError",
    "botocore.HTTPClientError",
    "botocore.IncompleteReadError",
    "fsspec.FSTimeoutError",
    "gcsfs.ChecksumError",
    "google.TransportError",
    "requests.RequestException",
)
_REFUSING_ERRORS = (
    "botocore.CredentialRetrievalError",
    "botocore.NoCredentialsError",
    "botocore.PartialCredentialsError",
    "botocore.ProfileNotFound",
    "botocore.TokenRetrievalError",
    "google.GoogleAuthError",
)
_ADVICE = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
}

T = TypeVar("T")

_given_up_until: dict[str, float] = {}
"""By store, the time until which each of its requests has one attempt, after one was waited for in vain."""


def connect(path: str) -> tuple[Any, str]:
    """The filesystem of a path or URL, and the path as that filesystem has it.

    Stores are asked anew each time: what another machine has just written is in no listing that was kept.

    Raises:
        ConfigurationError: no such protocol, or its library is not installed.
    """
    protocol = path.partition("://")[0]
    options = {"config_kwargs": _S3_CONFIGURATION} if protocol in ("s3", "s3a") else {}
    try:
        filesystem, stripped = fsspec.core.url_to_fs(path, use_listings_cache=False, **options)
    except ImportError as error:
        extra = {"gs": "gcs", "gcs": "gcs"}.get(protocol, "s3" if protocol.startswith("s3") else None)
        way_out = f": pip install 'hardness-masking[{extra}]'" if extra else ""
        raise ConfigurationError(f"cannot reach {path}: {error}{way_out}") from error
    except ValueError as error:
        raise ConfigurationError(f"cannot reach {path}: {error}") from error
    if isinstance(filesystem, LocalFileSystem):
        return filesystem, str(stripped)
    return PatientFileSystem(filesystem, path), str(stripped)


class PatientFileSystem:
    """A store's fsspec filesystem, each call of which is made again while it fails in passing.

    Every call can be made twice: reads change nothing, a whole file is written by one request, and of a conditional
    one whose answer was lost the second says `FileExistsError`.
    """

    def __init__(self, filesystem: Any, url: str):
        """Wraps a filesystem; `url` is for messages."""
        self._filesystem = filesystem
        self._url = url

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._filesystem, name)
        if not callable(attribute):
            return attribute

        def call(*arguments: Any, **options: Any) -> Any:
            return self._patiently(lambda: attribute(*arguments, **options))

        return call

    def exists(self, path: str) -> bool:
        """Says whether there is a file or folder; an unreachable store is no answer."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def isdir(self, path: str) -> bool:
        """Says whether there is a folder."""
        try:
            return bool(self.info(path)["type"] == "directory")
        except FileNotFoundError:
            return False

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: stores have no folders, and a bucket is for its owner to make."""

    def open(self, path: str, mode: str = "rb") -> RangeFile:
        """Opens a file for reading, by ranges."""
        return RangeFile(self, path, mode, _BLOCK_BYTES, size=int(self.info(path)["size"]))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, all of them."""

        def read() -> bytes:
            data = bytes(self._filesystem.cat_file(path, start=start, end=end))
            if len(data) != end - start:
                raise ConnectionError(f"{len(data)} of {end - start} bytes came")
            return data

        return self._patiently(read)

    def get_file(self, path: str, local: str) -> None:
        """Downloads a file, all of it."""
        size = int(self.info(path)["size"])

        def get() -> None:
            self._filesystem.get_file(path, local)
            if os.path.getsize(local) != size:
                raise ConnectionError(f"{os.path.getsize(local)} of {size} bytes came")

        self._patiently(get)

    def put_file(self, local: str, path: str, mode: str = "overwrite") -> None:
        """Uploads a file by one request to its final key, or by several that the last one makes visible.

        Raises:
            FileExistsError: mode is "create", and another writer was first (or this one, and its answer was lost).
            AccessError: there is no such bucket.
        """

        def put() -> None:
            try:
                self._filesystem.put_file(local, path, mode=mode)
            except FileNotFoundError as error:
                if _is_passing(error) or not os.path.exists(local):
                    raise
                raise AccessError(f"{self._url} cannot be written: its bucket does not exist; make it first") from error

        self._patiently(put)

    def _patiently(self, call: Callable[[], T]) -> T:
        place = "/".join(self._url.split("/")[:3])  # a bucket
        # Who has waited for a store is not made to wait for it again at each step of giving up.
        patience = 0.0 if time.monotonic() < _given_up_until.get(place, 0.0) else _patience()
        for pause in _pauses(patience):
            try:
                result = call()
                _given_up_until.pop(place, None)
                return result
            except Exception as error:
                _raise_unless_passing(error, self._url)
                if pause is None:
                    _given_up_until[place] = time.monotonic() + _patience()
                    raise StorageError(
                        f"{self._url}: the store gave no answer for {_patience():.0f} s (last: {first_line(error)}). "
                        f"Run the same command again when it does; {PATIENCE_VARIABLE}=SECONDS waits longer"
                    ) from error
                if pause > _FIRST_PAUSE * _PAUSE_GROWTH:
                    logger.warning("%s: %s; trying again", self._url, first_line(error))
            time.sleep(pause)
        raise AssertionError("the last pause is None")


class RangeFile(AbstractBufferedFile):
    """A file of a store, open for reading: each range is asked for until all of it is there."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self.fs.read_range(self.path, start, min(end, self.size)))


def _patience() -> float:
    value = os.environ.get(PATIENCE_VARIABLE)
    try:
        return PATIENCE_SECONDS if value is None else float(value)
    except ValueError:
        raise ConfigurationError(f"{PATIENCE_VARIABLE}={value}: expected a number of seconds") from None


def _pauses(patience: float) -> Iterator[float | None]:
    """Seconds to wait after each attempt; None after the last one."""
    started, pause = time.monotonic(), _FIRST_PAUSE
    while time.monotonic() - started < patience:
        # A store that was down would else be met by all workers at once.
        yield pause * random.uniform(0.6, 1.0)
        pause = min(pause * _PAUSE_GROWTH, _LONGEST_PAUSE)
    yield None


def _raise_unless_passing(error: Exception, url: str) -> None:
    """Raises what another attempt would not mend."""
    if _is_passing(error):
        return
    code, status = _answer(error)
    if isinstance(error, FileExistsError) or code == "PreconditionFailed" or status == 412:
        raise FileExistsError(url) from error
    if isinstance(error, FileNotFoundError | AccessError) or status == 501:
        raise error
    is_answer = code is not None or status is not None or str(error).startswith("Forbidden")  # all that gcsfs says
    if is_answer or isinstance(error, PermissionError) or _is(error, _REFUSING_ERRORS):
        advice = _ADVICE.get(url.partition("://")[0], "those that its fsspec filesystem takes")
        raise AccessError(
            f"{url}: the store refuses ({first_line(error)}): check the path, the credentials ({advice}), and what "
            "they may do there"
        ) from error
    if isinstance(error, OSError):
        raise error
    raise StorageError(f"{url}: {type(error).__name__}: {first_line(error)}") from error


def _is_passing(error: Exception) -> bool:
    """Whether the same request may well succeed in a moment."""
    code, status = _answer(error)
    if code is not None or status is not None:
        is_server_error = status is not None and status >= 500 and status != 501  # not implemented
        return code in _PASSING_CODES or status in _PASSING_STATUSES or is_server_error
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNOS:
        return True
    return isinstance(error, ConnectionError | TimeoutError) or _is(error, _PASSING_ERRORS)


def _answer(error: BaseException) -> tuple[str | None, int | None]:
    """The store's own code and HTTP status, where it answered at all."""
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        if isinstance(response, dict):  # botocore's ClientError
            code = response.get("Error", {}).get("Code")
            return code, response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if _is(link, ("gcsfs.HttpError",)):
            return None, int(getattr(link, "code", None) or 0) or None
    return None, None


def _is(error: BaseException | None, names: tuple[str, ...]) -> bool:
    """Whether an error is of one of these classes: the package, and the name of a class that it derives from."""
    return any(f"{class_.__module__.partition('.')[0]}.{class_.__name__}" in names for class_ in type(error).__mro__)
