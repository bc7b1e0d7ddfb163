"""What patching measures at the last place: the logit difference, its slope at the sites, and the runs that patch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.realism import Gauge
from devmon.anatomy.sites import LayerSite, Reads, Site, Write
from devmon.data.probe import minibatches
from devmon.data.prompt_pairs import PromptPairs
from devmon.errors import InstrumentError

Index = tuple[Any, ...]  # of a site's tensor (batch, pos, …)


class SiteKind(NamedTuple):
    """Sites of one kind: where they are in the model, the dimensions that tell them apart, and what they are."""

    site: str
    dims: tuple[str, ...]
    what: str

    def entries(self, at: tuple[int, ...]) -> Index:
        """The entries of an activation of a layer, (batch, pos, …), that belong to the site."""
        if "pos" in self.dims:
            return slice(None), at[1]
        return (slice(None), slice(None), at[1]) if "head" in self.dims else (...,)


SITE_KINDS = {
    "resid": SiteKind("resid_pre", ("layer", "pos"), "the stream before the layer, at the place"),
    "z": SiteKind("z", ("layer", "head"), "the head, at all places"),
    "mlp": SiteKind("mlp_out", ("layer",), "the MLP, at all places"),
}


def logit_difference(logits: Tensor, answer: Tensor, foil: Tensor, who: str = "logit_difference") -> Tensor:
    """Logit of `answer` minus logit of `foil` (batch,) at the last place of (batch, pos, vocab), in float64."""
    if max(int(answer.max()), int(foil.max())) >= logits.shape[-1]:
        raise InstrumentError(
            f"{who}: answers and foils go up to {max(int(answer.max()), int(foil.max()))}, the model has "
            f"{logits.shape[-1]} logits: give tokens of its vocabulary"
        )
    last = logits[:, -1].double()
    pair = torch.stack([answer, foil], 1).to(last.device)
    return last.gather(1, pair).diff(dim=1)[:, 0].neg()


def patched(value: Tensor, source: Tensor, index: Index) -> Tensor:
    """A copy of `value` that holds `source` at `index`."""
    new = value.clone()
    new[index] = source[index].to(value)
    return new


def run_patched(
    anatomy: Anatomy,
    tokens: Tensor,
    patches: Sequence[tuple[Site, Index, Tensor]],
    read: Iterable[Site] = (),
    last: bool = False,
) -> tuple[Tensor, Reads]:
    """One forward pass in which each site of `patches` holds its tensor at its index; the logits, with `last` perhaps
    those of the last place alone, and what was read."""
    write: dict[Site, Write] = {}
    for site, index, source in patches:
        write[site] = _writes(source, index)
    return anatomy.run(tokens, read, write, last=last)


class Starts:
    """Passes that start at a layer, with the stream that enters it: no layer below is run.

    `works` says whether they give what whole passes give, as tried on the first of `tokens` (batch, pos) after a
    pass of another: they do not where a layer hands on more than its stream, or keeps what later layers read. The layer
    may be that after the last: then only the final norm and the unembedding run.
    """

    def __init__(self, anatomy: Anatomy, tokens: Tensor) -> None:
        self.anatomy, self.works = anatomy, False
        self.tupled: dict[nn.Module, bool] = {}
        if anatomy.layout.batch_first and anatomy.layers > 1:
            with suppress(Exception), torch.no_grad():
                self.works = self._try(tokens)

    def at(self, layer: int, state: Tensor) -> AbstractContextManager[None]:
        """Passes inside start at `layer` with `state` (batch, pos, d); where that does not work they are whole."""
        return self._at(layer, state) if self.works and layer else nullcontext()

    @contextmanager
    def _at(self, layer: int, state: Tensor) -> Iterator[None]:
        below = [block for block in self.anatomy.blocks[:layer] if block in self.tupled]
        before = [vars(block).get("forward") for block in below]
        try:
            for block in below:
                given = (state,) if self.tupled[block] else state
                vars(block)["forward"] = lambda *args, given=given, **kwargs: given
            yield
        finally:
            for block, forward in zip(below, before, strict=True):
                vars(block).pop("forward") if forward is None else vars(block).update(forward=forward)

    def _try(self, tokens: Tensor) -> bool:
        end = ("resid_post", self.anatomy.layers - 1)

        # What each block returns: its stream, or a tuple that begins with it and holds no other tensor.
        def look(module: nn.Module, args: Any, output: Any) -> None:
            rest = output[1:] if isinstance(output, tuple) else ()
            if not any(isinstance(each, Tensor) for each in rest):
                self.tupled[module] = isinstance(output, tuple)

        handles = [block.register_forward_hook(look) for block in self.anatomy.blocks]
        try:
            whole, reads = self.anatomy.run(tokens[:1], ["resid_pre", end], last=True)
        finally:
            for handle in handles:
                handle.remove()
        if len(self.tupled) < self.anatomy.layers:
            return False
        # What layers keep is now that of others: of all, of all below the last, and then still of the first.
        self.anatomy.run(tokens[1:2], last=True)
        states = {self.anatomy.layers: reads[end]}
        states |= {layer: reads["resid_pre", layer] for layer in (self.anatomy.layers - 1, 1)}
        same = []
        for layer, state in states.items():
            with self._at(layer, state):
                same.append(torch.equal(self.anatomy.run(tokens[:1], last=True)[0], whole))
        return all(same)


class Runs(NamedTuple):
    """Both prompts of every pair as they are: what the sites hold, the logit difference (prompt,), its slopes at the
    sites where what is "restored" starts (corrupt), and where what is "broken" does (clean), and how real states are.
    """

    clean: Reads
    corrupt: Reads
    clean_end: np.ndarray
    corrupt_end: np.ndarray
    slopes: dict[str, Mapping[LayerSite, Tensor]]
    gauge: Gauge

    @property
    def whole(self) -> np.ndarray:
        return self.clean_end - self.corrupt_end

    @classmethod
    def of(cls, anatomy: Anatomy, pairs: PromptPairs, sites: Sequence[str], batch_size: int) -> Runs:
        """Of all pairs, with the slopes at `sites`; what is unembedded is the last place alone."""
        read, batches = (
            [*sites, "q", "k", "v", "pattern", "resid_post"],
            list(minibatches(len(pairs.clean), batch_size)),
        )
        ends, reads, steep = list[np.ndarray](), list[Reads](), list[Mapping[LayerSite, Tensor]]()
        for tokens in (pairs.clean, pairs.corrupt):
            ran = [anatomy.run(tokens[rows], read, last=True) for rows in batches]
            differences = [
                logit_difference(output, pairs.answer[rows], pairs.foil[rows], anatomy.who).cpu().numpy()
                for rows, (output, _) in zip(batches, ran, strict=True)
            ]
            ends.append(np.concatenate(differences))
            reads.append(Reads(_joined([part for _, part in ran])))
            at = [slopes(anatomy, tokens[rows], pairs.answer[rows], pairs.foil[rows], sites) for rows in batches]
            steep.append(_joined(at))
        # denoising starts from the corrupt prompt, noising from the clean one
        starts = {"restored": steep[1], "broken": steep[0]}
        gauge = Gauge.fit(reads[0].stack("resid_post")[:, :, -1])
        return cls(reads[0], reads[1], ends[0], ends[1], starts, gauge)


def _joined(parts: Sequence[Mapping[LayerSite, Tensor]]) -> dict[LayerSite, Tensor]:
    return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}


def slopes(
    anatomy: Anatomy, tokens: Tensor, answer: Tensor, foil: Tensor, sites: Sequence[Site]
) -> Mapping[tuple[str, int], Tensor]:
    """∂ logit difference / ∂ site, (batch, pos, …) for each site, in one forward and one backward pass.

    Sites that are read lie in each other's paths: the slope is the total one, through everything after the site.
    """
    # The batch is summed: no sequence reads another, so each slope is that of its own difference.
    with torch.enable_grad():
        output, reads = anatomy.run(tokens, sites, grad=True, last=True)
        total = logit_difference(output, answer, foil, anatomy.who).sum()
        gradients = torch.autograd.grad(total, list(reads.values()), allow_unused=True)
    return {
        site: torch.zeros_like(value) if slope is None else slope.detach()
        for (site, value), slope in zip(reads.items(), gradients, strict=True)
    }


def attributed(clean: Reads, corrupt: Reads, kind: SiteKind, slope: Mapping[LayerSite, Tensor]) -> np.ndarray:
    """Σ (clean - corrupt) · slope, (prompt, *site)."""
    layers = []
    for site in sorted(site for site in clean if site[0] == kind.site):
        product = ((clean[site] - corrupt[site]).double() * slope[site].double()).sum(-1)
        layers.append(product if "pos" in kind.dims else product.sum(1))  # (batch, pos), (batch, head) or (batch,)
    return torch.stack(layers, 1).cpu().numpy()


def attributed_reads(
    anatomy: Anatomy,
    tokens: Tensor,
    own: Reads,
    source: Reads,
    slope: Mapping[LayerSite, Tensor],
    batches: Iterable[slice],
) -> dict[str, np.ndarray]:
    """Σ slope · change of `z` where a head's queries ("q"), keys ("k") or values ("v") alone are those of `source`,
    (prompt, layer, head) each: through the softmax itself, from `z` on to first order (the query-key correction of
    AtP*, Kramár et al. 2403.00745, section 3.1.1). `own` is what `tokens` hold; both have q, k, v, z and pattern.
    """
    found: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": []}
    for rows in batches:
        changes: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for part in "qk":
            # Where `z` stays what it is nothing further up changes: one pass serves all layers.
            write: dict[Site, Write] = {}
            for layer in range(anatomy.layers):
                write[part, layer], write["z", layer] = source[part, layer][rows], own["z", layer][rows]
            _, reads = anatomy.run(tokens[rows], ["pattern"], write, last=True)
            for layer in range(anatomy.layers):
                moved = reads["pattern", layer] - own["pattern", layer][rows]
                changes[part].append(_attend(moved, own["v", layer][rows]))
        for layer in range(anatomy.layers):
            difference = source["v", layer][rows] - own["v", layer][rows]
            changes["v"].append(_attend(own["pattern", layer][rows], difference))
        for part, z in changes.items():
            products = [(change * slope["z", i][rows].double()).sum((1, 3)) for i, change in enumerate(z)]
            found[part].append(torch.stack(products, 1).cpu().numpy())
    return {part: np.concatenate(values) for part, values in found.items()}


def _attend(pattern: Tensor, v: Tensor) -> Tensor:
    """(batch, pos, head, d_head) of a pattern (batch, head, q, k) and v (batch, pos, kv_head, d_head), in float64."""
    v = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
    return torch.einsum("bhqk,bkhe->bqhe", pattern.double(), v.double())


def _writes(source: Tensor, index: Index) -> Write:
    return lambda value: patched(value, source, index)


def largest(guesses: dict[str, np.ndarray], count: int) -> list[tuple[int, ...]]:
    """The sites with the largest attribution, of either sort."""
    size = np.maximum(*(np.abs(values.mean(0)) for values in guesses.values()))
    order = np.argsort(-size.ravel(), kind="stable")[:count]
    return [tuple(int(i) for i in np.unravel_index(at, size.shape)) for at in order]


def check_heads(anatomy: Anatomy, heads: Iterable[tuple[int, int]]) -> None:
    """InstrumentError unless all pairs (layer, head) are of this model."""
    wrong = [pair for pair in heads if not (0 <= pair[0] < anatomy.layers and 0 <= pair[1] < anatomy.heads)]
    if wrong:
        raise InstrumentError(
            f"{anatomy.who}: heads={tuple(heads)} are not all in the {anatomy.layers} layers of {anatomy.heads} heads "
            f"of {type(anatomy.model).__name__}: give pairs (layer, head) of this model"
        )
