"""Susceptibilities per token × component beside devinterp 2: seconds at equal error.

    python benchmarks/susceptibilities.py [--seeds 4] [--out benchmarks/susceptibilities.json]

A two-layer GPT-NeoX, trained for 300 steps on the characters of Python's standard library, is measured by both from
several seeds, at the same nβ, γ, step size, chains, draws and data. The error is the root mean square over tokens and
components of the standard deviation over seeds; CPU seconds × error² is what an error costs, whatever the number of
draws. devinterp centres ℓ − L on its mean with all parameters free: a term of λ̂ times that mean, which is most of its
χ and of its error here. So what is compared is the covariance under the component's own law, from the draws of each.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from devmon.data.text import SYMBOLS, read_text
from devmon.instruments import Susceptibilities
from devmon.sampling import next_token_loss
from devmon.sampling.masks import as_mask
from devmon.sampling.responses.covariances import responses
from devmon.snapshot import Snapshot

LENGTH, BATCH, PROBED = 25, 16, 16
COMPONENTS = ("layer 0 head 1", "layer 1 mlp")
SETTINGS: dict[str, Any] = {"nbeta": 300.0, "gamma": 100.0, "lr": 1e-3}
CHAINS, DRAWS, BURN_IN = 4, 40, 20


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """The model, its data (256, 25) and the probe (16, 25)."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=SYMBOLS, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model, text = GPTNeoXForCausalLM(config), read_text()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        next_token_loss(model, text.windows(32, LENGTH, generator=generator)).mean().backward()
        optimizer.step()
    data = text.windows(256, LENGTH, generator=generator)
    return model.eval(), data, text.windows(PROBED, LENGTH, generator=generator, held_out=True)


def ours(model: nn.Module, data: Tensor, probe: Tensor, seed: int, **changes: Any) -> np.ndarray:
    """χ over nβ², (component, token)."""
    given: dict[str, Any] = {"chains": CHAINS, "draws": DRAWS, "burn_in": BURN_IN, "batch_size": BATCH, "nulls": 0}
    given |= {"shuffled": 0, "scored": PROBED, "budget": 2**20} | SETTINGS | changes
    found = Susceptibilities(data, {"probe": probe}, COMPONENTS, **given)(Snapshot(0, model, seed=seed))
    return np.asarray(found["susceptibility"].values.astype(float) / SETTINGS["nbeta"] ** 2)


