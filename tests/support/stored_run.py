"""A small run that version 0.1.0 wrote: every watch of the full preset and an LLC, at three steps of a tiny GPT-2.

`tests/stored/version_0_1.zarr` is what `write` made then. The tests read it, measure the same weights again, and go on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from devmon import Trajectory, Watch, observe, presets
from devmon.data import random_tokens
from devmon.instruments import LLC, InContextLearning, LinearProbe, MDLProbe, Polysemanticity, Superposition
from devmon.sampling import next_token_loss

STORED = Path(__file__).parents[1] / "stored" / "version_0_1.zarr"
VOCAB, STEPS = 48, (0, 1, 4)


def model(step: int) -> torch.nn.Module:
    """A GPT-2 of two layers whose weights are a function of the step alone."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2, n_inner=32, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    net = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * step * torch.randn(parameter.shape, generator=generator)
    return net


def watches() -> list[Watch]:
    """The full preset with an LLC and a corpus, and the instruments that no preset has."""
    tokens, corpus = random_tokens(VOCAB, 12, 24, seed=0), random_tokens(VOCAB, 8, 24, seed=1)
    llc = LLC(tokens, next_token_loss, nbeta=10.0, gamma=10.0, lr=1e-3, chains=2, draws=4, burn_in=0, batch_size=2)
    made = presets.full(tokens, vocab_size=VOCAB, last=10, count=10, llc=llc, corpus=corpus)
    steps = range(11)
    more = [
        Watch("context", InContextLearning(tokens, 2, 20), steps),
        Watch("probe", LinearProbe(tokens, tokens % 3), steps),
        Watch("mdl", MDLProbe(tokens, tokens % 3), steps),
        Watch("neurons", Polysemanticity(tokens, tokens % 3), steps),
        Watch("superposition", Superposition(), steps),
    ]
    return [*(Watch(watch.name, watch.instrument, steps) for watch in made), *more]


def write(path: Path) -> None:
    run = Trajectory(path, "a", seed=0)
    for step in STEPS:
        observe(step, model(step), watches(), run)
