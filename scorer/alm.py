"""The bidirectional auto-regressive LM: two causal language models that share nothing but the tokenizer.

What each direction sees of a block, and which token each of its outputs predicts:

    position            0     1     2     3     4
    block              <s>   The   cat   sat   </s>

    left to right      <s>   The   cat   sat          reads the block as it stands
      predicts         The   cat   sat   …
    right to left      </s>  sat   cat   The          reads the same block reversed
      predicts         sat   cat   The   …            its scores are flipped back
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from scorer import files
from scorer.console import first_line
from scorer.devices import require_device
from scorer.engine import Engine, Settings
from scorer.errors import ConfigurationError
from scorer.shards import BLOCK_LENGTH

logger = logging.getLogger(__name__)

Direction = Literal["forward", "backward"]
READING_DIRECTION: dict[Direction, str] = {"forward": "left_to_right", "backward": "right_to_left"}
"""What each folder's config.json says under `reading_direction`."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_POSITIONS_COUNT_FROM_PADDING = {
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
}
_State = tuple[int, int | None, torch.dtype, torch.device]
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version")


class BidirectionalALM(nn.Module):
    """Both directions in one module, so that an engine that shares models shares both."""

    def __init__(self, left_to_right: PreTrainedModel, right_to_left: PreTrainedModel):
        super().__init__()
        self.left_to_right = left_to_right
        self.right_to_left = right_to_left
        self._engines: dict[Settings | None, tuple[list[_State], tuple[Engine, Engine]]] = {}
        self._preparing = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def engines(self, settings: Settings | None = None) -> tuple[Engine, Engine]:
        """Both directions made ready for their device, left to right first; anew only if a weight has changed since."""
        with self._preparing:
            state = [_state(tensor) for tensor in (*self.parameters(), *self.buffers())]
            known, engines = self._engines.get(settings, (None, None))
            if engines is None or known != state:
                engines = Engine(self.left_to_right, settings), Engine(self.right_to_left, settings)
                self._engines[settings] = state, engines
            return engines

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made of the weights, which neither copies nor travels."""
        return {key: value for key, value in super().__getstate__().items() if key not in ("_engines", "_preparing")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Prepares anew, when first asked to."""
        super().__setstate__(state)
        self._engines, self._preparing = {}, threading.Lock()


def _state(tensor: Tensor) -> _State:
    """What changes when a tensor's values or place do."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


def load_alm(folder: str, device: str = "cpu", dtype: str | torch.dtype | None = None) -> BidirectionalALM:
    """Loads an ALM for scoring, in evaluation mode.

    Args:
        folder: holds `forward/` and `backward/`, each an ordinary causal-LM checkpoint.
        device: 'cpu', 'cuda' or 'cuda:1'.
        dtype: of the weights and logits ('float32', 'bfloat16' or a torch dtype); default float32 on the CPU and
            bfloat16 on CUDA. The log-sum-exp and all after it is float32 whatever this says.

    Raises:
        ConfigurationError: a checkpoint is missing, damaged, too short for a block, reads in the other direction or
            is not causal; or the device is not there. Never falls back to another device.
    """
    require_device(device)
    for warning in check_alm(folder):
        logger.warning("%s", warning)
    if dtype is None:
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    torch_dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    models = {direction: _load_direction(folder, direction, torch_dtype) for direction in READING_DIRECTION}
    alm = BidirectionalALM(models["forward"], models["backward"]).to(device)
    return alm.eval().requires_grad_(False)


def check_alm(folder: str, vocabulary_size: int = 0) -> list[str]:
    """Checks an ALM's configuration without loading its weights.

    Args:
        folder: holds `forward/` and `backward/`.
        vocabulary_size: ids that it has to know.

    Returns:
        Warnings, one a line, for what is suspicious but allowed.

    Raises:
        ConfigurationError: a direction is missing, swapped, too short for a block or too small for the vocabulary.
    """
    warnings = []
    for direction, expected in READING_DIRECTION.items():
        config = _read_config(folder, direction)
        found = config.get("reading_direction")
        if found is None:
            warnings.append(f"{folder}/{direction}/config.json has no reading_direction; taking it for {expected}")
        elif found != expected:
            raise ConfigurationError(
                f"{folder}/{direction} reads {found}, expected {expected}: are forward/ and backward/ swapped?"
            )
        if config.get("vocab_size", vocabulary_size) < vocabulary_size:
            raise ConfigurationError(
                f"{folder}/{direction} knows {config['vocab_size']} ids, the tokenizer has {vocabulary_size}: "
                "score with the tokenizer that the ALM was trained with"
            )
        needed = positions_needed(config.get("model_type", ""), config.get("pad_token_id"))
        positions = config.get("n_positions", config.get("max_position_embeddings", needed))
        if positions < needed:
            raise ConfigurationError(
                f"{folder}/{direction} has {positions} positions, blocks of {BLOCK_LENGTH} tokens need {needed}: "
                "train an ALM with as many"
            )
    return warnings


def positions_needed(model_type: str, pad_token_id: int | None) -> int:
    """Position embeddings that a block needs: RoBERTa's descendants count from the padding id + 1."""
    counts_from_padding = model_type in _POSITIONS_COUNT_FROM_PADDING and pad_token_id is not None
    return BLOCK_LENGTH + (pad_token_id + 1 if counts_from_padding and pad_token_id is not None else 0)


