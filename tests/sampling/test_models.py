"""Models of every kind are sampled, and left as they were; what cannot be sampled is refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from devmon.analysis import llc
from devmon.errors import InstrumentError
from devmon.instruments.llc import LLC
from devmon.sampling import classification_loss, next_token_loss, regression_loss
from devmon.snapshot import Snapshot
from tests.support.sampling_toys import Bowl, Net, bowl_loss, net_and_data, run

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
    assert set(traces.data_vars) == {"loss", "baseline", "distance", "slope", "first_order", "noise_bias"}
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
    unstable = run(lr=1.0, chains=3, draws=600, burn_in=0)
    assert llc(unstable)["verdict"].item() in ("non-finite", "diverged")


def test_regression_loss_is_half_the_squared_error():
    model = nn.Linear(2, 3)
    x, y = torch.randn(4, 2), torch.randn(4, 3)
    expected = [0.5 * ((model(x[i]) - y[i]) ** 2).sum().item() for i in range(4)]
    assert regression_loss(model, (x, y)).tolist() == pytest.approx(expected, rel=1e-5)
