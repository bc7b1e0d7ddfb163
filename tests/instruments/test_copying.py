"""Copying heads: an identity OV scores 1 wherever it looks, slow sums over the definition, all families, contract."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.anatomy import Anatomy
from devmon.data import random_tokens
from devmon.errors import DataError, InstrumentError
from devmon.instruments.copying import CopyingHeads
from devmon.instruments.residual_attribution import ResidualAttribution
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract, even, fixed_offset, induction
from tests.anatomy.test_anatomy_sites import CONFIGS, HEADS, MASKED, VISION, VOCAB, family
from tests.instruments.test_residual_attribution import Ended, random_model

CAUSAL = [name for name in CONFIGS if name not in MASKED and name not in VISION]


def snapshot(model: nn.Module) -> Snapshot:
    return Snapshot(0, model.eval())


def small(**more: Any) -> CopyingHeads:
    return CopyingHeads(**{"vocab_size": VOCAB, "sequences": 6, "length": 9, **more})


def spread(circuit: Tensor, length: int = 20) -> AttentionOnly:
    """One head that attends evenly to the past, with an OV circuit (vocab, vocab) on one-hot tokens."""
    vocab = len(circuit)
    eye = torch.eye(2 * vocab, dtype=torch.float64)
    add = torch.zeros_like(eye)
    add[:vocab, vocab:] = circuit
    nowhere = torch.zeros(length, 2 * vocab, dtype=torch.float64)
    return AttentionOnly(eye[:vocab], nowhere, [[(torch.zeros_like(eye), add)]], eye[:, vocab:])


def score(circuit: Tensor, **more: Any) -> Any:
    return CopyingHeads(**{"vocab_size": len(circuit), "sequences": 5, "length": 9, **more})(snapshot(spread(circuit)))


def test_an_identity_copies_wherever_it_looks() -> None:
    eye = torch.eye(20, dtype=torch.float64)
    for circuit, expected in ((5 * eye, 1.0), (-eye, -1.0)):
        found = score(circuit)
        np.testing.assert_allclose([found["copying"], found["copying_se"]], [[[expected]], [[0]]], atol=1e-9)
    found = score(5 * eye)
    np.testing.assert_allclose(found["shuffled"], -1.0, atol=1e-9)
    np.testing.assert_allclose(found["uniform"], 2 / 9 - 1)
    np.testing.assert_allclose(found["raised"], 5 * (1 - 1 / 20), rtol=1e-9)  # of each query, all of it at its tokens
    for model in (fixed_offset(20, 12, 3), induction(20, 12)):
        found = small(vocab_size=20, bos=0)(snapshot(model))
        head = (-1, 0)
        np.testing.assert_allclose(found["copying"][head], 1.0, atol=1e-6)
    assert np.isnan(found["copying"][0, 1]), "the previous-token head writes nothing that is unembedded"
    assert found["copying"].attrs["nan"]


def test_one_rival_at_a_time_sees_a_copy_under_noise() -> None:
    """OV = a I + noise of variance 1: each rival is beaten with probability Φ(a / √2), however many there are, while
    the share of the rectified sum is swamped."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 400, generator=generator, dtype=torch.float64)
    for a in (0.0, 1.0, 3.0):
        found = score(a * torch.eye(400, dtype=torch.float64) + noise, length=20, sequences=40)
        expected = (1 + math.erf(a / 2)) / 2
        assert abs(found["rank"].item() - expected) < 4 * found["rank_se"].item() + 0.01, (a, found["rank"])
        assert found["copying"].item() < -0.4
        values = np.linalg.eigvals(a * np.eye(400) + noise.numpy())
        np.testing.assert_allclose(found["eigenvalue"], values.sum().real / np.abs(values).sum(), rtol=1e-8)
    for circuit, rank in ((torch.eye(20), 1.0), (-torch.eye(20), 0.0)):
        found = score(circuit.double(), length=9)
        np.testing.assert_allclose([found["rank"], (1 + found["eigenvalue"]) / 2], rank)


