"""The modules and sizes of a model by what they do, and which layout is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from devmon.anatomy import Layout
from devmon.anatomy.find import find
from devmon.anatomy.layout import GPT2, LLAMA
from devmon.anatomy.parts import Parts
from devmon.errors import InstrumentError
from tests.anatomy.test_anatomy_sites import HEADS, D, Own, family


def test_modules_are_those_that_the_layout_names() -> None:
    model: Any = family("llama")
    parts = Parts(model)
    assert parts.module(1, "query") is model.model.layers[1].self_attn.q_proj
    assert parts.module(0, "mlp_norm") is model.model.layers[0].post_attention_layernorm
    assert parts.module(None, "norm") is model.model.norm
    assert parts.unembedding is model.lm_head
    assert (parts.layers, parts.heads, parts.kv_heads, parts.d_model, parts.d_head) == (2, HEADS, 2, D, D // HEADS)
    assert parts.optional(0, "attention_end") is None
    for layer, part in ((0, "qkv"), (None, "unembed")):
        with pytest.raises(InstrumentError, match=f"Lens needs the '{part}' of LlamaForCausalLM: declare it"):
            Parts(model, who="Lens").module(layer, part)


@pytest.mark.parametrize("name, kv_heads", [("gpt2", HEADS), ("gpt_neox", HEADS), ("phi3", 2), ("qwen2", 2)])
def test_fused_maps_are_split_into_heads_and_joined_again(name: str, kv_heads: int) -> None:
    parts = Parts(family(name))
    assert parts.kv_heads == kv_heads
    if not parts.layout.qkv:
        return
    fused = torch.randn(3, 5, (HEADS + 2 * kv_heads) * parts.d_head)
    split = parts.split(0, fused)
    assert [tuple(part.shape) for part in split] == [(3, 5, n, parts.d_head) for n in (HEADS, kv_heads, kv_heads)]
    assert torch.equal(parts.join(split), fused)


def test_a_declaration_comes_before_the_family_and_the_family_before_a_guess() -> None:
    model: Any = family("gpt2")
    layout, body, guessed = find(model, None, "Parts")
    assert (layout, guessed) == (GPT2, False)
    assert body is model.transformer
    own = Layout(**{**GPT2.__dict__, "heads": 2})
    body.anatomy = own  # an attribute of a module inside does
    assert find(model, None, "Parts")[0] is own
    given = Layout(**{**GPT2.__dict__, "heads": 8})
    assert find(model, given, "Parts")[0] is given
    guess: Any = family("smollm3, by its names")
    assert find(guess, None, "Parts") == (LLAMA, guess.model, True)


def test_a_model_without_an_unembedding_has_no_logits() -> None:
    headless: Any = family("gpt2").transformer
    assert not Parts(headless).has_logits
    with pytest.raises(InstrumentError, match="GPT2Model shows none: declare `unembed`"):
        _ = Parts(headless).unembedding
    assert Parts(family("gpt2")).has_logits
    parts = Parts(Own(), Layout(blocks="tower", qkv="all", out="back", heads=2, unembed="read"))
    assert parts.has_logits
    assert parts.unembedding is parts.model.read
