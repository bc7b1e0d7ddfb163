"""Each verdict on chains of a loss whose law is known: what is off, by how much, and that the word says so."""

import numpy as np
import pytest
import torch
from torch import nn

from devmon.analysis import llc
from devmon.errors import DataError
from devmon.sampling import BAOAB, SGLD, Settings, regression_loss, sample
from devmon.testing import exact
from tests.support.sampling_toys import CURVATURE, Bowl, run, slopes

H = np.array(CURVATURE)


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("batch_size", [10, 200])
def test_the_first_order_part_of_a_slope_at_the_center(control_variate, batch_size):
    """The law is N(nbeta x / a, 1 / a) around w*, for a loss ½ Σ h δ² − x·δ."""
    x, nbeta, gamma = torch.tensor([0.3, 0.0, 0.1, 0.0], dtype=torch.float64), 50.0, 2.0
    a = nbeta * H + gamma
    mean = nbeta * x.numpy() / a
    first, quadratic = -nbeta * (x.numpy() * mean).sum(), 0.5 * nbeta * (H * (1 / a + mean**2)).sum()
    data = slopes(size=0.2 if control_variate else 0.0) + x
    options = {"batch_size": batch_size, "control_variate": control_variate, "sampler": "baoab"}
    traces = run(data=data, chains=256, draws=300, burn_in=150, lr=0.005, **options)
    result, without = llc(traces), llc(traces, without_first_order=True)
    assert abs(result["first_order"].item() - first) < 4 * result["first_order_se"].item() < 0.05 * abs(first)
    assert result["llc"].item() == pytest.approx(quadratic + first, rel=0.03)
    assert without["llc"].item() == pytest.approx(quadratic, rel=0.01)
    assert result["verdict"].item() == "not a minimum", result
    assert without["verdict"].item() == "ok", without
    with pytest.raises(DataError, match="first_order"):
        llc(traces.drop_vars("first_order"), without_first_order=True)


def test_at_a_minimum_there_is_no_first_order_part():
    result = llc(run(data=slopes(size=0.5), chains=32, batch_size=20, sampler="baoab", control_variate=True))
    assert abs(result["first_order"].item()) < 1e-9
    assert result["verdict"].item() == "ok", result


def test_chains_that_share_the_work_have_the_first_order_part_of_all():
    """The gradient at w* must not depend on which chains a rank has; here it is over a part of the data."""
    data = slopes(size=0.5) + 0.1
    options = {"chains": 3, "draws": 3, "burn_in": 0, "batch_size": 4, "stacked": False}
    whole = run(data=data, **options)
    assert whole.attrs["n"] > 12
    for chain in range(3):
        part = run(data=data, chains_only=[chain], **options)
        np.testing.assert_array_equal(part["first_order"].values[0], whole["first_order"].values[chain])
        assert part["noise_bias"].item() == whole["noise_bias"].item() > 0


@pytest.mark.parametrize("sampler", ["sgld", "baoab"])
def test_the_prior_belongs_to_the_temperature(sampler):
    """With a strong prior w·(w − w*) is most of the virial: without it the temperature of a right law is far from 1."""
    traces = run(prior=30.0, sampler=sampler, lr=0.002, chains=256)
    result, without = llc(traces), llc(traces.drop_vars("prior_slope"))
    own = np.mean(1 / (1 - 0.002 * (50 * H + 32) / 4)) if sampler == "sgld" else 1.0
    assert abs(result["temperature"].item() - own) < 4 * result["temperature_se"].item() < 0.3
    assert abs(without["temperature"].item() - 1) > 2


