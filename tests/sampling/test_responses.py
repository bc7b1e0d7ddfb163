"""Covariances over draws: against closed forms, quadrature, devinterp's own sums, and their own errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from devmon.sampling import Settings, sample
from devmon.sampling.data import as_examples
from devmon.sampling.losses import next_token_loss
from devmon.sampling.responses.covariances import averaged, batches_of, responses, spread
from devmon.sampling.responses.gaussians import SecondMoment, both_sides, localisation
from devmon.sampling.responses.labels import chosen, label, shuffled
from devmon.sampling.responses.scores import Excess, Scored, next_token_losses
from tests.support.sampling_toys import WELL, Well, harmonic, items, plain, well_loss

NBETA, GAMMA = 60.0, 5.0


def gaussian(chains: int, draws: int, seed: int) -> np.ndarray:
    """Exact draws of the harmonic law, (chain, draw, 4)."""
    noise = np.random.default_rng(seed).normal(size=(chains, draws, 4))
    return noise / np.sqrt(NBETA * WELL + GAMMA)


def losses_at(w: np.ndarray, of: tuple[torch.Tensor, ...]) -> np.ndarray:
    curvature, slope, cubic = (part.numpy() for part in of)
    return 0.5 * (w**2) @ curvature.T + w @ slope.T + w[..., :1] ** 3 * cubic


def test_the_answer_of_a_harmonic_well_is_half_a_trace() -> None:
    some = items(30)
    w = gaussian(8, 4000, seed=0)
    level = losses_at(w, plain())[..., 0]
    found = responses(level, losses_at(w, some) - level[..., None], NBETA)
    expected = harmonic(some, NBETA, GAMMA)
    z = (found.value - expected) / found.se
    assert np.abs(z).max() < 4, z
    assert 0.5 < np.sqrt((z**2).mean()) < 1.6, z  # items share their draws
    assert np.median(found.se / np.abs(expected)) < 0.06
    np.testing.assert_allclose(found.replicates.mean(0), found.value, rtol=1e-12)


def test_the_answer_is_the_derivative_of_the_llc_by_the_weight_of_an_item() -> None:
    """λ̂(h) = ½ nβ tr(H Σ(h)) in the mixture of (1 − h) of the data and h of the item."""
    some, h = items(5), 1e-5

    def at(weight: float) -> np.ndarray:
        mixed = (1 - weight) * WELL + weight * some[0].numpy()
        return 0.5 * NBETA * (WELL / (NBETA * mixed + GAMMA)).sum(1)

    np.testing.assert_allclose((at(h) - at(-h)) / (2 * h), harmonic(some, NBETA, GAMMA), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.3, -0.3])
def test_a_cubic_well_answers_to_a_slope(alpha: float) -> None:
    """Of λx²/2 + αx³: t² Cov[x², x] → −12 α / λ³ (that of λx²/2 + αx³/6 is −2α/λ³), by quadrature of the law."""
    lam = 2.0
    for t in (1e4, 1e5):
        x = np.linspace(-12, 12, 20001) / np.sqrt(t * lam)
        p = np.exp(-t * (0.5 * lam * x**2 + alpha * x**3))
        p /= p.sum()
        covariance = (p * x**3).sum() - (p * x**2).sum() * (p * x).sum()
        assert t**2 * covariance == pytest.approx(-12 * alpha / lam**3, rel=200 / t)


def test_errors_know_correlated_draws() -> None:
    """AR(1) draws: the spread of the answer over 200 repetitions is what the errors say."""
    rng, rho = np.random.default_rng(1), 0.8
    found = []
    for _ in range(200):
        noise = rng.normal(size=(4, 400, 2)) * np.sqrt(1 - rho**2)
        noise[:, 0] /= np.sqrt(1 - rho**2)
        x = np.zeros_like(noise)
        for i in range(400):
            x[:, i] = rho * x[:, i - 1] * (i > 0) + noise[:, i]
        found.append(responses(x[..., 0] ** 2, (x[..., :1] ** 2 + x[..., 1:]), 1.0))
    values, errors = (np.array([getattr(one, key)[0] for one in found]) for key in ("value", "se"))
    assert 0.8 < np.sqrt((errors**2).mean()) / values.std() < 1.3, (errors.mean(), values.std())
    assert np.mean(np.abs(values + 2) < 1.645 * errors) > 0.82
    # independent draws would say less than half of that
    assert np.sqrt((errors**2).mean()) > 2 * np.sqrt(10 / 1600)


def test_a_pair_cancels_what_is_odd() -> None:
    some = items(20, slope=3.0)
    half = gaussian(4, 500, seed=2)
    pairs = np.stack([half, -half], 1).reshape(8, 500, 4)
    alone = gaussian(8, 500, seed=3)
    expected = harmonic(some, NBETA, GAMMA)
    found = []
    for w, mirrored in ((pairs, True), (alone, False)):
        level = losses_at(w, plain())[..., 0]
        found.append(responses(level, losses_at(w, some) - level[..., None], NBETA, mirrored=mirrored))
    for one in found:
        assert np.abs((one.value - expected) / one.se).max() < 4.5
    assert np.median(found[0].se / found[1].se) < 0.5, [one.se for one in found]


def test_spread_takes_the_noise_out() -> None:
    rng = np.random.default_rng(4)
    truth = rng.normal(size=4000)
    noisy = truth + 3 * rng.normal(size=(16, 4000))
    assert spread(noisy) == pytest.approx(1, abs=0.06)
    assert spread(noisy - truth) < 0.2
    assert noisy.mean(0).std() > 1.2
    assert np.isnan(spread(noisy[:1]))


def test_the_mean_of_items_has_the_error_of_the_mean() -> None:
    """Items that share their noise: their mean is no surer than one of them."""
    rng = np.random.default_rng(5)
    level = rng.normal(size=(4, 256))
    common = rng.normal(size=(4, 256, 1)) + np.zeros(50)
    whole = responses(level, common, 1.0)
    mean = averaged(whole, batches_of(4, 256), units=4)
    assert mean.se[0] == pytest.approx(whole.se[0], rel=1e-6)


def test_batches_fit_the_draws() -> None:
    assert [batches_of(*of) for of in ((2, 200), (4, 200), (16, 200), (2, 4), (1, 1), (64, 100))] == [8, 4, 1, 2, 1, 1]


# -- scores and nulls ------------------------------------------------------------------------------------------------


def settings(**changes: object) -> Settings:
    given = {"nbeta": NBETA, "gamma": GAMMA, "lr": 0.004, "chains": 4, "draws": 300, "burn_in": 60, "batch_size": 8}
    return Settings(**(given | {"float64": True, "sampler": "baoab"} | changes))  # type: ignore[arg-type]


def test_what_is_kept_is_the_loss_above_that_at_the_centre() -> None:
    model, some = Well(), items(3, slope=1.0)
    model.first.data += 0.3
    excess = Excess({"a": Scored(as_examples(some), well_loss, 2)}, range(2), 5, 2)
    seen = {}

    def probe(network: torch.nn.Module, chain: int, draw: int) -> None:
        excess(network, chain, draw)
        seen[chain, draw] = well_loss(network, some).detach().numpy()

    sample(model, well_loss, plain(), settings(chains=2, draws=5, burn_in=2), probe=probe)
    np.testing.assert_allclose(excess.start["a"], well_loss(model, some).detach().numpy(), rtol=1e-12)
    assert excess.kept["a"].shape == (2, 5, 3)
    np.testing.assert_allclose(excess.kept["a"][1, 3], seen[1, 5] - seen[0, 0], rtol=1e-5)


def test_mirrored_chains_have_opposite_noise_and_the_same_law() -> None:
    ends: dict[int, np.ndarray] = {}

    def probe(network: torch.nn.Module, chain: int, draw: int) -> None:
        ends[chain] = torch.cat([network.first, network.second]).detach().numpy().copy()

    for stacked in (True, False):
        for chains in (range(4), [1], [3, 2]):
            sample(Well(), well_loss, plain(), settings(), mirrored=True, probe=probe, stacked=stacked, chains=chains)
        np.testing.assert_allclose(ends[1], -ends[0], rtol=1e-10)
        np.testing.assert_allclose(ends[3], -ends[2], rtol=1e-10)
        assert not np.allclose(ends[0], ends[2])
    sample(Well(), well_loss, plain(), settings(), probe=probe)
    assert not np.allclose(ends[1], -ends[0])


def test_the_second_moment_is_that_of_the_chains() -> None:
    moment = SecondMoment(None, 400, 60, 1200, seed=0)
    sample(Well(), well_loss, plain(), settings(), probe=moment)
    drawn = torch.cat([moment.sums["first"], moment.sums["second"]], 1).numpy()
    np.testing.assert_allclose((drawn**2).mean(0), 1 / (NBETA * WELL + GAMMA), rtol=0.4)
    wide = localisation(Well(), None, GAMMA, 4000, seed=0)
    np.testing.assert_allclose((wide["first"] ** 2).mean(0), 1 / GAMMA, rtol=0.1)


def test_both_sides_leave_the_model_alone() -> None:
    model = Well()
    model.first.data += 1.0
    away = {"first": torch.tensor([[0.5, -0.25]], dtype=torch.float64)}
    seen = [(m.first.detach().numpy().copy(), side) for m, side, _ in both_sides(model, away, torch.float64)]
    np.testing.assert_allclose(seen[0][0], [1.5, 0.75])
    np.testing.assert_allclose(seen[1][0], [0.5, 1.25])
    assert model.first.tolist() == [1.0, 1.0]


# -- tokens ----------------------------------------------------------------------------------------------------------


class Bigram(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(7, 7)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.table(input_ids)


def test_losses_by_token_average_to_the_loss_of_a_sequence() -> None:
    torch.manual_seed(0)
    model, tokens = Bigram(), torch.randint(7, (5, 6))
    torch.testing.assert_close(next_token_losses(model, tokens).mean(1), next_token_loss(model, tokens))
    mask = torch.ones_like(tokens)
    mask[2, 3:] = 0
    padded = {"input_ids": tokens, "attention_mask": mask}
    each = next_token_losses(model, padded)
    assert each[2].isnan().tolist() == [False, False, True, True, True]
    torch.testing.assert_close(each.nanmean(1), next_token_loss(model, padded))


def test_items_are_called_by_context_and_token() -> None:
    tokens = as_examples(torch.arange(24).view(2, 12))
    assert label(tokens, (2, 11), 0, ()) == "0 ▸ 1"
    assert label(tokens, (2, 11), 11 + 9, ()) == "16 17 18 19 20 21 ▸ 22"
    assert label(tokens, (2, 11), 1, tuple("abcdefghijklmnopqrstuvwx")) == "ab ▸ c"
    assert label(tokens, (2,), 1, ()) == "example 1"
    assert label(as_examples((torch.rand(3, 2), torch.rand(3))), (3, 2), 5, ()) == "example 2, 1"


def test_kept_items_are_fixed_and_shared_evenly() -> None:
    kept = chosen([50, 4, 50], 30)
    assert np.bincount(kept[:, 0]).tolist() == [13, 4, 13]
    assert (kept == chosen([50, 4, 50], 30)).all()
    assert len(np.unique(kept, axis=0)) == len(kept)
    assert len(chosen([5, 2], 9)) == 7


def test_shuffled_sequences_have_the_same_tokens_elsewhere() -> None:
    tokens = torch.arange(40).view(4, 10)
    mixed = shuffled(as_examples(tokens), 3)
    assert mixed is not None
    assert mixed.n == 3
    assert (mixed.tree.sort(1).values == tokens[:3]).all()
    assert not (mixed.tree == tokens[:3]).all(1).any()
    assert shuffled(as_examples(torch.rand(3, 2)), 3) is None
