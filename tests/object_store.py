"""An S3 server for the tests, and the weather between it and its clients.

`make s3-server` fetches versitygw, which keeps its data through a SIGKILL and knows users of fewer rights. Without it,
moto stands in, unless `HARDNESS_REQUIRE_S3` is set.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import botocore.config
import botocore.session
import psutil

ROOT = Path(__file__).parent.parent
_START_SECONDS = 60.0
_PIECE_BYTES = 1 << 14
_READER = ("reader", "reader-secret")
_SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message><RequestId>0</RequestId></Error>"""
_SLOW_DOWN_HEAD = b"""HTTP/1.1 503 Slow Down\r
Content-Type: application/xml\r
Content-Length: %d\r
Connection: close\r
\r
""" % len(_SLOW_DOWN)


class S3Server:
    """An S3 server on 127.0.0.1, in a process that ends with this one, however this one ends.

    Args:
        folder: of its own: data, users and the log.

    Raises:
        RuntimeError: `HARDNESS_REQUIRE_S3` is set, and there is no versitygw.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        engines = Path(os.environ.get("HARDNESS_ENGINES") or ROOT / ".engines")
        self._gateway = engines / "bin" / "versitygw"
        self.is_durable = self._gateway.exists()
        """Whether data outlives `kill`."""
        if not self.is_durable and os.environ.get("HARDNESS_REQUIRE_S3", "0") not in ("", "0"):
            raise RuntimeError(f"{self._gateway} is missing, and HARDNESS_REQUIRE_S3 is set: run `make s3-server`")
        self._access, self._secret = f"tests-{os.getpid()}", os.urandom(16).hex()
        # Bound and never listening, it keeps the port for the server also while that is down: nobody else is given the
        # port, no client's own end of a connection takes it, and the server may listen on it (both have SO_REUSEADDR).
        self._claim = socket.socket()
        self._claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._claim.bind(("127.0.0.1", 0))
        self.port: int = self._claim.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._session = botocore.session.Session()
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None

    @property
    def is_up(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Returns when the server answers, and at once where it already does."""
        if self.is_up:
            return
        self.kill()  # what is left of one that ended by itself
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        # Linux could tell the server of its parent's death, but does so at the end of the thread that started it.
        self._watch = subprocess.Popen(
            ["sh", "-c", 'read -r _; kill -9 "$0"', str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if not self.is_up or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"no S3 server at {self.endpoint}:\n{self.last_words()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL; the port stays this server's, and `start` serves what was stored (where `is_durable`)."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """For good: the port is given back."""
        self._end(signal.SIGTERM)
        self._claim.close()

    def last_words(self) -> str:
        """The end of the log."""
        return self._log.read_text(errors="replace")[-4000:] if self._log.exists() else ""

    def environment(
        self, endpoint: str | None = None, access: str | None = None, secret: str | None = None
    ) -> dict[str, str]:
        """What sends a client to this server, by way of `endpoint` if given, and nowhere else."""
        return {
            "AWS_ACCESS_KEY_ID": access or self._access,
            "AWS_SECRET_ACCESS_KEY": secret or self._secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def client(self, endpoint: str | None = None, attempts: int = 1) -> Any:
        """botocore's client; without retries, a test sees each fault as it is."""
        settings = self.environment(endpoint)
        return self._session.create_client(
            "s3",
            region_name=settings["AWS_DEFAULT_REGION"],
            endpoint_url=settings["AWS_ENDPOINT_URL"],
            aws_access_key_id=settings["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=settings["AWS_SECRET_ACCESS_KEY"],
            config=botocore.config.Config(retries={"total_max_attempts": attempts}, proxies={}),
        )

    def make_bucket(self, name: str) -> None:
        self.client(attempts=3).create_bucket(Bucket=name)

    def read_only_environment(self, bucket: str) -> dict[str, str] | None:
        """Of a user who may list and read the bucket, and no more; None where the server has no such users (moto)."""
        if not self.is_durable:
            return None
        access, secret = _READER
        if not (self.folder / access).exists():
            self._administer("create-user", "--access", access, "--secret", secret, "--role", "user")
            (self.folder / access).touch()
        resources = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
        statements = [
            {"Effect": "Allow", "Principal": {"AWS": [access]}, "Action": action, "Resource": resource}
            for action, resource in zip(("s3:ListBucket", "s3:GetObject"), resources, strict=True)
        ]
        policy = {"Version": "2012-10-17", "Statement": statements}
        self.client().put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
        return self.environment(access=access, secret=secret)

    @property
    def _log(self) -> Path:
        return self.folder / "log"

    def _command(self) -> list[str]:
        if not self.is_durable:
            return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        data, users, notes = (self.folder / name for name in ("data", "users", "notes"))
        for folder in (data, users, notes):
            folder.mkdir(exist_ok=True)
        try:
            os.setxattr(data, "user.hardness", b"")
            aside = []
        except OSError:  # no extended attributes here: what is said of an object goes beside it
            aside = ["--sidecar", str(notes)]
        return [
            *(str(self._gateway), "--access", self._access, "--secret", self._secret),
            *("--port", f"127.0.0.1:{self.port}", "--quiet", "--keep-alive"),
            *("--iam-dir", str(users), "--iam-cache-disable"),
            *("posix", *aside, str(data)),
        ]

    def _administer(self, *arguments: str) -> None:
        who = ["--access", self._access, "--secret", self._secret, "--endpoint-url", self.endpoint]
        command = [str(self._gateway), "admin", *who, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def _answers(self) -> bool:
        """Whether this server has the port, and answers there."""
        assert self._process is not None
        with suppress(OSError, http.client.HTTPException, psutil.Error):
            listening = psutil.Process(self._process.pid).net_connections("tcp")
            if any(end.status == psutil.CONN_LISTEN and end.laddr.port == self.port for end in listening):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
                connection.request("GET", "/")
                connection.getresponse()
                connection.close()
                return True
        return False

    def _end(self, number: int) -> None:
        if self._watch is not None:  # first, for it must not outlive the process id that it knows
            self._watch.kill()
            self._watch.communicate()
        if self._process is not None:
            self._process.send_signal(number)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._watch = self._process = None


class Weather:
    """A proxy before an S3 server, which does harm by count and never by chance.

    It goes through the server's absence: then it resets its clients' connections, as a dead server's machine would.
    Requests and answers pass byte for byte, for their signatures hold as they are.

    `done` counts what it did, under the names of `every`; and `connections`, `requests`, requests by their methods,
    `delays`, and `outages` (the server was away when a connection came, or left one that was idle). `uploaded` counts
    the bytes of PUTs that passed, by path and while they pass.

    Args:
        port: of the server, on 127.0.0.1.
    """

    FAULTS = ("resets", "drops", "cuts", "slow_downs", "lost_puts", "lost_posts")

    def __init__(self, port: int) -> None:
        self.done: Counter[str] = Counter()
        self.uploaded: Counter[str] = Counter()
        self._target = ("127.0.0.1", port)
        self._every = dict.fromkeys(self.FAULTS, 0)
        self._seen: Counter[str] = Counter()
        self._delay = self._bandwidth = 0.0
        self._line_is_free_at = 0.0
        self._lock = Lock()
        self._closed = Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._open = {self._listener}
        self.port: int = self._listener.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        Thread(target=self._accept, daemon=True).start()

    def every(self, **counts: int) -> None:
        """Sets faults, and counts anew for each that is named: 1 strikes each time, 0 never.

        Args:
            counts: `resets`: every n-th connection is reset, at its first request (clients keep connections for long).
                `drops`: every n-th request is, whatever its connection, and does not reach the server.
                `cuts`: the body of every n-th good answer to a GET ends half-way.
                `slow_downs`: every n-th request is answered by 503 SlowDown, and does not reach the server.
                `lost_puts`, `lost_posts`: every n-th PUT or POST with a good answer has its effect, and the connection
                is reset in place of the answer.
        """
        assert set(counts) <= set(self.FAULTS), counts
        with self._lock:
            for fault, count in counts.items():
                self._every[fault] = count
                self._seen[fault] = 0

    def slow(self, delay: float = 0.0, bandwidth: float = 0.0) -> None:
        """Delays each answer by seconds; lets so many bytes of bodies pass in a second (0: as they come)."""
        with self._lock:
            self._delay, self._bandwidth = delay, bandwidth

    def clear(self) -> None:
        """Fair weather; `done` stays."""
        self.every(**dict.fromkeys(self.FAULTS, 0))
        self.slow()

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            for end in self._open:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for it
            self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """One client's connection, with one of its own to the server."""
        client, server = _Stream(connection), None
        try:
            self._keep(connection)
            if not client.has_more():
                return
            self._note("connections")
            if self._strikes("resets"):
                client.head()
                self._note("resets")
                client.reset()
                return
            try:
                server = _Stream(socket.create_connection(self._target))
                self._keep(server.socket)
            except ConnectionError:
                self._note("outages")
                client.reset()
                return
            either = select.poll()
            for stream in (client, server):
                either.register(stream.socket, select.POLLIN)
            while self._exchange(client, server):
                ready = [] if client.rest else [number for number, _ in either.poll()]
                if server.socket.fileno() in ready:  # it has not been asked, so it can only be at its end
                    self._note("outages")
                    client.finish()
                    return
        except (OSError, ValueError):  # one of them is gone in the middle, and so has the other to be
            client.reset()
        finally:
            for stream in (client, server):
                if stream is not None:
                    with self._lock:
                        self._open.discard(stream.socket)
                        stream.socket.close()

    def _exchange(self, client: _Stream, server: _Stream) -> bool:
        """One request and its answer; whether the connection goes on."""
        head = client.head()
        if not head:
            return False
        (method, path, *_), fields = _parsed(head)
        self._note("requests")
        self._note(method)
        expects = "expect" in fields
        if self._strikes("drops"):
            self._note("drops")
            client.reset()
            return False
        if self._strikes("slow_downs"):
            for _ in () if expects else client.body(fields):
                pass
            self._note("slow_downs")
            self._pause()
            client.send(_SLOW_DOWN_HEAD + _SLOW_DOWN * (method != "HEAD"))
            client.finish()
            return False

        server.send(head)
        answer = server.head() if expects else b""
        is_whole = not expects or _status(answer) == 100  # else the server wants none of the body
        if is_whole:
            client.send(answer)
            answer = b""
            for piece in client.body(fields):
                self._pass(piece)
                try:
                    server.send(piece)
                except ConnectionError:  # it may have answered before the end
                    is_whole = False
                    break
                if method == "PUT":
                    with self._lock:
                        self.uploaded[path] += len(piece)
        while not answer or _status(answer) < 200:
            if answer:
                client.send(answer)
            answer = server.head()
            if not answer:
                raise ConnectionError("the server left without an answer")
        return self._answer(client, server, method, answer) and is_whole

    def _answer(self, client: _Stream, server: _Stream, method: str, head: bytes) -> bool:
        (version, status, *_), fields = _parsed(head)
        is_good = status.startswith("2")
        has_body = method != "HEAD" and status not in ("204", "304")
        is_framed = "content-length" in fields or "transfer-encoding" in fields
        fault = {"PUT": "lost_puts", "POST": "lost_posts"}.get(method)
        if fault and is_good and self._strikes(fault):
            for _ in server.body(fields, to_end=not is_framed):
                pass
            self._note(fault)
            client.reset()
            return False

        self._pause()
        client.send(head)
        if not has_body:
            return fields.get("connection", "").lower() != "close"
        length = int(fields.get("content-length", 2))
        is_cut = method == "GET" and is_good and is_framed and length > 1 and self._strikes("cuts")
        left = length // 2
        for piece in server.body(fields, to_end=not is_framed):
            self._pass(piece)
            client.send(piece[:left] if is_cut else piece)
            left -= len(piece)
            if is_cut and left <= 0:
                self._note("cuts")
                client.finish()
                return False
        return is_framed and version != "HTTP/1.0" and fields.get("connection", "").lower() != "close"

    def _strikes(self, fault: str) -> bool:
        with self._lock:
            self._seen[fault] += 1
            return self._every[fault] > 0 and self._seen[fault] % self._every[fault] == 0

    def _note(self, what: str, count: int = 1) -> None:
        with self._lock:
            self.done[what] += count

    def _keep(self, end: socket.socket) -> None:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            if self._closed.is_set():
                raise ConnectionError("closed")
            self._open.add(end)

    def _pause(self) -> None:
        with self._lock:
            delay = self._delay
        if delay:
            self._note("delays")
            self._closed.wait(delay)

    def _pass(self, piece: bytes) -> None:
        """Waits until the line has had the time for it."""
        with self._lock:
            if not self._bandwidth:
                return
            now = time.monotonic()
            self._line_is_free_at = max(now, self._line_is_free_at) + len(piece) / self._bandwidth
            wait = self._line_is_free_at - now
        self._closed.wait(wait)


class _Stream:
    """A connection, read by HTTP's heads and bodies, whose bytes it leaves as they are."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.send = connection.sendall
        self.rest = b""

    def has_more(self) -> bool:
        """Waits for the other side: False at its end."""
        self.rest = self.rest or self.socket.recv(_PIECE_BYTES)
        return bool(self.rest)

    def head(self) -> bytes:
        """As far as the empty line; nothing where the other side is at its end."""
        return self._until(b"\r\n\r\n") if self.has_more() else b""

    def body(self, fields: dict[str, str], to_end: bool = False) -> Iterator[bytes]:
        """Piece by piece, with the framing of chunks; without a length there is none, or all `to_end`."""
        if "chunked" in fields.get("transfer-encoding", "").lower():
            size = -1
            while size != 0:
                line = self._until(b"\r\n")
                size = int(line.partition(b";")[0], 16)
                yield line
                if size:
                    yield from self._exactly(size + 2)
            while line != b"\r\n":  # trailers
                line = self._until(b"\r\n")
                yield line
        elif "content-length" in fields:
            yield from self._exactly(int(fields["content-length"]))
        elif to_end:
            while self.has_more():
                piece, self.rest = self.rest, b""
                yield piece

    def finish(self) -> None:
        """Ends what is sent, in order; then the socket can be closed."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Closes with an RST."""
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.socket.close()

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.rest:
            self._more()
        end = self.rest.index(mark) + len(mark)
        found, self.rest = self.rest[:end], self.rest[end:]
        return found

    def _exactly(self, count: int) -> Iterator[bytes]:
        while count:
            if not self.rest:
                self._more()
            piece, self.rest = self.rest[:count], self.rest[count:]
            count -= len(piece)
            yield piece

    def _more(self) -> None:
        piece = self.socket.recv(_PIECE_BYTES)
        if not piece:
            raise ConnectionError("the end, in the middle of a message")
        self.rest += piece


def _parsed(head: bytes) -> tuple[list[str], dict[str, str]]:
    """The words of the first line, and the fields by their names in lower case."""
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return first.split(" "), {name.strip().lower(): value.strip() for name, _, value in pairs}


def _status(head: bytes) -> int:
    return int(head.split(None, 2)[1]) if head else 0
