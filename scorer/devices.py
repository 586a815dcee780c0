"""Devices to score on: there or not, and each for one process alone."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import psutil
import torch

from scorer.errors import ConfigurationError

_PATIENCE_SECONDS = 30.0
"""In which a process that is ending lets go of its device: the one in whose place this one was started, say."""
_LOOK_SECONDS = 0.5
_claims: dict[str, int] = {}
"""Open lock files of this process, by path. They stay open, and so locked, until it ends, however it ends."""


def device_count() -> int:
    """Usable CUDA devices of this machine."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def require_device(device: str) -> None:
    """Checks that a device is there.

    Raises:
        ConfigurationError: CUDA was asked for and there is none, or there are fewer devices than the index says.
    """
    if not device.startswith("cuda"):
        return
    count = device_count()
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise ConfigurationError(
            f"--device {device} was asked for, but this machine shows {count} usable CUDA device(s): "
            "pass --device cpu, or check the driver (`nvidia-smi`) and that torch is a CUDA build"
        )


def claim_device(device: str) -> str:
    """Reserves a device for this process until it ends.

    Args:
        device: 'cpu', which needs no claim; 'cuda', any device that is free; or 'cuda:1', this one.

    Returns:
        'cpu', or the claimed device, 'cuda:N'.

    Raises:
        ConfigurationError: there is no such device, or other processes have them all; it says which.
    """
    require_device(device)
    if not device.startswith("cuda"):
        return device
    wanted = range(device_count()) if device == "cuda" else [int(device.partition(":")[2])]
    names = [f"cuda-{torch.cuda.get_device_properties(index).uuid}" for index in wanted]
    return f"cuda:{wanted[claim_one(names)]}"


def claim_one(names: Sequence[str], folder: str | None = None) -> int:
    """Locks the first of some names that no other process of this machine has locked; waits a while for one.

    Args:
        names: what the devices are called on this machine, whatever a process sees of them.
        folder: of the lock files (default: the system's for temporary files).

    Returns:
        The index of the name.

    Raises:
        ConfigurationError: all are taken.
    """
    paths = [os.path.join(folder or tempfile.gettempdir(), f"hardness-{name}.lock") for name in names]
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        for index, path in enumerate(paths):
            if path in _claims or _lock(path):
                return index
        if time.monotonic() >= deadline:
            break
        time.sleep(_LOOK_SECONDS)
    holders = ", ".join(f"{name} by {_holder(path)}" for name, path in zip(names, paths, strict=True))
    raise ConfigurationError(
        f"all {len(names)} CUDA device(s) that were asked for are taken ({holders}): run one worker a device "
        "(--direct_num_workers; on Flink, one slot), or wait for the other job"
    )


def _holder(path: str) -> str:
    """Who has locked a file, as far as this machine tells."""
    try:
        inode = os.stat(path).st_ino
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "FLOCK" in line]
        owners = [int(fields[4]) for fields in locks if fields[5].rpartition(":")[2] == str(inode)]
        process = psutil.Process(owners[0])
        since = datetime.fromtimestamp(process.create_time())
        return f"process {process.pid} of {process.username()}, since {since:%F %T}"
    except (OSError, psutil.Error, IndexError, ValueError):
        return "a process that this one cannot see"


def _lock(path: str) -> bool:
    """Takes the lock of a file for this process, or says that another one has it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError as error:
        raise ConfigurationError(f"{path} cannot be read, by which devices are claimed: remove it") from error
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
        os.fchmod(descriptor, 0o644)  # other users try it too, whatever the umask
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    _claims[path] = descriptor
    return True
