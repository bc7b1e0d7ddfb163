"""Families whose layout is known and that the page of families names without a row: each is put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T

from devmon.anatomy import Anatomy
from tests.anatomy.families import GROUPED, HEADS, LENGTH, SMALL, TEXT, VOCAB, D
from tests.anatomy.families_page import ALSO
from tests.anatomy.proposing.client_models import shaken

LETTERS: dict[str, Any] = {"vocab_size": VOCAB}
CONFIGS: dict[str, Any] = {
    "apertus": lambda: T.ApertusConfig(**GROUPED),
    "biogpt": lambda: T.BioGptConfig(**TEXT),
    "ctrl": lambda: T.CTRLConfig(n_embd=D, n_layer=2, n_head=HEADS, dff=48, n_positions=32, **LETTERS),
    "falcon, by group, one norm": lambda: T.FalconConfig(
        **SMALL, **LETTERS, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "glm4": lambda: T.Glm4Config(**GROUPED, head_dim=8, pad_token_id=0),
    "mpt": lambda: T.MptConfig(d_model=D, n_layers=2, n_heads=HEADS, max_seq_len=32, **LETTERS),
    "persimmon": lambda: T.PersimmonConfig(**TEXT),
    "vaultgemma": lambda: T.VaultGemmaConfig(**GROUPED, head_dim=8),
    "xglm": lambda: T.XGLMConfig(d_model=D, num_layers=2, attention_heads=HEADS, ffn_dim=48, **LETTERS),
}


def test_the_page_names_them() -> None:
    assert set(CONFIGS) == set(ALSO)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_give_the_logits(name: str) -> None:
    config = CONFIGS[name]()
    config.bos_token_id = config.eos_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = shaken(T.AutoModelForCausalLM.from_config(config))
    anatomy = Anatomy(model)
    assert anatomy.tried
    assert name.startswith("falcon") or not anatomy.guessed
    tokens = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    whole, rebuilt = anatomy.rebuild(tokens)
    torch.testing.assert_close(whole, rebuilt, atol=1e-3, rtol=1e-4)
