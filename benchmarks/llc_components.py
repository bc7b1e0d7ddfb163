"""What a sweep over all heads and MLPs costs, against one LLC with a mask for each, side by side.

    python benchmarks/llc_components.py [--json PATH] [--quick]

Process CPU seconds of one thread. Of the runs one at a time, one head and one MLP of each layer are timed (heads of a
layer cost the same); each is timed next to a sweep, in rounds, and the ratio is the median over rounds. The losses at
w* are part of both.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from devmon.sampling import Settings, next_token_loss, sample
from devmon.sampling.components.chains import sweep
from devmon.sampling.components.masks import components_of
from devmon.sampling.data import as_examples

LAYERS = HEADS = 4
# d, vocabulary, positions, batch, draws: small as in studies of development, then bound by arithmetic
SIZES = {"d 32": (32, 64, 24, 8, 12), "d 64": (64, 96, 32, 8, 8), "d 64, batch 32": (64, 512, 64, 32, 3)}


def model_of(family: str, d: int, vocab: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=d, n_layer=LAYERS, n_head=HEADS, vocab_size=vocab)).eval()
    sizes: dict[str, Any] = {"hidden_size": d, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab, intermediate_size=4 * d, **sizes)).eval()


def measure(model: nn.Module, tokens: torch.Tensor, settings: Settings, rounds: int) -> dict[str, float]:
    """CPU milliseconds a step of one chain and component: alone, in the sweep, and their ratio."""
    examples = as_examples(tokens)
    components, blocks = components_of(model, ("heads", "mlps"), examples, null=False)
    each = {"head": HEADS, "mlp": 1}
    steps = settings.draws * settings.chains
    found = []
    for _ in range(rounds):
        alone = 0.0
        for component in components:
            if component.name.endswith("head 0") or component.name.endswith("mlp"):
                started = time.process_time()
                sample(model, next_token_loss, tokens, replace(settings, mask=component.mask))
                alone += each[component.name.split()[2]] * (time.process_time() - started)
        started = time.process_time()
        together = sweep(model, next_token_loss, examples, components, blocks, settings)
        found.append((alone / len(components), (time.process_time() - started) / len(components)))
        assert all(together.shared)
    ratios = sorted(b / a for a, b in found)
    alone, shared = (1e3 * statistics.median(column) / steps for column in zip(*found, strict=True))
    return {"alone_ms": alone, "sweep_ms": shared, "ratio": statistics.median(ratios), "highest": ratios[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default=None)
    parser.add_argument("--quick", action="store_true", help="one round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": platform.platform(), "torch": torch.__version__}
    for size, (d, vocab, positions, batch, draws) in SIZES.items():
        for family in ("gpt2", "gpt_neox"):
            tokens = torch.randint(vocab, (256, positions), generator=torch.Generator().manual_seed(0))
            for variates in (False, True):
                settings = Settings(
                    lr=1e-6, gamma=10.0, nbeta=30.0, draws=draws, burn_in=0, batch_size=batch, control_variate=variates
                )
                name = f"{family}, {size}" + ", control variates" * variates
                results[name] = measure(model_of(family, d, vocab), tokens, settings, 1 if args.quick else 3)
                print(f"{name:45s} " + " ".join(f"{k} {v:.3f}" for k, v in results[name].items()), flush=True)
                if args.json:
                    with open(args.json, "w") as file:
                        json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
