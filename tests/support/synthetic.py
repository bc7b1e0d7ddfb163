"""Made-up runs of known shape, in the form a trajectory gives them: for the tests of derivation, plots and report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

STEPS = np.array(
    sorted({0, *np.unique(np.geomspace(1, 2000, 60).round().astype(int)), 550, 600, 650, 700, 750, 800, 900})
)


@dataclass
class Run:
    """The three members by which devmon.analysis reads a trajectory."""

    data: dict[str, xr.Dataset]
    attrs: dict[str, Any] = field(default_factory=dict)

    def names(self) -> list[str]:
        return sorted(self.data)

    def __getitem__(self, name: str) -> xr.Dataset:
        return self.data[name]


def rise(steps: np.ndarray, at: float = 640.0, width: float = 0.035) -> np.ndarray:
    """A logistic in log10(step) that is 1/2 at step `at`."""
    x = np.log10(np.maximum(steps, 0.1))
    return 1 / (1 + np.exp(-np.clip((x - np.log10(at)) / width, -60, 60)))


def induction_run(seed: int = 0, steps: np.ndarray = STEPS, *, flat: bool = False) -> Run:
    """A 2-layer language model with an induction transition near step 640 (none if `flat`), all watches of the demo."""
    rng = np.random.default_rng(seed)
    n, up = len(steps), 0 * rise(steps) if flat else rise(steps)
    run = Run({}, {"run_id": "demo", "seed": seed, "created": "2026-01-01T00:00:00+00:00", "schema": 1,
                   "versions": {"devmon": "0.1.0", "torch": "2.13.0"}, "device": "cpu", "threads": 1,
                   "title": "A flat control" if flat else "Induction in a small language model",
                   "data": "Python sources as characters", "control": flat})  # fmt: skip

    def noisy(mean: np.ndarray, sd: float) -> xr.DataArray:
        dims = ("step", "layer", "head")[: mean.ndim]
        return xr.DataArray(mean + sd * rng.standard_normal(mean.shape), dims=dims)

    def add(name: str, instrument: str, variables: dict[str, Any], headline: list[str]) -> None:
        run.data[name] = watch(steps, variables, headline, instrument)

    fall = 4.6 - (0 if flat else 2.2) * (1 - np.exp(-steps / 120))
    positions = np.arange(63)
    by_position = (
        fall[:, None] - (0.1 + 0.9 * up[:, None]) * np.log1p(positions) / 4 + 0.01 * rng.standard_normal((n, 63))
    )
    add("loss", "ProbeLoss", {
        "loss": noisy(fall - 0.25 * up, 0.006), "loss_se": 0.006 + 0 * up,
        "icl_score": noisy(-0.05 - 0.6 * up, 0.01), "icl_score_se": 0.01 + 0 * up,
        "loss_by_position": (("step", "pos"), by_position),
    }, ["loss", "icl_score"])  # fmt: skip
    heads = np.full((n, 2, 4), 0.03)
    heads[:, 1, 2] += 0.72 * up
    heads[:, 1, 0] += 0.3 * up
    add("induction", "InductionHeads", {
        "prefix_matching": noisy(heads, 0.004), "prefix_matching_se": noisy(0 * heads + 0.004, 0.0),
        "fixed_offset": noisy(0 * heads + 0.06, 0.002), "uniform": 0.0213 + 0 * up,
    }, ["prefix_matching"])  # fmt: skip
    previous = np.full((n, 2, 4), 0.06)
    previous[:, 0, 1] += 0.8 * (0 if flat else rise(steps, at=560))
    add("previous_token", "PreviousTokenHeads",
        {"previous_token": noisy(previous, 0.004), "previous_token_se": noisy(0 * previous + 0.004, 0.0),
         "uniform": 0.05 + 0 * up}, ["previous_token"])  # fmt: skip
    add("repeat_gain", "RepeatGain", {"gain": noisy(0.1 + 3.2 * up, 0.03), "gain_se": 0.03 + 0 * up}, ["gain"])
    layers = 0.4 + 0.15 * np.arange(3) * (0.3 + 0.7 * up[:, None])
    add("probe", "LinearProbe", {
        "accuracy": noisy(layers, 0.004), "accuracy_se": noisy(0 * layers + 0.006, 0.0),
        "control_accuracy": noisy(0 * layers + 0.3, 0.004), "selectivity": noisy(layers - 0.3, 0.005),
        "selectivity_se": noisy(0 * layers + 0.008, 0.0), "majority": 0.22 + 0 * up,
    }, ["selectivity", "accuracy"])  # fmt: skip
    bump = 0 if flat else 60 * np.exp(-(((np.log10(np.maximum(steps, 1)) - np.log10(650)) / 0.05) ** 2) / 2)
    truth = np.where(steps < 10, -400.0 + 35 * steps, 24 + 55 * rise(steps, at=150, width=0.2) + bump)
    run.data["llc"] = traces(steps, truth, rng)
    return run


def watch(steps: np.ndarray, variables: dict[str, Any], headline: list[str] | None, instrument: str) -> xr.Dataset:
    """A watch's dataset: `variables` over step, with the coordinates and attributes that a trajectory adds."""
    data = {k: v if isinstance(v, tuple | xr.DataArray) else ("step", v) for k, v in variables.items()}
    attrs: dict[str, Any] = {"instrument": f"devmon.instruments.{instrument}", "fields": {"seed": "0"},
                             "fingerprint": "0123456789abcdef", "doc": f"{instrument}, in one sentence."}  # fmt: skip
    coords = {"step": steps, "weights": ("step", np.array([f"{s:016x}" for s in steps], dtype=object)),
              "seconds": ("step", np.full(len(steps), 0.25))}  # fmt: skip
    dataset = xr.Dataset(data, coords, attrs if headline is None else attrs | {"headline": headline})
    units = {"loss": "nats/token", "gain": "nats/token", "icl_score": "nats/token", "loss_by_position": "nats/token",
             "prefix_matching": "attention", "previous_token": "attention", "accuracy": "share of tokens",
             "selectivity": "share of tokens"}  # fmt: skip
    for name, unit in units.items():
        if name in dataset:
            dataset[name].attrs |= {"units": unit, "long_name": name.replace("_", " ")}
    return dataset