def test_circuits_in_closed_form() -> None:
    """Raise token t by a and token t + 1 by b: of 20 tokens, all in the sequence, the mean is (a + b) / 20."""
    eye = torch.eye(20, dtype=torch.float64)
    for a, b in ((3.0, 1.0), (1.0, 3.0)):
        found = score(a * eye + b * eye.roll(1, 1), length=20, vocab_size=20, sequences=3)
        mean = (a + b) / 20
        np.testing.assert_allclose(found["copying"], 2 * (a - mean) / (a + b - 2 * mean) - 1, rtol=1e-9)
    permuted = score(eye.roll(1, 1), length=20)
    np.testing.assert_allclose(permuted["copying"], -1.0, atol=1e-9)
    tokens = torch.arange(10).repeat(3, 1)
    inwards = score(eye.roll(1, 1), vocab_size=None, tokens=tokens)
    np.testing.assert_allclose(inwards["copying"], -1.0, atol=1e-9)
    np.testing.assert_allclose(inwards["shuffled"], 1.0, atol=1e-9)  # 9 is followed by 10, not by 0: raises none there


def slow(model: nn.Module, tokens: Tensor, layer: int, head: int, start: int = 0) -> np.ndarray:
    """(sequence, 3) by the definition, one query and one place at a time, through the norm of a GPT-2."""
    anatomy = Anatomy(model)
    last = ("resid_post", anatomy.layers - 1)
    _, reads = anatomy.run(tokens, ["v", "pattern", last])
    norm, unembed = model.transformer.ln_f, model.lm_head.weight
    rows = []
    for b, sequence in enumerate(tokens.tolist()):
        own = other = everything = 0.0
        for q in range(len(sequence)):
            sd = (reads[last][b, q].var(unbiased=False) + norm.eps).sqrt()
            for j in range(start, q + 1):
                added = reads["v", layer][b, j, head] @ anatomy.W_O(layer)[head]
                logits = unembed @ ((added - added.mean()) / sd * norm.weight) * reads["pattern", layer][b, head, q, j]
                raised = (logits - logits.mean()).clamp(min=0)
                following = sequence[j + 1] if j + 1 < len(sequence) else sequence[start]
                own, other = own + float(raised[sequence[j]]), other + float(raised[following])
                everything += sum(float(raised[t]) for t in set(sequence[start:]))
        rows.append([own, other, everything])
    return np.array(rows)


