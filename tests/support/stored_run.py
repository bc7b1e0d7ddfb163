"""A small run that version 0.1.0 wrote: every watch of the full preset and an LLC, at three steps of a tiny GPT-2.

`tests/stored/version_0_1.zarr` is what `write` made then. The tests read it, measure the same weights again, and go on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from devmon import Trajectory, Watch, observe, presets
from devmon.data import broken_repeats, random_tokens
from devmon.data.symbol_tasks import TaskPrompts
from devmon.instruments import (
    LLC,
    ActivationPatching,
    Circuit,
    Curvature,
    FunctionVectorHeads,
    FuzzyInduction,
    HeadAblation,
    HeadSpectra,
    InContextLearning,
    LayerRoles,
    LinearProbe,
    MDLProbe,
    NgramStages,
    Polysemanticity,
    Superposition,
    TunedLens,
)
from devmon.sampling import next_token_loss

STORED = Path(__file__).parents[1] / "stored" / "version_0_1.zarr"
VOCAB, STEPS = 48, (0, 1, 4)
# Watches of the full preset with other settings than then.
OTHERS = {
    "ablation",
    "patching",
    "circuit",
    "layers",
    "tuned_lens",
    "curvature",
    "function_vectors",
    "ngrams",
    "spectra",
}


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
    made = [
        watch
        for watch in presets.full(tokens, vocab_size=VOCAB, last=10, count=10, llc=llc, corpus=corpus)
        if watch.name not in OTHERS
    ]
    steps = range(11)
    # what the preset of then held, of probes and settings that it holds no longer
    pairs, order = broken_repeats(VOCAB, period=8), torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    made += [
        Watch("ablation", HeadAblation(VOCAB, length=24), steps),
        Watch("layers", LayerRoles(tokens), steps),
        Watch("tuned_lens", TunedLens(tokens), steps),
        Watch("curvature", Curvature(tokens, top=3, probes=8, limit=16), steps),
        Watch("patching", ActivationPatching(pairs), steps),
        Watch("circuit", Circuit(pairs), steps),
        Watch("function_vectors", FunctionVectorHeads(tasks_of_then()), steps),
        Watch("spectra", HeadSpectra(), steps),
        Watch("ngrams", NgramStages(corpus, tokens, VOCAB), steps),
        Watch("fuzzy_induction", FuzzyInduction(order, length=24), steps),
    ]
    more = [
        Watch("context", InContextLearning(tokens, 2, 20), steps),
        Watch("probe", LinearProbe(tokens, tokens % 3), steps),
        Watch("mdl", MDLProbe(tokens, tokens % 3), steps),
        Watch("neurons", Polysemanticity(tokens, tokens % 3), steps),
        Watch("superposition", Superposition(), steps),
    ]
    return [*(Watch(watch.name, watch.instrument, steps) for watch in made), *more]


def tasks_of_then() -> TaskPrompts:
    """`symbol_tasks(VOCAB, shots=3, symbols=5, query="shown")` as it was: the first tokens of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    right, wrong, answers = [], [], []
    for _ in range(4):
        made = 7 + torch.randperm(5, generator=generator)
        for _ in range(32):
            order = torch.randperm(5, generator=generator)
            shown, y = 2 + order[:3], made[order[:3]]
            asked = order[torch.randint(3, (1,), generator=generator)[0]]
            other = y.roll(int(torch.randint(1, 3, (1,), generator=generator)))
            for labels, rows in ((y, right), (other, wrong)):
                pairs = [[int(a), 0, int(b), 1] for a, b in zip(shown, labels, strict=True)]
                rows.append([*(token for pair in pairs for token in pair), 2 + int(asked), 0])
            answers.append(int(made[asked]))
    task = torch.arange(4).repeat_interleave(32)
    return TaskPrompts(torch.tensor(right), torch.tensor(wrong), torch.tensor(answers), task)


def write(path: Path) -> None:
    run = Trajectory(path, "a", seed=0)
    for step in STEPS:
        observe(step, model(step), watches(), run)