def baoab_noise(kernel: BAOAB, a: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Stationary variances of BAOAB on ½ Σ a w², `noise` the variance of the gradient of nbeta L: by iteration."""
    h, c = np.sqrt(kernel.lr), kernel.momentum
    found = []
    for stiffness, variance in zip(a, noise, strict=True):
        kick = np.array([[1, 0], [-h * stiffness, 1]])
        drift, friction = np.array([[1, h / 2], [0, 1]]), np.diag([1, c])
        step = drift @ friction @ drift @ kick
        kicked = (drift @ friction @ drift @ np.array([0, h]))[:, None]
        shaken = (drift @ np.array([0, np.sqrt(1 - c**2)]))[:, None]
        added = variance * kicked @ kicked.T + shaken @ shaken.T
        law = np.zeros((2, 2))
        for _ in range(20_000):
            law = step @ law @ step.T + added
        found.append(law[0, 0])
    return np.array(found)


@pytest.mark.parametrize("kernel", [SGLD(0.001, 50, 0.1), BAOAB(0.001, 50, 0.1), BAOAB(0.0005, 50, 0.1, momentum=0.8)])
@pytest.mark.parametrize("replacement", [False, True])
def test_what_minibatch_noise_adds_at_most_is_what_it_adds_to_curved_directions(kernel, replacement):
    data = slopes(n=4000, size=0.5)
    n, b = len(data), 10
    noise = data.numpy().var(0) / b * (1 if replacement else (n - b) / (n - 1))
    a = 50 * H + 0.1
    if isinstance(kernel, SGLD):
        lr = kernel.lr
        law, quiet = ((lr + (lr * 25) ** 2 * c) / (lr * a * (1 - lr * a / 4)) for c in (noise, 0))
    else:
        law, quiet = (baoab_noise(kernel, a, 50**2 * c) for c in (noise, 0 * noise))
    added = 0.5 * 50 * (H * (law - quiet)).sum()
    traces = run(data=data, sampler=kernel, chains=2, draws=400, burn_in=0, replacement=replacement)
    assert traces["noise_bias"].item() == pytest.approx(added, rel=0.06)
    assert run(data=data, chains=1, draws=2, burn_in=0, batch_size=n)["noise_bias"].item() == pytest.approx(
        0, abs=1e-12
    )


def test_noise_that_adds_more_than_a_tenth_is_named_though_the_temperature_is_one():
    """Two noisy directions among 400 quiet flat ones: the temperature hides them, and λ̂ is half too high."""
    curvature = (4.0, 1.0, *[1e-6] * 400)
    x = torch.zeros(200, 402, dtype=torch.float64)
    x[:, :2] = slopes(d=2, size=1.0)
    options = {"model": Bowl(curvature), "data": x, "chains": 32, "draws": 200, "lr": 0.005, "gamma": 20.0}
    options["sampler"] = "baoab"
    noisy, quiet = llc(run(**options)), llc(run(**options, control_variate=True))
    right = exact.gibbs_quadratic(curvature, 50, 20.0)
    assert noisy["llc"].item() > 1.3 * right
    assert abs(noisy["temperature"].item() - 1) < 0.1
    assert noisy["verdict"].item() == "gradient noise", noisy
    assert quiet["llc"].item() == pytest.approx(right, rel=0.1)
    assert quiet["verdict"].item() == "ok", quiet


class Well(nn.Module):
    """L = 1 − exp(−‖w − c‖² / 2): quadratic near c, flat away from it."""

    def __init__(self, d=40):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d, dtype=torch.float64))


def well_loss(model, batch):
    return (1 - torch.exp(-0.5 * (model.w**2).sum())).expand(len(batch))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_chains_in_equilibrium_outside_of_the_basin_have_left_it(gamma):
    """The Gaussian around w* holds them, so the temperature is 1 and the chains agree; the loss there is no valley."""
    options = {"data": torch.zeros(50, 1, dtype=torch.float64), "loss": well_loss, "nbeta": 20.0, "chains": 16}
    result = llc(run(Well(), sampler="baoab", lr=0.05, gamma=gamma, draws=200, burn_in=100, **options))
    assert abs(result["temperature"].item() - 1) < 0.1
    assert result["anharmonicity"].item() + 2 * result["anharmonicity_se"].item() < 0.75
    assert result["verdict"].item() == "left the basin", result
    held = llc(run(Well(), sampler="baoab", lr=0.002, gamma=400.0, draws=200, burn_in=100, **options))
    assert held["anharmonicity"].item() > 0.9
    assert held["verdict"].item() == "ok", held


def regression(n=2000, d=20):
    """λ = d / 2, and at n / log n = 263 and gamma 1 the law has 9.96 of 10."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    y = x @ torch.randn(d, 1, generator=generator) + torch.randn(n, 1, generator=generator)
    model = nn.Linear(d, 1, bias=False)
    model.weight.data = torch.linalg.lstsq(x.double(), y.double()).solution.T.float()
    return model, (x, y), torch.linalg.eigvalsh((x.T @ x / n).double()).numpy()


@pytest.mark.parametrize("sampler", ["sgld", "baoab"])
@pytest.mark.parametrize("batch_size", [64, 2000])
@pytest.mark.parametrize("gamma", [1.0, 1000.0])
def test_whatever_the_step_size_ok_is_within_a_tenth_of_the_truth(sampler, batch_size, gamma):
    model, data, h = regression()
    truth = exact.gibbs_quadratic(h, 2000 / np.log(2000), gamma)
    found = {}
    for lr in (1e-14, 1e-9, 1e-6, 2e-5, 1e-4, 3e-4, 2e-3, 1e-2):
        settings = Settings(lr=lr, gamma=gamma, batch_size=batch_size, sampler=sampler, draws=100, burn_in=50)
        result = llc(sample(model, regression_loss, data, settings))
        found[lr] = (result["verdict"].item(), round(result["llc"].item() / truth, 3))
    ok = {lr: ratio for lr, (verdict, ratio) in found.items() if verdict == "ok"}
    assert all(abs(ratio - 1) < 0.1 for ratio in ok.values()), found
    assert all(found[lr][0] != "ok" for lr in (1e-14, 1e-9, 1e-6)), found
    assert ok or batch_size == 64, found
