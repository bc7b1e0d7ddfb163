"""The chains: exact laws, the same numbers however they are run, and nothing touched that is not theirs."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from devmon.analysis import llc
from devmon.errors import InstrumentError
from devmon.instruments.llc import LLC
from devmon.sampling import classification_loss, next_token_loss, regression_loss
from devmon.sampling.traces import Settings, sample
from devmon.snapshot import Snapshot
from devmon.testing import exact

CURVATURE = (4.0, 1.0, 0.3, 0.05)


class Bowl(nn.Module):
    """L = ½ Σ hᵢ (wᵢ − cᵢ)² − x·(w − c), the same for every example but for its slope x (their mean should be 0)."""

    def __init__(self, curvature=CURVATURE, offset=1.5):
        super().__init__()
        self.w = nn.Parameter(torch.full((len(curvature),), offset, dtype=torch.float64))
        self.register_buffer("c", self.w.detach().clone())
        self.register_buffer("h", torch.tensor(curvature, dtype=torch.float64))


def bowl_loss(model, batch):
    away = model.w - model.c
    return 0.5 * (model.h * away**2).sum() - batch @ away


def slopes(n=200, d=4, size=0.0):
    x = size * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return x - x.mean(0)


def run(model=None, data=None, loss=bowl_loss, *, stacked=True, chains_only=None, group=None, **settings):
    defaults = {"lr": 0.01, "gamma": 2.0, "nbeta": 50.0, "chains": 512, "draws": 400, "burn_in": 250}
    defaults |= {"batch_size": 10, "float64": True}
    settings = Settings(**(defaults | settings))
    model = Bowl() if model is None else model
    data = slopes() if data is None else data
    return sample(model, loss, data, settings, chains=chains_only, stacked=stacked, group=group)


def assert_within_ess_gated(result, expected, percent=1.0, sigmas=4.0):
    """Enough effective draws for the claim first, then both the error bar and the percentage."""
    value, se = result["llc"].item(), result["se"].item()
    assert se < percent / 100 * expected, f"too few draws: {value} ± {se}"
    assert abs(value - expected) < sigmas * se, f"{value} ± {se}, expected {expected}"
    assert abs(value - expected) < 2 * percent / 100 * expected, f"{value} ± {se}, expected {expected}"


# -- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr, gamma", [(0.002, 20.0), (0.01, 2.0), (0.01, 30.0)])
def test_sgld_has_its_exact_law_step_size_bias_included(lr, gamma):
    expected = exact.sgld_quadratic(CURVATURE, 50, gamma, lr)
    assert lr < 0.01 or expected > 1.1 * exact.gibbs_quadratic(CURVATURE, 50, gamma)
    result = llc(run(lr=lr, gamma=gamma))
    assert result["verdict"].item() == "ok", result
    assert_within_ess_gated(result, expected)


@pytest.mark.parametrize("replacement", [False, True])
def test_gradient_noise_heats_sgld_exactly_as_the_law_says(replacement):
    data = slopes(size=0.8)
    b, n = 10, len(data)
    per_example = data.numpy().var(0)
    noise = per_example / b * (1 if replacement else (n - b) / (n - 1))
    expected = exact.sgld_quadratic(CURVATURE, 50, 2, 0.01, noise)
    assert expected > 1.2 * exact.sgld_quadratic(CURVATURE, 50, 2, 0.01)
    result = llc(run(data=data, replacement=replacement))
    assert_within_ess_gated(result, expected, percent=1.5)


def test_control_variates_take_the_heat_and_the_noise_of_the_score_away():
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
    from devmon.sampling.data import draw_batches
    from devmon.snapshot import derive_seed

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


# -- the same numbers ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x):
        return self.layers(x)


def net_and_data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = Net()
    for parameter in net.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return net, (torch.randn(60, 5, generator=generator), torch.randint(3, (60,), generator=generator))


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("shared_batches", [False, True])
def test_stacked_looped_grouped_and_dealt_chains_are_the_same(control_variate, shared_batches):
    net, data = net_and_data()
    settings = {"control_variate": control_variate, "shared_batches": shared_batches, "steps_per_draw": 2}
    settings |= {"chains": 4, "draws": 12, "burn_in": 3, "lr": 1e-3, "loss": classification_loss}
    once = run(net, data, stacked=True, **settings)
    for other in (
        run(net, data, stacked=False, **settings),
        run(net, data, stacked=True, group=3, **settings),
        run(net, data, stacked=None, **settings),
    ):
        for name in once:
            np.testing.assert_allclose(other[name], once[name], rtol=1e-9, atol=1e-12, err_msg=name)
    some = run(net, data, stacked=False, chains_only=[3, 1], **settings)
    assert some["chain"].values.tolist() == [3, 1]
    np.testing.assert_allclose(some["loss"], once["loss"].sel(chain=[3, 1]), rtol=1e-9)


def test_chains_differ_unless_they_share_batches_and_then_only_in_noise():
    data = slopes(size=1.0)
    apart = run(data=data, chains=3, draws=5, burn_in=0)
    assert len(np.unique(apart["distance"].values[:, -1])) == 3
    assert len(np.unique(apart["baseline"].values[:, 0])) >= 1
    together = run(data=data, chains=3, draws=5, burn_in=0, shared_batches=True)
    assert len(np.unique(together["distance"].values[:, -1])) == 3


def test_seed_decides_and_checkpoint_does_not():
    one = run(chains=2, draws=5, burn_in=0, seed=1)
    np.testing.assert_array_equal(one["loss"], run(chains=2, draws=5, burn_in=0, seed=1)["loss"])
    assert (one["loss"].values[:, 1:] != run(chains=2, draws=5, burn_in=0, seed=2)["loss"].values[:, 1:]).all()
    elsewhere = run(Bowl(offset=-7.0), chains=2, draws=5, burn_in=0, seed=1)  # the same bowl around other weights
    np.testing.assert_allclose(elsewhere["distance"], one["distance"], rtol=1e-9)


def test_steps_per_draw_averages_the_same_chain():
    fine = run(chains=2, draws=12, burn_in=0, data=slopes(size=1.0))
    coarse = run(chains=2, draws=4, burn_in=0, steps_per_draw=3, data=slopes(size=1.0))
    np.testing.assert_allclose(coarse["loss"], fine["loss"].values.reshape(2, 4, 3).mean(2), rtol=1e-12)
    np.testing.assert_allclose(
        coarse["distance"], (fine["distance"].values ** 2).reshape(2, 4, 3).mean(2) ** 0.5, rtol=1e-12
    )


# -- models and data -------------------------------------------------------------------------------------------------


def test_model_generators_and_grad_mode_are_untouched():
    net, data = net_and_data()
    net.train()
    net.layers[0].weight.grad = torch.ones_like(net.layers[0].weight)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        run(net, data, classification_loss, chains=2, draws=3, burn_in=0)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert net.training
    assert (net.layers[0].weight.grad == 1).all()


class Awkward(nn.Module):
    """Tied and unused parameters, a frozen one, dropout, batch norm, and a tuple as output."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.out = nn.Linear(6, 11, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) * self.frozen
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.out(self.drop(x)), "something else"


