"""An output folder in an object store: checkpoints and results lie there, and libraries work on a local copy.

    at the start     the newest complete checkpoint is fetched; what else the copy holds is removed
    at a checkpoint  its files go up, from each machine those that it has, then the mark that makes it complete
    at the end       model, results and logs go up, and the local copy is removed

The store is the truth: a machine that dies takes nothing with it but the steps since the last mark.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scorer import files
from trainer.shard_cache import cache_folder

RESULTS_NAME = "all_results.json"
CHECKPOINT_PREFIX = "checkpoint-"
COMPLETE_MARK = "complete.json"
"""Written into a checkpoint's folder once all of it is there; a checkpoint without it is torn, and ignored."""


@dataclass(frozen=True)
class StoredOutput:
    """Where a run's output lies, and where it is worked on."""

    url: str
    folder: str
    """Local; the same one for all processes of a machine."""

    @classmethod
    def at(cls, url: str) -> StoredOutput:
        """The output at a URL, and a local folder of its own, beside the cached shards."""
        name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
        return cls(url.rstrip("/"), str(cache_folder() / "runs" / name))

    def below(self, name: str) -> StoredOutput:
        """A folder in it."""
        return StoredOutput(files.join(self.url, name), os.path.join(self.folder, name))

    def fetch(self) -> None:
        """Makes the local copy what is in the store: its newest complete checkpoint and no other, and results so far.

        Raises:
            AccessError: the store does not let us write there; better said now than at the first checkpoint.
        """
        files.require_writable(self.url)
        complete = self._complete()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        with suppress(FileNotFoundError):
            files.download(files.join(self.url, RESULTS_NAME), os.path.join(self.folder, RESULTS_NAME))
        if complete:
            newest = f"{CHECKPOINT_PREFIX}{complete[-1]}"
            files.download_folder(files.join(self.url, newest), os.path.join(self.folder, newest))

    def push_checkpoint(self, name: str) -> None:
        """Uploads what this machine has of a checkpoint, less the mark."""
        files.upload_folder(os.path.join(self.folder, name), files.join(self.url, name), skipped={COMPLETE_MARK})

    def complete_checkpoint(self, name: str, keep: int | None, best: str | None = None) -> None:
        """Uploads a checkpoint's mark, and then removes the oldest ones.

        Args:
            name: of the checkpoint.
            keep: how many to keep (None: all).
            best: the name of one that is kept in any case.
        """
        mark = Path(self.folder, name, COMPLETE_MARK).read_bytes()
        files.replace(files.join(self.url, name, COMPLETE_MARK), mark)
        if keep is None:
            return
        for old in (f"{CHECKPOINT_PREFIX}{step}" for step in self._complete()[: -max(1, keep)]):
            if old != best:
                files.remove(files.join(self.url, old, COMPLETE_MARK))  # first, so that a half-removed one is torn
                files.remove_folder(files.join(self.url, old))

    def push_results(self) -> None:
        """Uploads all but the checkpoints."""
        checkpoints = {name for name in os.listdir(self.folder) if name.startswith(CHECKPOINT_PREFIX)}
        files.upload_folder(self.folder, self.url, skipped=checkpoints)

    def remove_copy(self) -> None:
        """Removes the local copy."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # others' copies may lie beside it
            os.removedirs(os.path.dirname(self.folder))

    def _complete(self) -> list[int]:
        """Steps of the marked checkpoints, oldest first."""
        steps = [
            int(name.removeprefix(CHECKPOINT_PREFIX))
            for name in files.names(self.url)
            if name.startswith(CHECKPOINT_PREFIX) and name.removeprefix(CHECKPOINT_PREFIX).isdigit()
        ]
        return sorted(
            step for step in steps if files.exists(files.join(self.url, f"{CHECKPOINT_PREFIX}{step}", COMPLETE_MARK))
        )