def theirs(model: nn.Module, data: Tensor, probe: Tensor, seed: int) -> np.ndarray:
    """The same by devinterp, (component, token), its restrictions those that our masks name."""
    from datasets import Dataset
    from devinterp.slt.susceptibilities import susceptibilities

    sets = {
        name: Dataset.from_dict({"input_ids": part.tolist()}).with_format("torch")
        for name, part in (("data", data), ("probe", probe))
    }
    masks: dict[str, Any] = {"full": None}
    for name in COMPONENTS:
        mask = as_mask(name, model)
        assert mask is not None
        masks[name] = {parameter: mask.entries.get(parameter) for parameter in mask.names}
    tree = susceptibilities(
        model, sets["data"], {name: (each, PROBED // BATCH) for name, each in sets.items()}, masks,
        sampling_task="data", lr=SETTINGS["lr"], n_beta=SETTINGS["nbeta"], localization=SETTINGS["gamma"],
        num_chains=CHAINS, num_draws=DRAWS, num_burnin_steps=BURN_IN, batch_size=BATCH, num_init_loss_batches=8,
        init_seed=1000 * seed, device="cpu",
    )  # fmt: skip
    return np.asarray(tree["susceptibilities"]["sus"].values.T)


def theirs_own_law(model: nn.Module, data: Tensor, probe: Tensor, seed: int) -> np.ndarray:
    """What we measure, from devinterp's draws: −Cov[L, ℓ − L] under the law of the component alone."""
    from datasets import Dataset
    from devinterp.slt.sampling import sample

    sets = {
        name: Dataset.from_dict({"input_ids": part.tolist()}).with_format("torch")
        for name, part in (("data", data), ("probe", probe))
    }
    found = []
    for name in COMPONENTS:
        mask = as_mask(name, model)
        assert mask is not None
        tree = sample(
            model, sets["data"], {key: (each, PROBED // BATCH) for key, each in sets.items()},
            param_masks={parameter: mask.entries.get(parameter) for parameter in mask.names}, lr=SETTINGS["lr"],
            n_beta=SETTINGS["nbeta"], localization=SETTINGS["gamma"], num_chains=CHAINS, num_draws=DRAWS,
            num_burnin_steps=BURN_IN, batch_size=BATCH, num_init_loss_batches=1, init_seed=1000 * seed, device="cpu",
        )  # fmt: skip
        level = tree["loss_data"].values.astype(float).mean((2, 3))
        losses = tree["loss_probe"].values.astype(float).reshape(*level.shape, -1)
        found.append(responses(level, losses - level[..., None], 1.0).value)
    return np.array(found)


def measured(run: Any, seeds: int) -> dict[str, float]:
    """CPU seconds of a run, the error by the spread over seeds, and the size of what is measured."""
    values, seconds = [], []
    for seed in range(1, seeds + 1):
        start = time.process_time()
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            values.append(run(seed))
        seconds.append(time.process_time() - start)
    found = np.array(values)
    error = float(np.sqrt(found.var(0, ddof=1).mean()))
    # what all seeds share: products of two different ones hold no noise
    square = (found.sum(0) ** 2 - (found**2).sum(0)) / (seeds * (seeds - 1))
    signal = float(np.sqrt(max(square.mean(), 0.0)))
    return {
        "seconds": round(float(np.median(seconds)), 2),
        "error": error,
        "signal": signal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, data, probe = trained()
    cases: dict[str, Any] = {
        "devinterp 2": lambda seed: theirs(model, data, probe, seed),
        "devinterp 2's draws, own law": lambda seed: theirs_own_law(model, data, probe, seed),
        "devmon": lambda seed: ours(model, data, probe, seed),
        "devmon, 2 steps a draw": lambda seed: ours(model, data, probe, seed, steps_per_draw=2),
        "devmon, not mirrored": lambda seed: ours(model, data, probe, seed, mirrored=False),
        "devmon, SGLD, not mirrored": lambda seed: ours(model, data, probe, seed, mirrored=False, sampler="sgld"),
    }
    # Case by case, each kept as it is done: `--only` adds to what is there.
    rows = json.loads(options.out.read_text())["cases"] if options.only and options.out.exists() else {}
    for name, run in cases.items():
        if options.only in name:
            rows[name] = measured(run, options.seeds)
            _write(options.out, rows, options.seeds)
    print(options.out.read_text())


def _write(out: Path, rows: dict[str, Any], seeds: int) -> None:
    # the two measure the same up to a centring: what counts is the error against the size of what is measured
    cost = {name: row["seconds"] * (row["error"] / row["signal"]) ** 2 for name, row in rows.items() if row["signal"]}
    for name, row in rows.items():
        for key, value in (
            ("cost_at_equal_error", row["seconds"] * row["error"] ** 2),
            ("cost_at_equal_error_over_signal", cost.get(name)),
        ):
            row[key] = value
    for row in rows.values():
        for key in ("cost_at_equal_error", "cost_at_equal_error_over_signal"):
            peer = rows.get("devinterp 2's draws, own law", {}).get(key)
            row[f"{key}_to_devinterp"] = row[key] / peer if peer and row[key] else None
    result = {
        "settings": SETTINGS | {"chains": CHAINS, "draws": DRAWS, "burn_in": BURN_IN, "batch_size": BATCH},
        "components": list(COMPONENTS),
        "seeds": seeds,
        "cases": rows,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 1,
                    "torch": torch.__version__},
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
