"""What a step of training a TopK dictionary costs, beside sae-lens' trainer on the same tensor.

    python benchmarks/features/cost.py             # in an environment that has sae-lens too; one thread

sae-lens is no dependency of devmon, and clashes with its extra `lens`: make an environment of its own. Steps of the two
are taken in turns, so that the load of the machine is the same for both; memory is that of two fresh processes. Writes
benchmarks/features/cost.json.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

PLACES, K, STEPS = 4096, 32, 8
SIZES = {"135M, 4x": (576, 2304), "135M, 16x": (576, 9216), "small, 4x": (128, 512)}


def data(d: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=generator) / d**0.5
    return [torch.randn(PLACES, d, generator=generator) @ mix for _ in range(2)]


def ours(d: int, m: int) -> Callable[[torch.Tensor], Any]:
    from devmon.features import Held, TopK, Training
    from devmon.features.training import State

    held = Held(torch.cat(data(d) * 2))  # as many places as latents, at least; which ones does not matter here
    state = State(Training(TopK(K), width=m / d, steps=10_000), held)
    return lambda x: state.advance(x, x)


def theirs(d: int, m: int) -> Callable[[torch.Tensor], Any]:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # type: ignore[import-not-found]
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=m, k=K))
    config = SAETrainerConfig(10**9, PLACES, lr_end=3e-5, logger=LoggingConfig(log_to_wandb=False))

    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield data(d)[0]

    trainer = SAETrainer(config, sae, endless())
    return lambda x: trainer._train_step(sae=trainer.sae, sae_in=x)


KINDS = {"devmon": ours, "sae-lens": theirs}


def side_by_side(d: int, m: int) -> dict[str, dict[str, float]]:
    """Seconds of a step of each, median and least over steps taken in turns."""
    batches, step = data(d), {name: make(d, m) for name, make in KINDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    for i in range(STEPS + 2):
        for name, take in step.items():
            begun = time.process_time()
            take(batches[i % 2])
            seconds[name].append(time.process_time() - begun)
    return {name: {"median": float(np.median(s[2:])), "least": min(s[2:])} for name, s in seconds.items()}


def memory(name: str, d: int, m: int) -> float:
    """What four steps add to the memory of this process at its peak, in MB (Linux)."""
    batches, take = data(d), KINDS[name](d, m)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak()
    for i in range(4):
        take(batches[i % 2])
    return _peak() - before


def _peak() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 4:
        print(memory(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
        return
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    found |= {"threads": 1, "places": PLACES, "k": K}
    for label, (d, m) in SIZES.items():
        row: dict[str, Any] = side_by_side(d, m)
        for name in KINDS:
            command = [sys.executable, __file__, name, str(d), str(m)]
            row[name]["peak MB"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row["time ratio"] = row["devmon"]["median"] / row["sae-lens"]["median"]
        found[label] = row
        print(label, json.dumps(row), flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
