"""Models to train: from a checkpoint, or fresh from a configuration that fits the tokenizer and the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from scorer.alm import positions_needed
from scorer.console import first_line
from scorer.errors import ConfigurationError
from scorer.shards import BLOCK_LENGTH
from scorer.vocabulary import Vocabulary


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to go on from: a folder or a hub name"}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "configuration of a fresh model: a folder or a hub name"}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "architecture of a fresh model with its default configuration, as in 'roberta'"}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "changes to the configuration, as in 'hidden_size=256,num_hidden_layers=4'"}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "tokenizer to save with the model; default: the one in the shards' folder"}
    )


def build_model(
    auto_class: Any,
    arguments: ModelArguments,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    fresh_defaults: Mapping[str, Any],
) -> PreTrainedModel:
    """Loads or makes a model, with float32 weights.

    Args:
        auto_class: AutoModelForCausalLM or AutoModelForMaskedLM.
        arguments: which.
        vocabulary: of the shards.
        tokenizer: gives the padding id.
        fresh_defaults: settings of a fresh model's configuration where only its type is given.

    Raises:
        ConfigurationError: none or two are named, it cannot be loaded, or it does not fit the vocabulary or the blocks.
    """
    if arguments.model_name_or_path is not None and (arguments.config_name or arguments.model_type):
        raise ConfigurationError(
            "--model_name_or_path goes on from a checkpoint, --config_name and --model_type begin a fresh model: "
            "pass one"
        )
    if not (arguments.model_name_or_path or arguments.config_name or arguments.model_type):
        raise ConfigurationError(
            "no model named: pass --model_name_or_path (go on from a checkpoint), "
            "or --config_name or --model_type (begin a fresh one)"
        )
    try:
        config = _config(arguments, vocabulary, tokenizer, fresh_defaults)
        _check_fit(config, vocabulary)
        if arguments.model_name_or_path is None:
            return auto_class.from_config(config).float()
        # At lr 1e-6 bfloat16 weights would never move, and transformers loads what was saved: ask for float32.
        return auto_class.from_pretrained(arguments.model_name_or_path, config=config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        source = arguments.model_name_or_path or arguments.config_name or arguments.model_type
        raise ConfigurationError(f"no model can be made from {source}: {first_line(error)}") from error


def _config(
    arguments: ModelArguments,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    fresh_defaults: Mapping[str, Any],
) -> PreTrainedConfig:
    if arguments.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(arguments.model_name_or_path)
    else:
        ids = {
            "vocab_size": vocabulary.size,
            "bos_token_id": vocabulary.start_id,
            "eos_token_id": vocabulary.end_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if arguments.config_name is not None:
            config = AutoConfig.from_pretrained(arguments.config_name, **ids)
        elif arguments.model_type is not None and arguments.model_type in CONFIG_MAPPING:
            config = _fresh_config(arguments.model_type, arguments.config_overrides, {**ids, **fresh_defaults})
        else:
            raise ConfigurationError(
                f"--model_type {arguments.model_type} is not known to transformers: expected one as in 'roberta'"
            )
        if getattr(config, "max_position_embeddings", None) == BLOCK_LENGTH:
            config.max_position_embeddings = positions_needed(config.model_type, config.pad_token_id)
    if arguments.config_overrides:
        config.update_from_string(arguments.config_overrides)
    return config


def _fresh_config(model_type: str, overrides: str | None, settings: dict[str, Any]) -> PreTrainedConfig:
    """A configuration made with the overrides, so that what follows from them (llama's head_dim) does follow."""
    config = CONFIG_MAPPING[model_type](**settings)
    if not overrides:
        return config
    config.update_from_string(overrides)  # for the types of the values
    names = [override.partition("=")[0] for override in overrides.split(",")]
    return CONFIG_MAPPING[model_type](**(settings | {name: getattr(config, name) for name in names}))


def _check_fit(config: PreTrainedConfig, vocabulary: Vocabulary) -> None:
    if config.vocab_size < vocabulary.size:
        raise ConfigurationError(
            f"the model knows {config.vocab_size} ids, the shards' tokenizer has {vocabulary.size}: "
            "train the model that belongs to the tokenizer, or tokenize the corpus with the model's"
        )
    needed = positions_needed(config.model_type, config.pad_token_id)
    positions = getattr(config, "max_position_embeddings", needed)
    if positions < needed:
        raise ConfigurationError(
            f"the model has {positions} positions, blocks of {BLOCK_LENGTH} tokens need {needed}: "
            f"pass --config_overrides max_position_embeddings={needed}, or choose a model with as many"
        )
