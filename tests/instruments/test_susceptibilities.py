"""Susceptibilities by chains: closed forms, nulls, devinterp's numbers on the same chains, and what a row holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from devmon.errors import InstrumentError
from devmon.instruments.susceptibilities import TOKEN_BYTES, Susceptibilities
from devmon.sampling import Settings, next_token_loss
from devmon.sampling.devinterp_tree import sample_tree
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract
from tests.support.models import tiny_neox
from tests.support.sampling_toys import Well, harmonic, items, plain, well_loss

NBETA, GAMMA = 60.0, 5.0
FREE = {"first": slice(0, 2), "second": slice(2, 4), "both": slice(0, 4)}


def of_wells(**changes: Any) -> Susceptibilities:
    given: dict[str, Any] = {
        "data": plain(),
        "probes": {"a": items(40, slope=1.0), "b": items(12, seed=1)},
        "components": {"first": "first", "second": "second", "both": None},
        "loss": well_loss,
        "token_loss": well_loss,
        "nbeta": NBETA,
        "gamma": GAMMA,
        "lr": 0.008,
        "chains": 8,
        "draws": 300,
        "burn_in": 50,
        "batch_size": 8,
        "float64": True,
    }
    return Susceptibilities(**(given | changes))


@pytest.fixture(scope="module")
def wells() -> xr.Dataset:
    return of_wells()(Snapshot(0, Well(), seed=3))


def test_each_item_answers_as_the_harmonic_law_says(wells: xr.Dataset) -> None:
    for name, free in FREE.items():
        parts = [harmonic(some, NBETA, GAMMA, free) for some in (items(40), items(12, seed=1))]
        expected = np.concatenate(parts)
        one = wells.sel(component=name)
        z = (one["susceptibility"].astype(float).values - expected) / one["susceptibility_se"].astype(float).values
        assert np.abs(z).max() < 4.5, z
        assert np.sqrt((z**2).mean()) < 1.7, z
        mean = (one["mean"].values - [expected[:40].mean(), expected[40:].mean()]) / one["mean_se"].values
        assert np.abs(mean).max() < 3.5, mean
        width = [np.sqrt((part**2).mean()) for part in (expected[:40], expected[40:])]
        np.testing.assert_allclose(one["spread"], width, rtol=0.25)
    assert (wells["accepted"] == 1).all()


def test_the_nulls_are_the_gaussians_they_are_named_for(wells: xr.Dataset) -> None:
    """At nβ = 0 the covariance is that of N(0, 1/γ); a harmonic well is its own harmonic null."""
    some = of_wells(nulls=600, draws=60, components={"both": None})(Snapshot(0, Well(), seed=3)).sel(component="both")
    h = np.array([4.0, 1.0, 2.0, 0.5])
    wide = -0.5 * NBETA**2 * ((items(12, seed=1)[0].numpy() - h) * h).sum(1) / GAMMA**2
    null = some["mean_null"].sel(null="localisation", probe="b")
    assert float(null) == pytest.approx(wide.mean(), rel=0.5)
    assert float(some["spread_null"].sel(null="localisation", probe="b")) == pytest.approx(
        np.sqrt((wide**2).mean()), rel=0.3
    )
    own = wells.sel(component="both", probe="b")
    assert float(own["spread_null"].sel(null="gaussian")) == pytest.approx(float(own["spread"]), rel=0.6)
    assert wells["mean_null"].sel(null="shuffled").isnull().all()  # no tokens to shuffle


def test_the_llc_of_a_component_is_that_of_its_law(wells: xr.Dataset) -> None:
    h = np.array([4.0, 1.0, 2.0, 0.5])
    for name, free in FREE.items():
        expected = 0.5 * NBETA * (h[free] / (NBETA * h[free] + GAMMA)).sum()
        assert float(wells["llc"].sel(component=name)) == pytest.approx(expected, rel=0.08)
        each = 0.5 * NBETA * (items(12, seed=1)[0].numpy()[:, free] / (NBETA * h[free] + GAMMA)).sum(1)
        own = wells["token_llc"].sel(component=name)[wells["probe_of"].values == "b"].astype(float)
        np.testing.assert_allclose(own, each, rtol=0.2)


def test_a_cubic_well_answers_with_its_skew() -> None:
    """ℓ − L = c x³ − and a slope: the exact law by quadrature, one parameter entry free."""
    alpha, slope = 2.0, 1.0
    x = np.linspace(-1, 1, 40001)
    p = np.exp(-NBETA * (2 * x**2 + alpha * x**3) - 0.5 * GAMMA * x**2)
    p[x < -0.5] = 0  # beyond the top of the barrier, which no chain crosses in the draws there are
    p /= p.sum()
    level = 2 * x**2 + alpha * x**3
    expected = -(NBETA**2) * ((p * level * slope * x).sum() - (p * level).sum() * (p * slope * x).sum())
    item = (
        plain(1)[0],
        torch.tensor([[slope, 0, 0, 0]], dtype=torch.float64),
        torch.tensor([alpha], dtype=torch.float64),
    )
    free = {"first": torch.tensor([True, False])}
    found = of_wells(
        data=plain(8, cubic=alpha),
        probes={"a": item},
        components={"x": free},
        lr=0.002,
        gamma=GAMMA,
        chains=16,
        draws=600,
        nbeta=NBETA,
    )(Snapshot(0, Well(), seed=1))
    value, se = float(found["mean"][0, 0]), float(found["mean_se"][0, 0])
    assert abs(expected) > 5 * se, (value, se, expected)
    assert abs(value - expected) < 3.5 * se, (value, se, expected)


# -- devinterp -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def neox() -> torch.nn.Module:
    return tiny_neox(0)


def tokens(n: int, seed: int) -> torch.Tensor:
    return torch.randint(19, (n, 6), generator=torch.Generator().manual_seed(seed))


def of_tokens(**changes: Any) -> Susceptibilities:
    given: dict[str, Any] = {
        "data": tokens(12, 2),
        "probes": {"probe": tokens(5, 3)},
        "components": {"head": "layer 1 head 0", "mlp": "layer 0 mlp"},
        "nbeta": 20.0,
        "gamma": 10.0,
        "lr": 1e-3,
        "chains": 2,
        "draws": 32,
        "burn_in": 3,
        "batch_size": 8,
        "nulls": 3,
        "shuffled": 2,
    }
    return Susceptibilities(**(given | changes))


def test_devinterp_has_the_same_numbers_on_the_same_chains(neox: torch.nn.Module) -> None:
    from devinterp.slt.susceptibilities import compute_susceptibilities

    from devmon.analysis.derive.susceptibilities import on_the_whole

    ours = of_tokens(components={"head": "layer 1 head 0", "all": None}, mirrored=False, scored=12, sampler="sgld")
    found = ours(Snapshot(0, neox, seed=5))
    settings = Settings(nbeta=20.0, gamma=10.0, lr=1e-3, chains=2, draws=32, burn_in=3, batch_size=8)
    observables = {"data": tokens(12, 2), "probe": tokens(5, 3)}
    trees = {
        name: sample_tree(neox, tokens(12, 2), observables, replace(settings, mask=mask), seed=5)
        for name, mask in (("full", None), ("head", "layer 1 head 0"))
    }
    # devinterp's own excess is over the mean of `init_loss`, that of the minibatches; here over the same tokens
    for tree in trees.values():
        start = tree["loss_data"].mean(("chain", "draw")) * 0 + _start(neox)
        tree["init_loss"] = tree["init_loss"] * 0 + float(start.mean())
    theirs = compute_susceptibilities(trees, "data")["susceptibilities"]["sus"].values[:, 0] * 20.0**2
    whole = on_the_whole(found, "all").sel(component="head").values
    np.testing.assert_allclose(whole, theirs[found["token"].values], rtol=2e-2, atol=2e-3 * np.abs(theirs).max())
    # apart from what float16 takes: the arrays themselves, to 1e-5
    from devmon.sampling.responses.covariances import responses

    head = trees["head"]
    level = head["loss_data"].values.astype(float).mean((2, 3)) - float(head["init_loss"].mean())
    each = head["loss_probe"].values.astype(float).reshape(2, 32, -1)
    plain_form = responses(level, each - each.mean() - level[..., None], 20.0).value
    centre = [
        tree["loss_probe"].values.astype(float).mean((0, 1)).ravel() - tree["loss_data"].values.astype(float).mean()
        for tree in (trees["full"], head)
    ]
    np.testing.assert_allclose(
        plain_form + 400 * level.mean() * (centre[0] - centre[1]), theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max()
    )
    kept = found["susceptibility"].sel(component="head").astype(float).values
    np.testing.assert_allclose(kept, plain_form[found["token"].values], rtol=2e-2, atol=2e-3 * np.abs(plain_form).max())


def _start(model: torch.nn.Module) -> float:
    from devmon.sampling.devinterp_tree import token_losses

    return float(token_losses(model, tokens(12, 2)).mean())


# -- what a row holds ------------------------------------------------------------------------------------------------


def test_a_row_is_no_larger_than_was_said(neox: torch.nn.Module) -> None:
    for budget in (2 * TOKEN_BYTES, 10 * TOKEN_BYTES + 3, 65536):
        instrument = of_tokens(budget=budget)
        found = instrument(Snapshot(0, neox))
        numbers = sum(v.nbytes for v in found.data_vars.values() if v.dtype.kind != "O")
        assert numbers <= instrument.row_bytes(), (numbers, instrument.row_bytes())
        assert found.sizes["token"] == min(budget // (2 * TOKEN_BYTES), 25)
        assert found["susceptibility"].dtype == np.float16


def test_top_tokens_are_the_largest_of_all(neox: torch.nn.Module) -> None:
    words = tuple(f"w{i} " for i in range(19))
    found = of_tokens(top=5, words=words)(Snapshot(0, neox, seed=1))
    for name in ("head", "mlp"):
        one = found.sel(component=name)
        size = np.abs(one["susceptibility"].astype(float)).values
        assert one["top_token"].values.tolist() == np.argsort(-size, kind="stable")[:5].tolist()
        np.testing.assert_array_equal(one["top_susceptibility"], one["susceptibility"].values[one["top_token"].values])
    item = int(found["top_token"][0, 0])
    row, place = divmod(item, 5)
    assert str(found["top_label"][0, 0].item()).endswith(f"▸ w{int(tokens(5, 3)[row, place + 1])} ")


def test_a_budget_keeps_the_same_tokens_at_every_step() -> None:
    small = of_tokens(budget=8 * 2 * TOKEN_BYTES)
    one, two = (small(Snapshot(step, tiny_neox(step))) for step in (0, 1))
    assert one["label"].values.tolist() == two["label"].values.tolist()
    assert one.sizes["token"] == 8


def test_a_pair_of_chains_counts_once(neox: torch.nn.Module) -> None:
    with pytest.raises(InstrumentError, match="even"):
        of_tokens(chains=3)
    assert of_tokens(chains=3, mirrored=False)(Snapshot(0, neox))["mean_se"].notnull().all()


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"probes": {}}, "probes"),
        ({"mask": "layer 0 mlp"}, "mask"),
        ({"budget": 3}, "budget"),
        ({"scored": 0}, "scored"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InstrumentError, match=match):
        of_tokens(**changes)


def test_a_loss_of_another_shape_is_refused(neox: torch.nn.Module) -> None:
    with pytest.raises(InstrumentError, match="single items"):
        of_tokens(token_loss=lambda model, batch: torch.zeros(2, 2, 2))(Snapshot(0, neox))


def test_the_cost_is_what_passes_through_the_model(neox: torch.nn.Module) -> None:
    passed = {True: 0, False: 0}

    def count(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        given = args[0] if args else kwargs["input_ids"]
        passed[torch.is_grad_enabled()] += given.shape[0] * given.shape[1]

    def alone(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        losses = next_token_loss(model, batch)
        assert np.isfinite(losses[0].item())  # which no stack of chains can be asked: they take turns
        return losses

    instrument = of_tokens(data=tokens(40, 2), scored=8, loss=alone)
    counted = neox.register_forward_pre_hook(count, with_kwargs=True)
    try:
        instrument(Snapshot(0, neox))
    finally:
        counted.remove()
    work = passed[False] + 3 * passed[True]
    assert 0.9 * instrument.cost().work <= work <= 1.1 * instrument.cost().work, (instrument.cost().work, work)


class TestContract(InstrumentContract):
    def instrument(self) -> Susceptibilities:
        return of_tokens(chains=8, draws=8, burn_in=1, nulls=2, shuffled=1)

    def model(self, seed: int) -> torch.nn.Module:
        return tiny_neox(seed)
