"""The one small tree of errors that this project raises on purpose.

HardnessError                something a user can act on; the message says what, where, and the way out
├── ConfigurationError       wrong flags, paths or mixtures, found before any work (exit code 2)
├── CorpusError              text that cannot be worked on, or too much of it
├── ShardError               a shard, receipt or manifest that is missing, damaged or foreign
├── ArchiveError             a compressed file or web archive that is cut or damaged; readers make it one reject
├── StorageError             storage that fails: no space, no permission, a store that does not answer
│   └── AccessError          a store that refuses: credentials, rights, a bucket that is not there (exit code 2)
├── WorkerError              worker processes that end as soon as they start
└── ScoringError             an ALM that gave something that is not a probability
"""

from __future__ import annotations


class HardnessError(Exception):
    """Base of every error whose message is meant for a person; commands print it without a traceback."""

    exit_code = 1


class ConfigurationError(HardnessError):
    """What was asked for cannot be done as asked; nothing has been written yet."""

    exit_code = 2


class CorpusError(HardnessError):
    """Part of the corpus defeats the job, or more of its documents are bad than was allowed."""


class ShardError(HardnessError):
    """A shard, receipt or manifest is missing, damaged, or belongs to something else."""


class ArchiveError(HardnessError):
    """A compressed file or a web archive ends too early, or cannot be read on; what stands before has been read."""


class StorageError(HardnessError):
    """A file could not be written: no space left, no permission, a read-only file system; or a store is down."""


class AccessError(StorageError):
    """An object store refuses what was asked of it, and will go on to: credentials, permission, a missing bucket."""

    exit_code = 2


class WorkerError(HardnessError):
    """Worker processes end again and again before they can work."""


class ScoringError(HardnessError):
    """The ALM returned NaN or infinity where a log-probability was expected."""