@pytest.mark.parametrize("stacked", [False, True])
def test_awkward_models(stacked):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Awkward()
    tokens = torch.randint(11, (20, 5), generator=torch.Generator().manual_seed(0))
    data = run(model, tokens, next_token_loss, stacked=stacked, chains=2, draws=30, burn_in=0, lr=1e-3)
    assert data.attrs["parameters"] == 66 + 12 + 4
    assert np.isfinite(data["loss"].values).all()
    np.testing.assert_allclose(data["baseline"].values[:, 0], data["loss"].values[:, 0], rtol=1e-12)
    other = run(model, tokens, next_token_loss, stacked=not stacked, chains=2, draws=30, burn_in=0, lr=1e-3)
    np.testing.assert_allclose(data["loss"], other["loss"], rtol=1e-9)
    assert torch.equal(model.norm.running_mean, torch.zeros(6))


def test_bfloat16_models_are_sampled_in_float32():
    net, (x, y) = net_and_data()
    rounded = copy.deepcopy(net).to(torch.bfloat16)
    twin = copy.deepcopy(rounded).float()
    low, high = (
        run(m, (x, y), classification_loss, chains=2, draws=5, burn_in=0, lr=1e-3, float64=False)
        for m in (rounded, twin)
    )
    np.testing.assert_array_equal(low["loss"], high["loss"])


