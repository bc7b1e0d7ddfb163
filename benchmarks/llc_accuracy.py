"""How near λ̂ comes to coefficients that are known, and whether its error bar is one.

    python benchmarks/llc_accuracy.py [CASES…] [--seeds 20] [--intervals 200] [--nets 30] [--json PATH]

Cases: regression, intervals, reduced-rank, deep-linear, crossings, peers, hard. Every estimate is calibrated unaided;
regression and intervals are calibrated once, on another seed's data. `hard` is `llc_hard.py`, which runs in parts too.
Label noise is made orthogonal to the features where w* is built by hand, so that w* is a minimum of the empirical loss
and λ̂ estimates λ and not λ − λ / log n.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import llc_hard
import numpy as np
import torch
from llc_hard_cases import Product
from torch import Tensor, nn

from devmon.analysis import llc
from devmon.sampling import Settings, calibrate, estimate_llc, regression_loss, sample
from devmon.testing import exact


class Point(nn.Module):
    """Weights at 0, and a loss of them alone."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))


def regression(seed: int, n: int = 100_000, d: int = 64) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Unit label noise, w* the least-squares solution: λ = d / 2."""
    generator = torch.Generator().manual_seed(seed)
    x, truth = torch.randn(n, d, generator=generator), torch.randn(d, 1, generator=generator)
    y = x @ truth + torch.randn(n, 1, generator=generator)
    model = nn.Linear(d, 1, bias=False)
    model.weight.data = torch.linalg.lstsq(x.double(), y.double()).solution.T.float()
    return model, (x, y)


def deep_linear(widths: list[int], rank: int, seed: int, *, noise: float = 0.0, n: int = 20_000) -> Any:
    """w* on a stratum that attains λ, label noise orthogonal to the inputs."""
    model = Product(exact.deep_linear_point(widths, rank, np.random.default_rng(seed)))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, widths[0], generator=generator)
    with torch.no_grad():
        y = model(x)
    if noise:
        e = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        e -= x.double() @ torch.linalg.lstsq(x.double(), e).solution
        y = y + noise * e.float()
    return model, (x, y)


def settings_for_regression(tolerance: float) -> Settings:
    model, data = regression(10_000)
    start = Settings(batch_size=64, sampler="baoab")
    return calibrate(model, regression_loss, data, start, tolerance=tolerance).settings


def case_regression(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_for_regression(0.01)
    found = []
    for seed in range(args.seeds):
        model, data = regression(seed)
        found.append(float(llc(sample(model, regression_loss, data, settings, seed=seed))["llc"]))
    steps = settings.chains * (settings.draws + settings.burn_in) * settings.steps_per_draw
    passes = 2 * steps * settings.batch_size + 100_000  # forward and backward at w and at w*, and once over the data
    return {
        "truth": 32.0,
        "mean": float(np.mean(found)),
        "relative_bias": float(np.mean(found) / 32 - 1),
        "seed_sd": float(np.std(found, ddof=1) / 32),
        "examples_times_gradients": passes,
        "settings": {"lr": settings.lr, "gamma": settings.gamma, "steps_per_draw": settings.steps_per_draw},
    }


def case_intervals(args: argparse.Namespace) -> dict[str, Any]:
    """Over fewer steps than `regression`, so that the interval is the sampler's error and not the calibration's."""
    settings = replace(settings_for_regression(0.01), steps_per_draw=2, draws=200, burn_in=100)
    found = []
    for seed in range(args.intervals):
        model, data = regression(seed, n=100_000)
        result = llc(sample(model, regression_loss, data, settings, seed=seed))
        found.append([float(result[name]) for name in ("llc", "low", "high", "se")])
    value, low, high, se = np.array(found).T
    return {
        "nominal": 0.9,
        "coverage": float(((low <= 32) & (high >= 32)).mean()),
        "coverage_of_the_mean_over_runs": float(((low <= value.mean()) & (value.mean() <= high)).mean()),
        "relative_bias": float(value.mean() / 32 - 1),
        "mean_relative_se": float(se.mean() / 32),
        "sd_over_runs": float(value.std(ddof=1) / 32),
        "runs": len(found),
    }


def case_reduced_rank(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for noise in (0.0, 1.0):
        model, data = deep_linear([8, 6, 8], 3, 0, noise=noise, n=100_000)
        result = estimate_llc(model, regression_loss, data, draws=400, batch_size=256)
        rows.append(summary(result, 26.0) | {"label_noise": noise})
    return {"rows": rows}


def case_deep_linear(args: argparse.Namespace) -> dict[str, Any]:
    rng, rows = np.random.default_rng(7), []
    for net in range(args.nets):
        widths = rng.integers(5, 61, rng.integers(3, 8)).tolist()
        rank = int(rng.integers(1, min(widths) + 1))
        model, data = deep_linear(widths, rank, net, n=100_000)
        start = time.perf_counter()
        result = estimate_llc(model, regression_loss, data, chains=2, draws=200, batch_size=128)
        row = summary(result, float(exact.deep_linear(widths, rank)[0])) | {"widths": widths, "rank": rank}
        rows.append(row | {"seconds": time.perf_counter() - start})
        print("deep-linear", json.dumps(rows[-1]), flush=True)
    held = [row["low"] <= row["truth"] <= row["high"] for row in rows]
    errors = np.abs([row["relative_error"] for row in rows])
    return {
        "median": float(np.median(errors)),
        "p90": float(np.quantile(errors, 0.9)),
        "coverage": float(np.mean(held)),
        "rows": rows,
    }


def case_crossings(args: argparse.Namespace) -> dict[str, Any]:
    """Against the expectation at this nbeta and gamma, by quadrature: the limit is approached like 1 / log n."""
    nbeta, gamma = 1e3, 10.0
    cases: dict[str, tuple[int, Callable[..., Any], float]] = {
        "w^4": (1, lambda w: w**4, exact.gibbs_one(lambda w: w**4, nbeta, gamma)),
        "(w1 w2)^2": (2, lambda a, b: (a * b) ** 2, exact.gibbs_two(lambda a, b: (a * b) ** 2, nbeta, gamma)),
        "(w1 w2^2)^2": (2, lambda a, b: a**2 * b**4, exact.gibbs_two(lambda a, b: a**2 * b**4, nbeta, gamma)),
        "(w1 w2 w3)^2": (3, lambda a, b, c: (a * b * c) ** 2, exact.gibbs_crossing_three(nbeta, gamma)),
        "w1^2 + w2^4": (2, lambda a, b: a**2 + b**4, exact.gibbs_two(lambda a, b: a**2 + b**4, nbeta, gamma)),
    }
    rows = []
    for name, (size, potential, truth) in cases.items():

        def loss(model: nn.Module, batch: Tensor, potential: Any = potential, size: int = size) -> Tensor:
            weights = torch.as_tensor(model.w)
            return potential(*(weights[i] for i in range(size))).expand(len(batch))

        settings = Settings(
            sampler="baoab",
            lr=3e-4,
            gamma=gamma,
            nbeta=nbeta,
            chains=1024,
            draws=200,
            burn_in=200,
            steps_per_draw=10,
            batch_size=1,
        )
        result = llc(sample(Point(size), loss, torch.zeros(1, 1), settings))
        rows.append(summary(result, truth) | {"potential": name})
    return {"rows": rows}


def summary(result: Any, truth: float) -> dict[str, Any]:
    value = float(result["llc"])
    row = {"truth": truth, "llc": value, "se": float(result["se"]), "relative_error": value / truth - 1}
    row |= {name: float(result[name]) for name in ("low", "high", "ess", "rhat", "temperature")}
    settings = {k: result.attrs[k] for k in ("lr", "gamma", "nbeta", "steps_per_draw", "control_variate")}
    return row | {"verdict": str(result["verdict"].item()), "settings": settings}


def case_peers(args: argparse.Namespace) -> dict[str, Any]:
    """The label-noise regression at the same nbeta and batch size: devinterp at its defaults (lr has none: four are
    tried, the best counts), devmon on a small budget.

    Cost is examples × gradient evaluations (a forward pass alone counts a third). What an estimator would need for an
    error of 5% is its cost times (its root mean square error over the seeds / 5%)², as if all of it were noise.
    """
    found: dict[str, list[float]] = defaultdict(list)
    settings = replace(settings_for_regression(0.02), draws=150, burn_in=100, steps_per_draw=1, chains=4)
    rates = (1e-4, 1e-5, 1e-6, 1e-7)
    for seed in range(args.peer_seeds):
        model, data = regression(seed)
        found["devmon"].append(float(llc(sample(model, regression_loss, data, settings, seed=seed))["llc"]))
        for lr in rates:
            found[f"devinterp, lr {lr:g}"].append(devinterp_llc(model, data, seed, lr))
    n, batch = len(data[0]), settings.batch_size
    ours = 2 * settings.chains * (settings.draws + settings.burn_in) * batch + n  # at w, at w*, all data once
    theirs = 4 * 200 * batch + 4 * 32 * batch / 3
    rows: dict[str, Any] = {"truth": 32.0, "settings": {"lr": settings.lr, "gamma": settings.gamma}}
    for name, values in found.items():
        error, cost = float(np.sqrt(np.mean((np.array(values) / 32 - 1) ** 2))), ours if name == "devmon" else theirs
        needed = cost * max((error / 0.05) ** 2, float(name == "devmon"))
        rows[name] = {"values": values, "rms_error": error, "cost": cost, "cost_for_5_percent": needed}
    best = min(rows[name]["cost_for_5_percent"] for name in found if name != "devmon")
    return rows | {"ratio": best / rows["devmon"]["cost_for_5_percent"]}


def devinterp_llc(model: nn.Module, data: tuple[Tensor, Tensor], seed: int, lr: float) -> float:
    """devinterp 2 through its public functions, the example's loss in the place of each token's."""
    from devinterp.slt.llc import compute_llc
    from devinterp.slt.sampling import sample as devinterp_sample
    from torch.utils.data import Dataset

    table = torch.cat(data, 1)

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(table)

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"input_ids": table[i]}

    def loss(network: nn.Module, rows: Tensor) -> Tensor:
        return regression_loss(network, (rows[:, :-1], rows[:, -1:]))[:, None].expand(-1, rows.shape[1] - 1)

    with tempfile.TemporaryDirectory() as folder:
        tree = devinterp_sample(
            copy.deepcopy(model),
            Rows(),
            {},
            lr=lr,
            n_beta=len(table) / math.log(len(table)),
            localization=1.0,
            batch_size=64,
            init_seed=seed,
            loss_fn=loss,
            output_path=f"{folder}/samples.zarr",
            device="cpu",
        )
        return float(compute_llc(tree)["llc_mean"])


CASES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "crossings": case_crossings,
    "reduced-rank": case_reduced_rank,
    "regression": case_regression,
    "intervals": case_intervals,
    "deep-linear": case_deep_linear,
    "peers": case_peers,
    "hard": lambda args: llc_hard.run_all((), "now", None, math.inf)["now"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASES", help=", ".join(CASES))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--intervals", type=int, default=200)
    parser.add_argument("--peer-seeds", type=int, default=8)
    parser.add_argument("--nets", type=int, default=30)
    parser.add_argument("--json", default=None, help="write the results here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "python": platform.python_version()}
    }
    for name in args.cases:
        start = time.perf_counter()
        results[name] = CASES[name](args) | {"seconds": time.perf_counter() - start}
        print(name, json.dumps(results[name], indent=1), flush=True)
        if args.json:
            with open(args.json, "w") as file:
                json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
