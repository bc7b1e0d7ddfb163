"""Adapters of PEFT itself: what is measured is the model that runs, not the frozen base that its modules show."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from devmon.instruments import Composition, HeadSpectra, InductionHeads, LogitLens, ResidualAttribution
from devmon.snapshot import Snapshot
from tests.anatomy.test_anatomy_sites import VOCAB, family, inputs

# PEFT asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
INSTRUMENTS: dict[str, Any] = {
    "composition": Composition(),
    "copying": HeadSpectra(),
    "prefix_matching": InductionHeads(vocab_size=VOCAB, sequences=4, length=16),
    "head_effect": LogitLens(inputs("gpt2")),
    "logit_difference": ResidualAttribution.repeated(VOCAB, length=16, ablation_prompts=0),
}
ADAPTERS: dict[str, tuple[str, Any]] = {
    "LoRA in GPT-2's transposed maps": (
        "gpt2",
        peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    ),
    "LoRA, rank-stabilised, everywhere": ("llama", peft.LoraConfig(r=3, target_modules="all-linear", use_rslora=True)),
    "DoRA": ("llama", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "o_proj"], use_dora=True)),
    "LoRA of the vocabulary": ("qwen2", peft.LoraConfig(r=3, target_modules=["k_proj", "embed_tokens", "lm_head"])),
    "IA3": (
        "llama",
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
}


def adapted(name: str, config: Any) -> nn.Module:
    """A model with adapters that are not at their start, where they do nothing."""
    model: nn.Module = peft.get_peft_model(copy.deepcopy(family(name)), copy.deepcopy(config))
    generator = torch.Generator().manual_seed(1)
    for path, weight in model.named_parameters():
        if "lora_" in path or "ia3_" in path:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_measured_as_the_weights_they_merge_into(adapter: str) -> None:
    name, config = ADAPTERS[adapter]
    model = adapted(name, config)
    merged = copy.deepcopy(model).merge_and_unload().eval()  # type: ignore[operator]
    moved = []
    for key, instrument in INSTRUMENTS.items():
        found, expected, base = (instrument(Snapshot(0, m))[key].values for m in (model, merged, family(name)))
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=key)
        moved.append(float(np.nanmax(np.abs(found - base))))
    assert max(moved) > 1e-2, "the adapters change nothing: the test could not fail"
