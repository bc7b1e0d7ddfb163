"""Edges between the parts of a transformer: each part reads a residual stream of its own, edge by edge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.fit import mlp_entry
from devmon.anatomy.forward import forward, logits
from devmon.anatomy.layout import FUNCTIONAL, Layout
from devmon.anatomy.sites import Site, Write
from devmon.errors import InstrumentError

Group = tuple[int, str]  # layer and "q", "k", "v", "mlp" or "logits": receivers that are built together


@dataclass
class Sent:
    """What the senders put out in one forward pass: `embed` (batch, pos, d), `z` (batch, pos, head, d_head) and `mlp`
    (batch, pos, d) of each layer."""

    embed: Tensor
    z: list[Tensor]
    mlp: list[Tensor]


@dataclass
class _Pass:
    """One forward pass: what was sent, the streams before each layer, and the inputs of the receivers, (batch, pos,
    receiver, d) for each group, where they were asked for."""

    embed: Tensor | None = None
    z: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    stream: dict[int, Tensor] = field(default_factory=dict)
    received: dict[Group, Tensor] = field(default_factory=dict)
    more: dict[int, Tensor] = field(default_factory=dict)  # (head, batch, pos, d): what others' heads write more
    fired: set[Group] = field(default_factory=set)


class Edges:
    """The graph of a causal language model: every part that writes to the residual stream, and all that read it.

    Senders are the embedding (the stream before layer 0, positions included), each head and each MLP; receivers the
    queries of each head, the keys and values of each key-value head (with grouped attention these are fewer), each MLP
    and the logits. An edge goes from each sender to each receiver that comes after it; `exists` (sender, receiver)
    tells which. Names are "embed", "head 0.1", "mlp 0" and "q 1.0", "k 1.0", "v 1.0", "mlp 1", "logits".

    Norms inside a receiver are computed on its own input, none is frozen. Where a norm stands between a layer's heads
    and the stream (Gemma 2, OLMo 2) a receiver gets the norm of the heads as *it* sees them. Raises InstrumentError for
    a model whose stream is not a sum (BERT), or in which the input of an MLP cannot be set apart.
    """

    def __init__(self, model: nn.Module, layout: Layout | None = None, who: str = "Edges") -> None:
        self.anatomy = a = Anatomy(model, layout, who)
        self.who = who
        if a.layout.post_norm or not a.layout.direct:
            raise InstrumentError(
                f"{who} needs a residual stream that is the sum of what the parts write; that of "
                f"{type(a.model).__name__} is normalised after each addition, or read by further layers"
            )

        # Senders in the order in which a forward pass runs them, each with its layer and kind.
        self.has_mlp = a.has_mlp
        self.senders, sent_by = ["embed"], [(-1, "embed")]
        for layer in range(a.layers):
            self.senders += [f"head {layer}.{h}" for h in range(a.heads)]
            sent_by += [(layer, "head")] * a.heads
            if self.has_mlp:
                self.senders.append(f"mlp {layer}")
                sent_by.append((layer, "mlp"))

        # Receivers by group, and which senders come before each: those of earlier layers, and for an MLP that does not
        # run beside the attention also the heads of its own layer.
        self.groups: dict[Group, slice] = {}
        self.receivers: list[str] = []
        before: list[list[bool]] = []
        for layer in range(a.layers):
            sizes = {"q": a.heads, "k": a.kv_heads, "v": a.kv_heads}
            for part, size in sizes.items():
                self._add((layer, part), [f"{part} {layer}.{h}" for h in range(size)])
                before += [[at < layer for at, _ in sent_by]] * size
            if self.has_mlp:
                self._add((layer, "mlp"), [f"mlp {layer}"])
                before.append(
                    [at < layer or (at == layer and kind == "head" and not a.parallel) for at, kind in sent_by]
                )
        self._add((a.layers, "logits"), ["logits"])
        before.append([True] * len(self.senders))
        self.exists = torch.tensor(before).T.contiguous()  # (sender, receiver)

    def names(self, edges: Iterable[int]) -> list[str]:
        """Of edges by their place in the flattened (sender, receiver)."""
        return [f"{self.senders[e // len(self.receivers)]} → {self.receivers[e % len(self.receivers)]}" for e in edges]

    @property
    def identity(self) -> str:
        """What the numbers of edges belong to."""
        a = self.anatomy
        return (
            f"{a.layers} layers, {a.heads} heads, {a.kv_heads} key-value heads, mlp {self.has_mlp}, "
            f"parallel {a.parallel}"
        )

    def place(self, sender: str, receiver: str) -> tuple[int, int]:
        """Of an edge by its names. Raises InstrumentError where there is no such edge."""
        if sender in self.senders and receiver in self.receivers:
            edge = self.senders.index(sender), self.receivers.index(receiver)
            if self.exists[edge]:
                return edge
        raise InstrumentError(
            f"{self.who}: there is no edge {sender!r} → {receiver!r} in {type(self.anatomy.model).__name__}; senders "
            f"are {', '.join(self.senders[:3])} …, receivers {', '.join(self.receivers[:2])} … {self.receivers[-1]}, "
            "and a sender comes before its receiver"
        )

    def sent(self, inputs: Tensor) -> tuple[Tensor, Sent]:
        """Logits (batch, pos, vocab) and what the senders put out."""
        output, ran = self._run(inputs, None, None, None, False)
        return output, self._sent(ran)

    def cut(self, inputs: Tensor, cut: Tensor, other: Sent) -> Tensor:
        """Logits where the receivers read, along the edges of `cut` (sender, receiver), what `other` holds instead.

        Every sender computes what it puts out from what it then reads, and sends that along the edges that are left.
        """
        with torch.no_grad():
            return self._run(inputs, cut.to(self._weight), other, None, False)[0]

    def slopes(self, inputs: Tensor, embed: Tensor, metric: Callable[[Tensor], Tensor]) -> dict[Group, Tensor]:
        """∂ metric(logits) / ∂ the input of each receiver, (batch, pos, receiver, d) by group, at the stream that
        starts from `embed` (batch, pos, d) in place of the embedding."""
        with torch.enable_grad():
            output, ran = self._run(inputs, None, None, embed.detach().requires_grad_(), True)
            inputs_of = list(ran.received.values())
            gradients = torch.autograd.grad(metric(output), inputs_of, allow_unused=True)
        return {
            group: torch.zeros_like(received) if slope is None else slope  # None: nothing of it reaches the metric
            for group, received, slope in zip(ran.received, inputs_of, gradients, strict=True)
        }

    @torch.no_grad()
    def differences(self, first: Sent, second: Sent) -> Tensor:
        """What an edge alone carries of `first` and not of `second`, (batch, pos, sender, d), as it reaches a receiver.

        Behind a norm after attention (Gemma 2, OLMo 2): by how much its output changes when this head alone does.
        """
        parts = [(first.embed - second.embed)[:, :, None]]
        for layer in range(self.anatomy.layers):
            heads = self._heads(layer, first.z[layer] - second.z[layer])
            end = self._end(layer)
            if end is not None:
                # A norm is not linear: what a head contributes is what is missing of the output without it.
                whole = self._attention(layer, first.z[layer])[:, :, None]
                heads = end(whole) - end(whole - heads)
            parts.append(heads)
            if self.has_mlp:
                parts.append((first.mlp[layer] - second.mlp[layer])[:, :, None])
        return torch.cat(parts, 2)

    # -- private -----------------------------------------------------------------------------------------------------

    def _add(self, group: Group, names: Sequence[str]) -> None:
        self.groups[group] = slice(len(self.receivers), len(self.receivers) + len(names))
        self.receivers += names

    @cached_property
    def _weight(self) -> Tensor:
        return self.anatomy.W_O(0)

    def _run(
        self, inputs: Tensor, cut: Tensor | None, other: Sent | None, embed: Tensor | None, keep: bool
    ) -> tuple[Tensor, _Pass]:
        # What a receiver reads is made of what was sent before it in the same pass, so one pass does: sites write down
        # what is sent, and give q, k and v what their own streams make of them.
        a, ran = self.anatomy, _Pass()
        write: dict[Site, Write] = {}
        for layer in range(a.layers):
            write["resid_pre", layer] = self._begin(ran, layer, embed)
            write["z", layer] = _note(ran.z, layer)
            if self.has_mlp:
                write["mlp_out", layer] = _note(ran.mlp, layer)
            for part in "qkv":
                write[part, layer] = self._project(ran, (layer, part), cut, other, keep)

        # An MLP and the logits have one stream each, which takes the place of the input of a module.
        with ExitStack() as stack:
            for group in self.groups:
                if group[1] in ("mlp", "logits"):
                    module, hook = self._before(ran, group, cut, other, keep)
                    stack.callback(module.register_forward_pre_hook(hook).remove)
            stack.enter_context(a.tapped([], write, grad=keep))
            output = logits(a.model, inputs, self.who, output=forward(a.model, inputs, self.who, grad=keep))

        missing = [group for group in self.groups if group not in ran.fired]
        if missing:
            layer, part = missing[0]
            raise InstrumentError(
                f"{self.who}: nothing was seen to enter the {part} of layer {layer} of {type(a.model).__name__}: its "
                "forward pass does not run that norm or module; declare another `anatomy = Layout(...)`"
            )
        return output, ran

    def _sent(self, ran: _Pass) -> Sent:
        assert ran.embed is not None
        layers = range(self.anatomy.layers)
        mlp = [ran.mlp[layer].detach() for layer in layers] if self.has_mlp else []
        return Sent(ran.embed.detach(), [ran.z[layer].detach() for layer in layers], mlp)

    def _begin(self, ran: _Pass, layer: int, embed: Tensor | None) -> Callable[[Tensor], Tensor]:
        def write(value: Tensor) -> Tensor:
            if layer == 0:
                value = value if embed is None else embed
                ran.embed = value
            ran.stream[layer] = value
            return value

        return write

    def _project(
        self, ran: _Pass, group: Group, cut: Tensor | None, other: Sent | None, keep: bool
    ) -> Callable[[Tensor], Tensor]:
        """Queries, keys or values (batch, pos, head, d_head), each from its own stream."""
        (layer, part), a = group, self.anatomy

        def write(value: Tensor) -> Tensor:
            ran.fired.add(group)
            inputs = self._inputs(ran, group, ran.stream[layer], cut, other, keep)
            if inputs is None:
                return value
            # Each head has a stream of its own, so the model's own map, which takes one for all heads, is not used.
            weight = {"q": a.W_Q, "k": a.W_K, "v": a.W_V}[part](layer)
            weight = weight[:: len(weight) // value.shape[2]]  # one for each key-value head
            new = torch.einsum("bprd,rde->bpre", a.norm_in(layer, "attention")(inputs), weight)
            bias = a.bias_in(layer, "qkv".index(part))
            return (new if bias is None else new + bias).to(value.dtype)

        return write

    def _before(
        self, ran: _Pass, group: Group, cut: Tensor | None, other: Sent | None, keep: bool
    ) -> tuple[nn.Module, Callable[..., Any]]:
        """The module in which an MLP or the logits begin, and the hook that gives it a stream of its own."""
        # The norm before it; without one the module around the MLP, or the unembedding.
        (layer, part), a = group, self.anatomy
        if not a.layout.batch_first:
            raise InstrumentError(
                f"{self.who} needs layers whose stream is (batch, pos, d): set batch_first=True in them"
            )
        if (a.layout.norm if part == "logits" else a.layout.mlp_norm).startswith(FUNCTIONAL):
            raise InstrumentError(
                f"{self.who} must set what a norm reads apart: {type(a.model).__name__} calls it as a function; make "
                "it a module"
            )
        within = "" if part == "logits" or a.layout.mlp_norm else mlp_entry(a)
        if part == "logits":
            module = a.module(None, "norm") if a.layout.norm else a.unembedding
        elif mlp_entry(a):
            module = a.blocks[layer].get_submodule(mlp_entry(a))
        else:
            raise InstrumentError(
                f"{self.who} must set the input of the MLP apart: {type(a.model).__name__} shows no norm before it and "
                "no module around it; declare `mlp_norm` in its layout"
            )

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            ran.fired.add(group)
            shape = ran.stream[0].shape
            normed = bool(within) and a.parallel  # what arrives has passed the norm that attention reads through
            base = ran.stream[layer] if normed else args[0].reshape(shape)
            inputs = self._inputs(ran, group, base, cut, other, keep)
            if inputs is None:
                return None
            new = a.norm_in(layer, "mlp")(inputs[:, :, 0]) if normed else inputs[:, :, 0]
            return (new.reshape(args[0].shape), *args[1:])

        return module, hook

    def _inputs(
        self, ran: _Pass, group: Group, stream: Tensor, cut: Tensor | None, other: Sent | None, keep: bool
    ) -> Tensor | None:
        """The streams (batch, pos, receiver, d) of a group: what is there, plus what `other` has more along the cut."""
        receivers = self.groups[group]
        own = None if cut is None else cut[:, receivers]
        if not keep and (own is None or not bool(own.any())):
            return None
        streams = stream[:, :, None].expand(-1, -1, receivers.stop - receivers.start, -1)
        if own is not None:
            assert other is not None
            streams = self._replaced(ran, streams, own, other)
        if keep:
            # A leaf of the graph, or a node of it that is kept: the slope is asked for here.
            streams = streams.clone() if streams.requires_grad else streams.detach().clone().requires_grad_()
            ran.received[group] = streams
        return streams

    def _replaced(self, ran: _Pass, streams: Tensor, cut: Tensor, other: Sent) -> Tensor:
        """Streams (batch, pos, receiver, d), and along the edges of `cut` (sender, receiver) what `other` has more."""
        # Only differences are added: along edges that are not cut nothing is computed again, and nothing rounded. Later
        # senders, whose edges do not exist, have no cut. What heads write more is worked out once for all receivers.
        assert ran.embed is not None
        streams = streams + (other.embed - ran.embed)[:, :, None] * cut[0, :, None]
        at = 1
        for layer in range(self.anatomy.layers):
            heads = cut[at : at + self.anatomy.heads]
            if bool(heads.any()):
                if layer not in ran.more:
                    ran.more[layer] = self._heads(layer, other.z[layer] - ran.z[layer]).permute(2, 0, 1, 3).contiguous()
                more = torch.tensordot(heads.T, ran.more[layer], 1).permute(1, 2, 0, 3)
                end = self._end(layer)
                if end is not None:
                    whole = self._attention(layer, ran.z[layer])[:, :, None]
                    more = end(whole + more) - end(whole)
                streams += more
            at += self.anatomy.heads
            if self.has_mlp:
                if bool(cut[at].any()):
                    streams += (other.mlp[layer] - ran.mlp[layer])[:, :, None] * cut[at, :, None]
                at += 1
        return streams

    def _heads(self, layer: int, z: Tensor) -> Tensor:
        """(batch, pos, head, d)."""
        return torch.einsum("bphe,hed->bphd", z, self.anatomy.W_O(layer))

    def _attention(self, layer: int, z: Tensor) -> Tensor:
        """What all heads write together (batch, pos, d), with the bias, before a norm at their end."""
        return torch.einsum("bphe,hed->bpd", z, self.anatomy.W_O(layer)) + self.anatomy.bias(layer, "out")

    def _end(self, layer: int) -> nn.Module | None:
        return self.anatomy.optional(layer, "attention_end")


def _note(kept: dict[int, Tensor], layer: int) -> Callable[[Tensor], Tensor]:
    def write(value: Tensor) -> Tensor:
        kept[layer] = value.clone()  # some models (Falcon) add to it in place
        return value

    return write