def test_models_made_for_inference_are_sampled_whole():
    net, data = net_and_data()
    net.requires_grad_(False)
    assert run(net, data, classification_loss, chains=2, draws=2, burn_in=0).attrs["parameters"] == 66


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.qkv = nn.Linear(8, 24)

    def forward(self, tokens):
        q, k, v = self.qkv(self.embed(tokens)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x.transpose(1, 2).flatten(2) @ self.embed.weight.T


def test_fused_attention_is_stacked_without_the_slow_fallback():
    """torch warns when it maps in a loop, and warnings are errors here."""
    tokens = torch.randint(7, (20, 5), generator=torch.Generator().manual_seed(0))
    settings = {"chains": 3, "draws": 4, "burn_in": 0, "lr": 1e-3, "loss": next_token_loss}
    model = Attention()
    stacked, looped = (run(model, tokens, stacked=flag, **settings) for flag in (True, False))
    np.testing.assert_allclose(stacked["loss"], looped["loss"], rtol=1e-6)


def test_models_that_cannot_be_stacked_are_looped():
    class Branching(Net):
        def forward(self, x):
            return super().forward(x) if float(self.layers[0].bias.detach().sum()) > -1e9 else x

    net, data = net_and_data()
    branching = Branching()
    branching.load_state_dict(net.state_dict())
    settings = {"loss": classification_loss, "chains": 2, "draws": 4, "burn_in": 0, "lr": 1e-3}
    same = run(net, data, **settings)
    np.testing.assert_allclose(run(branching, data, stacked=None, **settings)["loss"], same["loss"], rtol=1e-9)


# -- the instrument --------------------------------------------------------------------------------------------------


def test_instrument_returns_traces_and_settings():
    net, data = net_and_data()
    instrument = LLC(data, loss=classification_loss, gamma=10.0, lr=1e-4, chains=3, draws=20, burn_in=10)
    traces = instrument(Snapshot(step=5, model=net, seed=3))
    assert dict(traces.sizes) == {"chain": 3, "draw": 30}
    assert set(traces.data_vars) == {"loss", "baseline", "distance", "slope"}
    expected = {"kind": "llc", "gamma": 10.0, "lr": 1e-4, "burn_in": 10, "batch_size": 32, "n": 60, "kernel": "sgld"}
    expected |= {"steps_per_draw": 1, "control_variate": False, "parameters": 66, "seed": 3}
    assert {name: traces.attrs[name] for name in expected} == expected
    assert traces.attrs["nbeta"] == pytest.approx(60 / np.log(60))
    assert all({"long_name", "units"} <= set(traces[name].attrs) for name in traces)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"nbeta": 0.0}, "nbeta must be a finite number > 0, got 0.0"),
        ({"lr": -1e-3}, "lr must be"),
        ({"lr": float("nan")}, "lr must be"),
        ({"gamma": -1.0}, "gamma must be"),
        ({"batch_size": 201}, "200 examples, got 201"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"sampler": "hmc"}, "one of"),
    ],
)
def test_settings_that_cannot_be_run(settings, message):
    with pytest.raises(InstrumentError, match=message):
        run(**settings)


def test_losses_of_the_wrong_shape():
    for loss, got in (
        (lambda m, b: bowl_loss(m, b).mean(), r"\(\) torch"),
        (lambda m, b: bowl_loss(m, b)[:, None], r"\(10, 1\)"),
        (lambda m, b: bowl_loss(m, b).long(), "int64"),
        (lambda m, b: 3.0, "float"),
    ):
        with pytest.raises(InstrumentError, match=got):
            run(loss=loss, chains=2, draws=2)


@pytest.mark.parametrize("control_variate", [False, True])
def test_nan_at_the_start_is_an_error_and_later_a_verdict(control_variate):
    broken = Bowl()
    broken.h[0] = torch.nan
    with pytest.raises(InstrumentError, match="not finite"):
        run(broken, control_variate=control_variate)
    hot = run(lr=1.0, chains=3, draws=600, burn_in=0)
    assert llc(hot)["verdict"].item() in ("non-finite", "diverged")


def test_regression_loss_is_half_the_squared_error():
    model = nn.Linear(2, 3)
    x, y = torch.randn(4, 2), torch.randn(4, 3)
    expected = [0.5 * ((model(x[i]) - y[i]) ** 2).sum().item() for i in range(4)]
    assert regression_loss(model, (x, y)).tolist() == pytest.approx(expected, rel=1e-5)
