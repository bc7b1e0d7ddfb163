"""The twins of LinearProbe: fitted on a reference and frozen, and erased from the stream."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from devmon.anatomy import Anatomy
from devmon.data import random_tokens
from devmon.errors import DataError, InstrumentError
from devmon.instruments import FrozenProbe, LinearProbe, ProbeErasure
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract, Readable
from devmon.testing.handbuilt import AttentionOnly
from tests.support.models import LENGTH, VOCAB, random_model, snapshot

LABEL = torch.tensor([0] * 18 + [1] * 8 + [2] * 6)
ORDERS = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(i)) for i in range(12)])


class Turned(Readable):
    """`Readable` whose stream is turned by an orthogonal map: all is there, in another code."""

    def __init__(self, label: Tensor, seed: int) -> None:
        super().__init__(label)
        width = self.embed.shape[1]
        turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0].double()
        with torch.no_grad():
            for table in self.parameters():
                table.copy_(table @ turn)


def test_on_the_reference_itself_it_is_the_probe() -> None:
    for model in (Readable(LABEL), Turned(LABEL, 1)):
        found = FrozenProbe(model, ORDERS, LABEL[ORDERS])(snapshot(model))
        plain = LinearProbe(ORDERS, LABEL[ORDERS])(snapshot(model))
        for name in ("accuracy", "own"):
            np.testing.assert_allclose(found[name], plain["accuracy"], rtol=1e-12)
            np.testing.assert_allclose(found[f"{name}_se"], plain["accuracy_se"], atol=1e-12)
        np.testing.assert_allclose(found["majority"], plain["majority"])
        np.testing.assert_allclose(found["moved"], 0, atol=1e-12)


def test_a_turned_stream_has_the_labels_in_another_code() -> None:
    found = FrozenProbe(Readable(LABEL), ORDERS, LABEL[ORDERS])(snapshot(Turned(LABEL, 1)))
    np.testing.assert_allclose(found["own"][1:], 1.0)
    assert (found["accuracy"][1:] < 0.8).all()
    np.testing.assert_allclose(found["moved"], found["own"] - found["accuracy"], rtol=1e-12)


def test_the_reference_is_a_copy_known_by_its_weights() -> None:
    model = Readable(LABEL)
    one = FrozenProbe(model, ORDERS, LABEL[ORDERS])
    before = one(snapshot(Readable(LABEL)))
    with torch.no_grad():
        model.embed.add_(1.0)
    np.testing.assert_array_equal(one(snapshot(Readable(LABEL)))["accuracy"], before["accuracy"])
    assert one == FrozenProbe(Readable(LABEL), ORDERS, LABEL[ORDERS])
    assert one != FrozenProbe(Turned(LABEL, 1), ORDERS, LABEL[ORDERS])
    with pytest.raises(InstrumentError, match="reference's layers"):
        one(snapshot(Readable(torch.cat([LABEL, LABEL]))))
    with pytest.raises(DataError, match="one shape"):
        FrozenProbe(model, ORDERS, LABEL[ORDERS][:, :5])


SURE, TYPES = 6.0, 8


def says_the_class() -> AttentionOnly:
    """Tokens of two classes: the stream is the class and two coordinates that are balanced in each class; the next
    token is one of the other class, as sure as SURE. The one layer has an idle head."""
    sign = torch.tensor([1.0, -1.0]).repeat(4)
    rest = torch.tensor([[1.0 if i >> bit & 1 else -1.0 for bit in range(1, 3)] for i in range(TYPES)])
    embed = torch.cat([sign[:, None], rest, torch.zeros(TYPES, 2)], 1).double()
    unembed = torch.zeros(5, TYPES, dtype=torch.float64)
    unembed[0] = -SURE / 2 * sign
    none = torch.zeros(5, 5, dtype=torch.float64)
    return AttentionOnly(embed, torch.zeros(33, 5, dtype=torch.float64), [[(none, none)]], unembed)


def in_turn(sequences: int) -> Tensor:
    """Sequences (sequence, 33) whose tokens are of either class in turn, each of its types about as often."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.cat([torch.randperm(4, generator=generator) for _ in range(9)])[:33] for _ in range(sequences)]
    return 2 * torch.stack(rows) + torch.arange(33) % 2


