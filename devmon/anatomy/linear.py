"""The map that a module computes, as a matrix: its weight, or what comes out when an identity is pushed through."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.variants.builtin import Projection
from devmon.errors import InstrumentError

AT_ONCE = 1024  # rows of an identity, or tokens, that go through a module together: memory, not numbers
HALF = (torch.float16, torch.bfloat16)
MAX_BEND = 1e-3  # of the largest answer: float32 gives 1e-6, and activations that are quantised to 8 bits 1e-2
HALF_BEND = 3e-2  # the same of what computes in half precision: bfloat16 rounds to 4e-3


def linear_map(module: nn.Module, who: str, what: str) -> tuple[Tensor, Tensor | None]:
    """W (in, out) and b (out,) or None of a module that computes x W + b; the weights themselves where it is a plain
    linear module of torch or transformers.

    Any other (an adapter, a quantised, parametrised or normed weight) may hold a `weight` that is not its map, so an
    identity is pushed through it. Raises InstrumentError, naming the module as `what`, where it computes no x W + b.
    """
    if _plain(module):
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        return (weight if type(module).__name__ == "Conv1D" else weight.T), bias  # type: ignore[return-value]
    width = _width(module)
    if width is None:
        raise InstrumentError(
            f"{who}: how many numbers {what!r} ({type(module).__name__}) reads is not known: give the module an "
            "attribute in_features"
        )
    with torch.no_grad():
        return _pushed(module, width, who, what)


def table(module: nn.Module, who: str, what: str) -> Tensor:
    """What a module of embeddings gives for each token, (vocab, d). Raises InstrumentError where it has no vocabulary
    of its own."""
    weight = getattr(module, "weight", None)
    if type(module) is nn.Embedding and "forward" not in vars(module):
        assert isinstance(weight, Tensor)
        return weight
    size = getattr(module, "num_embeddings", None) or (len(weight) if isinstance(weight, Tensor) else None)
    if size is None:
        raise InstrumentError(
            f"{who}: how many tokens {what!r} ({type(module).__name__}) knows is not known: give the module an "
            "attribute num_embeddings"
        )
    with torch.no_grad():
        tokens = torch.arange(int(size), device=_device(module))
        return torch.cat([_answer(module, rows) for rows in tokens.split(AT_ONCE)])


def _plain(module: nn.Module) -> bool:
    """Whether the module's forward pass is that of its class, and the class one whose weight is the map."""
    known = type(module) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, Projection)
    conv = type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    return (known or conv) and "forward" not in vars(module) and not _own_hooks(module)


def _own_hooks(module: nn.Module) -> list[Any]:
    """The hooks by which torch makes a weight before each pass (weight_norm, spectral_norm of `torch.nn.utils`)."""
    return [h for h in module._forward_pre_hooks.values() if type(h).__module__.startswith("torch.nn.utils")]


def _width(module: nn.Module) -> int | None:
    for name in ("in_features", "infeatures", "nx"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    weight = getattr(module, "weight", None)
    return int(weight.shape[1]) if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _device(module: nn.Module) -> torch.device:
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _answer(module: nn.Module, inputs: Tensor) -> Tensor:
    """The module's answer, without the hooks of whoever reads its inside meanwhile."""
    for hook in _own_hooks(module):
        hook(module, (inputs,))
    answer = module.forward(inputs)
    assert isinstance(answer, Tensor)
    return answer


def _pushed(module: nn.Module, width: int, who: str, what: str) -> tuple[Tensor, Tensor | None]:
    # Adding a bias in half precision would round the rows of the weight: a copy in float32 is asked, unless a part is
    # quantised, which stays as it is.
    for hook in _own_hooks(module):
        hook(module, ())
    dtypes = [t.dtype for t in (*module.parameters(), *module.buffers())]
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    own = floats[0] if floats else torch.float32
    raised = own in HALF and len(floats) == len(dtypes)
    asked, dtype = (copy.deepcopy(module).float(), torch.float32) if raised else (module, own)
    device = _device(module)

    zero = _answer(asked, torch.zeros(1, width, dtype=dtype, device=device))[0]
    rows = torch.arange(width, device=device).split(AT_ONCE)
    eye = (torch.nn.functional.one_hot(at, width).to(dtype) for at in rows)
    weight = torch.cat([_answer(asked, part) - zero for part in eye])

    # What is pushed through is the map only if the module is linear beyond the rows of an identity.
    generator = torch.Generator().manual_seed(0)
    tried = torch.randn(4, width, generator=generator).to(device, dtype)
    answer, expected = _answer(asked, tried), tried @ weight + zero
    bend = float((answer - expected).abs().max()) / max(float((answer - zero).abs().max()), 1e-30)
    if not bend <= (HALF_BEND if dtype in HALF else MAX_BEND) and bool(answer.isfinite().all()):
        raise InstrumentError(
            f"{who}: {what!r} ({type(module).__name__}) is no linear map: what it makes of a vector is off by "
            f"{bend:.1%} of the matrix that an identity gives: merge or dequantise it, or leave this instrument out"
        )
    return weight.to(own), (zero.to(own) if bool(zero.any()) else None)
