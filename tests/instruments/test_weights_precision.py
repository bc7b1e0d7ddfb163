"""What is read off weights in float32 against the same in float64: hostile spectra, scales, process settings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.anatomy import circuits
from devmon.anatomy.circuits import gram
from devmon.anatomy.fit import exact_products
from devmon.instruments import Composition, CopyingHeads, HeadSpectra, Superposition, WeightStatistics
from devmon.instruments.superposition import MAX_FEATURES
from devmon.snapshot import Instrument, Snapshot
from tests.anatomy.families import VOCAB, family

SIZE = 96


def spectrum(singular: Tensor, seed: int = 0) -> Tensor:
    """A random float32 matrix (SIZE, SIZE + 40) with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, SIZE, generator=generator, dtype=torch.float64)).Q for n in (SIZE, SIZE + 40)
    )
    return ((left * singular.double()) @ right.T).float()


SPECTRA = {
    "flat": torch.ones(SIZE),
    "one direction": torch.eye(SIZE)[0],
    "rank 5": (torch.arange(SIZE) < 5).float(),
    "six decades": torch.logspace(0, -6, SIZE),
    "one large": torch.cat([torch.tensor([300.0]), torch.linspace(0.01, 1, SIZE - 1)]),
}


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
@pytest.mark.parametrize("name", SPECTRA)
def test_singular_values_of_any_spectrum(name: str, scale: float) -> None:
    """A Gram matrix squares the condition: the mean of low rank would be off by 3e-4 of the largest over the mean."""
    model = nn.Linear(SIZE + 40, SIZE, bias=False)
    model.weight.data = scale * spectrum(SPECTRA[name])
    singular = np.linalg.svd(model.weight.detach().double().numpy(), compute_uv=False)
    found = WeightStatistics()(Snapshot(0, model)).isel(parameter=0)
    np.testing.assert_allclose(found["spectral"], singular[0], rtol=1e-6)
    np.testing.assert_allclose(found["sv_mean"], singular.mean(), rtol=1e-4)
    np.testing.assert_allclose(found["sv_variance"], singular.var(), rtol=1e-4, atol=1e-10 * singular[0] ** 2)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_and_medians_of_entries(offset: float) -> None:
    """Against NumPy in float64, with ties, an offset and parts of several sizes."""
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleList([nn.Linear(700, 500), nn.Linear(3, 3), nn.Linear(64, 64)])
    for k, parameter in enumerate(model.parameters()):
        drawn = torch.randn(parameter.shape, generator=generator).exp() * (k + 1)
        parameter.data = offset + (drawn * 8).round() / 8
    found = WeightStatistics()(Snapshot(0, model))
    for kind, dims in (("weight", 2), ("vector", 1)):
        entries = np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters() if p.ndim == dims])
        here = found.sel(kind=kind)
        np.testing.assert_allclose(here["mean"], entries.mean(), rtol=1e-12)
        np.testing.assert_allclose(here["variance"], entries.var(), rtol=1e-10)
        assert float(here["median"]) == np.sort(entries)[(len(entries) - 1) // 2]


@pytest.mark.parametrize("values", [[1.0], [2.0, 1.0], [0.0] * 9 + [1.0], [-0.0, 0.0, 5.0]])
def test_medians_of_few(values: list[float]) -> None:
    model = nn.Linear(len(values), 1, bias=False)
    model.weight.data = torch.tensor([values])
    found = WeightStatistics()(Snapshot(0, model))["median"].sel(kind="weight")
    assert float(found) == sorted(values)[(len(values) - 1) // 2]


@contextmanager
def precision(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


INSTRUMENTS = (WeightStatistics(), Composition(draws=64), HeadSpectra(length=8), Superposition())


@pytest.mark.parametrize("instrument", INSTRUMENTS, ids=lambda one: type(one).__name__)
def test_float32_is_as_good_as_float64(instrument: Instrument) -> None:
    model = family("gpt2")
    narrow, wide = instrument(Snapshot(0, model)), instrument(Snapshot(0, copy.deepcopy(model).double()))
    for name, values in wide.data_vars.items():
        np.testing.assert_allclose(narrow[name], values, rtol=1e-4, atol=1e-6, err_msg=str(name))


@pytest.mark.parametrize("instrument", INSTRUMENTS[:2], ids=lambda one: type(one).__name__)
def test_what_the_process_has_set_changes_nothing(instrument: Instrument) -> None:
    """Where products of float32 may be rounded to bfloat16 (on machines that do) or TF32."""
    model = family("gpt2")
    plain = instrument(Snapshot(0, model))
    with precision("medium"):
        xr.testing.assert_identical(instrument(Snapshot(0, model)), plain)


@pytest.mark.parametrize("value", ["highest", "high", "medium"])
def test_exact_products_are_exact_and_leave_no_trace(value: str) -> None:
    left = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    with precision(value):
        before = left @ left.T
        with suppress(KeyError), exact_products():
            torch.testing.assert_close(left @ left.T, (left.double() @ left.double().T).float(), rtol=1e-5, atol=1e-4)
            raise KeyError
        torch.testing.assert_close(left @ left.T, before, rtol=0, atol=0)
        assert torch.get_float32_matmul_precision() == value


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_composition_is_free_of_the_scale_of_the_weights(scale: float) -> None:
    model = family("gpt2")
    plain = Composition(draws=64)(Snapshot(0, model))
    for parameter in model.parameters():
        parameter.data *= scale
    scaled = Composition(draws=64)(Snapshot(0, model))
    np.testing.assert_allclose(scaled["composition"], plain["composition"], rtol=1e-5)


def test_many_features_in_float32() -> None:
    """Some of no length, some tiny, most along one direction: against float64."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(MAX_FEATURES + 100, 24, generator=generator) + 5 * torch.eye(24)[0]
    rows[:5], rows[5:9] = 0.0, 1e-15 * rows[5:9]
    model, wide = nn.Linear(24, len(rows), bias=False), nn.Linear(24, len(rows), bias=False).double()
    model.weight.data, wide.weight.data = rows, rows.double()
    narrow, found = (Superposition("weight")(Snapshot(0, one)) for one in (model, wide))
    assert "dimensionality" not in found
    for name, values in found.data_vars.items():
        np.testing.assert_allclose(narrow[name], values, rtol=1e-6, err_msg=str(name))


@pytest.mark.parametrize("size", [1, 3, 5, 33])
def test_symmetric_products_by_tiles(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devmon.anatomy.circuits.ROWS_AT_ONCE", 7)
    rows = torch.randn(20, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(gram(rows), rows.T @ rows)
    torch.testing.assert_close(gram(rows.float(), torch.float32), rows.T @ rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, products", [("gpt2", 1), ("llama", 2)])
def test_products_over_the_vocabulary_are_made_once_a_step(
    name: str, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 has one table, Llama two, whose products are not mixed up."""
    made: list[Tensor] = []
    monkeypatch.setattr(circuits, "gram", lambda table: made.append(table) or gram(table))
    snapshot, length = Snapshot(0, family(name).eval()), 8
    instruments = (HeadSpectra(length=length), Superposition(), CopyingHeads(vocab_size=VOCAB, length=length))
    together = [one(snapshot) for one in instruments]
    assert len(made) == products
    for one, found in zip(instruments, together, strict=True):
        xr.testing.assert_identical(one(Snapshot(0, snapshot.model)), found)
