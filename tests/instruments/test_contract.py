"""The contract of instruments passes a careful instrument and stops every careless one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from devmon.data import clustered_groups, clustered_mean
from devmon.data.rows import Rows
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract


def measured(value: Any, **attrs: Any) -> xr.Dataset:
    labels = {"long_name": "norm", "units": "1"}
    return xr.Dataset({"norm": ((), float(value), labels), "norm_se": ((), 0.0, labels)}, attrs=attrs)


def norm(model: nn.Module) -> float:
    return float(sum(p.detach().square().sum() for p in model.parameters()))


def careful(snapshot: Snapshot) -> xr.Dataset:
    return measured(norm(snapshot.model), headline=["norm"])


def careless(change: Callable[[Snapshot], object]) -> Callable[[Snapshot], xr.Dataset]:
    def instrument(snapshot: Snapshot) -> xr.Dataset:
        change(snapshot)
        return careful(snapshot)

    return instrument


def first(snapshot: Snapshot) -> nn.Parameter:
    return next(snapshot.model.parameters())


def backward(snapshot: Snapshot) -> None:
    if first(snapshot).requires_grad:
        first(snapshot).sum().backward()


def needs_gradients(snapshot: Snapshot) -> xr.Dataset:
    return measured(norm(snapshot.model) + first(snapshot).requires_grad, headline=["norm"])


def without(name: str) -> Callable[[Snapshot], xr.Dataset]:
    return lambda snapshot: careful(snapshot).drop_vars(name)


def grouped(snapshot: Snapshot, deal: Callable[[np.ndarray], np.ndarray] = np.asarray) -> xr.Dataset:
    """The mean of 40 items that differ, with its error and by groups of the items in the order that `deal` gives."""
    items = norm(snapshot.model) * (1 + np.sin(np.arange(40.0)))
    ones, result = np.ones(40), Rows(headline=["mean"])
    mean, se = clustered_mean(items, ones)
    result.put("mean", (), mean, se, "mean", units="1", replicates=clustered_groups(deal(items), ones))
    return result.dataset()


def drawn_anew(snapshot: Snapshot) -> xr.Dataset:
    return grouped(snapshot, np.random.default_rng(snapshot.step).permutation)


def regrouped(change: Callable[[xr.DataArray], xr.DataArray]) -> Callable[[Snapshot], xr.Dataset]:
    def instrument(snapshot: Snapshot) -> xr.Dataset:
        dataset = grouped(snapshot)
        return dataset.assign(mean_replicates=change(dataset["mean_replicates"]))

    return instrument


class Halved:
    """Its join forgets all parts but the first."""

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        return careful(snapshot)

    def share(self, rank: int, ranks: int) -> Callable[[Snapshot], xr.Dataset]:
        return lambda snapshot: careful(snapshot) / ranks

    def join(self, parts: list[xr.Dataset]) -> xr.Dataset:
        return parts[0]


CARELESS: dict[str, tuple[Callable[[Snapshot], xr.Dataset], str]] = {
    "draws from torch": (lambda s: measured(norm(s.model) + torch.rand(())), "the_same_weights"),
    "knows the step": (lambda s: measured(norm(s.model) + s.step), "the_step_does_not_matter"),
    "constant": (lambda s: measured(1.0), "other_weights"),
    "moves weights": (careless(lambda s: first(s).data.add_(1e-7)), "model_is_untouched"),
    "leaves training mode": (careless(lambda s: s.model.train()), "model_is_untouched"),
    "leaves a hook": (careless(lambda s: s.model.register_forward_hook(lambda *a: None)), "model_is_untouched"),
    "leaves gradients": (careless(backward), "model_is_untouched"),
    "freezes": (careless(lambda s: s.model.requires_grad_(False)), "model_is_untouched"),
    "needs gradients": (needs_gradients, "frozen_parameters"),
    "moves torch": (careless(lambda s: torch.rand(())), "global_randomness"),
    "moves numpy": (careless(lambda s: np.random.rand()), "global_randomness"),  # noqa: NPY002
    "moves python": (careless(lambda s: random.random()), "global_randomness"),
    "turns gradients off": (careless(lambda s: torch.set_grad_enabled(False)), "process_wide_switches"),
    "grows with weights": (
        lambda s: careful(s).expand_dims(part=np.arange(1 + int(norm(s.model) * 1e6) % 97)),
        "variables_and_dimensions",
    ),
    "no coordinate": (lambda s: careful(s).expand_dims(part=2), "every_dimension"),
    "no units": (lambda s: careful(s).assign(bare=1.0), "every_dimension"),
    "no error": (without("norm_se"), "headline_numbers"),
    "no headline": (without("norm"), "headline_numbers"),
    "knows the object": (lambda s: measured(norm(s.model) + len(s.model.of_seed)), "online_is_offline"),
    "counts its like": (
        lambda s: measured(s.memo.setdefault("n", []).append(1) or len(s.memo["n"])),
        "alone_is_together",
    ),
    "loses a share": (Halved(), "shares_of_ranks"),
    "groups drawn anew at each step": (drawn_anew, "the_step_does_not_matter"),
    "groups of other items": (regrouped(lambda groups: groups * np.float32(1.01)), "replicates_are"),
    "groups of too many digits": (regrouped(lambda groups: groups.astype(float)), "replicates_are"),
    "groups last": (regrouped(lambda groups: groups.expand_dims(layer=[0], axis=1)), "replicates_are"),
    "groups of single words": (
        regrouped(lambda groups: groups.mean() + (groups - groups.mean()) / np.float32(8)),
        "replicates_are",
    ),
    "infinite": (lambda s: measured(np.inf), "numbers_are_finite"),
}


def contract(instrument: Callable[[Snapshot], xr.Dataset]) -> InstrumentContract:
    class Contract(InstrumentContract):
        def instrument(self) -> Callable[[Snapshot], xr.Dataset]:
            return instrument

        def model(self, seed: int) -> nn.Module:
            model = nn.utils.skip_init(nn.Linear, 3, 2)
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator)
            model.of_seed = "x" * seed  # what no state dict holds
            return model

    return Contract()


def checks(suite: InstrumentContract) -> list[str]:
    return [name for name in dir(suite) if name.startswith("test_")]


@pytest.mark.parametrize("instrument", [careful, grouped])
def test_a_careful_instrument_passes_all(instrument: Callable[[Snapshot], xr.Dataset]) -> None:
    suite = contract(instrument)
    assert len(checks(suite)) == 15
    for name in checks(suite):
        getattr(suite, name)()


@pytest.mark.parametrize("fault", CARELESS)
def test_a_careless_instrument_is_stopped(fault: str) -> None:
    instrument, stopped_by = CARELESS[fault]
    suite = contract(instrument)
    (name,) = [test for test in checks(suite) if stopped_by in test]
    try:
        with pytest.raises(AssertionError):
            getattr(suite, name)()
    finally:
        torch.set_grad_enabled(True)


def test_a_headline_without_error_may_say_why() -> None:
    suite = contract(without("norm_se"))
    suite.without_error = {"norm": "a function of the weights, not an estimate"}
    suite.test_headline_numbers_carry_their_error()


def test_the_contract_leaves_global_randomness_as_it_was() -> None:
    before = torch.get_rng_state(), random.getstate()
    contract(careful).test_global_randomness_is_neither_used_nor_moved()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
