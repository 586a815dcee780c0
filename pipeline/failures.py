"""What goes wrong with parts of a corpus: splits set aside, and how many bad documents are too many."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from fractions import Fraction

from scorer import files
from scorer.errors import ConfigurationError, CorpusError

SET_ASIDE_FOLDER = "_set_aside"


@dataclass(frozen=True)
class SetAside:
    """A split that could not be made, whatever was tried. The next run tries it again."""

    index: int
    shard: str
    place: str
    """In the corpus: what was being read when it failed; empty where that is not known."""
    message: str
    """What went wrong."""

    def describe(self) -> str:
        """For people: the shard, the place and the cause."""
        return f"{self.shard}{f' at {self.place}' if self.place else ''}: {self.message}"


def record(folder: str, failure: SetAside) -> None:
    """Leaves word of a split that was set aside, for `status`."""
    files.make_folder(files.join(folder, SET_ASIDE_FOLDER))
    files.replace(_path(folder, failure.index), files.to_json(asdict(failure)))


def read_set_aside(folder: str) -> list[SetAside]:
    """The splits that the last run set aside."""
    found = []
    for name in files.names(files.join(folder, SET_ASIDE_FOLDER)):
        if name.endswith(".json") and not files.is_temporary(name):
            try:
                found.append(SetAside(**files.read_json(files.join(folder, SET_ASIDE_FOLDER, name))))
            except (FileNotFoundError, ValueError, TypeError):
                continue  # gone or damaged since: the splits that are missing say enough
    return found


def forget_set_aside(folder: str) -> None:
    """Makes a clean sheet: a new run tries all splits again."""
    files.remove_folder(files.join(folder, SET_ASIDE_FOLDER))


def _path(folder: str, index: int) -> str:
    return files.join(folder, SET_ASIDE_FOLDER, f"{index:05d}.json")


@dataclass(frozen=True)
class Tolerance:
    """How many documents may be bad: `--max_rejected_documents`."""

    documents: int | None = None
    """At most so many."""
    share: Fraction | None = None
    """At most this share of all documents, 0 to 1; exact, as `0.7%` is no binary fraction."""

    @classmethod
    def parse(cls, value: str | None) -> Tolerance:
        """Reads '100' or '1%'; None is no limit.

        Raises:
            ConfigurationError: it is neither.
        """
        if value is None:
            return cls()
        if re.fullmatch(r"\d+", value):
            return cls(documents=int(value))
        if re.fullmatch(r"\d+(\.\d+)?%", value) and Fraction(value[:-1]) <= 100:
            return cls(share=Fraction(value[:-1]) / 100)
        raise ConfigurationError(f"--max_rejected_documents {value}: expected a number as 100, or a share as 1%")

    def check(self, rejected: int, documents: int | Fraction) -> None:
        """Holds counts to the limit.

        Args:
            rejected: bad documents.
            documents: all documents, or how many are expected.

        Raises:
            CorpusError: there are too many bad ones.
        """
        if self.documents is not None:
            limit, allowed = Fraction(self.documents), f"{self.documents}"
        elif self.share is not None:
            limit, allowed = self.share * documents, f"{float(100 * self.share):g}%"
        else:
            return
        if rejected > limit:
            raise CorpusError(
                f"{rejected:,} documents were rejected, more than --max_rejected_documents {allowed} allows: "
                "see `rejects` in the receipts for file, line and reason, mend the corpus or the flags on its form, "
                "or allow more and run again"
            )
