"""The logit lens: closed forms, a slow reference, relations, the families, and its contract."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devmon.data import clustered_mean, random_tokens
from devmon.errors import DataError, InstrumentError
from devmon.instruments.logit_lens import LogitLens
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, Bigram, InstrumentContract, even, induction
from tests.anatomy.test_anatomy_sites import CONFIGS, MASKED, VISION, family

VOCAB, LENGTH = 20, 21
CAUSAL = [name for name in CONFIGS if name not in (*MASKED, *VISION)]
SINGLE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")  # experts are multiplied in float32 at most


def measure(model: nn.Module, tokens: Tensor, **settings: Any) -> Any:
    return LogitLens(tokens, **settings)(Snapshot(0, model.eval()))


def random_model(seed: int, vocab: int = VOCAB, length: int = 24, width: int = 12) -> AttentionOnly:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5

    heads = [[(draw(width, width), draw(width, width)) for _ in range(3)] for _ in range(2)]
    return AttentionOnly(draw(vocab, width), draw(length, width), heads, draw(width, vocab))


def test_the_induction_circuit_in_closed_form() -> None:
    """Nothing is written where the unembedding reads before layer 2, whose head 0 then writes 8 for the right token."""
    generator = torch.Generator().manual_seed(0)
    copies = torch.stack([1 + torch.randperm(VOCAB - 1, generator=generator)[:10] for _ in range(8)])
    found = measure(
        induction(VOCAB, LENGTH, confidence=8.0), torch.cat([torch.zeros(8, 1, dtype=torch.int64), copies, copies], 1)
    )
    share = 9 / 20  # of the places 0 .. 19, the places 11 .. 19 know the next token
    chance = 1 / (1 + (VOCAB - 1) * math.exp(-8.0))
    negentropy = chance * math.log(chance) + (1 - chance) * math.log((1 - chance) / (VOCAB - 1))
    kl = share * (math.log(VOCAB) + negentropy)
    np.testing.assert_allclose(found["kl_uniform"], kl, rtol=1e-9)
    np.testing.assert_allclose(found["kl"], [kl, kl, 0.0], rtol=1e-9, atol=1e-12)
    loss = math.log(VOCAB) * (1 - share) - share * math.log(chance)
    np.testing.assert_allclose(found["loss"], [math.log(VOCAB)] * 2 + [loss], rtol=1e-9)
    np.testing.assert_allclose(found["head_effect"], [[0, 0], [8 * share * (1 - 1 / VOCAB), 0]], rtol=1e-9, atol=1e-9)
    assert abs(float(found["head_effect_unigram"][1, 0])) < 0.1 * float(found["head_effect"][1, 0])


def test_a_model_without_layers_that_write_is_known_from_the_start() -> None:
    tokens = random_tokens(VOCAB, 6, 12)
    model = random_model(0, length=12)
    for name, parameter in model.blocks.named_parameters():
        if name.endswith("out.weight"):
            parameter.data.zero_()
    found = measure(model, tokens)
    np.testing.assert_allclose(found["kl"], 0.0, atol=1e-14)
    np.testing.assert_allclose(found["agreement"], 1.0)
    assert float(found["prediction_depth"]) == 0.0
    np.testing.assert_allclose(found["head_effect"], 0.0, atol=1e-14)
    flat = measure(even(VOCAB, 12), tokens)
    np.testing.assert_allclose([flat["kl_uniform"], flat["kl_constant"]], 0.0, atol=1e-12)


def test_by_brute_force() -> None:
    model, tokens = random_model(1), random_tokens(VOCAB, 5, 24, 2)
    found = measure(model, tokens)
    with torch.no_grad():
        state = model.embed(tokens) + model.positions[:24]
        states = [state]
        for block in model.blocks:
            states.append(block(states[-1]))
        logits = model(tokens)[:, :-1]
    p = logits.softmax(-1)
    lens = [model.unembed(state)[:, :-1].softmax(-1).detach() for state in states]
    places = [(b, q) for b in range(5) for q in range(23)]
    for depth, q in enumerate(lens):
        kl = [sum(p[b, i, v] * math.log(p[b, i, v] / q[b, i, v]) for v in range(VOCAB)) for b, i in places]
        loss = [-math.log(q[b, i, tokens[b, i + 1]]) for b, i in places]
        same = [int(q[b, i].argmax()) == int(p[b, i].argmax()) for b, i in places]
        for name, values in {"kl": kl, "loss": loss, "agreement": same}.items():
            mean, se = clustered_mean(np.array(values, float).reshape(5, 23).sum(1), np.full(5, 23))
            np.testing.assert_allclose(found[name][depth], mean, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(found[f"{name}_se"][depth], se, rtol=1e-7, atol=1e-12)
    depths = []
    for b, i in places:
        tops = [int(q[b, i].argmax()) for q in lens]
        depths.append(next(d for d in range(3) if len(set(tops[d:])) == 1))
    assert set(depths) == {0, 1, 2}
    np.testing.assert_allclose(found["prediction_depth"], np.mean(depths), rtol=1e-12)
    # the same for the token that is preferred one place earlier, which the last lens need not prefer
    earlier = []
    for b, i in places:
        wanted = int(p[b, i - 1].argmax())
        keeps = [int(q[b, i].argmax()) == wanted for q in lens]
        earlier.append(next((d for d in range(2) if all(keeps[d:2])), 2))
    np.testing.assert_allclose(found["prediction_depth_shifted"], np.mean(earlier), rtol=1e-12)
    assert float(found["prediction_depth_shifted"]) > float(found["prediction_depth"])
    mean = p.mean((0, 1))
    best = torch.tensor([(p[b, i] * (p[b, i] / mean).log()).sum() for b, i in places]).mean()
    np.testing.assert_allclose(found["kl_constant"], best, rtol=1e-9)
    for other in (p[0, 0], torch.full((VOCAB,), 1 / VOCAB)):
        assert float((p * (p / other).log()).sum(-1).mean()) > float(best)
    share = torch.bincount(tokens[:, 1:].flatten(), minlength=VOCAB).double() / 115
    np.testing.assert_allclose(found["loss_constant"], -torch.xlogy(share, share).sum(), rtol=1e-9)
    tops = p.argmax(-1)
    np.testing.assert_allclose(found["agreement_constant"], tops.flatten().bincount().max() / 115, rtol=1e-7)


@pytest.mark.parametrize("name", CAUSAL)
def test_families_the_last_lens_is_the_model(name: str) -> None:
    model = family(name) if name in SINGLE else family(name).double()
    tokens = torch.randint(3, 23, (4, 9), generator=torch.Generator().manual_seed(1))
    found = measure(model, tokens)
    assert dict(found.drop_dims("replicate").sizes) == {"depth": 3, "layer": 2, "head": 4}
    with torch.no_grad():
        p = model(tokens).logits[:, :-1].log_softmax(-1)
    loss = -p.gather(-1, tokens[:, 1:, None]).mean()
    np.testing.assert_allclose(found["kl"][-1], 0.0, atol=1e-9)
    np.testing.assert_allclose(found["loss"][-1], loss, rtol=1e-5)
    assert float(found["kl"][0]) > 0.01
    assert float(found["agreement"][-1]) == 1.0
    assert np.isfinite(found["head_effect"]).all()


def manual(name: str, model: Any, tokens: Tensor) -> np.ndarray:
    """Head effects (layer, head) by hooks and the norms' textbook formulas, place by place."""
    inner = model.transformer if name == "gpt2" else model.model
    blocks = inner.h if name == "gpt2" else inner.layers
    outs = [block.attn.c_proj if name == "gpt2" else block.self_attn.o_proj for block in blocks]
    last = inner.ln_f if name == "gpt2" else inner.norm
    seen: dict[Any, Tensor] = {}
    handles = [m.register_forward_pre_hook(lambda m, a: seen.__setitem__(m, a[0].detach())) for m in [*outs, last]]
    with torch.no_grad():
        model(tokens)
        for handle in handles:
            handle.remove()
        gain = last.weight + 1 if name == "gemma2" else last.weight
        x = seen[last]
        sd = (x - x.mean(-1, keepdim=True) * (name == "gpt2")).square().mean(-1, keepdim=True) + 1e-5
        unembed = model.lm_head.weight
        effects = []
        for block, out in zip(blocks, outs, strict=True):
            matrix = out.weight if name == "gpt2" else out.weight.T
            z = seen[out]
            size = z.shape[-1] // 4
            heads = [z[..., h * size : (h + 1) * size] @ matrix[h * size : (h + 1) * size] for h in range(4)]
            if name == "gemma2":
                end = block.post_attention_layernorm
                rms = (sum(heads).square().mean(-1, keepdim=True) + end.eps).sqrt()
                heads = [head * (1 + end.weight) / rms for head in heads]
            row = []
            for head in heads:
                if name == "gpt2":
                    head = head - head.mean(-1, keepdim=True)
                logits = (head * gain / sd.sqrt()) @ unembed.T
                right = logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0] - logits[:, :-1].mean(-1)
                row.append(float(right.mean()))
            effects.append(row)
    return np.array(effects)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_head_effects_by_hooks_and_textbook_norms(name: str) -> None:
    model = family(name) if name in SINGLE else family(name).double()
    tokens = torch.randint(3, 23, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = manual(name, model, tokens)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(measure(model, tokens)["head_effect"], expected, rtol=2e-3, atol=2e-4)


def test_head_effects_are_linear_in_what_the_head_writes() -> None:
    model, tokens = random_model(2), random_tokens(VOCAB, 4, 20)
    before = measure(model, tokens)
    model.blocks[1].out.weight.data[:, 12:24] *= 3.0  # head 1 of the last layer
    after = measure(model, tokens)
    ratio = after["head_effect"].values / before["head_effect"].values
    np.testing.assert_allclose(ratio, [[1, 1, 1], [1, 3, 1]], rtol=1e-9)
    model.unembed.weight.data += torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(measure(model, tokens)["head_effect"], after["head_effect"], rtol=1e-8)


def test_minibatches_do_not_change_the_numbers() -> None:
    model, tokens = random_model(0), random_tokens(VOCAB, 7, 24)
    whole, parts = measure(model, tokens), measure(model, tokens, batch_size=3)
    for name in whole.data_vars:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_some_sequences_give_what_they_give_alone(count: int) -> None:
    """The lens of the first sequences, while all of the tokens pass: those of a second minibatch may have none."""
    model, tokens = random_model(0), random_tokens(VOCAB, 7, 24)
    some, alone = measure(model, tokens, sequences=count, batch_size=4), measure(model, tokens[:count])
    for name in alone.data_vars:
        np.testing.assert_allclose(some[name], alone[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert list(some.data_vars) == list(alone.data_vars)


def test_sequences_that_there_are_not_are_refused() -> None:
    for count in (0, 8):
        with pytest.raises(DataError, match=rf"^LogitLens needs sequences from 1 to the 7 of its tokens, got {count}"):
            LogitLens(random_tokens(VOCAB, 7, 24), sequences=count)


@pytest.mark.parametrize("name", ["bert", "esm"])
def test_encoders_are_told(name: str) -> None:
    with pytest.raises(InstrumentError, match=r"^LogitLens needs a residual stream that is summed up and unembedded"):
        measure(family(name), random_tokens(20, 2, 9))
    with pytest.raises(InstrumentError, match=r"^LogitLens needs an unembedding"):
        measure(family("vit"), random_tokens(20, 2, 9))


def test_a_last_lens_that_is_not_the_model_is_refused() -> None:
    class Scaled(AttentionOnly):
        def forward(self, tokens: Tensor) -> Tensor:
            return 2 * super().forward(tokens)

    plain = random_model(0)
    scaled = random_model(0)
    scaled.__class__ = Scaled
    tokens = random_tokens(VOCAB, 4, 20)
    measure(plain, tokens)
    with pytest.raises(InstrumentError, match=r"^LogitLens: the layout .* not its logits .* another norm="):
        measure(scaled, tokens)
    with pytest.raises(InstrumentError, match=r"^LogitLens"):
        measure(Bigram(torch.full((5, 5), 0.2)), random_tokens(5, 2, 9))
    plain.unembed.weight.data = plain.unembed.weight.data[:8]
    with pytest.raises(InstrumentError, match=r"^LogitLens: the tokens go up to 19 but AttentionOnly has 8 logits"):
        measure(plain, tokens)


class TestLogitLens(InstrumentContract):
    def instrument(self) -> LogitLens:
        return LogitLens(random_tokens(VOCAB, 6, 24))

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
