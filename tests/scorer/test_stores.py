"""Which failures of an object store are waited out, which end the command, and what is said of them."""

import errno
import logging
import os

import aiohttp
import botocore.exceptions
import pytest
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.errors import translate_boto_error

from scorer import files, stores
from scorer.errors import AccessError, ConfigurationError, HardnessError, StorageError

ENDPOINT = "http://127.0.0.1:1"


def answer(code, status, **more):
    """What s3fs makes of an S3 server's answer."""
    response = {"Error": {"Code": code, "Message": f"the store said {code}"} | more}
    response["ResponseMetadata"] = {"HTTPStatusCode": status}
    return translate_boto_error(botocore.exceptions.ClientError(response, "Operation"))


class HttpError(Exception):
    """gcsfs's, as far as it matters here."""

    __module__ = "gcsfs.retry"

    def __init__(self, code):
        super().__init__(f"an answer, {code}")
        self.code = code


class GoogleAuthError(Exception):
    __module__ = "google.auth.exceptions"


PASSING = [
    ConnectionResetError("Connection reset by peer"),
    TimeoutError("timed out"),
    FSTimeoutError(),
    OSError(errno.EBUSY, "Please reduce your request rate."),
    aiohttp.ClientPayloadError("Response payload is not completed"),
    botocore.exceptions.EndpointConnectionError(endpoint_url=ENDPOINT),
    botocore.exceptions.ReadTimeoutError(endpoint_url=ENDPOINT),
    botocore.exceptions.ResponseStreamingError(error="cut"),
    answer("SlowDown", 503),
    answer("InternalError", 500),
    answer("502", 502),
    answer("TooManyRequests", 429),
    answer("ConditionalRequestConflict", 409),
    answer("RequestTimeout", 400),
    answer("BadDigest", 400),
    answer("NoSuchUpload", 404),
    HttpError(503),
    HttpError(429),
]
REFUSING = [
    PermissionError("Access Denied."),
    OSError("Forbidden: https://storage.googleapis.com/b/a"),
    botocore.exceptions.NoCredentialsError(),
    botocore.exceptions.ProfileNotFound(profile="nobody"),
    answer("AccessDenied", 403),
    answer("InvalidAccessKeyId", 403),
    answer("SignatureDoesNotMatch", 403),
    answer("ExpiredToken", 400),
    answer("SomethingNew", 400),
    HttpError(401),
    GoogleAuthError("no credentials"),
]


def named(errors):
    return [pytest.param(error, id=f"{type(error).__name__} {error}"[:60]) for error in errors]


