"""What one step of a chain costs, against a plain forward and backward pass of the same batch.

    python benchmarks/llc_cost.py [--device cpu|cuda] [--json PATH] [--large] [--memory]

Times are process CPU seconds of one thread on the CPU, synchronised wall seconds on CUDA: medians over rounds that take
plain passes and chain steps in turn. The fixed cost of an estimate (one pass over the examples at w*) is taken out by
comparing two lengths. `--large` adds Pythia-sized models on CUDA (bfloat16 model, float32 chains, random weights).
Memory is the peak of live tensors, counted between operations, beside the model and in float32 copies of its
parameters; `--memory` measures that alone, and keeps the times of the JSON given.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from devmon.sampling import Settings, next_token_loss, regression_loss, sample
from devmon.testing.memory import peak_bytes

ROUNDS = 5


def neox(hidden: int = 128, layers: int = 2, heads: int = 4, vocab: int = 5000) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=512,
    )
    return GPTNeoXForCausalLM(config).eval()


class Product(nn.Module):
    """The 8-6-8 linear network."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 8) / 3), nn.Parameter(torch.randn(8, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.T @ self.b.T


class DemoLM(nn.Module):
    """Two layers of attention, d 64, 96 symbols, context 64."""

    def __init__(self, vocab: int = 96, d: int = 64, heads: int = 8, context: int = 64) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, d), nn.Embedding(context, d)
        self.norms = nn.ModuleList([nn.LayerNorm(d) for _ in range(2)])
        self.qkv = nn.ModuleList([nn.Linear(d, 3 * d) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(d, d) for _ in range(2)])
        self.unembed = nn.Linear(d, vocab, bias=False)
        self.heads = heads

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for norm, qkv, out in zip(self.norms, self.qkv, self.out, strict=True):
            q, k, v = qkv(norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(mixed.transpose(1, 2).flatten(2))
        return self.unembed(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def measure(
    model: nn.Module,
    loss: Any,
    data: Any,
    chains: int,
    batch: int,
    device: str,
    steps: int = 8,
    seconds: float = math.inf,
    **options: Any,
) -> dict[str, float]:
    """Milliseconds of a plain pass and of a chain step, and their ratio; no round begins after `seconds`."""
    model = model.to(device)
    parts = data if isinstance(data, tuple) else (data,)
    short = max(2, math.ceil(4 * len(parts[0]) / chains / batch))  # draws after which all examples have been met
    some = tuple(part[:batch].to(device) for part in parts)
    settings = {"lr": 1e-7, "gamma": 10.0, "nbeta": 30.0, "chains": chains, "burn_in": 0, "batch_size": batch}

    def plain(count: int) -> None:
        twin = plain_model
        for _ in range(count):
            for parameter in twin.parameters():
                parameter.grad = None
            loss(twin, some if isinstance(data, tuple) else some[0]).mean().backward()

    plain_model = model.float() if not options.pop("keep_dtype", False) else model

    def chain(count: int) -> None:
        sample(model, loss, data, Settings(**settings, draws=count, **options))

    plain(3)
    chain(short)
    rounds, end = [], time.perf_counter() + seconds
    while len(rounds) < ROUNDS and (not rounds or time.perf_counter() < end):
        before = clock(lambda: plain(steps), device)
        more, less = clock(lambda: chain(short + steps), device), clock(lambda: chain(short), device)
        base = (before + clock(lambda: plain(steps), device)) / 2 / steps
        rounds.append((base, (more - less) / steps / chains))
    ratios = sorted(step / base for base, step in rounds)
    base, step = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "plain_ms": 1e3 * base,
        "chain_step_ms": 1e3 * step,
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "rounds": len(rounds),
    }


def clock(work: Callable[[], None], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(kind: str) -> float:
    """Peak resident memory (MiB) of a fresh process that runs `kind`: 'step' (AdamW) or 'chains' (4 in sequence)."""
    found = subprocess.run([sys.executable, __file__, "--peak", kind], capture_output=True, text=True, check=True)
    return float(found.stdout.strip().splitlines()[-1])


def run_peak(kind: str) -> None:
    model, tokens = neox(), torch.randint(5000, (256, 128))
    idle = resident("VmRSS")
    if kind == "step":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        for _ in range(3):
            next_token_loss(model, tokens[:32]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        sample(model, next_token_loss, tokens, Settings(lr=1e-7, gamma=1.0, draws=2, burn_in=0, batch_size=32))
    print(resident("VmHWM") - idle)


def memory_copies() -> dict[str, Any]:
    """By kernel and mode on 21M parameters in layers of 1M, and of a scaled language model in bfloat16."""
    torch.manual_seed(0)
    wide = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(20)))
    low, pair = copy.deepcopy(wide).bfloat16(), (torch.randn(8, 1024), torch.randn(8, 1024))
    modes: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        **{kernel: (wide, {"sampler": kernel}) for kernel in ("sgld", "baoab", "sgnht", "preconditioned")},
        "sgld, model in bfloat16": (low, {}),
        "sgld, micro-batches": (wide, {"micro_batch": 2}),
        "sgld, passes in bfloat16": (wide, {"precision": "bfloat16"}),
        "sgld, control variates": (wide, {"control_variate": True}),
        "sgld, acceptance": (wide, {"acceptance": True}),
        "sgld, 4 chains in turn": (wide, {"chains": 4}),
        "sgld, 4 chains stacked": (wide, {"chains": 4, "stacked": True}),
    }
    found: dict[str, Any] = {}
    for name, (model, options) in modes.items():
        found[name] = copies(model, regression_loss, pair, **options)
        print(f"{name:50s} {found[name]:.2f} copies", flush=True)
    # A Pythia-like model in bfloat16, passes in bfloat16: what is over the copies above are activations and the
    # gradient of the embedding, which is held twice while its parts are added.
    lm, tokens = neox(512, 6, 8, vocab=8192).to(torch.bfloat16), torch.randint(8192, (16, 64))
    size = sum(p.numel() for p in lm.parameters()) / 1e6
    name = f"Pythia-like, {size:.0f}M, bfloat16, batch 4 of 64 tokens, micro-batch"
    for micro in (4, 1):
        found[f"{name} {micro}"] = copies(lm, next_token_loss, tokens, precision="bfloat16", micro_batch=micro)
        print(f"{name} {micro}: {found[f'{name} {micro}']:.2f} copies", flush=True)
    return found