@torch.no_grad()
@pytest.mark.parametrize("bos", [None, 2])
def test_gpt2_by_the_definition(bos: int | None) -> None:
    model = family("gpt2").double()
    text = random_tokens(6, 4, 7, seed=3) + 3  # with repeats within sequences
    instrument = CopyingHeads(tokens=text, bos=bos)
    found = instrument(snapshot(model))
    probe = text if bos is None else torch.cat([torch.full((4, 1), bos), text], 1)
    for layer, head in ((0, 1), (1, 3)):
        own, other, everything = slow(model, probe, layer, head, 0 if bos is None else 1).T
        share = own.sum() / everything.sum()
        error = np.sqrt(((own - share * everything) ** 2).sum() * 4 / 3) / everything.sum()
        expected = [2 * share - 1, 2 * error, 2 * other.sum() / everything.sum() - 1, everything.sum() / 28]
        here = found.isel(layer=layer, head=head)
        values = [here[name] for name in ("copying", "copying_se", "shuffled", "raised")]
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    types = [len(set(row)) for row in text.tolist()]
    np.testing.assert_allclose(found["uniform"], np.mean([2 / n - 1 for n in types]))


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family(name: str) -> None:
    model = family(name)
    found = small()(snapshot(model))
    assert dict(found.drop_dims("replicate").sizes) == {"layer": 2, "head": HEADS}
    assert ((found["copying"] > -1) & (found["copying"] < 1)).all()
    assert (found["raised"] > 0).all()
    assert float(np.abs(found["copying"] - found["uniform"]).max()) < 0.8, "random heads copy little"
    again = small(batch_size=2)(snapshot(model))
    for part in found.data_vars:
        np.testing.assert_allclose(again[part], found[part], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_norm_after_attention_is_frozen() -> None:
    """All that the heads add, summed over places and heads, is the attention's own output through its norm."""
    model = Ended().eval()
    instrument = CopyingHeads(tokens=random_tokens(VOCAB, 3, 5, seed=1))
    found = instrument(snapshot(model))
    block, anatomy = model.blocks[0], Anatomy(model)
    tokens = instrument.tokens
    _, reads = anatomy.run(tokens, ["v", "pattern", "z"])
    whole = torch.einsum("bqhe,hed->bqd", reads["z", 0], anatomy.W_O(0)) + block.out.bias
    sd = (whole.var(-1, unbiased=False) + block.end.eps).sqrt()
    own = everything = 0.0
    for b in range(3):
        for q in range(5):
            for j in range(q + 1):
                added = reads["v", 0][b, j, 1] @ anatomy.W_O(0)[1]
                added = (added - added.mean()) / sd[b, q] * block.end.weight
                logits = model.unembed.weight @ added * reads["pattern", 0][b, 1, q, j]
                raised = (logits - logits.mean()).clamp(min=0)
                own += float(raised[tokens[b, j]])
                everything += float(raised[tokens[b].unique()].sum())
    np.testing.assert_allclose(found["copying"][0, 1], 2 * own / everything - 1, rtol=1e-6)
    np.testing.assert_allclose(found["raised"][0, 1], everything / 15, rtol=1e-6)


def test_alone_and_together() -> None:
    """What was read for the attribution of the same prompts serves the copying score, and the other way round."""
    tokens = random_tokens(VOCAB - 3, 4, 7, seed=1) + 3
    both = [
        CopyingHeads(tokens=tokens),
        ResidualAttribution(tokens, tokens[:, 0], tokens[:, 0] - 3, ablation_prompts=3),
    ]
    alone = [instrument(snapshot(family("gemma2"))) for instrument in both]
    for order in (1, -1):
        shared = snapshot(family("gemma2"))
        together = {type(instrument): instrument(shared) for instrument in both[::order]}
        for instrument, expected in zip(both, alone, strict=True):
            xr.testing.assert_identical(together[type(instrument)], expected)


def test_the_probe_has_different_tokens() -> None:
    probe = CopyingHeads(40, sequences=20, length=25, seed=4, bos=1, exclude=(0, 7))._probe
    assert (probe[:, 0] == 1).all()
    for row in probe[:, 1:].tolist():
        assert len(set(row)) == 25
        assert not set(row) & {0, 1, 7}
    assert len({tuple(row) for row in probe.tolist()}) == 20
    one = CopyingHeads(40, seed=4)
    assert one == pickle.loads(pickle.dumps(one)) != CopyingHeads(40, seed=5)
    assert not torch.equal(one._probe, CopyingHeads(40, seed=5)._probe)
    assert (one.cost().forwards, one.cost().positions) == (32, 25)


def test_what_it_refuses() -> None:
    for wrong in ({}, {"vocab_size": 50, "tokens": random_tokens(5, 2, 9)}):
        with pytest.raises(DataError, match="either vocab_size"):
            CopyingHeads(**wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"32 sequences of 25 out of 24 tokens: lower length"):
        CopyingHeads(25, bos=0)
    with pytest.raises(InstrumentError, match=f"up to {VOCAB} but AttentionOnly has {VOCAB} logits"):
        CopyingHeads(tokens=torch.full((1, 4), VOCAB))(snapshot(random_model(0)))
    with pytest.raises(InstrumentError, match="summed up and unembedded; that of BertForMaskedLM"):
        small()(snapshot(family("bert")))

    class Gated(AttentionOnly):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.blocks[0].out.register_forward_pre_hook(lambda m, args: (args[0] * 2,))

    model = even(VOCAB, 16)
    width = 3 * VOCAB + 16
    places, head = torch.ones(16, width).double(), (torch.eye(width).double(),) * 2
    gated = Gated(model.embed.weight.detach(), places, [[head]], model.unembed.weight.T.detach())
    with pytest.raises(InstrumentError, match="in layer 0 what its heads read is not pattern · v"):
        small()(snapshot(gated))


class TestCopyingHeads(InstrumentContract):
    def instrument(self) -> CopyingHeads:
        return small()

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)


class TestOnLlama(TestCopyingHeads):
    def model(self, seed: int) -> nn.Module:
        return family("llama", seed)
