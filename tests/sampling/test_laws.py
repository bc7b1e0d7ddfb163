"""SGLD against its exact stationary law, and two of its steps by hand."""

import numpy as np
import pytest
import torch

from devmon.analysis import llc
from devmon.sampling.data import draw_batches
from devmon.snapshot import derive_seed
from devmon.testing import exact
from tests.support.sampling_toys import CURVATURE, assert_within_ess_gated, run, slopes


@pytest.mark.parametrize("lr, gamma", [(0.002, 20.0), (0.01, 2.0), (0.01, 30.0)])
def test_sgld_has_its_exact_law_step_size_bias_included(lr, gamma):
    expected = exact.sgld_quadratic(CURVATURE, 50, gamma, lr)
    assert lr < 0.01 or expected > 1.1 * exact.gibbs_quadratic(CURVATURE, 50, gamma)
    result = llc(run(lr=lr, gamma=gamma))
    # A law that is wider by more than a tenth is no level of λ.
    assert result["verdict"].item() == ("ok" if lr < 0.01 else "finite-time"), result
    assert_within_ess_gated(result, expected)


@pytest.mark.parametrize("replacement", [False, True])
def test_minibatch_noise_widens_sgld_exactly_as_the_law_says(replacement):
    data = slopes(size=0.8)
    b, n = 10, len(data)
    per_example = data.numpy().var(0)
    noise = per_example / b * (1 if replacement else (n - b) / (n - 1))
    expected = exact.sgld_quadratic(CURVATURE, 50, 2, 0.01, noise)
    assert expected > 1.2 * exact.sgld_quadratic(CURVATURE, 50, 2, 0.01)
    result = llc(run(data=data, replacement=replacement))
    assert_within_ess_gated(result, expected, percent=1.5)


def test_control_variates_remove_the_noise_bias_and_the_noise_of_the_score():
    data = slopes(size=0.8)
    expected = exact.sgld_quadratic(CURVATURE, 50, 2, 0.01)
    result = llc(run(data=data, control_variate=True, draws=300, burn_in=200))
    plain = llc(run(data=data, draws=300, burn_in=200))
    assert_within_ess_gated(result, expected, percent=1.5)
    assert result["se"].item() < 0.5 * plain["se"].item()


def test_the_full_batch_has_no_noise():
    data = slopes(n=20, size=3.0)
    full = run(data=data, batch_size=20, chains=2, draws=20, burn_in=0)
    quiet = run(data=0 * data, batch_size=20, chains=2, draws=20, burn_in=0)
    np.testing.assert_allclose(full["loss"] - full["baseline"], quiet["loss"] - quiet["baseline"], atol=1e-12)


def test_first_draw_is_at_the_weights_themselves():
    data = run(data=slopes(size=1.0), chains=3, draws=2, burn_in=0)
    assert (data["distance"].values[:, 0] == 0).all()
    np.testing.assert_array_equal(data["loss"].values[:, 0], data["baseline"].values[:, 0])
    assert (data["loss"].values[:, 1] != data["baseline"].values[:, 1]).all()


def test_two_steps_by_hand():
    """The update, the pairing and the seeds, against a loop that knows nothing of the engine but its two streams."""
    data, lr, gamma, nbeta = slopes(size=1.0), 0.01, 2.0, 50.0
    traces = run(data=data, chains=2, draws=3, burn_in=0, stacked=False)
    h = torch.tensor(CURVATURE, dtype=torch.float64)
    for chain in range(2):
        index = draw_batches(200, 10, 3, torch.Generator().manual_seed(derive_seed(0, "batches", chain)))
        noise = torch.Generator().manual_seed(derive_seed(0, "noise", chain))
        block = torch.empty(8192 // 4, 4, dtype=torch.float64).normal_(generator=noise)
        away = torch.zeros(4, dtype=torch.float64)
        for step in range(3):
            x = data[index[step]]
            loss = (0.5 * (h * away**2).sum() - x @ away).mean().item()
            assert traces["loss"].values[chain, step] == pytest.approx(loss, abs=1e-12)
            assert traces["distance"].values[chain, step] == pytest.approx(away.norm().item())
            grad = h * away - x.mean(0)
            assert traces["slope"].values[chain, step] == pytest.approx((grad @ away).item(), abs=1e-12)
            away = away - lr / 2 * (nbeta * grad + gamma * away) + lr**0.5 * block[step]
