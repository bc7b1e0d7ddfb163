"""Calibration and the direct call, on problems whose coefficient is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from devmon.analysis import llc
from devmon.errors import InstrumentError
from devmon.sampling import Settings, calibrate, classification_loss, estimate_llc, regression_loss, sample
from devmon.sampling.choosing.noise import noise_bias
from devmon.testing import exact


def linear_regression(n=5000, d=8, noise=1.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    y = x @ torch.randn(d, 1, generator=generator) + noise * torch.randn(n, 1, generator=generator)
    model = nn.Linear(d, 1, bias=False)
    model.weight.data = torch.linalg.lstsq(x.double(), y.double()).solution.T.float()
    return model, (x, y)


def test_regression_with_label_noise_unaided():
    """λ = 4; plain minibatch SGLD at this batch size is far off, as is a baseline from other examples."""
    model, data = linear_regression()
    result = estimate_llc(model, regression_loss, data, chains=4, draws=200, batch_size=256)
    value, se = result["llc"].item(), result["se"].item()
    assert result["verdict"].item() == "ok"
    assert result.attrs["control_variate"]
    assert "Control variates pay" in result.attrs["calibration"]
    assert se < 0.05 * 4
    assert abs(value - 4) < 3 * se + 0.03 * 4, (value, se)
    assert {"llc", "se", "ess", "rhat", "verdict", "loss", "baseline"} <= set(result.data_vars)
    assert result["loss"].dims == ("chain", "draw")


def test_the_interval_of_a_calibrated_level_knows_what_the_settings_leave():
    """Minibatch noise moves λ̂ both ways; what localisation takes away can only be above."""
    model, data = linear_regression(n=200, d=16)
    result = estimate_llc(model, regression_loss, data, draws=60, batch_size=50)
    value, half = (
        result["llc"].item(),
        1.6449 * np.hypot(result["se"], result.attrs["systematic"] * result["llc"]).item(),
    )
    assert result.attrs["systematic"] > 0
    assert result.attrs["flat"] == 1
    assert abs(result.attrs["slope"]) < 0.1
    assert result["low"].item() == pytest.approx(value - half, rel=1e-3)
    assert result["high"].item() == pytest.approx(value / (1 - result.attrs["missing"]) + half, rel=1e-3)
    given = {name: result.attrs[name] for name in ("lr", "gamma", "steps_per_draw", "control_variate")}
    alone = estimate_llc(model, regression_loss, data, draws=60, batch_size=50, **given)
    assert alone["llc"].item() == value
    assert (alone["high"] - alone["low"]).item() / 2 == pytest.approx(1.6449 * alone["se"].item(), rel=1e-3)


@pytest.mark.parametrize("factor, verdict", [(10.0, "ok"), (1000.0, "localised")])
def test_one_feature_on_another_scale(factor, verdict):
    """λ = 5. A search that stops where λ̂ moves little, or much, finds .87 and .5 and calls them ok."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 10, generator=generator) * torch.tensor([factor] + [1.0] * 9)
    model = nn.Linear(10, 1, bias=False)
    result = estimate_llc(model, regression_loss, (x, model(x).detach()), batch_size=32)
    value, low, high = (result[name].item() for name in ("llc", "low", "high"))
    assert result["verdict"].item() == verdict
    assert low < 5 < high
    if verdict == "ok":
        assert value == pytest.approx(5, rel=0.15)
    else:
        assert high == np.inf
        assert result.attrs["missing"] > 0.5


def test_the_budget_is_never_exceeded_and_by_default_three_estimates():
    model, data = linear_regression(n=400, d=4)
    counted = []

    def loss(net, batch):
        losses = inner = regression_loss(net, batch)
        while torch._C._functorch.is_batchedtensor(inner):
            inner = torch._C._functorch.get_unwrapped(inner)
        counted.append(inner.numel() * torch.is_grad_enabled())
        return losses

    heard = []
    start = Settings(batch_size=16, sampler="baoab", draws=60, burn_in=30)
    calibration = calibrate(model, loss, data, start, max_steps=400, progress=heard.append)
    assert sum(counted) <= 1.05 * calibration.cost  # what finds out whether chains can be stacked is not counted
    settings = calibration.settings
    steps = settings.chains * (settings.draws + settings.burn_in) * settings.steps_per_draw
    assert calibration.cost <= 3 * (steps * 16 * (1 + settings.control_variate) + 400 * settings.control_variate)
    assert all("% of the budget" in line for line in heard)
    few = calibrate(model, regression_loss, data, start, max_steps=400, budget=60_000)
    assert few.cost <= 60_000
    with pytest.raises(InstrumentError, match="larger budget"):
        calibrate(model, regression_loss, data, start, max_steps=400, budget=10_000)


def test_what_is_left_of_the_noise_bias_is_small_beside_the_error():
    """Label noise, small batches: at the largest stable step λ̂ would be a quarter too high."""
    model, data = linear_regression(n=1000, d=16)
    start = Settings(batch_size=16, sampler="baoab", draws=100, burn_in=50)
    calibration = calibrate(model, regression_loss, data, start, tolerance=0.05, max_steps=1000)
    values = [
        llc(sample(model, regression_loss, data, calibration.settings, seed=seed))["llc"].item() for seed in range(6)
    ]
    assert abs(np.mean(values) / 8 - 1) < 0.06
    assert calibration.systematic < 0.1