@pytest.fixture
def clock(monkeypatch):
    """Time goes on by sleeping only: [seconds]."""
    now = [0.0]
    monkeypatch.setattr(stores.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stores.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


@pytest.fixture
def store(monkeypatch, clock):
    """A store with a file of ten bytes, whose next calls of some method fail: store(method, errors)."""
    monkeypatch.delenv(stores.PATIENCE_VARIABLE, raising=False)
    monkeypatch.setattr(stores, "_given_up_until", {})
    MemoryFileSystem().pipe("/bucket/a", b"0123456789")
    calls = []

    def fail(method, errors):
        left, real = errors, getattr(MemoryFileSystem, method)

        def call(self, *arguments, **options):
            calls.append(arguments)
            if left:
                raise left.pop(0)
            return real(self, *arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, method, call)
        return calls

    yield fail
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("error", named(PASSING))
def test_what_fails_in_passing_is_asked_again(store, error):
    calls = store("cat_file", [error] * 4)
    assert files.read_bytes("memory://bucket/a") == b"0123456789"
    assert len(calls) == 5


@pytest.mark.parametrize("error", named(PASSING[:3]))
def test_every_kind_of_request_is_asked_again(store, error, tmp_path):
    store("info", [error])
    assert files.size("memory://bucket/a") == 10
    store("ls", [error])
    assert files.names("memory://bucket") == ["a"]
    store("put_file", [error])
    assert files.publish("memory://bucket/b", b"b")
    store("get_file", [error])
    files.download("memory://bucket/b", str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == b"b"
    store("rm_file", [error])
    files.remove("memory://bucket/b")
    assert not files.exists("memory://bucket/b")


@pytest.mark.parametrize("error", named(REFUSING))
def test_a_refusal_is_said_at_once(store, error):
    calls = store("info", [error] * 99)
    with pytest.raises(
        AccessError, match=r"memory://bucket/a: the store refuses \(.*\): check the path, the cred"
    ) as e:
        files.size("memory://bucket/a")
    assert e.value.exit_code == 2
    assert len(calls) == 1


def test_advice_is_that_of_the_store():
    with pytest.raises(AccessError, match="AWS_ACCESS_KEY_ID"):
        stores._raise_unless_passing(PermissionError("no"), "s3://bucket/a")
    with pytest.raises(AccessError, match="GOOGLE_APPLICATION_CREDENTIALS"):
        stores._raise_unless_passing(PermissionError("no"), "gs://bucket/a")


def test_patience_ends_after_two_minutes_with_the_last_error(store, clock, caplog):
    store("info", [ConnectionRefusedError("nobody listens")] * 1000)
    with (
        caplog.at_level(logging.WARNING, logger="scorer.stores"),
        pytest.raises(StorageError, match=r"memory://bucket/a: the store gave no answer for 120 s \(last: nobody list"),
    ):
        files.size("memory://bucket/a")
    assert 120 <= clock[0] < 135 + 1
    assert all("nobody listens; trying again" in record.message for record in caplog.records)
    assert 5 < len(caplog.records) < 25


def test_who_has_waited_in_vain_does_not_wait_again_until_the_store_answers(store, clock):
    calls = store("info", [ConnectionRefusedError("nobody listens")] * 1000)
    for _ in range(3):
        with pytest.raises(StorageError):
            files.size("memory://bucket/a")
    assert clock[0] < 136  # the first one's patience
    del calls[:]
    clock[0] += 121
    with pytest.raises(StorageError):
        files.size("memory://bucket/a")
    assert len(calls) > 5


def test_an_answer_gives_patience_back(store, clock):
    errors = [ConnectionRefusedError("nobody listens")] * 1000
    store("info", errors)
    with pytest.raises(StorageError):
        files.size("memory://bucket/a")
    assert files.names("memory://bucket") == ["a"]
    before = clock[0]
    errors[:] = errors[:3]
    assert files.size("memory://bucket/a") == 10
    assert clock[0] > before


@pytest.mark.parametrize(("patience", "attempts"), [("0", 1), ("0.1", 2)])
def test_patience_can_be_set(store, monkeypatch, patience, attempts):
    monkeypatch.setenv(stores.PATIENCE_VARIABLE, patience)
    calls = store("info", [ConnectionRefusedError("nobody listens")] * 1000)
    with pytest.raises(StorageError, match=f"{stores.PATIENCE_VARIABLE}=SECONDS waits longer"):
        files.size("memory://bucket/a")
    assert len(calls) == attempts


def test_patience_that_is_no_number_is_refused(store, monkeypatch):
    monkeypatch.setenv(stores.PATIENCE_VARIABLE, "long")
    with pytest.raises(ConfigurationError, match=f"{stores.PATIENCE_VARIABLE}=long: expected a number of seconds"):
        files.size("memory://bucket/a")


def test_a_range_that_comes_short_is_asked_for_again(store, monkeypatch):
    real, shorts = MemoryFileSystem.cat_file, [3, 0, 9]

    def cut(self, path, start=None, end=None, **options):
        data = real(self, path, start=start, end=end, **options)
        return data[: shorts.pop()] if shorts else data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cut)
    with files.open_binary("memory://bucket/a") as stream:
        assert stream.read() == b"0123456789"
    assert not shorts


def test_a_download_that_comes_short_is_made_again(store, monkeypatch, tmp_path):
    shorts = [3, 0]

    def cut(self, path, local, **_):
        with open(local, "wb") as stream:
            stream.write(b"0123456789"[: shorts.pop() if shorts else None])

    monkeypatch.setattr(MemoryFileSystem, "get_file", cut)
    files.download("memory://bucket/a", str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_download_without_room_says_so(store, tmp_path):
    store("get_file", [OSError(errno.ENOSPC, "No space left on device")])
    with pytest.raises(StorageError, match=rf"memory://bucket/a cannot be copied to {tmp_path}: No space left on dev"):
        files.download("memory://bucket/a", str(tmp_path / "a"))


def test_a_file_that_is_not_there_stays_an_answer(store):
    with pytest.raises(FileNotFoundError):
        files.read_bytes("memory://bucket/nothing")
    assert not files.exists("memory://bucket/nothing")


@pytest.mark.parametrize("code", ["PreconditionFailed", "412"])
def test_a_key_that_is_taken_is_the_first_writers(store, code):
    """Some servers leave out what s3fs tells a taken key by."""
    store("put_file", [answer(code, 412)])
    assert not files.publish("memory://bucket/a", b"other")
    assert files.read_bytes("memory://bucket/a") == b"0123456789"


def test_an_upload_whose_answer_was_lost_counts_as_published(store, monkeypatch):
    real, lost = MemoryFileSystem.put_file, [True]

    def put(self, local, path, **options):
        real(self, local, path, **options)
        if lost:
            raise ConnectionResetError(lost.pop())

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    assert files.publish("memory://bucket/mine", b"mine")
    assert not lost


def test_a_store_without_conditional_uploads_is_looked_at_first(store):
    not_implemented = answer("NotImplemented", 501)
    store("put_file", [not_implemented])
    assert files.publish("memory://bucket/b", b"b")
    store("put_file", [not_implemented])
    assert not files.publish("memory://bucket/a", b"other")
    assert files.read_bytes("memory://bucket/a") == b"0123456789"


def test_a_bucket_that_is_missing_is_said_where_something_is_written(store):
    store("put_file", [answer("NoSuchBucket", 404)])
    with pytest.raises(AccessError, match="memory://bucket/b cannot be written: its bucket does not exist; make it fi"):
        files.replace("memory://bucket/b", b"b")


def test_what_a_library_stumbles_over_names_the_url(store):
    store("info", [RuntimeError("a bug in there")])
    with pytest.raises(HardnessError, match="memory://bucket/a: RuntimeError: a bug in there"):
        files.size("memory://bucket/a")


@pytest.mark.parametrize(("url", "library", "extra"), [("s3://b/a", "s3fs", "s3"), ("gs://b/a", "gcsfs", "gcs")])
def test_a_library_that_is_missing_is_named_with_the_extra_that_brings_it(monkeypatch, url, library, extra):
    def fail(path, **_):
        raise ImportError(f"Install {library}")

    monkeypatch.setattr(stores.fsspec.core, "url_to_fs", fail)
    with pytest.raises(
        ConfigurationError, match=rf"{url}: Install {library}: pip install 'hardness-masking\[{extra}\]"
    ):
        files.exists(url)


def test_many_small_files_come_in_order_with_none_for_those_that_are_missing(store):
    for number in range(0, 600, 2):
        MemoryFileSystem().pipe(f"/bucket/{number}", str(number).encode())
    found = list(files.read_many(f"memory://bucket/{number}" for number in range(600)))
    assert found == [str(number).encode() if number % 2 == 0 else None for number in range(600)]


def test_of_many_files_those_that_fail_in_passing_are_asked_for_again(store):
    MemoryFileSystem().pipe("/bucket/b", b"b")
    store("cat_file", [ConnectionResetError("reset")])
    assert list(files.read_many(["memory://bucket/a", "memory://bucket/b"])) == [b"0123456789", b"b"]


def test_folders_go_up_and_down_whole(tmp_path, store):
    for name in ("a", "b/c", "b/d/e", "skipped/f"):
        path = tmp_path / "up" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    files.upload_folder(str(tmp_path / "up"), "memory://bucket/folder", skipped={"skipped"})
    files.download_folder("memory://bucket/folder", str(tmp_path / "down"))
    found = {path.relative_to(tmp_path / "down").as_posix(): path for path in (tmp_path / "down").rglob("*")}
    assert {name: path.read_text() for name, path in found.items() if path.is_file()} == {
        name: name for name in ("a", "b/c", "b/d/e")
    }


def test_what_a_killed_writer_was_to_upload_is_swept_when_it_is_old(store, tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    with files.staged("memory://bucket/shard") as temporary:
        young = temporary + ".x.tmp"
        for path, age in ((temporary, 7 * 3600), (young, 60)):
            with open(path, "wb"):
                os.utime(path, (os.path.getmtime(path) - age,) * 2)
        files.sweep_staging("memory://bucket")
        assert not os.path.exists(temporary)
        assert os.path.exists(young)


def test_a_folder_for_temporary_files_that_cannot_be_made_is_said(store, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(files.os, "makedirs", refuse)
    with pytest.raises(StorageError, match=f"memory://bucket/b cannot be written: Permission denied in {tmp_path}"):
        files.publish("memory://bucket/b", b"b")
