"""RestrictedLLC: the contract of an instrument, what it stores, its way through the store to a series and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from devmon.analysis import component_llc, llc, report, series_of
from devmon.errors import InstrumentError
from devmon.instruments import LLC, BayesianInfluence, RestrictedLLC, Susceptibilities
from devmon.monitoring.observe import observe
from devmon.snapshot import Snapshot
from devmon.store.trajectory import Trajectory
from devmon.testing import InstrumentContract
from devmon.watch import Watch
from tests.anatomy.test_anatomy_sites import VOCAB, family

DATA = torch.randint(3, VOCAB, (12, 9), generator=torch.Generator().manual_seed(0))
SMALL = {"lr": 1e-5, "gamma": 10.0, "nbeta": 30.0, "chains": 2, "draws": 6, "burn_in": 2, "batch_size": 3}


class TestContract(InstrumentContract):
    without_error = {"excess": "traces, from which λ̂ and its error are derived"}  # noqa: RUF012

    def instrument(self) -> RestrictedLLC:
        return RestrictedLLC(DATA, components=("heads",), control_variate=True, **SMALL)

    def model(self, seed: int) -> nn.Module:
        return family("gpt2", seed)

    def measure(self, model: nn.Module) -> xr.Dataset:
        """As it is, with its traces in the place of what is derived from them."""
        return super().measure(model).assign_attrs(headline=["excess"])


@pytest.fixture(scope="module")
def found() -> xr.Dataset:
    return RestrictedLLC(DATA, components=("heads", "mlps"), **SMALL)(Snapshot(0, family("gpt2"), seed=3))


def test_each_component_is_an_llc_with_its_mask(found: xr.Dataset) -> None:
    derived = component_llc(found)
    for name in ("layer 0 head 2", "layer 1 mlp"):
        alone = llc(LLC(DATA, mask=name, **SMALL)(Snapshot(0, family("gpt2"), seed=3)))
        one = derived.sel(component=name)
        for variable in ("llc", "se", "temperature"):
            np.testing.assert_allclose(one[variable], alone[variable], rtol=2e-3)
        assert one["verdict"].item() == alone["verdict"].item()
        assert int(one["parameters"]) == alone.attrs["parameters"]


def test_random_masks_stand_beside_and_are_named_by_their_place(found: xr.Dataset) -> None:
    names, null = found["component"].values, found["null"].values
    assert names[null[0]] == "1048 random of layer 0, attention"
    assert all(null[i] == -1 for i in set(null[null >= 0].tolist()))
    assert set(found["layer"].values[:4].tolist()) == {0}


def test_it_is_stored_small(found: xr.Dataset) -> None:
    """What chains trace is float32, and the minibatch's own loss is not repeated for each component."""
    assert {found[name].dtype for name in ("excess", "distance", "slope")} == {np.dtype("float32")}
    assert found["baseline"].dims == ("chain", "draw")
    assert found.nbytes < 3 * 4 * found["excess"].size + 100 * found.sizes["component"] + 1000


def test_what_a_sweep_cannot_trace_is_refused() -> None:
    for setting in ({"mask": "layer 0 mlp"}, {"examples": 2}, {"acceptance": True}):
        with pytest.raises(InstrumentError, match=next(iter(setting))):
            RestrictedLLC(DATA, **SMALL, **setting)


def test_the_cost_is_known_where_the_components_are() -> None:
    assert RestrictedLLC(DATA).cost() is None
    masks = {"a": "transformer.h.0.*", "b": "transformer.h.1.*"}
    cost = RestrictedLLC(DATA, components=masks, null=False, **SMALL).cost()
    assert cost is not None
    whole = min(len(DATA), 8 * 3)  # whose gradient is taken at w*
    assert cost.backwards == 2 * 8 * 2 * 3 + whole
    assert cost.positions == 9


def test_from_the_store_to_series_and_page(tmp_path: Path) -> None:
    run = Trajectory(tmp_path / "run.zarr", seed=0)
    steps = [1, 3, 10, 30]
    watch = Watch("parts", RestrictedLLC(DATA, components=("heads", "mlps"), **SMALL), steps)
    for seed, step in enumerate(steps):
        observe(step, family("gpt2", seed), [watch], run)
    series = {each.name: each for each in series_of(run)}
    assert len(series) == 10  # random masks are no series
    assert series["parts/llc[layer 1 head 3]"].se is not None
    derived = component_llc(run["parts"])
    assert derived["above_null"].dims == derived["llc"].dims == ("step", "component")
    page = report(run, tmp_path / "report.html").read_text()
    assert "λ̂ of components" in page
    assert "random masks of equal size" in page


@pytest.mark.parametrize("kind", [LLC, RestrictedLLC, Susceptibilities, BayesianInfluence])
def test_one_of_lr_and_gamma_alone_leaves_the_other_at_its_default(kind: Any) -> None:
    tokens = torch.zeros(4, 8, dtype=torch.int64)
    more = {Susceptibilities: ({"a": tokens}, ["w"]), BayesianInfluence: ({"a": tokens},)}.get(kind, ())
    assert kind(tokens, *more, gamma=7.0, chains=2).lr_and_gamma == (1e-4, 7.0)
    assert kind(tokens, *more, lr=1e-5, chains=2).lr_and_gamma == (1e-5, 300.0)
