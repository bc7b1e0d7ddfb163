"""Whether a layout is right: the model runs once on a short input, and its parts must give what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.attention import Patterns
from devmon.anatomy.forward import logits, unwatched
from devmon.anatomy.layout import FUNCTIONAL
from devmon.anatomy.parts import Parts
from devmon.anatomy.sites import LayerSite, Reads
from devmon.anatomy.taps import Taps, heads_of
from devmon.errors import InstrumentError

TOKENS = 8  # of the sequence that a layout is tried on: enough places to tell queries from keys
MAX_ERROR = 1e-3  # of the length of a vector: float32 gives 1e-6, another norm, order or multiplier tenths
HALF_ERROR = 5e-2  # the same in half precision, where a sum of bfloat16 rounds to 1e-2
SHOUT = 100.0  # what a query is replaced with, so that its pattern changes whatever the scale of the weights
LOOKED = 1e-2  # of attention: what may change where nothing should


def try_layout(parts: Parts, inputs: Any = None, alone: bool = True) -> bool:
    """Runs the model on the first of `inputs`, or on an input made up where there is none, and holds what its parts
    give against what it computes, layer by layer: False where no input is found that it runs on. A tower that is
    `alone` may be run by itself.

    Raises InstrumentError, with the line of the layout to change, where they differ: the heads of the patterns are
    `heads`; pattern · v = z; q, k, v = W norm(stream) + b; a query moves the attention of its own place alone; stream
    after = stream before + z W_O + what the MLP writes, through their ends; logits = unembedding of norm(stream).
    Vectors that are not finite are not compared.
    """
    with exact_products(), torch.no_grad():
        for module, given in _trials(parts, inputs):
            if module is not parts.model and not alone:
                continue
            try:
                unwatched(module, given, parts.layout)
            except Exception:
                continue
            try:
                _Fit(parts, module, given).check()
            except (RuntimeError, ValueError, IndexError, AttributeError) as error:  # of shapes that are others
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise InstrumentError(
                    f"{parts.who}: the layout of {type(parts.model).__name__} names parts that do not fit together "
                    f"({error}): leave this instrument out, or declare another `anatomy = Layout(...)`"
                ) from error
            return True
    return False


def rebuilt_stream(parts: Parts, reads: Reads, layer: int, stream: Tensor) -> Tensor:
    """The stream after a layer from the stream before it and what its heads and MLP were read to hold."""
    added = torch.einsum("bphe,hed->bpd", reads["z", layer], parts.W_O(layer)) + parts.bias(layer, "out")
    stream = _add(parts, layer, "attention_end", stream, added)
    if parts.layout.neurons:
        added = reads["neurons", layer] @ parts.W_out(layer) + parts.bias(layer, "neurons")
        return _add(parts, layer, "mlp_end", stream, added)
    return stream + reads["mlp_out", layer] if parts.has_mlp else stream


def rebuilt_logits(parts: Parts, stream: Tensor) -> Tensor:
    """Logits from the stream after the last layer, where the unembedding reads it directly."""
    unembedded = parts.final_norm(stream) @ parts.W_U
    return parts.capped(unembedded if parts.bias_U is None else unembedded + parts.bias_U)


def mlp_entry(parts: Parts) -> str:
    """The path in a block of the module that the stream enters on its way into the MLP: the norm before it, else the
    module around it; "" for none."""
    layout = parts.layout
    norm = "" if layout.mlp_norm.startswith(FUNCTIONAL) else layout.mlp_norm
    return norm or layout.neurons.rpartition(".")[0] or (layout.mlp_end if not layout.neurons else "")


def mlp_site(parts: Parts) -> tuple[str, ...]:
    """What `rebuilt_stream` reads of the MLP."""
    return ("neurons",) if parts.layout.neurons else ("mlp_out",) if parts.has_mlp else ()


class _Fit:
    """One layout held against one pass of `module` (the model, or a part of it that holds the blocks)."""

    def __init__(self, parts: Parts, module: nn.Module, given: Any) -> None:
        self.parts, self.module, self.given = parts, module, given
        self.counts: set[int] = set()  # of the heads of the patterns that were seen
        self.entered: dict[int, Tensor] = {}  # what the norm before the MLP of a layer, or the MLP, was given
        half = parts.W_O(0).dtype in (torch.float16, torch.bfloat16)
        self.most = HALF_ERROR if half else MAX_ERROR

    def check(self) -> None:
        parts, layout = self.parts, self.parts.layout
        layers = range(parts.layers)
        sites = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_post", *mlp_site(parts))
        output, reads = self._run({(name, layer) for name in sites for layer in layers}, {})
        self._check_order(reads["resid_pre", 0])
        seen = {layer for layer in layers if ("pattern", layer) in reads}  # a kernel may hide those of some layers
        if len(seen) < parts.layers and self.counts - {parts.heads}:
            counts = ", ".join(map(str, sorted(self.counts)))
            self._refuse(f"its patterns are of {counts} heads, the layout says {parts.heads}", f"heads={counts}")
        for layer in layers:
            self._check_layer(layer, reads, layer in seen)
        if len(seen) == parts.layers:
            self._check_queries(reads)

        # The logits, where the unembedding reads the stream; other heads stand on their own.
        direct = layout.direct and not layout.post_norm and not layout.hybrid
        if parts.has_logits and direct and self.module is parts.model:
            found = logits(parts.model, self.given, parts.who, output=output)
            rebuilt = rebuilt_logits(parts, reads["resid_post", parts.layers - 1])
            off = _off(rebuilt, found)
            if off > self.most:  # some return logarithms of probabilities
                off = _off(rebuilt.log_softmax(-1), found.log_softmax(-1))
            if off > self.most:
                self._refuse(
                    f"norm and unembedding of its last stream are not its logits (off by {off:.0%})",
                    f"norm={layout.norm!r}, unembed={layout.unembed!r}, cap={layout.cap!r}, or direct=False",
                )

    def _check_order(self, stream: Tensor) -> None:
        """The stream is (batch, pos, d), its places those of the tokens."""
        given = tuple(self.given.shape) if isinstance(self.given, Tensor) and self.given.ndim == 2 else ()
        if stream.ndim != 3:
            self._refuse(f"its stream is {tuple(stream.shape)}", "enter, leave; several streams have no layout")
        if tuple(stream.shape[:2]) == given[::-1] != given:
            flipped = not self.parts.layout.batch_first
            self._refuse(f"its stream is {tuple(stream.shape)} of {given} tokens", f"batch_first={flipped}")

    def _check_layer(self, layer: int, reads: Reads, seen: bool) -> None:
        parts, layout = self.parts, self.parts.layout
        # Values: what each head reads is its pattern times them, so they are those of the right head.
        if seen:
            v = reads["v", layer].repeat_interleave(parts.heads // parts.kv_heads, 2)
            pattern = reads["pattern", layer].to(v.dtype)
            off = _off(torch.einsum("bhqk,bkhe->bqhe", pattern, v).flatten(2), reads["z", layer].flatten(2))
            if off > self.most:
                other = "heads" if layout.fused == "parts" else "parts"
                line = (
                    f"fused={other!r} (or parts:kqv and the like), or heads"
                    if layout.qkv
                    else f"value={layout.value!r}, out={layout.out!r}"
                )
                self._refuse(f"in layer {layer} what its heads read is not pattern · v (off by {off:.0%})", line)

        # Queries, keys and values are maps of the stream behind the norm that the layout names.
        normed = parts.norm_in(layer, "attention")(reads["resid_pre", layer])
        for which, (name, weight) in enumerate(zip("qkv", (parts.W_Q, parts.W_K, parts.W_V), strict=True)):
            value = reads[name, layer]
            matrix = weight(layer)[:: parts.heads // value.shape[2]]
            expected, bias = torch.einsum("bpd,hde->bphe", normed, matrix), parts.bias_in(layer, which)
            off = _off((expected if bias is None else expected + bias).flatten(2), value.flatten(2))
            if off > self.most:
                self._refuse(
                    f"in layer {layer} {name} is not W · norm(stream) + b (off by {off:.0%})",
                    f"attention_norm={layout.attention_norm!r}",
                )

        before = reads["resid_pre", layer]
        off = _off(rebuilt_stream(parts, reads, layer, before), reads["resid_post", layer])
        if off > self.most:
            self._refuse(
                f"what the heads and the MLP of layer {layer} write does not add up to its output (off by {off:.0%})",
                "out, neurons, attention_end, mlp_end, post_norm; a stream that is multiplied, gated or branched has "
                "no layout",
            )

        # Between layers nothing is done to the stream, unless blocks of another kind stand there.
        if layer + 1 < parts.layers and not layout.hybrid:
            off = _off(reads["resid_pre", layer + 1], reads["resid_post", layer])
            if off > self.most:
                self._refuse(
                    f"layer {layer + 1} does not read what layer {layer} gives (off by {off:.0%})",
                    "blocks; a stream that is mixed or scaled between layers has no layout",
                )

        if mlp_entry(parts) and not layout.post_norm and layer not in self.entered:
            self._refuse(f"nothing was seen to enter the mlp of layer {layer}", f"mlp_norm={layout.mlp_norm!r}")

        # What enters the MLP is the stream, before or after attention has added to it, behind its norm.
        if layer in self.entered:
            expected = before if parts.parallel else before + reads["attn_out", layer]
            is_norm = bool(layout.mlp_norm) and not layout.mlp_norm.startswith(FUNCTIONAL)  # it stands before it
            expected = expected if is_norm else parts.norm_in(layer, "mlp")(expected)
            entered = self.entered[layer]
            entered = entered if layout.batch_first or entered.ndim < 3 else entered.transpose(0, 1)
            off = _off(entered.reshape(expected.shape), expected)
            if off > self.most:
                where = "before" if parts.parallel else "after"
                self._refuse(
                    f"in layer {layer} what enters the MLP is not the stream {where} attention (off by {off:.0%})",
                    f"mlp_norm={layout.mlp_norm!r}, parallel={layout.parallel!r}",
                )

    def _check_queries(self, reads: Reads) -> None:
        """Other queries at one place, in every layer at once: no other place may attend otherwise."""
        parts = self.parts
        length = reads["q", 0].shape[1]
        place = length // 2
        generator = torch.Generator().manual_seed(0)

        def shout(value: Tensor) -> Tensor:
            new = value.clone()
            new[:, place] = SHOUT * torch.randn(value[:, place].shape, generator=generator).to(value)
            return new

        write: dict[LayerSite, Any] = {("q", layer): shout for layer in range(parts.layers)}
        # The streams are held, so that no layer sees what was done to another.
        write |= {("resid_pre", layer): reads["resid_pre", layer] for layer in range(parts.layers)}
        _, after = self._run(set(), write)
        others = [q for q in range(length) if q != place]
        for layer in range(parts.layers):
            before = reads["pattern", layer]
            moved = float((after["pattern", layer] - before)[:, :, others].abs().amax())
            if moved > LOOKED:
                self._refuse(
                    f"in layer {layer} another query at one place changes what other places attend to ({moved:.2f}), "
                    "as a key does",
                    "query, key",
                )

    def _run(self, wanted: set[LayerSite], write: dict[LayerSite, Any]) -> tuple[Any, Reads]:
        parts = self.parts
        places = {("pattern", layer) for layer in range(parts.layers)}
        taps = Taps(parts, wanted | places, write, False)

        def meet(pattern: Tensor) -> Tensor | None:
            if taps.layer >= 0 and pattern.shape[-1] == pattern.shape[-2] == taps.shape[1]:
                self.counts.add(heads_of(pattern, taps.shape[0]))
            return taps.pattern(pattern)

        def enter(layer: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                self.entered.setdefault(layer, args[0])

            return hook

        with ExitStack() as stack:
            for handle in taps.attach():
                stack.callback(handle.remove)
            for layer in range(parts.layers) if mlp_entry(parts) and not parts.layout.post_norm else ():
                entry = parts.blocks[layer].get_submodule(mlp_entry(parts))
                stack.callback(entry.register_forward_pre_hook(enter(layer)).remove)
            stack.enter_context(Patterns.of(parts.model, meet))
            output = unwatched(self.module, self.given, parts.layout)
        # A kernel may hide its patterns: what they would tell is then left out.
        taps.fired |= places
        taps.refuse_missing()
        return output, taps.reads

    def _refuse(self, what: str, line: str) -> None:
        parts = self.parts
        name = type(parts.model).__name__
        whose = f"the layout of {name} does not give what the model computes"
        if parts.guessed:
            whose = f"the parts of {name} have known names, but put together they do not give its logits"
        raise InstrumentError(
            f"{parts.who}: {whose}: {what}. Say how they are: anatomy = Layout(...) (devmon.anatomy.Layout) with "
            f"another {line}"
        )


def _trials(parts: Parts, inputs: Any) -> Iterator[tuple[nn.Module, Any]]:
    """What may be run: the first of the inputs given, or tokens, or images of the size that a config tells."""
    if isinstance(inputs, Tensor):
        if inputs.ndim == 2 and not inputs.is_floating_point():
            yield parts.model, inputs[:1, :TOKENS]
        yield parts.model, inputs[:1]
    generator = torch.Generator().manual_seed(0)
    if parts.layout.embed:
        size = len(parts.W_E)
        yield parts.model, ((7 * torch.arange(min(TOKENS, size)) + 3) % size)[None]
        return
    for module in parts.model.modules():
        config: Any = getattr(module, "config", None)
        side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
        if isinstance(channels, int) and side and any(inner is parts.body for inner in module.modules()):
            sides = (side, side) if isinstance(side, int) else tuple(side)
            image = torch.randn(1, channels, *sides, generator=generator)
            dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
            yield parts.model, image.to(dtype)
            yield module, image.to(dtype)
    yield parts.model, torch.arange(TOKENS)[None]


def _add(parts: Parts, layer: int, end: str, stream: Tensor, added: Tensor) -> Tensor:
    """The stream after an addition, with the norm or scale that stands before or after it."""
    module = parts.optional(layer, end)
    if module is None:
        return stream + added
    return module(stream + added) if parts.layout.post_norm else stream + module(added)


def _off(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two vectors (…, d) at one place, over the length of the second."""
    found, expected = found.float(), expected.float()
    if not bool(found.isfinite().all()) or not bool(expected.isfinite().all()):
        return 0.0  # training has diverged, which is no fault of the layout
    length = expected.norm(dim=-1)
    floor = length.amax().clamp(min=1e-30) * 1e-3  # next to nothing, at a place, is compared with the others
    return float(((found - expected).norm(dim=-1) / length.clamp(min=floor)).amax())


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 in float32 inside: TF32 and bfloat16 (`torch.set_float32_matmul_precision`) round to 1e-3."""
    backends: list[Any] = [getattr(part, "matmul", None) for part in (torch.backends.cuda, torch.backends.mkldnn)]
    if not all(hasattr(backend, "fp32_precision") for backend in backends):  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    settings = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, setting in zip(backends, settings, strict=True):
            backend.fp32_precision = setting