def test_calibration_records_every_trial_and_its_reasons():
    model, data = linear_regression(n=500, d=4, noise=0.0)
    calibration = calibrate(model, regression_loss, data, max_steps=800)
    settings, trials = calibration.settings, calibration.trials
    assert calibration.flat, calibration.reasons
    assert not settings.control_variate
    assert set(trials.data_vars) >= {"lr", "gamma", "model", "llc", "se", "anharmonicity", "verdict"}
    rows = list(zip(trials["lr"].values, trials["gamma"].values, trials["steps_per_draw"].values, strict=True))
    assert (settings.lr, settings.gamma) in {row[:2] for row in rows}
    (fit,) = calibration.fits
    assert fit.low < 2 < fit.high
    for sentence in (
        "runs healthily; smaller steps would take longer than allowed.",
        f"gamma {settings.gamma:.3g}: λ̂ is flat there",
        f"to {fit.limit:.3g} [{fit.low:.3g}, {fit.high:.3g}]",
        "Control variates do not pay.",
        f"steps_per_draw {settings.steps_per_draw}.",
        f"Minibatch noise biases λ̂ by {calibration.systematic:.1%}",
    ):
        assert sentence in calibration.reasons, (sentence, calibration.reasons)
    assert not any(word in calibration.reasons for word in ("localises", "no two", "did not settle"))


def test_given_settings_are_used_as_they_are():
    model, data = linear_regression(n=500, d=3, noise=0.0)
    result = estimate_llc(
        model, regression_loss, data, lr=1e-3, gamma=2.0, nbeta=40.0, sampler="sgld", draws=10, burn_in=4
    )
    used = {name: result.attrs[name] for name in ("lr", "gamma", "nbeta", "burn_in", "kernel", "n")}
    assert used == {"lr": 1e-3, "gamma": 2.0, "nbeta": 40.0, "burn_in": 4, "kernel": "sgld", "n": 500}
    assert result.sizes["draw"] == 14


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_control_variates_are_chosen_where_the_noise_at_the_center_would_bias(noise):
    model, data = linear_regression(n=5000, d=8, noise=noise)
    given = {"lr": 2e-5, "gamma": 1.0, "batch_size": 64, "draws": 10, "sampler": "sgld"}
    assert estimate_llc(model, regression_loss, data, **given).attrs["control_variate"] == bool(noise)
    settings = Settings(lr=2e-5, gamma=1.0, batch_size=64)
    # Cov(∇L_B) = noise² I (1 / B − 1 / n), so lr nbeta² tr / 8 over 8 / 2 is 2e-5 · 587² · 8 / 64.8 / 8 / 4 = 0.0266;
    # eight batches know a trace over eight directions to 19%
    assert noise_bias(model, regression_loss, data, settings) == pytest.approx(0.0266 * noise**2, rel=0.6, abs=1e-9)
    smaller = noise_bias(model, regression_loss, data, replace(settings, lr=2e-6))
    assert smaller == pytest.approx(noise_bias(model, regression_loss, data, settings) / 10)
    assert noise_bias(model, regression_loss, data, replace(settings, batch_size=5000)) == 0


class Product(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = nn.ParameterList([torch.tensor(w, dtype=torch.float32) for w in weights])

    def forward(self, x):
        for weight in self.weights:
            x = x @ weight.T
        return x


def test_reduced_rank_unaided():
    """λ = 26 of 96 parameters: d / 2 = 48 and the generic stratum's 27 are the wrong answers at hand."""
    model = Product(exact.deep_linear_point([8, 6, 8], 3, np.random.default_rng(0)))
    x = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    data, start = (x, model(x).detach()), Settings(batch_size=128, sampler="baoab")
    calibration = calibrate(model, regression_loss, data, start, max_steps=800)
    result = llc(sample(model, regression_loss, data, calibration.settings, seed=1))
    assert result["verdict"].item() == "ok"
    assert result["se"].item() < 0.03 * 26
    assert result["llc"].item() == pytest.approx(26, rel=0.05), (result["llc"].item(), result["se"].item())


def test_a_small_classifier_unaided():
    """No coefficient is known here; what the choice must give is healthy chains and the same λ̂ from another seed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 6, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        classification_loss(model, (x, y)).mean().backward()
        optimizer.step()
    calibration = calibrate(model, classification_loss, (x, y), max_steps=400)
    first, second = (
        llc(sample(model, classification_loss, (x, y), calibration.settings, seed=seed)) for seed in (1, 2)
    )
    assert first["verdict"].item() == second["verdict"].item() == "ok"
    assert first["anharmonicity"].item() > 0.75
    assert 2 < first["llc"].item() < 146 / 2
    spread = np.hypot(first["se"].item(), second["se"].item())
    assert abs(first["llc"].item() - second["llc"].item()) < 3 * spread < 0.6 * first["llc"].item()


def test_weights_that_are_flat_everywhere_set_no_scale():
    model = nn.Linear(2, 1)
    with pytest.raises(InstrumentError, match="curvature"):
        estimate_llc(model, lambda m, b: (0 * m.weight).sum() + 0 * b[:, 0], torch.zeros(10, 2))


@pytest.mark.parametrize("answer", [0.5, torch.zeros(3), torch.zeros(10, 2)])
def test_a_loss_of_another_shape_is_told_before_its_noise_is_measured(answer):
    model = nn.Linear(2, 1)
    with pytest.raises(InstrumentError, match="one loss per example"):
        estimate_llc(model, lambda m, b: answer, torch.zeros(20, 2), lr=1e-3, gamma=1.0, batch_size=10)
    with pytest.raises(InstrumentError, match="one loss per example"):
        estimate_llc(model, lambda m, b: answer, torch.zeros(20, 2), batch_size=10)


def test_a_loss_without_finite_curvature_is_told():
    model = nn.Linear(2, 1)
    with pytest.raises(InstrumentError, match="not finite"):
        estimate_llc(model, lambda m, b: m(b)[:, 0] * torch.nan, torch.ones(20, 2), batch_size=10)
