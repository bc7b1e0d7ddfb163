"""The spectrum of the Hessian at w*, what localisation leaves of it, and λ̂(gamma) fitted to trials."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from devmon.errors import InstrumentError
from devmon.sampling import BAOAB, SGLD, Settings, regression_loss
from devmon.sampling.choosing.extrapolation import fit
from devmon.sampling.choosing.spectrum import Spectrum, largest_curvature, mobility, spectrum
from devmon.testing import exact


def regression(scales, n=500, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(scales), generator=generator) * torch.tensor(scales)
    model = nn.Linear(len(scales), 1, bias=False)
    return model, (x, model(x).detach())


def curvatures(data, nbeta):
    x = data[0].double()
    return nbeta * torch.linalg.eigvalsh(x.T @ x / len(x)).numpy()


def test_few_parameters_are_taken_one_by_one_and_exactly():
    model, data = regression([10.0, 1.0, 0.1, 0.01])
    found = spectrum(model, regression_loss, data, Settings(nbeta=80.0, batch_size=64), examples=500)
    assert np.sort(found.scales) == pytest.approx(curvatures(data, 80.0), rel=1e-5)
    assert found.counts.tolist() == [1] * 4
    assert found.scale == pytest.approx(found.scales.max(), rel=1e-3)
    for gamma in (1.0, 50.0):
        assert found.llc(gamma) == pytest.approx(exact.gibbs_quadratic(found.scales, 1.0, gamma))
    assert found.llc() == 2.0
    largest = largest_curvature(model, regression_loss, data, Settings(batch_size=64))
    assert largest == pytest.approx(found.scales.max() / 80, rel=1e-4)


def test_many_parameters_are_seen_by_random_vectors():
    """200 curvatures over three decades and 100 flat directions: ½ tr a / (a + gamma), within √(2 / (2 · 200)) or so of
    it, and in its dependence on gamma far closer. A node off 0 would count flat directions as curved ones."""
    model, data = regression([*(10.0 ** np.linspace(0, -1.5, 200)).tolist(), *[0.0] * 100], n=4000)
    found = spectrum(model, regression_loss, data, Settings(nbeta=100.0, batch_size=500), examples=4000)
    true = curvatures(data, 100.0)
    assert found.counts.sum() == pytest.approx(300)
    assert found.scale == pytest.approx(true.max(), rel=0.01)
    assert found.llc() == pytest.approx(100, rel=0.25)
    for share in (0.3, 0.1, 0.01, 1e-3):
        expected = exact.gibbs_quadratic(true, 1.0, share * true.max()) / 100
        assert found.llc(share * found.scale) / found.llc() == pytest.approx(expected, abs=0.05), share


def test_a_mask_leaves_the_directions_that_move():
    model, data = regression([3.0, 2.0, 1.0])
    mask = {"weight": torch.tensor([[True, False, True]])}
    found = spectrum(model, regression_loss, data, Settings(nbeta=80.0, mask=mask), examples=500)
    kept = (data[0][:, [0, 2]], data[1])
    assert np.sort(found.scales) == pytest.approx(curvatures(kept, 80.0), rel=1e-5)


def test_chunks_are_no_larger_than_a_batch_and_the_gradients_are_counted():
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch[0]) * torch.is_grad_enabled())
        return regression_loss(model, batch)

    model, data = regression([1.0, 1.0])
    found = spectrum(model, loss, data, Settings(batch_size=7), examples=100)
    assert max(sizes) == 7
    assert found.gradients == sum(sizes)


class Unit(nn.Module):
    """x → a tanh(b x) at a = b = 0: the loss is of fourth order, so that nothing is curved at w*."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.a * torch.tanh(self.b * x)


def test_without_curvature_at_w_the_scale_is_where_the_loss_and_the_gaussian_hold_alike():
    """L = ½ a² b² E[x²] near 0: the curvature at the distance 1 / √s is of order 1 / s, so that s is about √nbeta."""
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    for nbeta in (1e3, 1e5):
        found = spectrum(Unit(), regression_loss, (x, 0 * x), Settings(nbeta=nbeta))
        assert 0.1 < found.scale / math.sqrt(nbeta) < 5
        assert found.llc() == 0.0
    flat = nn.Linear(1, 1)
    with pytest.raises(InstrumentError, match="curvature 0"):
        spectrum(flat, lambda m, b: 0 * m(b[0]).sum(1), (x, x), Settings())


def test_how_far_chains_have_come_is_that_of_the_gaussian():
    """One direction of curvature a, one flat: variances 1 − exp(−2 (a + gamma) t) of the law's, averaged by hand."""
    found = Spectrum(np.array([3.0, 0.0]), np.array([2.0, 5.0]), 3.0)
    times = np.linspace(0.4, 0.9, 100_001)
    shares = [1 - np.exp(-2 * (a + 0.5) * times).mean() for a in (3.0, 0.0)]
    value, temperature = found.filled(0.5, (0.4, 0.9))
    assert value == pytest.approx(0.5 * 2 * 3 / 3.5 * shares[0], rel=1e-6)
    assert temperature == pytest.approx((2 * shares[0] + 5 * shares[1]) / 7, rel=1e-6)


@pytest.mark.parametrize("momentum", [None, 0.5, 0.9])
def test_the_mobility_is_what_a_force_of_one_moves_a_chain_a_step(momentum):
    """Down a linear loss, with noise 0 and the velocity settled."""
    kernel = SGLD(1e-3, 100.0, 0.0) if momentum is None else BAOAB(1e-3, 100.0, 0.0, momentum=momentum)
    state = kernel.init(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    before = 0.0
    for _ in range(400):
        before = float(state.position)
        force = torch.full((1, 1), -1 / 100.0, dtype=torch.float64)
        state = kernel.step(state, force, torch.zeros(1, 1, dtype=torch.float64))
    moved = (float(state.position) - before) / 1e-3
    assert moved == pytest.approx(mobility(Settings(sampler=kernel)), rel=1e-6)


def law(scales):
    return lambda gamma: exact.gibbs_quadratic(scales, 1.0, gamma) if gamma else len(scales) / 2


def test_the_fit_extrapolates_what_the_hessian_knows_and_what_it_does_not():
    """Two scales of curvature, S-shaped in log gamma: the limit is 5 with the Hessian and, from trials that go far
    enough, without it; its error is that of the trials."""
    scales = np.array([3e4] + [300.0] * 9)
    gammas = [3e3, 300.0, 30.0]
    values = np.array([law(scales)(gamma) for gamma in gammas])
    covariance = np.diag((0.01 * values) ** 2)
    known = fit(gammas, values, covariance, law(scales))
    assert known.limit == pytest.approx(5, rel=0.01)
    assert known.low < 5 < known.high
    assert known.high - known.low < 0.8
    assert known.missing(known.limit) == pytest.approx(1 - values[-1] / 5, abs=0.02)
    assert known.slope == pytest.approx(-(9 * 0.5 * 300 * 30 / 330**2) / values[-1], abs=0.03)
    alone = fit([*gammas, 3.0], np.append(values, law(scales)(3.0)), np.diag(np.full(4, 1e-4)), lambda gamma: 0.0)
    assert alone.limit == pytest.approx(5, rel=0.05)


def test_a_curvature_trace_is_steep_and_has_no_limit_within_its_trials():
    gammas = [1e3, 1e2]
    found = fit(gammas, np.array([0.1, 1.0]), np.diag([1e-5, 1e-3]), lambda gamma: 0.0)
    assert found.slope < -0.6
    assert found.missing(found.low) > 0.5
