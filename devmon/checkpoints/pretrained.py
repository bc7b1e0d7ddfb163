"""Language models of the transformers library from a checkpoint's own config.json and weights, its code never run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from devmon.checkpoints.series import Checkpoint
from devmon.errors import DataError
from devmon.monitoring.isolation import isolated

VOLATILE = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "architectures"}


def causal_lm(checkpoint: Checkpoint, expected: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of one checkpoint in evaluation mode, all of whose weights come from the checkpoint.

    Raises DataError where the configuration is not the `expected` one (the series' first), or a weight is missing or of
    another shape: transformers would go on with random numbers in its place.
    """
    with isolated(), _quiet():
        kind, config, own = _architecture(checkpoint)
        if keys := [key for key in {**expected, **own} if key not in VOLATILE and own.get(key) != expected.get(key)]:
            keys.sort(key=lambda key: (key != "model_type", key))
            differ = "; ".join(f"{key}: there {expected.get(key)}, here {own.get(key)}" for key in keys[:4])
            raise DataError(f"{checkpoint.name} is of another model than the series' first checkpoint ({differ})")
        try:
            model, loading = kind.from_pretrained(
                None, config=config, state_dict=checkpoint.state, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )  # fmt: skip
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise DataError(
                f"{checkpoint.name} does not hold the weights that its config.json asks for ({reason})"
            ) from error
    if missing := sorted(loading["missing_keys"]):
        raise DataError(f"{checkpoint.name} lacks weights that its config.json asks for: {_few(missing)}")
    if other := [f"{key} {(*here,)} for {(*there,)}" for key, here, there in sorted(loading["mismatched_keys"])]:
        raise DataError(f"{checkpoint.name} holds weights of other shapes than its config.json asks for: {_few(other)}")
    return model.eval()


def _architecture(checkpoint: Checkpoint) -> tuple[Any, Any, dict[str, Any]]:
    """Its class, its configuration, and that as it is written."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    try:
        if checkpoint.folder is None:
            raise OSError("it is a single file, without a config.json")
        own = json.loads((checkpoint.folder / "config.json").read_text())
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            kind = "an encoder-decoder" if config.is_encoder_decoder else "no causal language model"
            raise DataError(
                f"{checkpoint.name} is {kind} ({config.model_type}), which cannot be made from its config.json alone: "
                "name a function that makes the model and gives watches that fit it, --source script.py:name"
            )
        with torch.device("meta"):
            return type(AutoModelForCausalLM.from_config(config, trust_remote_code=False)), config, own
    except DataError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DataError(
            f"{checkpoint.name} brings no architecture that transformers knows ({reason}): restore its config.json, or "
            "name a function that makes the model, --source script.py:name"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers prints: what matters of it is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _few(words: list[str]) -> str:
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if words[4:] else "")
