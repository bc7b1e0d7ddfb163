"""Rows of Susceptibilities and BayesianInfluence over steps, made by hand."""

from __future__ import annotations

import numpy as np
import xarray as xr


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
