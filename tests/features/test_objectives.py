"""What dictionaries are trained on: each loss against its formula, written out place by place."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from devmon.features import BatchTopK, Dictionary, Gated, JumpReLU, Matryoshka, ReLU, TopK
from devmon.features.dictionary import tensors
from devmon.features.objectives import Now, revival
from tests.features.test_dictionary import CODERS, cross_layer, dictionary, normal

X = normal(6, 4, seed=20)
D, M = 4, 7
CODER = dictionary(None, D, M)
ALIVE = Now(1.0, 1.0, torch.zeros(M, dtype=torch.bool))


def squared(x: Tensor) -> Tensor:
    return x.square().sum(-1).mean()


def test_l1_counts_what_a_latent_adds() -> None:
    h = (X - CODER.b_dec) @ CODER.W_enc + CODER.b_enc
    expected = (
        squared(X - h.relu() @ CODER.W_dec - CODER.b_dec) + 3 * (h.relu() * CODER.W_dec.norm(dim=1)).sum(1).mean()
    )
    torch.testing.assert_close(ReLU(3.0).loss(CODER, {}, X, X, ALIVE).loss, expected)
    half = ReLU(3.0).loss(CODER, {}, X, X, ALIVE._replace(warm=0.5))
    torch.testing.assert_close(half.loss - half.error, (expected - half.error) / 2)
    default = ReLU().loss(CODER, {}, X, X, ALIVE)
    torch.testing.assert_close(default.loss - default.error, (expected - default.error) * 0.18 * math.sqrt(D) / 3)


def test_top_k_keeps_the_largest_contributions_not_activations() -> None:
    long = replace(CODER, W_dec=CODER.W_dec * torch.tensor([9.0, 1, 1, 1, 1, 1, 1]).double()[:, None])
    h, f = long.pre(X), torch.zeros(len(X), M, dtype=torch.float64)
    for row in range(len(X)):
        order = (h[row] * long.norms()).argsort(descending=True)[:2]
        f[row, order] = h[row, order].relu()
    outcome = TopK(2).loss(long, {}, X, X, ALIVE)
    torch.testing.assert_close(outcome.loss, squared(X - long.decode(f)))
    assert outcome.fires.tolist() == (f > 0).sum(0).tolist()
    assert outcome.least is None


@pytest.mark.parametrize("objective", [BatchTopK(2), Matryoshka(2, (3,))])
def test_batch_top_k_spends_k_a_place_where_it_pays(objective: BatchTopK | Matryoshka) -> None:
    outcome = objective.loss(CODER, {}, X, X, ALIVE)
    scores = (CODER.pre(X).relu() * CODER.norms()).flatten()
    least = scores.sort(descending=True).values[2 * len(X) - 1]
    torch.testing.assert_close(outcome.least, least)
    f = CODER.pre(X).relu() * (scores.view(6, M) >= least)
    torch.testing.assert_close(outcome.error, squared(X - CODER.decode(f)))
    assert outcome.fires.tolist() == (f > 0).sum(0).tolist()


def test_matryoshka_adds_the_errors_of_its_prefixes() -> None:
    outcome = Matryoshka(2, (3, 5)).loss(CODER, {}, X, X, ALIVE)
    f = CODER.pre(X).relu() * (CODER.pre(X) * CODER.norms() >= outcome.least)
    ends = [squared(X - f[:, :end] @ CODER.W_dec[:end] - CODER.b_dec) for end in (3, 5, M)]
    torch.testing.assert_close(outcome.loss, sum(ends, torch.zeros(()).double()))
    torch.testing.assert_close(outcome.error, ends[-1])
    torch.testing.assert_close(Matryoshka(2, (3, 5, M)).loss(CODER, {}, X, X, ALIVE).loss, outcome.loss)


def test_the_gradient_of_a_threshold_is_that_of_its_kernel() -> None:
    """One place, one latent of length 1: ∂/∂θ ‖e‖² is 2e · θ/ε and that of the count −1/ε, inside ε/2 of θ."""
    eye = torch.eye(1, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    coder, now = Dictionary(eye, zero, eye, zero), ALIVE._replace(dead=torch.zeros(1, dtype=torch.bool))
    for x, inside in ((0.51, True), (0.49, True), (0.6, False)):
        theta = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        data = torch.tensor([[x]], dtype=torch.float64)
        JumpReLU(target=2.0, strength=3.0).loss(coder, {"threshold": theta}, data, data, now).loss.backward()
        assert theta.grad is not None
        passed = float(x > 0.5)
        through_f = -2 * (x - x * passed) * (-0.5 / 0.05)
        through_count = 3 * 2 * (passed / 2 - 1) / 2 * (-1 / 0.05)
        expected = (through_f + through_count) * inside
        torch.testing.assert_close(theta.grad, torch.tensor([expected], dtype=torch.float64), msg=str((x, expected)))


def test_tanh_counts_latents_and_pulls_at_dead_ones() -> None:
    objective = JumpReLU(strength=2.0)
    theta = torch.full((M,), 0.5, dtype=torch.float64)
    scores = CODER.pre(X) * CODER.norms()
    passed = scores * (scores > 0.5)
    error = squared(X - passed / CODER.norms() @ CODER.W_dec - CODER.b_dec)
    dead = torch.arange(M) < 2
    pull = 3e-6 * (0.5 - scores[:, :2]).relu().sum(1).mean()
    outcome = objective.loss(CODER, {"threshold": theta}, X, X, Now(0.25, 1.0, dead))
    e = X - passed / CODER.norms() @ CODER.W_dec - CODER.b_dec
    learns = revival(CODER, X, e, Now(0.25, 1.0, dead), theta)
    torch.testing.assert_close(outcome.loss, error + 0.25 * 2 * torch.tanh(4 * passed).sum(1).mean() + pull + learns)


def test_dead_latents_are_pulled_to_their_own_threshold_at_the_end() -> None:
    dead, theta = torch.arange(M) < 2, torch.linspace(0.2, 2.0, M, dtype=torch.float64)
    scores = (CODER.pre(X) * CODER.norms())[:, :2]
    pull = revival(CODER, X, torch.zeros_like(X), Now(0.9, 1.0, dead), theta)
    torch.testing.assert_close(pull, 0.1 * (theta[:2] - scores).relu().sum(1).mean())
    assert float(pull) > 0


def test_a_gate_chooses_and_another_map_tells_how_much() -> None:
    extra = {"log_gain": normal(M, seed=21), "shift": normal(M, seed=22)}
    h = CODER.pre(X)
    f = (h * extra["log_gain"].exp() + extra["shift"]).relu() * (h > 0)
    loss = squared(X - f @ CODER.W_dec - CODER.b_dec) + squared(X - h.relu() @ CODER.W_dec - CODER.b_dec)
    loss = loss + 2 * (h.relu() @ CODER.norms()).mean()
    decoder = CODER.W_dec.clone().requires_grad_()
    outcome = Gated(2.0).loss(replace(CODER, W_dec=decoder), extra, X, X, ALIVE)
    torch.testing.assert_close(outcome.loss, loss)
    outcome.loss.backward()
    # the decoder learns from the reconstruction alone
    torch.testing.assert_close(decoder.grad, -2 * f.T @ (X - f @ CODER.W_dec - CODER.b_dec) / len(X))


def test_dead_latents_learn_what_is_left() -> None:
    dead = torch.tensor([True, False, True, True, False, False, False])
    h, e = CODER.pre(X), normal(6, 4, seed=23)
    total = 0.0
    for row in range(len(X)):
        best = sorted((int(j) for j in dead.nonzero()), key=lambda j: -float(h[row, j]))[:2]  # d / 2
        total += float((e[row] - sum(h[row, j] * CODER.W_dec[j] for j in best)).square().sum()) / len(X)
    now, least = ALIVE._replace(share=0.5), torch.tensor(1.5).double()
    torch.testing.assert_close(float(revival(CODER, X, e, now._replace(dead=dead), least)), total)
    one = torch.arange(M) == 3  # of two that could, one is dead: half the weight
    alone = 0.5 * squared(e - h[:, 3:4] * CODER.W_dec[3])
    torch.testing.assert_close(revival(CODER, X, e, now._replace(dead=one), least), alone)
    assert float(revival(CODER, X, e, now, least)) == 0
    late = revival(CODER, X, e, Now(0.9, 1.0, one), least)
    torch.testing.assert_close(late, 0.1 * (1.5 - h[:, 3] * CODER.norms()[3]).relu().mean())


def test_every_objective_but_prefixes_is_one_of_many_layers() -> None:
    coder = cross_layer()
    x, y = normal(5, 6, seed=1), normal(5, 6, seed=2)
    now = Now(1.0, 1.0, torch.arange(coder.latents) < 3)
    for objective in (ReLU(), TopK(3), BatchTopK(3), JumpReLU(), JumpReLU(target=3), Gated()):
        like = torch.zeros(coder.latents, dtype=torch.float64)
        outcome = objective.loss(coder, objective.extra(like), x, y, now)
        assert torch.isfinite(outcome.loss)
        if isinstance(objective, ReLU):
            torch.testing.assert_close(outcome.error, squared(y - coder.decode(coder.pre(x).relu())))


@pytest.mark.parametrize("objective", [TopK(2), BatchTopK(2)])
@pytest.mark.parametrize("form", ["autoencoder", "transcoder", "crosscoder"])
def test_gradients_of_the_few_are_those_of_all(objective: TopK | BatchTopK, form: str) -> None:
    """What is coded at chosen pairs alone, against masks over all latents and autograd."""
    start = CODER if form == "autoencoder" else CODERS[form]
    assert isinstance(start, Dictionary)
    leaves = {name: each.clone().requires_grad_() for name, each in tensors(start).items()}
    coder = replace(start, **leaves)  # type: ignore[arg-type]
    y = X if form != "transcoder" else normal(6, 3, seed=25)
    now = ALIVE._replace(dead=torch.arange(M) < 2, share=0.5)
    outcome = objective.loss(coder, {}, X, y, now)
    few = torch.autograd.grad(outcome.loss, list(leaves.values()))

    h = coder.pre(X)
    scores = (h * coder.norms()).detach()
    if isinstance(objective, TopK):
        kept = torch.zeros_like(h).scatter(1, scores.topk(2, dim=1).indices, 1.0)
    else:
        kept = (scores >= scores.flatten().topk(12).values.min()).to(h)
    e = y - coder.decode(h.relu() * kept, X)
    dense = e.square().sum(-1).mean() + revival(coder, X, e, now, torch.tensor(0.0).double())
    torch.testing.assert_close(outcome.loss, dense)
    for name, one, other in zip(leaves, few, torch.autograd.grad(dense, list(leaves.values())), strict=True):
        torch.testing.assert_close(one, other, msg=name)
