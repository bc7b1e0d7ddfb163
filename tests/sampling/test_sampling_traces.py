"""What is traced on request: Metropolis acceptance, losses of single examples and the singular fluctuation."""

import numpy as np
import pytest
import torch
from torch import nn

from devmon.analysis import llc
from devmon.errors import InstrumentError
from devmon.sampling import BAOAB, classification_loss, regression_loss
from devmon.sampling.group import Group
from devmon.testing import exact
from tests.support.sampling_toys import CURVATURE, net_and_data, run, slopes


def acceptance_of_sgld(lr, gamma, draws=400_000):
    """Mean acceptance at stationarity on the quadratic, from the densities and nothing else."""
    rng = np.random.default_rng(0)
    a = 50 * np.array(CURVATURE) + gamma
    w = rng.standard_normal((draws, 4)) / np.sqrt(a * (1 - lr * a / 4))
    there = w - lr / 2 * a * w + np.sqrt(lr) * rng.standard_normal(w.shape)

    def log_density(x):
        return -0.5 * (a * x**2).sum(1)

    def log_proposal(to, start):
        return -((to - start + lr / 2 * a * start) ** 2).sum(1) / (2 * lr)

    ratio = log_density(there) - log_density(w) + log_proposal(w, there) - log_proposal(there, w)
    return np.minimum(1, np.exp(ratio)).mean()


@pytest.mark.parametrize("lr, gamma", [(0.01, 2.0), (0.004, 20.0)])
def test_acceptance_is_that_of_the_metropolis_adjusted_step(lr, gamma):
    traces = run(lr=lr, gamma=gamma, acceptance=True, draws=120)
    expected = acceptance_of_sgld(lr, gamma)
    assert expected < 0.99
    assert llc(traces)["acceptance"].item() == pytest.approx(expected, abs=0.004)


def test_acceptance_is_one_for_tiny_steps_and_unmoved_by_noise_that_control_variates_take_away():
    data = slopes(size=0.8)
    tiny = run(data=data, lr=1e-7, acceptance=True, draws=5, chains=64)
    np.testing.assert_allclose(tiny["acceptance"], 1, atol=1e-3)
    quiet = run(acceptance=True, draws=100)["acceptance"].values[:, 300:].mean()
    variates = run(data=data, acceptance=True, control_variate=True, draws=100)["acceptance"].values[:, 300:].mean()
    assert variates == pytest.approx(quiet, abs=0.01)  # the energy of the same control variates


def test_judging_a_step_changes_no_chain_and_needs_no_kernel_of_its_own():
    net, data = net_and_data()
    entries = {"layers.0.weight": torch.arange(35).view(7, 5) % 2 == 0}
    for options in ({}, {"control_variate": True}, {"mask": entries}, {"sampler": BAOAB(1e-3, 50, 2), "prior": 1.0}):
        settings = {"chains": 3, "draws": 6, "burn_in": 0, "lr": 1e-3, "loss": classification_loss} | options
        plain = run(net, data, **settings)
        judged, looped = (run(net, data, acceptance=True, stacked=flag, **settings) for flag in (True, False))
        np.testing.assert_array_equal(plain["loss"], judged["loss"])
        np.testing.assert_allclose(judged["acceptance"], looped["acceptance"], rtol=1e-7)
        assert ((judged["acceptance"] > 0) & (judged["acceptance"] <= 1)).all()


def test_losses_of_single_examples_are_those_of_the_drawn_weights():
    net, data = net_and_data()
    settings = {"chains": 3, "draws": 4, "burn_in": 1, "lr": 1e-3, "loss": classification_loss}
    traces = run(net, data, examples=9, batch_size=5, **settings)
    assert traces["example_loss"].dims == ("chain", "draw", "example")
    chosen = torch.tensor(traces["example"].values)
    assert len(set(chosen.tolist())) == 9
    inputs, labels = data
    at_start = classification_loss(net.eval().double(), (inputs[chosen].double(), labels[chosen])).detach()
    np.testing.assert_allclose(traces["example_loss"].values[:, 0], np.tile(at_start, (3, 1)), rtol=1e-6)
    assert (traces["example_loss"].values[:, 1] != traces["example_loss"].values[:, 0]).all()
    part = run(net, data, examples=9, batch_size=5, chains_only=[2], **settings)
    np.testing.assert_allclose(part["example_loss"][0], traces["example_loss"][2], rtol=1e-6)
    with pytest.raises(InstrumentError, match="examples must be at most the"):
        run(net, data, examples=10_000, **settings)


def test_singular_fluctuation_of_a_regular_model_is_half_its_parameters():
    """ν = λ = d / 2 at nbeta = n; the loss of an example varies by its residual times the step along its inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 6, generator=generator)
    y = x @ torch.randn(6, 1, generator=generator) + torch.randn(2000, 1, generator=generator)
    model = nn.Linear(6, 1, bias=False)
    model.weight.data = torch.linalg.lstsq(x.double(), y.double()).solution.T.float()
    options = {"lr": 5e-5, "gamma": 1.0, "nbeta": 2000.0, "sampler": "baoab", "batch_size": 64, "chains": 8}
    traces = run(
        model,
        (x, y),
        regression_loss,
        control_variate=True,
        examples=2000,
        steps_per_draw=4,
        draws=150,
        burn_in=50,
        **options,
    )
    result = llc(traces)
    residual = (y - model(x)).detach().double()[:, 0]
    inverse = torch.linalg.inv((x.T @ x / len(x)).double())
    expected = 0.5 * (residual**2 * torch.einsum("ni,ij,nj->n", x.double(), inverse, x.double())).mean()
    assert expected == pytest.approx(3, rel=0.1)
    assert result["fluctuation"].item() == pytest.approx(expected.item(), rel=0.05)
    assert abs(result["fluctuation"].item() - expected.item()) < 4 * result["fluctuation_se"].item()
    assert result["llc"].item() == pytest.approx(exact.gibbs_quadratic([1.0] * 6, 2000, 1), rel=0.05)


def test_traces_without_the_requests_say_so():
    result = llc(run(chains=2, draws=5, burn_in=0))
    assert np.isnan([result["acceptance"].item(), result["fluctuation"].item()]).all()


def test_chains_that_do_not_fit_into_memory_run_in_smaller_groups(monkeypatch):
    net, data = net_and_data()
    settings = {"chains": 5, "draws": 4, "burn_in": 0, "lr": 1e-3, "loss": classification_loss}
    expected, whole, tried = run(net, data, group=2, **settings), Group.run, []

    def small(self, chains):
        tried.append(len(chains))
        if len(chains) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, chains)

    monkeypatch.setattr(Group, "run", small)
    np.testing.assert_array_equal(run(net, data, **settings)["loss"], expected["loss"])
    assert tried == [5, 3, 2, 2, 1]
    monkeypatch.setattr(Group, "run", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(torch.OutOfMemoryError):
        run(net, data, **settings)
