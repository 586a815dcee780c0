"""The S3 server of the tests is one in what matters here, and the weather strikes as often as it says."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, HTTPClientError, IncompleteReadError
from urllib3.exceptions import ProtocolError

from tests.object_store import S3Server, Weather

LOST = (HTTPClientError, EndpointConnectionError, IncompleteReadError, ConnectionError, ProtocolError)
BODY = bytes(range(256)) * 1024
OWNER = """
import sys, time
from pathlib import Path
from tests.object_store import S3Server
server = S3Server(Path(sys.argv[1]))
server.start()
print(server._process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def near(s3_server: S3Server, bucket: str) -> Any:
    """A client of the server itself."""
    return s3_server.client()


@pytest.fixture
def far(s3_server: S3Server, weather: Weather) -> Any:
    """A client that goes through the weather, and tries everything once."""
    return s3_server.client(weather.endpoint)


@pytest.fixture
def durable(s3_server: S3Server) -> S3Server:
    if not s3_server.is_durable:
        pytest.skip("moto's data does not outlive it: run `make s3-server`")
    return s3_server


def read(client: Any, bucket: str, key: str) -> bytes:
    return client.get_object(Bucket=bucket, Key=key)["Body"].read()


def code_of(call: Callable[..., Any], **arguments: Any) -> str:
    with pytest.raises(ClientError) as error:
        call(**arguments)
    return error.value.response["Error"]["Code"]


def test_what_was_put_is_read_and_listed(near: Any, bucket: str) -> None:
    near.put_object(Bucket=bucket, Key="a/b", Body=BODY)
    assert read(near, bucket, "a/b") == BODY
    assert near.get_object(Bucket=bucket, Key="a/b", Range="bytes=256-511")["Body"].read() == bytes(range(256))
    assert [found["Key"] for found in near.list_objects_v2(Bucket=bucket, Prefix="a/")["Contents"]] == ["a/b"]
    assert code_of(near.get_object, Bucket=bucket, Key="c") == "NoSuchKey"


def test_a_second_conditional_put_is_refused(near: Any, bucket: str) -> None:
    near.put_object(Bucket=bucket, Key="a", Body=b"first", IfNoneMatch="*")
    assert code_of(near.put_object, Bucket=bucket, Key="a", Body=b"2", IfNoneMatch="*") == "PreconditionFailed"
    assert read(near, bucket, "a") == b"first"


def test_a_second_conditional_end_of_an_upload_in_parts_is_refused(near: Any, bucket: str) -> None:
    def upload(body: bytes) -> dict[str, Any]:
        upload = near.create_multipart_upload(Bucket=bucket, Key="a")["UploadId"]
        part = near.upload_part(Bucket=bucket, Key="a", UploadId=upload, PartNumber=1, Body=body)
        parts = {"Parts": [{"ETag": part["ETag"], "PartNumber": 1}]}
        return {"Bucket": bucket, "Key": "a", "UploadId": upload, "MultipartUpload": parts, "IfNoneMatch": "*"}

    first, second = upload(b"first"), upload(b"second")
    near.complete_multipart_upload(**first)
    assert code_of(near.complete_multipart_upload, **second) == "PreconditionFailed"
    assert read(near, bucket, "a") == b"first"


def test_s3fs_finds_the_server_by_its_environment(bucket: str, weather: Weather) -> None:
    with fsspec.open(f"s3://{bucket}/a", "wb") as file:
        file.write(BODY)
    assert fsspec.open(f"s3://{bucket}/a").open().read() == BODY
    assert weather.done["PUT"] == 1


def test_data_outlives_a_kill(durable: S3Server, bucket: str, near: Any) -> None:
    near.put_object(Bucket=bucket, Key="a", Body=BODY)
    endpoint = durable.endpoint
    durable.kill()
    assert not durable.is_up
    with pytest.raises(LOST):
        durable.client().head_bucket(Bucket=bucket)
    durable.start()
    assert durable.endpoint == endpoint
    assert read(near, bucket, "a") == BODY


@pytest.mark.slow
def test_the_server_ends_with_a_process_that_was_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    server = psutil.Process(int(owner.stdout.readline()))
    assert server.is_running()
    owner.kill()
    owner.communicate()
    psutil.wait_procs([server], timeout=60)
    assert not server.is_running()


def test_whoever_may_only_read_cannot_write(
    durable: S3Server, bucket: str, near: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    near.put_object(Bucket=bucket, Key="a", Body=BODY)
    environment = durable.read_only_environment(bucket)
    assert environment is not None
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem("s3")
    assert files.ls(bucket) == [f"{bucket}/a"]
    assert files.cat(f"{bucket}/a") == BODY
    with pytest.raises(PermissionError):
        files.pipe(f"{bucket}/a", b"")
    with pytest.raises(PermissionError):
        files.rm_file(f"{bucket}/a")
    assert read(near, bucket, "a") == BODY


def test_fair_weather_changes_nothing(far: Any, bucket: str, weather: Weather) -> None:
    for size in (0, 1, len(BODY)):
        far.put_object(Bucket=bucket, Key=f"{size}", Body=BODY[:size])
        assert read(far, bucket, f"{size}") == BODY[:size]
        assert far.head_object(Bucket=bucket, Key=f"{size}")["ContentLength"] == size
    far.delete_object(Bucket=bucket, Key="0")
    assert len(far.list_objects_v2(Bucket=bucket)["Contents"]) == 2
    assert weather.done["requests"] == 11
    assert not {"outages", "delays", *Weather.FAULTS} & set(weather.done)


def test_every_second_connection_is_reset(s3_server: S3Server, bucket: str, weather: Weather) -> None:
    weather.every(resets=2)
    for is_struck in (False, True, False, True):
        client = s3_server.client(weather.endpoint)
        if is_struck:
            with pytest.raises(LOST):
                client.head_bucket(Bucket=bucket)
        else:
            client.head_bucket(Bucket=bucket)
    assert (weather.done["resets"], weather.done["connections"]) == (2, 4)


def test_every_second_request_is_dropped(far: Any, near: Any, bucket: str, weather: Weather) -> None:
    weather.every(drops=2)
    for turn, is_struck in enumerate((False, True, False, True)):
        if is_struck:
            with pytest.raises(LOST):
                far.put_object(Bucket=bucket, Key=f"{turn}", Body=BODY)
        else:
            far.put_object(Bucket=bucket, Key=f"{turn}", Body=BODY)
    assert weather.done["drops"] == 2
    assert [found["Key"] for found in near.list_objects_v2(Bucket=bucket)["Contents"]] == ["0", "2"]


def test_every_second_body_is_cut_short(far: Any, bucket: str, weather: Weather) -> None:
    far.put_object(Bucket=bucket, Key="a", Body=BODY)
    weather.every(cuts=2)
    for is_struck in (False, True, False, True):
        if is_struck:
            with pytest.raises(LOST):
                read(far, bucket, "a")
        else:
            assert read(far, bucket, "a") == BODY
    assert weather.done["cuts"] == 2


def test_every_second_request_is_answered_by_slow_down(far: Any, near: Any, bucket: str, weather: Weather) -> None:
    weather.every(slow_downs=2)
    far.put_object(Bucket=bucket, Key="a", Body=BODY)
    assert code_of(far.put_object, Bucket=bucket, Key="a", Body=b"second") == "SlowDown"
    assert read(far, bucket, "a") == BODY
    assert code_of(far.get_object, Bucket=bucket, Key="a") == "SlowDown"
    assert far.head_object(Bucket=bucket, Key="a")["ContentLength"] == len(BODY)
    assert code_of(far.head_object, Bucket=bucket, Key="a") == "503"
    assert weather.done["slow_downs"] == 3
    assert read(near, bucket, "a") == BODY


def test_a_put_whose_answer_is_lost_has_its_effect(far: Any, near: Any, bucket: str, weather: Weather) -> None:
    weather.every(lost_puts=2)
    for turn, is_struck in enumerate((False, True, False, True)):
        key, body = f"{turn}", BODY[turn:]
        if is_struck:
            with pytest.raises(LOST):
                far.put_object(Bucket=bucket, Key=key, Body=body)
        else:
            far.put_object(Bucket=bucket, Key=key, Body=body)
        assert read(near, bucket, key) == body
    assert weather.done["lost_puts"] == 2


def test_a_refused_put_is_none_whose_answer_could_be_lost(far: Any, bucket: str, weather: Weather) -> None:
    far.put_object(Bucket=bucket, Key="a", Body=b"", IfNoneMatch="*")
    weather.every(lost_puts=1)
    assert code_of(far.put_object, Bucket=bucket, Key="a", Body=b"", IfNoneMatch="*") == "PreconditionFailed"
    assert weather.done["lost_puts"] == 0


def test_an_upload_in_parts_whose_last_answer_is_lost_has_ended(
    far: Any, near: Any, bucket: str, weather: Weather
) -> None:
    weather.every(lost_posts=2)  # the first begins the upload
    upload = far.create_multipart_upload(Bucket=bucket, Key="a")["UploadId"]
    part = far.upload_part(Bucket=bucket, Key="a", UploadId=upload, PartNumber=1, Body=BODY)
    parts = {"Parts": [{"ETag": part["ETag"], "PartNumber": 1}]}
    with pytest.raises(LOST):
        far.complete_multipart_upload(Bucket=bucket, Key="a", UploadId=upload, MultipartUpload=parts)
    assert weather.done["lost_posts"] == 1
    assert read(near, bucket, "a") == BODY


def test_slow_weather_takes_its_time(far: Any, bucket: str, weather: Weather) -> None:
    """Lower bounds alone: what a machine does beside may take any time."""
    far.put_object(Bucket=bucket, Key="a", Body=BODY)
    for settings, least in (({"delay": 0.3}, 0.3), ({"bandwidth": 4 * len(BODY)}, 0.25)):
        weather.slow(**settings)
        begin = time.monotonic()
        assert read(far, bucket, "a") == BODY
        assert time.monotonic() - begin >= least
    assert weather.done["delays"] == 1
    weather.clear()
    assert read(far, bucket, "a") == BODY


def test_weather_outlasts_the_server(durable: S3Server, bucket: str, far: Any, weather: Weather) -> None:
    far.put_object(Bucket=bucket, Key="a", Body=BODY)
    durable.kill()
    for _ in range(2):
        with pytest.raises(LOST):
            read(far, bucket, "a")
    assert weather.done["outages"] >= 2
    durable.start()
    assert read(far, bucket, "a") == BODY


@pytest.mark.parametrize("is_cut", [False, True])
def test_chunks_pass_as_they_are(is_cut: bool) -> None:
    """No S3 server here sends them, and no client without TLS."""
    request = b"PUT /a HTTP/1.1\r\nhost: Me\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nT: 1\r\n\r\n"
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n1\r\n!\r\n0\r\n\r\n"
    request = request.replace(b"PUT", b"GET" if is_cut else b"PUT")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        weather = Weather(listener.getsockname()[1])
        weather.every(cuts=1)
        with socket.create_connection(("127.0.0.1", weather.port)) as client:
            client.sendall(request)
            with listener.accept()[0] as server:
                assert server.recv(len(request), socket.MSG_WAITALL) == request
                server.sendall(answer)
                if is_cut:
                    received = b"".join(iter(lambda: client.recv(1000), b""))
                    assert answer.startswith(received)
                    assert b"hi" not in received
                else:
                    assert client.recv(len(answer), socket.MSG_WAITALL) == answer
        weather.close()


@pytest.mark.slow
def test_retries_get_through_the_worst_of_weathers(s3_server: S3Server, bucket: str, weather: Weather) -> None:
    client = s3_server.client(weather.endpoint, attempts=10)
    weather.every(resets=3, slow_downs=4, lost_puts=2)
    for turn in range(3):
        client.put_object(Bucket=bucket, Key=f"{turn}", Body=BODY[turn:])
    assert all(read(client, bucket, f"{turn}") == BODY[turn:] for turn in range(3))
    assert all(weather.done[fault] for fault in ("resets", "slow_downs", "lost_puts"))


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = tmp_path / "bin" / "versitygw"
    gateway.parent.mkdir()
    gateway.write_text("#!/bin/sh\necho 'the disk is on fire'; exit 1\n")
    gateway.chmod(0o755)
    monkeypatch.setenv("HARDNESS_ENGINES", str(tmp_path))
    server = S3Server(tmp_path)
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        server.start()
    server.stop()


def test_a_required_server_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARDNESS_ENGINES", str(tmp_path))
    monkeypatch.setenv("HARDNESS_REQUIRE_S3", "1")
    with pytest.raises(RuntimeError, match=f"{tmp_path}/bin/versitygw is missing.*make s3-server"):
        S3Server(tmp_path)
