"""What is claimed for GPUs, measured on one GPU in at most 8 minutes.

    python benchmarks/gpu.py [--parts step70 step410 chains preset calibration] [--json benchmarks/gpu.json] [--small]

Every part is a process of its own with a time budget: one that is slow, or needs more memory than there is, says so and
takes nothing from the others. What is known is written after each part. `--small` is the same with tiny models on the
CPU, in seconds, to see that the script works.

- step70, step410: a chain step over a plain forward and backward pass of the same batch, synchronised wall time: models
  as large as Pythia 70M and 410M (random weights, bfloat16) under float32 chains, passes in float32 and in bfloat16;
  peak memory of both, in GiB and in float32 copies of the parameters beside the model
- chains: a small language model, 64 chains at once against one: steps of all chains in a second
- preset: all watches of `presets.standard` (no λ̂) of the 70M model, together: seconds, the same in forward and backward
  passes of the probe batch, and peak memory
- calibration: `calibrate` of the small language model after a short training: seconds, gradients over the estimate's
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from llc_cost import DemoLM, clock, measure, neox
from torch import Tensor, nn

from devmon import Watch, presets
from devmon.instruments import LLC
from devmon.monitoring.observe import observe
from devmon.sampling import Settings, calibrate, next_token_loss, regression_loss, sample
from devmon.store.trajectory import Trajectory

GIB = 2**30


class Bench:
    """The sizes of the models, by whether all is small, and the device."""

    def __init__(self, small: bool) -> None:
        self.small, self.device = small, "cpu" if small else "cuda"

    def pythia(self, hidden: int, layers: int, heads: int) -> tuple[nn.Module, Tensor]:
        """A model, and tokens (batch, pos) for it."""
        hidden, layers, heads, vocab, length = (32, 2, 2, 96, 16) if self.small else (hidden, layers, heads, 50304, 512)
        model = neox(hidden, layers, heads, vocab=vocab)
        rows = 16 if self.small else 64
        tokens = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0))
        return model.to(self.device, torch.bfloat16), tokens

    def peak(self, work: Callable[[], Any]) -> float:
        """GiB at most beside what is there before; NaN on the CPU (`llc_cost.py --memory` counts there)."""
        if self.device == "cpu":
            return math.nan
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / GIB

    def step(self, hidden: int, layers: int, heads: int, seconds: float) -> dict[str, Any]:
        seconds = 0 if self.small else seconds  # one round
        model, tokens = self.pythia(hidden, layers, heads)
        size = sum(p.numel() for p in model.parameters())
        found: dict[str, Any] = {"parameters": size, "batch": 16, "positions": tokens.shape[1]}
        settings = {"lr": 1e-9, "gamma": 10.0, "nbeta": 30.0, "chains": 1, "draws": 2, "burn_in": 0, "batch_size": 16}
        for precision, options in (("bfloat16", {"precision": "bfloat16"}), ("float32", {})):
            one = Settings(**settings, **options)
            gib = self.peak(lambda one=one: sample(model, next_token_loss, tokens, one))
            memory = {"peak_gib": round(gib, 3), "float32_copies": round(gib * GIB / size / 4, 2)}
            # the plain pass is in the precision of the chain's: bfloat16 throughout, or float32
            twin = model if precision == "bfloat16" else model.float()
            options = options | {"keep_dtype": True, "steps": 4, "seconds": seconds}
            found[precision] = memory | measure(twin, next_token_loss, tokens, 1, 16, self.device, **options)
        return found

    def chains(self, seconds: float) -> dict[str, Any]:
        length = 8 if self.small else 64
        tokens = torch.randint(96, (32 if self.small else 64, length), generator=torch.Generator().manual_seed(0))
        found: dict[str, Any] = {}
        for chains in (1, 4 if self.small else 64):
            given = {"steps": 4, "seconds": 0} if self.small else {"steps": 20, "seconds": seconds}
            one = measure(DemoLM(), next_token_loss, tokens, chains, 16, self.device, **given)
            found[f"{chains} chains"] = one | {"chain_steps_per_second": 1e3 / one["chain_step_ms"]}
        first, last = (row["chain_steps_per_second"] for row in found.values())
        return found | {"steps_over_those_of_one_chain": last / first}

    def preset(self) -> dict[str, Any]:
        model, tokens = self.pythia(512, 6, 8)
        vocab, probe = model.config.vocab_size, tokens[:32, :64]
        watches = presets.standard(probe, vocab_size=vocab, last=1000, corpus=tokens)
        given = probe.to(self.device)

        def plain() -> None:
            model.zero_grad()
            next_token_loss(model, given).mean().backward()

        plain()
        one = min(clock(plain, self.device) for _ in range(3))
        rounds = 1 if self.small else 3
        due = [Watch(watch.name, watch.instrument, range(rounds + 2)) for watch in watches]
        with tempfile.TemporaryDirectory() as folder:
            trajectory, steps = Trajectory(Path(folder) / "run.zarr", seed=0), iter(range(rounds + 2))

            def together() -> None:
                observe(next(steps), model, due, trajectory)

            first = clock(together, self.device)
            least = min(clock(together, self.device) for _ in range(rounds))
            memory = round(self.peak(together), 3)
        return {
            "watches": [watch.name for watch in watches],
            "first_s": round(first, 3),
            "seconds": round(least, 3),
            "forward_backward_passes": round(least / one, 1),
            "peak_gib": memory,
        }

    def calibration(self) -> dict[str, Any]:
        model, loss, data = self.line() if self.small else self.language()
        draws = 40 if self.small else 200
        settings = Settings(chains=4, draws=draws, burn_in=draws // 2, batch_size=64)
        start = time.perf_counter()
        found = calibrate(model, loss, data, settings)
        spent = time.perf_counter() - start
        chosen = {field.name: getattr(found.settings, field.name) for field in fields(Settings)}
        over = found.cost / LLC(data, loss, **chosen).cost().backwards
        known = {"flat": found.flat, "reasons": found.reasons}
        return {
            "seconds": round(spent, 1),
            "gradients": found.cost,
            "over_those_of_the_estimate": round(over, 2),
        } | known

    def line(self) -> tuple[nn.Module, Any, Any]:
        """Four weights of a straight line at their optimum."""
        x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        model = nn.Linear(4, 1, bias=False)
        return model, regression_loss, (x, model(x).detach())

    def language(self) -> tuple[nn.Module, Any, Any]:
        """A small model after a short training on text of 96 symbols, each followed by one of four."""
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        follows = torch.randint(96, (96, 4), generator=generator)
        text = torch.randint(96, (512, 1), generator=generator)
        for _ in range(63):
            after = follows[text[:, -1], torch.randint(4, (512,), generator=generator)]
            text = torch.cat([text, after[:, None]], 1)
        model, moved = DemoLM().to(self.device), text.to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(300):
            optimizer.zero_grad()
            next_token_loss(model, moved[torch.randint(512, (64,), generator=generator)]).mean().backward()
            optimizer.step()
        return model, next_token_loss, text


# Seconds of a part at most, its start included, 465 in all; those handed on are after which no further round begins.
PARTS: dict[str, tuple[float, Callable[[Bench], dict[str, Any]]]] = {
    "step70": (75, lambda bench: bench.step(512, 6, 8, seconds=10)),
    "step410": (120, lambda bench: bench.step(1024, 24, 16, seconds=20)),
    "chains": (60, lambda bench: bench.chains(seconds=10)),
    "preset": (90, lambda bench: bench.preset()),
    "calibration": (120, lambda bench: bench.calibration()),
}


def run(part: str, small: bool) -> dict[str, Any]:
    """The part in a process of its own, or why it gave nothing."""
    command = [sys.executable, __file__, "--part", part, *(["--small"] if small else [])]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PARTS[part][0], check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {PARTS[part][0]:g} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:] or f"ended with {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"wall_s": round(time.perf_counter() - start, 1)}


def machine(small: bool) -> dict[str, Any]:
    """What it was measured on."""
    found: dict[str, Any] = {"platform": platform.platform(), "torch": torch.__version__, "small": small}
    if small:
        return found | {"device": "cpu"}
    card = torch.cuda.get_device_properties(0)
    return found | {"device": card.name, "memory_gib": round(card.total_memory / GIB, 1), "cuda": torch.version.cuda}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", choices=[*PARTS], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        torch.set_num_threads(1)
        print(json.dumps(PARTS[asked.part][1](Bench(asked.small))))
        return
    if not asked.small and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --small runs tiny models on the CPU")
    results = {"machine": machine(asked.small)}
    for part in asked.parts:
        results[part] = run(part, asked.small)
        print(part, json.dumps(results[part]), flush=True)
        if asked.json is not None:
            asked.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
