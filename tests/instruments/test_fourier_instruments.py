"""RestrictedLoss and FourierSpectrum against closed forms, explicit projections, and their contract."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from devmon.errors import DataError, InstrumentError
from devmon.instruments import FourierSpectrum, RestrictedLoss
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract

P = 13
A, B, C = torch.meshgrid(*[torch.arange(P, dtype=torch.float64)] * 3, indexing="ij")
SUMS = (A[..., 0] + B[..., 0]).long() % P
TRAIN = torch.rand(P, P, generator=torch.Generator().manual_seed(5)) < 0.4
TURN = 2 * math.pi / P


class Table(nn.Module):
    """A model of pairs that is a table of logits (a, b, output)."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.logits[pairs[:, 0], pairs[:, 1]]


def waves(amplitudes: Mapping[int, float]) -> Tensor:
    """Σ_k A_k cos(2πk(a + b - c)/p): the trigonometric solution with these frequencies."""
    return sum((size * torch.cos(TURN * k * (A + B - C)) for k, size in amplitudes.items()), torch.zeros_like(A))


def noise(seed: int = 0) -> Tensor:
    return torch.randn(P, P, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measure(logits: Tensor, train: Tensor = TRAIN, **settings: Any) -> xr.Dataset:
    return RestrictedLoss(train, **settings)(Snapshot(0, Table(logits)))


def loss_of(amplitudes: Mapping[int, float]) -> float:
    """The loss of `waves` on every pair, in closed form."""
    c = np.arange(P)
    height = sum(size * np.cos(TURN * k * c) for k, size in amplitudes.items())
    return float(np.log(np.exp(height).sum()) - height[0])


def test_a_sum_of_given_frequencies_is_its_own_restriction_and_nothing_without_them() -> None:
    amplitudes = {2: 3.0, 5: 1.5}
    bias = torch.linspace(-1, 1, P, dtype=torch.float64)
    found = measure(waves(amplitudes) + 7.0)
    for name in ("train_loss", "test_loss", "restricted_loss"):
        np.testing.assert_allclose(found[name], loss_of(amplitudes), rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(found["excluded_loss"], math.log(P), rtol=1e-12)
    assert found["frequency"][found["key"] == 1].values.tolist() == [2, 5]
    assert int(found["keys"]) == 2
    np.testing.assert_allclose(found["power"].sel(frequency=[2, 5]), [4 / 5, 1 / 5], rtol=1e-12)
    np.testing.assert_allclose(found["key_power"], 1, rtol=1e-12)
    # matched random frequencies keep nothing of it, and taking them out takes nothing
    np.testing.assert_allclose(found["restricted_loss_random"], math.log(P), rtol=1e-12)
    np.testing.assert_allclose(found["excluded_loss_random"], found["train_loss"], rtol=1e-12)
    # a bias of the outputs, the constant term, stays in both
    biased = measure(bias.expand(P, P, P) + waves(amplitudes))
    expected = F.cross_entropy(bias.expand(P, P, P)[TRAIN], SUMS[TRAIN])
    np.testing.assert_allclose(biased["excluded_loss"], expected, rtol=1e-12)
    np.testing.assert_allclose(
        biased["restricted_loss"], F.cross_entropy((waves(amplitudes) + bias).flatten(0, 1), SUMS.flatten()), rtol=1e-12
    )
    np.testing.assert_allclose(biased["key_power"], 1, rtol=1e-12)


def test_what_is_memorised_is_neither_kept_nor_taken_out() -> None:
    """A table of the trained pairs on top of a weak solution: train loss near 0, and only the restriction sees why."""
    memory = 20.0 * TRAIN[..., None] * F.one_hot(SUMS, P)
    found = measure(waves({3: 1.0}) + memory, frequencies=(3,))
    assert float(found["train_loss"]) < 1e-6
    assert float(found["excluded_loss"]) < 1e-6, "the table alone answers the trained pairs"
    assert float(found["test_loss"]) == pytest.approx(loss_of({3: 1.0}), rel=1e-12)
    solved = measure(waves({3: 20.0}) + 0.1 * noise(), frequencies=(3,))
    assert float(solved["excluded_loss"]) == pytest.approx(math.log(P), abs=0.1)


@pytest.mark.parametrize("frequencies", [(4,), (1, 6), (1, 2, 3, 4, 5, 6)])
def test_explicit_projections(frequencies: tuple[int, ...]) -> None:
    logits = noise(1) + waves({4: 2.0})
    flat = logits.flatten(0, 1)
    kept = torch.zeros_like(flat)
    power = {}
    varied = flat - flat.mean(1, keepdim=True)
    for k in range(1, P // 2 + 1):
        for wave in (torch.cos, torch.sin):
            direction = wave(TURN * k * (A[..., 0] + B[..., 0])).flatten()
            direction = direction / direction.norm()
            power[k] = power.get(k, 0.0) + float((direction @ varied).square().sum())
            if k in frequencies:
                kept += torch.outer(direction, direction @ flat)
    total = float((varied - varied.mean(0)).square().sum())
    found = measure(logits, frequencies=frequencies)
    np.testing.assert_allclose(found["power"], [power[k] / total for k in sorted(power)], rtol=1e-10)
    expected = F.cross_entropy(kept + flat.mean(0), SUMS.flatten())
    np.testing.assert_allclose(found["restricted_loss"], expected, rtol=1e-10)
    rows = TRAIN.flatten()
    np.testing.assert_allclose(
        found["excluded_loss"], F.cross_entropy((flat - kept)[rows], SUMS.flatten()[rows]), rtol=1e-10
    )
    for name, mask in (("train", TRAIN), ("test", ~TRAIN)):
        np.testing.assert_allclose(found[f"{name}_loss"], F.cross_entropy(logits[mask], SUMS[mask]), rtol=1e-12)
        right = (logits[mask].argmax(1) == SUMS[mask]).double().mean()
        np.testing.assert_allclose(found[f"{name}_accuracy"], right, rtol=1e-12)


def test_white_noise_has_the_reference_power_and_no_key() -> None:
    shares = np.array([measure(noise(seed))["power"] for seed in range(60)])
    reference = float(measure(noise())["power_reference"])
    assert abs(shares.mean() / reference - 1) < 4 * shares.std() / math.sqrt(shares.size) / reference
    quiet = measure(noise(), threshold=0.1)
    assert int(quiet["keys"]) == 0
    np.testing.assert_allclose(quiet["excluded_loss"], quiet["train_loss"], rtol=1e-12)
    constant = measure(torch.zeros(P, P, P, dtype=torch.float64))
    assert np.isnan(constant["power"]).all()
    np.testing.assert_allclose(constant["restricted_loss"], math.log(P), rtol=1e-12)


def test_models_that_read_an_equals_sign_and_answer_at_the_last_place() -> None:
    class Sequence(Table):
        def forward(self, tokens: Tensor) -> Tensor:
            assert tokens.shape[1] == 3
            assert bool((tokens[:, 2] == P).all())
            last = F.pad(super().forward(tokens), (0, 1), value=50.0)  # a logit for "=" that is no answer
            return torch.stack([torch.zeros_like(last), torch.zeros_like(last), last], dim=1)

    found = RestrictedLoss(TRAIN, equals=P, batch_size=50)(Snapshot(0, Sequence(waves({2: 3.0}))))
    np.testing.assert_allclose(found["restricted_loss"], loss_of({2: 3.0}), rtol=1e-12)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"train": torch.ones(4, 4, dtype=torch.bool)}, "p odd"),
        ({"train": TRAIN.float()}, "of bool"),
        ({"train": torch.ones(5, 5, dtype=torch.bool)}, "pairs that are not"),
        ({"train": TRAIN, "frequencies": (7,)}, r"1 \.\. 6 for p=13, got \(7,\)"),
        ({"train": TRAIN, "threshold": 0.0}, "0 < threshold < 1"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        RestrictedLoss(**settings)


def test_models_that_do_not_fit() -> None:
    with pytest.raises(
        InstrumentError, match=r"RestrictedLoss needs logits \(batch, 13 or more\).*returned \(169, 12\)"
    ):
        measure(noise()[..., :12])
    with pytest.raises(InstrumentError, match="no parameter|needs a parameter 'weight' of 13 rows.*has logits.weight"):
        FourierSpectrum(P, ("weight",))(Snapshot(0, nn.ModuleDict({"logits": nn.Linear(2, P)})))
    with pytest.raises(DataError, match="p odd and at least 3, got 4"):
        FourierSpectrum(4, ("weight",))


# -- the spectrum of weights -----------------------------------------------------------------------------------------


def spectrum(weight: Tensor, p: int = P) -> xr.Dataset:
    model = nn.Module()
    model.weight = nn.Parameter(weight)
    return FourierSpectrum(p, "weight")(Snapshot(0, model)).isel(parameter=0)  # type: ignore[arg-type]


def test_norms_of_known_waves() -> None:
    n = torch.arange(P, dtype=torch.float64)
    columns = [
        3 * torch.cos(TURN * 2 * n),
        4 * torch.sin(TURN * 2 * n),
        5 * torch.cos(TURN * 6 * n),
        torch.full_like(n, 2),
    ]
    found = spectrum(torch.cat([torch.stack(columns, 1), torch.full((1, 4), 99.0, dtype=torch.float64)]))
    expected = np.zeros(P // 2 + 1)
    expected[[0, 2, 6]] = 2 * math.sqrt(P), 5 * math.sqrt(P / 2), 5 * math.sqrt(P / 2)  # the row of "=" is not read
    np.testing.assert_allclose(found["norm"], expected, atol=1e-12)
    np.testing.assert_allclose(found["gini"], 1 - 2 / 6, rtol=1e-12)  # two of six carry all, equally
    weight = noise()[0]
    np.testing.assert_allclose(np.square(spectrum(weight)["norm"]).sum(), float(weight.square().sum()), rtol=1e-12)


def test_ends_and_definition_of_the_gini_coefficient() -> None:
    impulse = torch.zeros(P, 1, dtype=torch.float64)
    impulse[4] = 1  # all frequencies equal
    np.testing.assert_allclose(spectrum(impulse)["gini"], 0, atol=1e-12)
    one = torch.cos(TURN * 3 * torch.arange(P, dtype=torch.float64))[:, None]
    np.testing.assert_allclose(spectrum(one)["gini"], 1 - 1 / 6, rtol=1e-12)
    assert np.isnan(spectrum(torch.ones(P, 1))["gini"])
    found = spectrum(noise()[0])
    x = found["norm"].values[1:]
    np.testing.assert_allclose(found["gini"], np.abs(x[:, None] - x).sum() / (2 * len(x) ** 2 * x.mean()), rtol=1e-12)
    np.testing.assert_allclose(spectrum(-3e5 * noise()[0])["gini"], found["gini"], rtol=1e-12)


@pytest.mark.parametrize("columns", [12, 128])
def test_gaussian_weights_score_the_reference(columns: int) -> None:
    generator = torch.Generator().manual_seed(2)
    found = [spectrum(torch.randn(113, columns, generator=generator), 113) for _ in range(40)]
    ginis = np.array([float(one["gini"]) for one in found])
    bound = 4 * ginis.std() / math.sqrt(40) + float(found[0]["gini_reference"]) / columns
    assert abs(ginis.mean() - float(found[0]["gini_reference"])) < bound, (ginis.mean(), found[0]["gini_reference"])


# -- contract --------------------------------------------------------------------------------------------------------


class Adder(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.unembed = nn.Embedding(P, 6), nn.Linear(6, P)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.unembed(self.embed(pairs).sum(1).relu())


class TestRestrictedLoss(InstrumentContract):
    without_error = dict.fromkeys(
        ["train_loss", "test_loss", "restricted_loss", "excluded_loss"], "all pairs are measured"
    )

    def instrument(self) -> RestrictedLoss:
        return RestrictedLoss(TRAIN, frequencies=(2, 3), draws=2)

    def model(self, seed: int) -> nn.Module:
        return Adder(seed)


class TestFourierSpectrum(InstrumentContract):
    without_error = dict.fromkeys(["gini"], "an exact function of the weights")

    def instrument(self) -> FourierSpectrum:
        return FourierSpectrum(P, ("embed.weight", "unembed.weight"))

    def model(self, seed: int) -> nn.Module:
        return Adder(seed)