def test_erasing_what_is_used_costs_what_it_was_worth() -> None:
    tokens = in_turn(60)
    found = ProbeErasure(tokens, tokens % 2, batch_size=7)(Snapshot(0, says_the_class()))
    knows = math.log(4 + 4 * math.exp(-SURE))  # one of four tokens of the class
    blind = math.log(TYPES)
    np.testing.assert_allclose(found["loss_change"], blind - knows, rtol=0.02)
    assert (found["loss_change_random"] < found["loss_change"]).all()
    assert (found["accuracy"] <= found["majority"] + 3 * found["accuracy_se"] + 0.02).all()
    np.testing.assert_allclose(found["removed"], 1 / 3, atol=0.02)  # one of three coordinates of variance 1


def test_erasing_what_is_not_used_costs_nothing() -> None:
    """A coordinate that a probe reads, and that the unembedding does not."""
    tokens = in_turn(60)
    found = ProbeErasure(tokens, tokens // 4 % 2)(Snapshot(0, says_the_class()))
    np.testing.assert_allclose(found["loss_change"], 0, atol=0.02)
    assert (found["accuracy"] < 0.6).all()
    assert (LinearProbe(tokens, tokens // 4 % 2)(Snapshot(0, says_the_class()))["accuracy"] == 1).all()


def test_only_labelled_places_are_changed_and_scored() -> None:
    """Without heads a place is read by itself: the others' losses do not enter, whatever they are."""
    tokens = in_turn(40)
    labels = (tokens % 2).masked_fill(torch.arange(33) % 4 > 1, -100)
    found = ProbeErasure(tokens, labels)(Snapshot(0, says_the_class()))
    knows, blind = math.log(4 + 4 * math.exp(-SURE)), math.log(TYPES)
    np.testing.assert_allclose(found["loss_change"], blind - knows, rtol=0.03)
    with pytest.raises(DataError, match="next token"):
        ProbeErasure(tokens, (torch.arange(40)[:, None] % 2).expand(40, 33).masked_fill(torch.arange(33) < 32, -100))


def test_erasure_by_the_published_formula_at_the_labelled_places_of_the_other_half() -> None:
    """Where heads read other places, those must be what they were, and the loss of the others must not enter."""
    model, tokens = random_model(2), random_tokens(VOCAB, 30, 12, 3)
    labels = (tokens % 3).masked_fill(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.5, -100)
    instrument = ProbeErasure(tokens, labels)
    found, anatomy = instrument(Snapshot(0, model)), Anatomy(model)
    task, rest = instrument._task, instrument._rest
    used = labels >= 0
    for depth, site in enumerate((("resid_pre", 0), ("resid_post", 0), ("resid_post", 1))):
        states = anatomy.run(tokens, [site])[1][site]
        x = states[used].numpy()[task.train]
        z = np.eye(3)[labels[used].numpy()[task.train]]
        mean, covariance = x.mean(0), np.cov(x.T, bias=True)
        whiten = np.linalg.inv(sqrtm(covariance).real)
        cross = whiten @ (x - mean).T @ (z - z.mean(0)) / len(x)
        project = np.linalg.inv(whiten) @ cross @ np.linalg.pinv(cross, rcond=1e-8) @ whiten
        erased = states - (states - torch.from_numpy(mean)) @ torch.from_numpy(project.T)
        changed = torch.where(used[..., None], erased, states)
        losses = []
        for write in ({}, {site: changed[rest]}):
            log_p = anatomy.run(tokens[rest], write=write)[0].log_softmax(-1)
            nats = -log_p[:, :-1].gather(-1, tokens[rest, 1:, None])[..., 0]
            losses.append(nats[used[rest, :-1]].mean())
        np.testing.assert_allclose(found["loss_change"][depth], (losses[1] - losses[0]).detach(), rtol=1e-6)


PROBE, REFERENCE = random_tokens(VOCAB, 24, LENGTH, 1), random_model(5)


class TestFrozenProbe(InstrumentContract):
    def instrument(self) -> FrozenProbe:
        return FrozenProbe(REFERENCE, PROBE, PROBE % 3)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)


class TestProbeErasure(InstrumentContract):
    def instrument(self) -> ProbeErasure:
        return ProbeErasure(PROBE[:, :9], PROBE[:, :9] % 3)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