def copies(model: nn.Module, loss: Any, data: Any, *, stacked: bool = False, **options: Any) -> float:
    settings = Settings(**{"lr": 1e-9, "chains": 1, "draws": 2, "burn_in": 0, "batch_size": 4} | options)
    size = sum(p.numel() for p in model.parameters())
    return peak_bytes(lambda: sample(model, loss, data, settings, stacked=stacked)) / size / 4


def resident(field: str) -> float:
    """MiB of this process: now (VmRSS) or at most (VmHWM)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return float(status.split(f"{field}:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        run_peak(args.peak)
        return
    if args.memory:
        results = json.loads(pathlib.Path(args.json).read_text()) if args.json else {}
        write(args.json, results | {"memory, float32 copies beside the model": memory_copies()})
        return
    tokens, chars = torch.randint(5000, (64, 128)), torch.randint(96, (64, 64))
    wide, digits = torch.randn(1024, 64), torch.randint(10, (1024,))
    x = torch.randn(1024, 8)
    from devmon.sampling import classification_loss

    lm, shared = neox(), {"control_variate": True, "shared_batches": True}
    cases: dict[str, tuple[Any, ...]] = {
        "NeoX-like, batch 8": (lm, next_token_loss, tokens, 2, 8, {}),
        "NeoX-like, batch 32": (lm, next_token_loss, tokens, 2, 32, {"steps": 4}),
        "NeoX-like, batch 8, control variates, 1 chain": (lm, next_token_loss, tokens, 1, 8, {"control_variate": True}),
        "NeoX-like, batch 8, control variates, 4 chains": (lm, next_token_loss, tokens, 4, 8, shared),
        "demo language model, batch 16": (DemoLM(), next_token_loss, chars, 4, 16, {}),
        "demo language model, batch 32": (DemoLM(), next_token_loss, chars, 4, 32, {}),
        "MLP 85k, batch 256, 8 chains": (mlp(), classification_loss, (wide, digits), 8, 256, {"steps": 20}),
        "reduced rank 8-6-8, batch 256, 32 chains": (
            Product(),
            regression_loss,
            (x, x.clone()),
            32,
            256,
            {"steps": 100},
        ),
    }
    results = {"machine": platform.platform(), "torch": torch.__version__, "device": args.device}
    if args.device == "cuda":
        results["device"] = torch.cuda.get_device_name()
        cases["demo language model, batch 16, 1 chain"] = (DemoLM(), next_token_loss, chars, 1, 16, {})
        cases["demo language model, batch 16, 64 chains"] = (DemoLM(), next_token_loss, chars, 64, 16, {})
        if args.large:
            for name, hidden, layers, heads in (("70M", 512, 6, 8), ("410M", 1024, 24, 16)):
                big = neox(hidden, layers, heads, vocab=50304).to(torch.bfloat16)
                rows = torch.randint(50304, (64, 512))
                cases[f"Pythia-like {name}, batch 16"] = (big, next_token_loss, rows, 1, 16, {})
    for name, (model, loss, data, chains, batch, options) in cases.items():
        results[name] = measure(model, loss, data, chains, batch, args.device, **options)
        print(f"{name:50s} " + " ".join(f"{k} {v:.3f}" for k, v in results[name].items()), flush=True)
    if args.device == "cpu":
        step, chains_peak = peak("step"), peak("chains")
        results["peak memory"] = {"step_mib": step, "chains_mib": chains_peak, "ratio": chains_peak / step}
        print("peak memory", results["peak memory"])
        results["memory, float32 copies beside the model"] = memory_copies()
    write(args.json, results)


def write(path: str | None, results: dict[str, Any]) -> None:
    if path:
        pathlib.Path(path).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
