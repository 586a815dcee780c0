"""What the runs of a sweep have in common, recorded where they lie: another sweep in that folder is refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from scorer import files
from scorer.errors import ConfigurationError
from scorer.manifest import read_manifest

RECORD_NAME = "sweep.json"
_OWNED = {
    "--alpha": "use --alphas",
    "--seed": "use --seeds",
    "--resume_from_checkpoint": "leave it out: a run goes on from its newest complete checkpoint by itself",
}
"""Flags of a single run, and what to do about them."""


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a sweep recorded of itself when it began; None where none has begun in this folder.

    Raises:
        ConfigurationError: the file is not what a sweep writes.
    """
    path = folder / RECORD_NAME
    try:
        record: dict[str, Any] = files.read_json(str(path))
        if {"alphas", "seeds", "configuration"} <= record.keys():
            return record
    except FileNotFoundError:
        return None
    except (AttributeError, ValueError):
        pass
    raise ConfigurationError(f"{path} is not the record of a sweep: choose another --output_dir")


def by_name(passed: Sequence[str]) -> dict[str, str]:
    """Passed flags by their names, whatever their order; the last of several values counts, as it does to pretrain.

    Raises:
        ConfigurationError: a flag is the sweep's to set, or there is a word that belongs to none.
    """
    if strays := list(takewhile(lambda word: not word.startswith("--"), passed)):
        raise ConfigurationError(f"{' '.join(strays)}: expected a flag such as --max_steps")
    flags: dict[str, str] = {}
    for word in passed:
        if word.startswith("--"):
            spelled, equals, value = word.partition("=")
            name = spelled.replace("-", "_").replace("__", "--", 1)  # trainers take dashes for underscores
            flags[name] = value if equals else ""
        else:
            flags[name] = f"{flags[name]} {word}".strip()
    for name, instead in _OWNED.items():
        if name in flags:
            raise ConfigurationError(f"{name} is the sweep's to set for each run: {instead}")
    return flags


def content(folders: Sequence[str]) -> str:
    """One fingerprint of what the folders' shards hold, in their order, wherever they lie."""
    fingerprints = [[entry.content_sha256 for entry in read_manifest(folder).shards] for folder in folders]
    return hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()[:16] if folders else ""


def new_record(
    output: Path, alphas: Sequence[float], seeds: Sequence[int], configuration: Mapping[str, str]
) -> dict[str, Any] | None:
    """The record that a sweep has to write before it begins; None where it stands already.

    An earlier record binds once a run has something to go on from, and its grid grows. Before that it is replaced:
    flags with which no run could begin can be put right.

    Raises:
        ConfigurationError: the folder is of another sweep; the message says what differs.
    """
    found = read_record(output)
    grid: dict[str, Any] = {
        "alphas": ["inf" if math.isinf(alpha) else alpha for alpha in alphas],
        "seeds": list(seeds),
    }
    if _has_trained(output):
        if found is None:
            raise ConfigurationError(f"{output} holds runs but no {RECORD_NAME}: choose another --output_dir")
        _require_same(found["configuration"], configuration, output)
        grid = {key: list(dict.fromkeys([*found[key], *values])) for key, values in grid.items()}
    record = grid | {"configuration": dict(configuration)}
    return record if record != found else None


def _has_trained(output: Path) -> bool:
    """Whether any run left a checkpoint with its mark (`runs.COMPLETE_MARK`), or results."""
    return any(
        next(output.glob(f"alpha-*-seed-*/{name}"), None) for name in ("checkpoint-*/complete.json", "all_results.json")
    )


def _require_same(found: Mapping[str, str], wanted: Mapping[str, str], output: Path) -> None:
    def shown(value: str | None) -> str:
        return "not given" if value is None else value or "given without a value"

    differing = [
        f"{name} was {shown(found.get(name))}, now {shown(wanted.get(name))}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise ConfigurationError(
            f"{output} holds another sweep: {'; '.join(differing)}. Only --alphas and --seeds may change: "
            "choose another --output_dir, or the same flags and shards"
        )