@torch.no_grad()
def require_causal(model: PreTrainedModel, name: str) -> None:
    """Checks that no logit depends on a later token, which would make Eq. (1) meaningless.

    `AutoModelForCausalLM` loads encoders too, and only logs that they should have been decoders.

    Raises:
        ConfigurationError: it does.
    """
    was_training = model.training
    model.eval()
    ids = torch.arange(8, device=next(model.parameters()).device).remainder(model.config.vocab_size)[None]
    changed = ids.clone()
    changed[0, -1] = 0
    before, after = (model(input_ids=probe).logits[0, :-1].float() for probe in (ids, changed))
    model.train(was_training)
    # Rounding aside, a prefix's logits are the same numbers; NaN is scoring's to report.
    if bool((before - after).abs().max() > 1e-5 * before.abs().max()):
        raise ConfigurationError(
            f"{name} ({model.config.model_type}) sees the tokens that it is to predict: expected a causal LM; "
            "encoders take is_decoder=True in their configuration"
        )


def fingerprint_alm(folder: str) -> dict[str, str]:
    """SHA-256 of each direction's configuration and weights, as plans, footers and manifests carry them.

    Raises:
        ConfigurationError: a direction has no configuration or no safetensors file.
    """
    return {f"{direction}_sha256": _fingerprint_direction(folder, direction) for direction in READING_DIRECTION}


def _fingerprint_direction(folder: str, direction: Direction) -> str:
    config = {key: value for key, value in _read_config(folder, direction).items() if key not in _VOLATILE_CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    checkpoint = files.join(folder, direction)
    weights = [name for name in files.names(checkpoint) if name.endswith(".safetensors")]
    if not weights:
        raise ConfigurationError(
            f"{checkpoint} holds no .safetensors file: expected a causal-LM checkpoint that save_pretrained wrote"
        )
    for name in weights:
        digest.update(files.sha256(files.join(checkpoint, name))[0].encode())
    return digest.hexdigest()


def _read_config(folder: str, direction: Direction) -> dict[str, Any]:
    path = files.join(folder, direction, "config.json")
    try:
        config: dict[str, Any] = files.read_json(path)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"there is no {path}: an ALM is a folder with forward/ and backward/, as trainer.train_alm writes it"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON ({error}): is the checkpoint whole?") from error
    return config


def _load_direction(folder: str, direction: Direction, dtype: torch.dtype) -> PreTrainedModel:
    checkpoint = files.join(folder, direction)
    try:
        with files.local_folder(checkpoint) as local:
            model, report = AutoModelForCausalLM.from_pretrained(local, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(f"{checkpoint} cannot be loaded as a causal LM: {first_line(error)}") from error
    if absent := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise ConfigurationError(
            f"{checkpoint} lacks weights of its own configuration ({', '.join(map(str, absent[:3]))}): is it whole?"
        )
    require_causal(model, checkpoint)
    return model
