"""Trace and extreme eigenvalues of the Hessian: where the spectrum is known, against dense references, and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from numpy.typing import NDArray
from scipy.sparse.linalg import aslinearoperator
from scipy.stats import t as student
from torch import Tensor, nn

from devmon.instruments import Curvature
from devmon.instruments.curvature import MAX_DENSE, _trace
from devmon.sampling import classification_loss, next_token_loss, regression_loss
from devmon.snapshot import Snapshot

Array = NDArray[np.float64]

SHARP = np.array([7.0, 5.0, 4.0, 3.5, 3.0])  # the largest eigenvalues, well apart


def rotated(spectrum: Array, seed: int = 0) -> Array:
    """A symmetric matrix with this spectrum in a random basis."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(spectrum), len(spectrum))))[0]
    return (basis * spectrum) @ basis.T


def spectrum(size: int, least: float) -> Array:
    """SHARP, a bulk around 0.5, and `least`."""
    bulk = np.random.default_rng(1).uniform(0.0, 1.0, size - len(SHARP) - 1)
    return np.concatenate([SHARP, bulk, [least]])


class Bowl(nn.Module):
    """Two parameters, `a` and `b`, that together are w; an example x costs x · ½ wᵀAw."""

    def __init__(self, matrix: Array, split: int = 4) -> None:
        super().__init__()
        w = torch.randn(len(matrix), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.a, self.b = nn.Parameter(w[:split].clone()), nn.Parameter(w[split:].clone())
        self.register_buffer("matrix", torch.tensor(matrix))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.cat([self.a, self.b])
        return x * (w @ self.matrix @ w) / 2


def itself(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


UNEVEN = torch.tensor([9.0, -2.0, 0.5, 0.5, 0.0, 1.0, -2.0], dtype=torch.float64)  # mean 1


def measure(instrument: Curvature, model: nn.Module, seed: int = 7) -> xr.Dataset:
    return instrument(Snapshot(0, model.eval(), seed))


def precise(data: Any, loss: Any = itself, **settings: Any) -> Curvature:
    return Curvature(data, loss=loss, **({"float64": True, "tolerance": 1e-7} | settings))


def assert_describes(found: xr.Dataset, hessian: Array, rtol: float = 1e-7) -> None:
    """The dataset against the dense Hessian; the trace within four of its standard errors."""
    known, top = np.linalg.eigvalsh(hessian), found.sizes["rank"]
    atol = rtol * np.abs(known).max()
    assert found.attrs["parameters"] == len(hessian)
    np.testing.assert_allclose(found["eigenvalue"], known[::-1][:top], atol=atol, rtol=0)
    np.testing.assert_allclose(found["least"], known[0], atol=atol, rtol=0)
    off = (float(found["trace"]) - known.sum(), float(found["trace_se"]))
    assert abs(off[0]) <= 4 * off[1] + atol, off
    assert off[1] <= 0.1 * np.abs(known).sum(), "the interval would cover anything"
    largest = known[-1] if known[-1] > 0 else np.nan
    for end in ("", "_se"):
        np.testing.assert_allclose(found[f"effective_rank{end}"], found[f"trace{end}"] / largest, rtol=1e3 * rtol)


def dense(model: nn.Module, loss: Any, batch: Any) -> Array:
    """The Hessian by torch.func, reverse over reverse, in the order of named_parameters."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in named.values()]

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return loss(self.model, batch).mean()

    def of(vector: Tensor) -> Tensor:
        parts = {
            f"model.{name}": part.view(named[name].shape) for name, part in zip(named, vector.split(sizes), strict=True)
        }
        return torch.func.functional_call(Whole(), parts, ())

    return torch.func.jacrev(torch.func.jacrev(of))(torch.cat([p.reshape(-1) for p in named.values()])).numpy()


# --- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [MAX_DENSE, MAX_DENSE + 1])
@pytest.mark.parametrize("least", [0.0, -0.3, -9.0])
def test_a_bowl_has_its_spectrum(size: int, least: float) -> None:
    """Minibatches of unequal weight, a minimum, a saddle, and one that falls more steeply than it rises."""
    known = spectrum(size, least)
    found = measure(precise(UNEVEN, batch_size=3), Bowl(rotated(known)))
    assert_describes(found, rotated(known))
    assert (float(found["trace_se"]) == 0) == (size <= MAX_DENSE)
    assert found["rank"].values.tolist() == [1, 2, 3, 4, 5]
    assert (found["eigenvalue_error"] < 1e-5).all()
    assert found["least_error"] < 1e-5


def test_an_eigenvalue_lies_within_the_error() -> None:
    """A loose tolerance shows in the error; the error is the residual, so it bounds what it says it bounds."""
    size = 200
    known = np.linspace(-1.0, 1.0, size)
    loose, tight = (
        measure(precise(UNEVEN, top=2, tolerance=tolerance), Bowl(rotated(known))) for tolerance in (0.05, 1e-6)
    )
    for found in (loose, tight):
        for value, error in (("eigenvalue", "eigenvalue_error"), ("least", "least_error")):
            distance = np.abs(np.atleast_1d(found[value])[:, None] - known).min(1)
            assert (distance <= np.atleast_1d(found[error])).all(), (distance, found[error].values)
    assert 1e-3 < float(loose["least_error"]) < 0.3
    assert float(tight["least_error"]) < 1e-5


def test_linear_regression_has_the_covariance_of_its_inputs() -> None:
    """XᵀX / n, of rank n < parameters: where `top` covers the rank, the random part of the trace has nothing left."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 90, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 90) + 0.2
    y = torch.randn(37, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(90, 1, bias=False).double()
    for n, limit in ((37, 99), (20, 20)):
        hessian = (x[:n].T @ x[:n] / n).numpy()
        found = measure(precise((x, y), regression_loss, top=40, limit=limit, batch_size=16), model)
        assert found.attrs["n"] == n
        assert_describes(found, hessian)
        np.testing.assert_allclose(found["trace"], np.trace(hessian), rtol=1e-9)
        assert float(found["trace_se"]) < 1e-9
        np.testing.assert_allclose(found["eigenvalue"][n:], 0.0, atol=1e-9)


def test_every_eigenvalue_of_few_parameters() -> None:
    known = spectrum(MAX_DENSE + 6, -0.3)
    for top in (len(known), len(known) - 1):
        found = measure(precise(UNEVEN, top=top), Bowl(rotated(known)))
        assert_describes(found, rotated(known), 1e-12)
        assert float(found["trace_se"]) == 0
    one = measure(precise(UNEVEN[:, None], lambda model, x: model(x)[:, 0] ** 3, top=1), nn.Linear(1, 1, bias=False))
    assert one["eigenvalue"].item() == one["least"].item() == one["trace"].item()


@pytest.mark.parametrize("level", [0.0, 4.0, -4.0])
def test_equal_eigenvalues(level: float) -> None:
    """One direction tells of one of them: the others are new starts, of a Hessian that may be zero."""
    model, instrument = Bowl(level * np.eye(80)), precise(torch.ones(1, dtype=torch.float64))
    for seed in range(3):
        found = measure(instrument, model, seed)
        assert_describes(found, level * np.eye(80), 1e-12)
        assert np.isnan(found["effective_rank"]) == (level <= 0)
        xr.testing.assert_identical(found, measure(instrument, model, seed))


def test_a_loss_linear_in_the_weights_is_flat() -> None:
    found = measure(precise(torch.ones(3, 80), lambda model, x: model(x)[:, 0]), nn.Linear(80, 1).double())
    assert found[["eigenvalue", "least", "trace", "trace_se"]].to_array().values.any() == np.False_


def test_twice_the_loss_is_twice_the_curvature_with_the_same_probes() -> None:
    """Powers of two are exact, so what is drawn may depend on neither the weights nor the Hessian."""
    matrix = rotated(spectrum(100, -0.3))
    one, two, other = (
        measure(precise(UNEVEN, tolerance=1e-4), Bowl(factor * matrix), seed)
        for factor, seed in ((1.0, 7), (2.0, 7), (1.0, 8))
    )
    for name in ("eigenvalue", "eigenvalue_error", "least", "least_error", "trace", "trace_se"):
        np.testing.assert_array_equal(two[name], 2 * one[name])
    np.testing.assert_array_equal(two["effective_rank"], one["effective_rank"])
    assert abs(float(other["trace"] - one["trace"])) > 0.01 * float(one["trace_se"]), "another run, other probes"


# --- the error of the trace ---------------------------------------------------------------------------------------


def test_the_trace_is_unbiased_and_covered_at_the_nominal_rate() -> None:
    """On a subspace that is no eigenspace: exact there, random on the rest, never both.

    Few probes for the size of the error; the default number for its coverage, because four or eight products zᵀHz are
    skewed enough to cost Student's interval a hundredth or two (0.935 over 12000 runs of 4, 0.945 with 32).
    """
    matrix = rotated(spectrum(80, -2.0), seed=3)
    basis = np.linalg.qr(np.random.default_rng(4).standard_normal((80, 5)))[0]
    known = float(np.trace(basis.T @ matrix @ basis))

    def runs(count: int, probes: int) -> tuple[Array, Array]:
        operator, model = aslinearoperator(matrix), nn.Identity()
        pairs = [_trace(operator, basis, known, probes, Snapshot(0, model, seed)) for seed in range(count)]
        trace, error = np.array(pairs).T
        return trace - np.trace(matrix), error

    off, error = runs(2000, 4)
    z, ratio = off.mean() / (off.std() / np.sqrt(len(off))), (error**2).mean() / off.var()
    assert abs(z) < 3.5, z
    assert 0.85 < ratio < 1.15, ratio
    off, error = runs(700, 32)
    covered = (np.abs(off) < student.ppf(0.975, 31) * error).mean()
    assert 0.925 < covered < 0.975, covered


def test_known_directions_take_their_noise_away() -> None:
    """Five sharp directions make nearly all of the noise of plain Hutchinson."""
    matrix = rotated(np.concatenate([100 * SHARP, spectrum(94, -0.3)]))
    few, all_five = (measure(precise(UNEVEN, top=top), Bowl(matrix)) for top in (1, 5))
    assert float(all_five["trace_se"]) < 0.02 * float(few["trace_se"])


# --- networks, against the dense Hessian --------------------------------------------------------------------------


def mlp(seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 5)).to(dtype).eval()


def labelled(n: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = 2 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (n,), generator=generator)


def test_mlp_against_torch_func_whatever_the_minibatches() -> None:
    model, data = mlp(0), labelled()
    hessian = dense(model, classification_loss, data)
    assert np.linalg.eigvalsh(hessian)[0] < -0.005, "no minimum: the least eigenvalue has something to find"
    for batch_size in (6, 99):
        assert_describes(measure(precise(data, classification_loss, batch_size=batch_size), model), hessian)
    with torch.no_grad():
        assert_describes(measure(precise(data, classification_loss), model), hessian)


def test_float32_comes_near() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, data = mlp(0, dtype), labelled()
        found = measure(Curvature(data, loss=classification_loss), model)
        assert_describes(found, dense(model.double(), classification_loss, data), rtol=1e-5)
        assert (found["eigenvalue_error"] < 1e-3).all()


class Attending(nn.Module):
    """One causal attention head over tokens, its unembedding tied to the embedding; fused or written out."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embed, self.unembed = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.unembed.weight = self.embed.weight
        self.qkv, self.fused = nn.Linear(4, 12), fused
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            later = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
            mixed = (q @ k.mT / 2).masked_fill(later, -torch.inf).softmax(-1) @ v
        return self.unembed(x + mixed[:, 0])


def test_attention_with_tied_weights_against_torch_func() -> None:
    """Fused attention has no double backward; a tied matrix is 36 parameters and not 72."""
    tokens = torch.randint(9, (10, 6), generator=torch.Generator().manual_seed(0))
    hessian = dense(Attending(fused=False).double(), next_token_loss, tokens)
    assert len(hessian) == 36 + 60
    assert_describes(measure(precise(tokens, next_token_loss), Attending().double()), hessian)
    assert_describes(measure(Curvature(tokens, batch_size=4), Attending()), hessian, rtol=1e-5)


# --- which parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moving", [10, 100])
def test_mask_restricts_to_the_block(moving: int) -> None:
    matrix = rotated(spectrum(120, -0.3))
    model = Bowl(matrix, split=moving)
    block = np.arange(120) < moving
    for mask, where in (("a", block), ("b", ~block)):
        found = measure(precise(UNEVEN, mask=mask), model)
        assert_describes(found, matrix[np.ix_(where, where)])
        assert found.attrs["mask"] == mask
    rest = torch.arange(moving) % 3 != 1
    where = np.concatenate([rest.numpy(), np.arange(moving, 120) % 2 == 0])
    entries = {"a": rest, "b": torch.arange(moving, 120) % 2 == 0}
    assert_describes(measure(precise(UNEVEN, mask=entries), model), matrix[np.ix_(where, where)])


def test_frozen_parameters_rest_unless_all_are() -> None:
    matrix = rotated(spectrum(120, -0.3))
    model = Bowl(matrix, split=30)
    model.b.requires_grad_(False)
    assert_describes(measure(precise(UNEVEN), model), matrix[:30, :30])
    assert_describes(measure(precise(UNEVEN), model.requires_grad_(False)), matrix)


def test_an_unused_parameter_is_flat() -> None:
    model = mlp(0)
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    hessian = dense(mlp(0), classification_loss, labelled())
    padded = np.pad(hessian, (0, 3))
    assert_describes(measure(precise(labelled(), classification_loss), model), padded)
