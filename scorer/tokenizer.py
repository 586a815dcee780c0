"""Loading a Hugging Face tokenizer, and reading from it what shards need to know."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from scorer import files
from scorer.console import first_line
from scorer.errors import ConfigurationError
from scorer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a fast tokenizer from a folder (any fsspec URL) or by its hub name.

    Raises:
        ConfigurationError: there is none, or it is not a fast one.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - and torch: seconds, for processes that pass work on only

    try:
        if files.exists(name_or_path):
            with files.local_folder(name_or_path) as folder:
                tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ConfigurationError(
            f"no tokenizer at {name_or_path}: {first_line(error)} "
            "(expected a folder with tokenizer.json, or the name of a model on the hub)"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigurationError(
            f"the tokenizer {name_or_path} has no fast version: convert it to a tokenizer.json with transformers first"
        )
    return tokenizer


def describe(
    tokenizer: PreTrainedTokenizerBase, start_token: str | None = None, end_token: str | None = None
) -> Vocabulary:
    """Reads a tokenizer's vocabulary.

    Args:
        tokenizer: a fast tokenizer.
        start_token: frames blocks on the left, where bos and cls are both missing or not wanted.
        end_token: frames blocks on the right and separates documents, likewise for eos and sep.

    Raises:
        ConfigurationError: a frame token is missing, with the flag that gives it.
    """
    ids: dict[str, int] = tokenizer.get_vocab()
    special_ids = _special_ids(tokenizer)
    start = start_token or tokenizer.bos_token or tokenizer.cls_token
    end = end_token or tokenizer.eos_token or tokenizer.sep_token
    for token, meaning, flag in ((start, "start (bos or cls)", "start"), (end, "end (eos or sep)", "end")):
        if token is None or token not in ids:
            raise ConfigurationError(
                f"the tokenizer has no {meaning} token"
                + (f" {token!r}" if token else "")
                + f": name one of its tokens with --{flag}_token"
            )
        special_ids[token] = ids[token]
    return Vocabulary(
        size=max(ids.values()) + 1,
        special_ids=dict(sorted(special_ids.items(), key=lambda item: item[1])),
        start_id=ids[start],
        end_id=ids[end],
        mask_id=tokenizer.mask_token_id,
        **fingerprint(tokenizer),
    )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The tokenizer's two fingerprints (Vocabulary.fingerprints); padding, truncation and frames are not in them."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {key: value for key, value in backend["model"].items() if key != "vocab"}
    spelling = {key: backend[key] for key in ("normalizer", "pre_tokenizer", "added_tokens")} | {"model": model}
    tokens = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items())
    return {
        "vocabulary_sha256": _sha256([tokens, _special_ids(tokenizer)]),
        "tokenizer_sha256": _sha256(spelling),
    }


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = tokenizer.get_vocab()
    special = {str(token): ids[str(token)] for token in tokenizer.all_special_tokens if str(token) in ids}
    return special | {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}


def _sha256(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