def traces(
    steps: np.ndarray, truth: np.ndarray, rng: np.random.Generator, *, chains: int = 4, draws: int = 60
) -> xr.Dataset:
    """Stored sampling traces whose estimate is about `truth` at each step (60 draws a chain, 20 of them burn-in)."""
    nbeta = 100.0
    noise = rng.standard_normal((len(steps), chains, draws)) * 6 / nbeta
    baseline = 2 + 0.05 * rng.standard_normal((len(steps), chains, draws))
    excess = truth[:, None, None] / nbeta + noise
    dims = ("step", "chain", "draw")
    dataset = watch(steps, {"loss": (dims, baseline + excess), "baseline": (dims, baseline),
                            "distance": (dims, np.full_like(baseline, 0.5))}, None, "LLC")  # fmt: skip
    dataset.attrs |= {"kind": "llc", "nbeta": nbeta, "gamma": 100.0, "lr": 1e-5, "burn_in": 20, "batch_size": 32,
                      "n": 512, "kernel": "sgld", "steps_per_draw": 1, "headline": []}  # fmt: skip
    dataset["loss"].attrs |= {"units": "nats/token", "long_name": "minibatch loss"}
    return dataset


# -- rows of Susceptibilities and BayesianInfluence -------------------------------------------------------------------


def susceptibilities(steps: int = 6, tokens: int = 60, noise: float = 0.1, seed: int = 0) -> xr.Dataset:
    """Tokens on a plane in the space of components that grows and, halfway, turns; a mean changes sign."""
    rng, components = np.random.default_rng(seed), 4
    plane = np.linalg.qr(rng.normal(size=(components, components)))[0]
    place = rng.normal(size=(tokens, 2)) * [3, 1]
    values = np.array([
        (1 + i) * place @ (plane[:, :2] if i < steps // 2 else plane[:, 1:3]).T for i in range(steps)
    ]).transpose(0, 2, 1)  # fmt: skip
    values = values + noise * rng.normal(size=values.shape)
    half = values.astype(np.float16)
    mean = np.stack([np.linspace(-3, 3, steps), np.ones(steps), np.zeros(steps), -np.ones(steps)], 1)
    dims = ("step", "component", "token")
    top = np.argsort(-np.abs(values), 2, kind="stable")[..., :5].astype(np.int32)
    labels = np.array([f"the cat ▸ sat{i}" for i in range(tokens)], dtype=object)
    units = {"units": "1"}
    both = np.stack([mean, mean + 0.5], 2)
    return xr.Dataset(
        {
            "mean": (("step", "component", "probe"), both, units | {"long_name": "susceptibility to the probe"}),
            "mean_se": (("step", "component", "probe"), np.full(both.shape, 0.3), units),
            "llc": (("step", "component"), np.full((steps, components), 5.0), units),
            "susceptibility": (dims, half, units),
            "susceptibility_se": (dims, np.full(values.shape, noise, np.float16), units),
            "token_llc": (dims, np.full(values.shape, 5.0, np.float16), units),
            "top_token": (("step", "component", "rank"), top, units),
            "top_label": (("step", "component", "rank"), labels[top], {"units": "text"}),
            "top_susceptibility": (("step", "component", "rank"), np.take_along_axis(half, top, 2), units),
            "top_susceptibility_se": (("step", "component", "rank"), np.full(top.shape, noise, np.float16), units),
        },
        coords={
            "step": 100 * np.arange(steps),
            "component": np.array([f"layer 0 head {i}" for i in range(components)], dtype=object),
            "probe": np.array(["code", "prose"], dtype=object),
            "token": np.arange(tokens),
            "rank": np.arange(5),
            "label": ("token", labels),
            "probe_of": ("token", np.array(["code", "prose"] * (tokens // 2), dtype=object)),
        },
        attrs={"headline": ["mean"], "kind": "susceptibilities", "nbeta": 100.0, "gamma": 10.0},
    )


def influences() -> xr.Dataset:
    """Three steps; example 2 gains influence on "a" at the last, and its loss falls."""
    influence = np.full((3, 4, 5), -1.0)
    influence[2, :2, 2] = -9.0
    losses = np.ones((3, 5))
    losses[2, 2] = 0.25
    return xr.Dataset(
        {
            "influence": (("step", "query", "example"), influence.astype(np.float16)),
            "influence_se": (("step", "query", "example"), np.full(influence.shape, 0.5, np.float16)),
            "example_loss": (("step", "example"), losses),
        },
        coords={
            "step": [0, 10, 20],
            "example": [3, 5, 7, 9, 11],
            "set_of": ("query", np.array(["a", "a", "b", "b"], dtype=object)),
            "example_label": ("example", np.array([f"example {i}" for i in range(5)], dtype=object)),
        },
    )
