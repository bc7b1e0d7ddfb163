"""What a module computes is read, whatever it holds under the name of `weight`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from devmon.anatomy import Anatomy
from devmon.anatomy.linear import linear_map, table
from devmon.errors import InstrumentError
from devmon.instruments import Composition, LogitLens, Superposition
from devmon.snapshot import Snapshot
from tests.anatomy.test_anatomy_sites import HEADS, VOCAB, D, family, inputs


class Adapted(nn.Module):
    """An adapter of low rank around a frozen map, which shows the frozen weight as its own, as PEFT does."""

    def __init__(self, base: Any, scale: float = 2.0) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        wide = type(base).__name__ == "Conv1D"
        self.in_features, out = base.weight.shape if wide else reversed(base.weight.shape)
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(0.2 * torch.randn(self.in_features, 3, generator=generator).to(base.weight))
        self.up = nn.Parameter(0.2 * torch.randn(3, out, generator=generator).to(base.weight))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.down @ self.up)


class Transposed(nn.Module):
    """An unembedding tied to the embedding through a transform."""

    def __init__(self, embed: nn.Embedding) -> None:
        super().__init__()
        self.embed = embed
        self.turn = nn.Parameter(torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))[0])
        self.weight = embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x @ self.turn) @ self.embed.weight.T


class Scaled(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return 3 * super().forward(tokens)


class EightBits(nn.Linear):
    """Activations rounded to 8 bits of their largest: no linear map."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 7
        return F.linear((x / step).round() * step, self.weight, self.bias)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def normed(module: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.nn.utils.weight_norm(module)  # the old way: a hook makes `weight` before each pass
    module.weight_g.data.mul_(3)
    return module


def doubled(module: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Double())
    return module


def packed(module: nn.Linear) -> nn.Module:
    """Whole numbers of 8 bits and a scale: `weight` is not even a matrix of floats."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = module.in_features
            self.scale = float(module.weight.detach().abs().max()) / 127
            self.weight = nn.Parameter((module.weight.detach() / self.scale).round().to(torch.int8), False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x) * self.scale, module.bias)

    return Packed()


WRAPS: dict[str, Callable[[Any], nn.Module]] = {
    "adapter": Adapted,
    "weight_norm, by a hook": normed,
    "weight_norm": parametrizations.weight_norm,
    "parametrised": doubled,
    "quantised": packed,
    "plain": lambda module: module,
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_matrix_is_what_the_module_does_to_vectors(wrap: str) -> None:
    torch.manual_seed(0)
    module = WRAPS[wrap](nn.Linear(7, 5))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    weight, bias = linear_map(module, "Test", "out")
    x = torch.randn(4, 7)
    assert weight.shape == (7, 5)
    assert bias is not None
    torch.testing.assert_close(x @ weight + bias, module(x), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_rounded_by_a_bias(dtype: torch.dtype) -> None:
    base = nn.Linear(6, 4)
    with torch.no_grad():
        base.bias.add_(100.0)
    module = Adapted(base).to(dtype)
    weight, _ = linear_map(module, "Test", "out")
    exact = base.weight.T.double() + 2 * module.down.double() @ module.up.double()
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.double(), exact, rtol=0, atol=0.01)  # the bias alone rounds to .5


def test_what_is_no_linear_map_is_refused_by_name() -> None:
    with pytest.raises(InstrumentError, match=r"Lens: 'attn.out' \(EightBits\) is no linear map.*dequantise"):
        linear_map(EightBits(16, 8), "Lens", "attn.out")
    with pytest.raises(InstrumentError, match=r"'out' \(Sequential\) reads is not known.*in_features"):
        linear_map(nn.Sequential(nn.ReLU()), "Lens", "out")
    embed = Scaled(9, 4)
    torch.testing.assert_close(table(embed, "Lens", "embed"), 3 * embed.weight)


def adapted(name: str, parts: tuple[str, ...]) -> Any:
    """A family whose maps of these names have adapters."""
    model = family(name)
    for path, module in list(model.named_modules()):
        if path.endswith(parts):
            owner, _, last = path.rpartition(".")
            setattr(model.get_submodule(owner), last, Adapted(module))
    return model


def merged(model: nn.Module) -> nn.Module:
    """The same function in plain weights."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, Adapted):
            added = (module.scale * module.down @ module.up).detach()
            base = module.base
            base.weight.data.add_(added if type(base).__name__ == "Conv1D" else added.T)
            owner, _, last = path.rpartition(".")
            setattr(model.get_submodule(owner), last, base)
    return model


@pytest.mark.parametrize(
    "name, parts",
    [
        ("gpt2", ("c_attn", "c_proj")),
        ("llama", ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "lm_head")),
        ("gpt_neox", ("query_key_value", "attention.dense")),
    ],
)
def test_a_model_with_adapters_is_read_as_its_merged_twin(name: str, parts: tuple[str, ...]) -> None:
    model = adapted(name, parts)
    twin = merged(model)
    torch.testing.assert_close(model(inputs(name)).logits, twin(inputs(name)).logits, rtol=1e-4, atol=1e-4)
    output, rebuilt = Anatomy(model).rebuild(inputs(name))
    torch.testing.assert_close(rebuilt, output, rtol=0, atol=1e-3)
    for instrument, value in ((Composition(draws=16), "composition"), (LogitLens(inputs(name)), "head_effect")):
        found, expected, base = (instrument(Snapshot(0, each))[value].values for each in (model, twin, family(name)))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        assert np.nanmax(np.abs(found - base)) > 0.02, "the frozen base was read"


def test_an_unembedding_that_is_tied_through_a_transform() -> None:
    model = family("llama")
    model.lm_head = Transposed(model.model.embed_tokens)
    anatomy = Anatomy(model)
    torch.testing.assert_close(anatomy.W_U, 0.5 * model.lm_head.turn @ model.model.embed_tokens.weight.T)
    assert anatomy.W_U.shape == (D, VOCAB)
    assert Superposition()(Snapshot(0, model))["directions"] > HEADS
