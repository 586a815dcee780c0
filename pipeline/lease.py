"""One driver a folder: a second one is refused while the first is alive.

Two drivers would do no harm, since shards are published once whoever makes them; they would only do everything twice.
So the lease needs not be perfect, and must never stand in the way of a restart: a driver that was killed is recognised
by its process on the same machine, and from elsewhere by its silence.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from scorer import files
from scorer.errors import ConfigurationError, StorageError

LEASE_NAME = "_driver.json"
_RENEW_SECONDS = 15.0
_EXPIRE_SECONDS = 60.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_held: set[str] = set()
"""The leases that this process holds now; a store that was away may still have others of it."""


@dataclass(frozen=True)
class Holder:
    """Which process drives a folder."""

    host: str
    boot: str
    """Tells apart what has processes of its own: machines, containers, a machine before and after a restart."""
    pid: int
    started: float
    """Seconds since the epoch at which the process began: process ids are used again."""
    lease: str
    """Tells apart what one process asks for twice."""

    @classmethod
    def this_process(cls) -> Holder:
        """The one that asks."""
        is_linux = _BOOT_ID.exists()
        boot = f"{_BOOT_ID.read_text().strip()} {os.readlink(_PID_NAMESPACE)}" if is_linux else str(psutil.boot_time())
        return cls(socket.gethostname(), boot, os.getpid(), psutil.Process().create_time(), uuid.uuid4().hex)


@contextmanager
def holding(folder: str) -> Iterator[None]:
    """Keeps other drivers out of a folder of shards while the body runs.

    Raises:
        ConfigurationError: another driver is at work in the folder.
    """
    path = files.join(folder, LEASE_NAME)
    holder = Holder.this_process()
    lease = files.to_json(asdict(holder))
    _held.add(holder.lease)
    try:
        _take(path, lease)
    except BaseException:
        _held.discard(holder.lease)
        raise
    released = threading.Event()

    def renew() -> None:
        while not released.wait(_RENEW_SECONDS):
            with suppress(StorageError, OSError):  # the job itself will say that the disk is full
                files.replace(path, lease)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        _held.discard(holder.lease)
        with suppress(StorageError):  # nobody takes it for alive any more
            files.remove(path)


def living_driver(folder: str) -> str | None:
    """Describes the driver that is at work in the folder, or None where there is none that is known to live."""
    return _living_holder(files.join(folder, LEASE_NAME))


def _take(path: str, lease: bytes) -> None:
    while True:
        with suppress(FileNotFoundError):  # another driver finished and tidied up
            if files.publish(path, lease):
                return
        holder = _living_holder(path)
        if holder is not None:
            raise ConfigurationError(
                f"another driver is at work in {path.rpartition('/')[0]}: {holder}. Wait for it or stop it, or choose "
                f"another --output; {LEASE_NAME} goes stale {_EXPIRE_SECONDS:.0f} s after the last sign of life"
            )
        files.remove(path)


def _living_holder(path: str) -> str | None:
    """Describes the driver that holds a lease, or None where there is none that lives."""
    try:
        age = time.time() - files.modified(path)
        holder = Holder(**json.loads(files.read_bytes(path)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return f"one whose {LEASE_NAME} cannot be read" if age < _EXPIRE_SECONDS else None
    described = f"process {holder.pid} on {holder.host}"
    if holder.boot != Holder.this_process().boot:
        return f"{described}, last heard of {age:.0f} s ago" if age < _EXPIRE_SECONDS else None
    if holder.pid == os.getpid():
        return described if holder.lease in _held else None
    try:
        is_alive = abs(psutil.Process(holder.pid).create_time() - holder.started) < 1.0
    except (psutil.NoSuchProcess, TypeError, ValueError, OverflowError):
        return None
    return described if is_alive else None
