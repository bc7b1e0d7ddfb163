"""Whether the standard errors of the instruments are those of fresh probe data.

    python benchmarks/errors.py [NAMES…] [--probes 200] [--steps 900] [--json PATH]

A character model of the demo is trained past its induction transition. Each instrument is then measured on fresh probe
sets of the same kind: windows of held-out text at random places, or random tokens of another seed. For each headline
the reported standard error (root mean square over probe sets) is divided by the standard deviation of the value over
them; where a headline has several entries (layers, heads) the median over those that are not constant. A ratio is
known to 1/√(2 n) of itself from n probe sets: 5% from 200; the dear instruments (`SETS`) get fewer. With names, and a
JSON that is there, the rest of it is kept.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from devmon.data import broken_repeats
from devmon.data.prompt_pairs import PromptPairs
from devmon.data.text import Text, read_text
from devmon.features import BatchTopK, Dictionary, Streamed, Training, train
from devmon.instruments import (
    ActivationPatching,
    Circuit,
    ConceptDirection,
    CopyingHeads,
    DictionaryQuality,
    FeatureCircuit,
    FewShot,
    HeadAblation,
    InContextLearning,
    InductionHeads,
    IntrinsicDimension,
    LinearProbe,
    LogitLens,
    MDLProbe,
    NgramStages,
    Polysemanticity,
    PreviousTokenHeads,
    ProbeLoss,
    RepeatGain,
    ResidualAttribution,
    Sketch,
    SparseAutoencoder,
    Steering,
)
from devmon.recipes.language_model import AttentionOnly, mixture, previous_kinds
from devmon.snapshot import Snapshot

LENGTH, SEQUENCES = 64, 64
SETS = {  # at most, of what takes seconds a probe set
    "MDLProbe": 40, "ActivationPatching": 60, "Circuit": 60, "FeatureCircuit": 40, "SparseAutoencoder": 40,
}  # fmt: skip
SITES = ("attn_out", 0), ("attn_out", 1)  # of dictionaries
DICTIONARY = Training(BatchTopK(6), width=3, steps=150)


def trained(text: Text, steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AttentionOnly(len(text.alphabet))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = mixture(text, 64, generator, repeats=True)
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def dictionaries(text: Text, model: torch.nn.Module) -> dict[tuple[str, int], Dictionary]:
    """One of each of `SITES`, trained once."""
    tokens = mixture(text, 1000, torch.Generator().manual_seed(3), repeats=True)
    made = {}
    for site in SITES:
        coder = train(DICTIONARY, Streamed(model, tokens, [site], batch=512)).dictionary
        assert isinstance(coder, Dictionary)
        made[site] = coder
    return made


def instruments(text: Text, coders: dict[tuple[str, int], Dictionary]) -> dict[str, Callable[[int], Any]]:
    """What is measured, from the number of the probe set."""
    vocab = len(text.alphabet)
    corpus = text.windows(512, LENGTH, generator=torch.Generator().manual_seed(10**6))

    def windows(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return text.windows(SEQUENCES, LENGTH, generator=generator, held_out=True)

    def kinds(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = windows(seed)
        return tokens, *previous_kinds(tokens, text.alphabet)

    def pairs(seed: int, count: int = 24) -> PromptPairs:
        return broken_repeats(vocab, count, 8, seed=seed)

    shorter = replace(DICTIONARY, steps=30)
    size: dict[str, Any] = {"vocab_size": vocab, "sequences": SEQUENCES, "length": LENGTH}
    return {
        "ProbeLoss": lambda seed: ProbeLoss(windows(seed)),
        "InContextLearning": lambda seed: InContextLearning(windows(seed), 4, 50),
        "PreviousTokenHeads": lambda seed: PreviousTokenHeads(tokens=windows(seed)),
        "LogitLens": lambda seed: LogitLens(windows(seed)),
        "Sketch": lambda seed: Sketch(windows(seed), outputs=True),
        "IntrinsicDimension": lambda seed: IntrinsicDimension(windows(seed), limit=500, seed=seed),
        "NgramStages": lambda seed: NgramStages(corpus, windows(seed), vocab),
        "LinearProbe": lambda seed: LinearProbe(*kinds(seed), seed=seed),
        "MDLProbe": lambda seed: MDLProbe(*kinds(seed)[:2], seed=seed),
        "Polysemanticity": lambda seed: Polysemanticity(*kinds(seed)[:2], module="blocks.1", seed=seed),
        "InductionHeads": lambda seed: InductionHeads(**size, seed=seed),
        "RepeatGain": lambda seed: RepeatGain(**size, seed=seed),
        "CopyingHeads": lambda seed: CopyingHeads(vocab, seed=seed),
        "FewShot": lambda seed: FewShot(vocab, seed=seed),
        "HeadAblation": lambda seed: HeadAblation(**size, seed=seed),
        "ResidualAttribution": lambda seed: ResidualAttribution.repeated(vocab, length=LENGTH, seed=seed),
        "ActivationPatching": lambda seed: ActivationPatching(broken_repeats(vocab, 64, 20, seed=seed)),
        "Circuit": lambda seed: Circuit(broken_repeats(vocab, 64, 20, seed=seed), seed=seed),
        "DictionaryQuality": lambda seed: DictionaryQuality(windows(seed), coders[SITES[1]], SITES[1]),
        "SparseAutoencoder": lambda seed: SparseAutoencoder(corpus, windows(seed), SITES[1], shorter, batch=512),
        "Steering": lambda seed: Steering(
            pairs(seed), windows(seed)[:32], SITES[1], dictionary=coders[SITES[1]], latents=(0, 1, 2), strengths=(1.0,)
        ),
        "FeatureCircuit": lambda seed: FeatureCircuit(
            pairs(seed, 48), coders, steps=4, counts=(10, 100, 300), random=1, top=1, seed=seed
        ),
        "ConceptDirection": lambda seed: ConceptDirection(pairs(seed, 64).clean, pairs(seed, 64).corrupt, "attn_out"),
    }


def ratios(make: Callable[[int], Any], model: torch.nn.Module, probes: int) -> dict[str, Any]:
    """Reported over true standard error of each headline."""
    found = [make(seed)(Snapshot(0, model)) for seed in range(probes)]
    rows = {}
    for name in found[0].attrs["headline"]:
        if f"{name}_se" not in found[0]:
            continue
        values, errors = (np.array([row[f"{name}{end}"].values for row in found]) for end in ("", "_se"))
        good = np.isfinite(values).all(0) & np.isfinite(errors).all(0)
        spread = np.where(good, values.std(0, ddof=1), 0.0)
        used = good & (spread > 1e-9 + 1e-6 * np.abs(values).max())
        if not used.any():
            continue
        each = np.sqrt((errors[:, used] ** 2).mean(0)) / spread[used]
        rows[name] = {"ratio": float(np.median(each)), "entries": int(used.sum())}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = read_text()
    model = trained(text, args.steps)
    machine = {"platform": platform.platform(), "torch": torch.__version__, "python": platform.python_version()}
    results: dict[str, Any] = {"machine": machine, "probes": {}, "headlines": {}}
    if args.names and args.json and Path(args.json).exists():
        results |= {key: value for key, value in json.loads(Path(args.json).read_text()).items() if key != "machine"}
    for name, make in instruments(text, dictionaries(text, model)).items():
        if args.names and name not in args.names:
            continue
        probes = min(args.probes, SETS.get(name, args.probes))
        results["probes"][name] = probes
        results["headlines"][name] = ratios(make, model, probes)
        print(name, {key: round(row["ratio"], 2) for key, row in results["headlines"][name].items()}, flush=True)
        if args.json:
            with open(args.json, "w") as file:
                json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
