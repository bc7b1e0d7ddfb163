"""The usual watches for a kind of model, each tier with all of the one before it.

    monitor = Monitor("runs/my-run.zarr", presets.standard(tokens, vocab_size=5000, last=20_000))

A preset is a plain list of `Watch`: add to it, leave out of it, and see what it costs with `devmon cost`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Required, TypedDict, Unpack

import torch
from torch import Tensor

from devmon.data import broken_repeats, symbol_tasks
from devmon.errors import DataError
from devmon.instruments import (
    LLC,
    ActivationPatching,
    Circuit,
    Composition,
    CopyingHeads,
    Curvature,
    FewShot,
    FunctionVectorHeads,
    FuzzyInduction,
    HeadAblation,
    HeadSpectra,
    InductionHeads,
    IntrinsicDimension,
    LayerRoles,
    LinearProbe,
    LogitLens,
    NgramStages,
    PreviousTokenHeads,
    ProbeLoss,
    RepeatGain,
    ResidualAttribution,
    Sketch,
    TunedLens,
    WeightStatistics,
)
from devmon.watch import Watch, log_spaced

COUNT = 60  # observations of a run, in the tiers above `economy`


class Shared(TypedDict, total=False):
    """The keywords of `economy`, which every tier takes; `count` is 60 for the tiers above it."""

    vocab_size: Required[int]
    last: Required[int]
    count: int
    bos: int | None
    exclude: Sequence[int]
    llc: LLC | None


def economy(
    tokens: Tensor,
    *,
    vocab_size: int,
    last: int,
    count: int = 100,
    bos: int | None = None,
    exclude: Sequence[int] = (),
    llc: LLC | None = None,
) -> list[Watch]:
    """A language model by its behaviour and its attention: a handful of forward passes an observation.

    `tokens` (batch, pos) int64 are held-out text, the probe batch; `vocab_size` and `last`, the last step of training,
    are the model's and the run's; at about `count` steps, spaced evenly in log(step), and at step 0 all is measured.
    Random tokens of the induction probes are drawn from 0 .. vocab_size - 1 without `bos`, which then stands first, and
    `exclude` (padding, unused tokens). `llc` is the LLC with its calibrated settings (`devmon calibrate`), measured at
    half as many steps; without it there is none, because no setting suits every model.
    Watches: loss, repeats, induction, previous_token, weights, llc.
    """
    probe = _probe(tokens, vocab_size, bos, exclude)
    steps = log_spaced(count, last)
    watches = [
        Watch("loss", ProbeLoss(tokens), steps),
        Watch("repeats", RepeatGain(**probe), steps),
        Watch("induction", InductionHeads(**probe), steps),
        Watch("previous_token", PreviousTokenHeads(tokens=tokens), steps),
        Watch("weights", WeightStatistics(), steps),
    ]
    return watches if llc is None else [*watches, Watch("llc", llc, log_spaced(max(2, count // 2), last))]


def standard(tokens: Tensor, *, corpus: Tensor | None = None, **shared: Unpack[Shared]) -> list[Watch]:
    """`economy`, and what the heads and layers are: composition, spectra, copying, attribution, lens, sketches.

    At most about 12 forward and backward passes of the probe batch an observation, the LLC apart. `corpus` (batch, pos)
    int64 is text, not of the probe batch, whose n-gram statistics the model is compared with (left out without it).
    More watches: composition, spectra, copying, attribution, lens, sketch, dimension, ngrams.
    """
    shared.setdefault("count", COUNT)
    watches = economy(tokens, **shared)
    probe = _probe(tokens, shared["vocab_size"], shared.get("bos"), shared.get("exclude", ()))
    steps = log_spaced(shared["count"], shared["last"])
    watches += [
        Watch("composition", Composition(), steps),
        Watch("spectra", HeadSpectra(), steps),
        Watch("copying", CopyingHeads(**probe), steps),
        Watch("attribution", ResidualAttribution.repeated(**probe, ablation_prompts=0), steps),
        Watch("lens", LogitLens(tokens), steps),
        Watch("sketch", Sketch(tokens, outputs=True), steps),
        Watch("dimension", IntrinsicDimension(tokens), steps),
    ]
    ngrams = [] if corpus is None else [Watch("ngrams", NgramStages(corpus, tokens, shared["vocab_size"]), steps)]
    return watches + ngrams


def full(tokens: Tensor, *, corpus: Tensor | None = None, **shared: Unpack[Shared]) -> list[Watch]:
    """`standard`, and what causes what: ablation, patching, circuits, function vectors, layer roles, tuned lens.

    These take hundreds of passes, so they are made at a third of the steps. More watches: ablation, patching, circuit,
    function_vectors, few_shot, layers, tuned_lens, fuzzy_induction, curvature.
    """
    shared.setdefault("count", COUNT)
    watches = standard(tokens, corpus=corpus, **shared)
    probe = _probe(tokens, shared["vocab_size"], shared.get("bos"), shared.get("exclude", ()))
    drawn = {name: probe[name] for name in ("vocab_size", "bos", "exclude")}
    seldom = log_spaced(max(2, shared["count"] // 3), shared["last"])

    # probes that have to fit the model: a period that goes twice into the length, a map of every token to another
    pairs = broken_repeats(**drawn, period=min(8, (probe["length"] - 2) // 2))
    tasks = symbol_tasks(**drawn, shots=3, symbols=5, query="shown")
    order = torch.randperm(shared["vocab_size"], generator=torch.Generator().manual_seed(0))
    mapped = {name: probe[name] for name in ("length", "bos", "exclude")}
    return [
        *watches,
        Watch("ablation", HeadAblation(**probe), seldom),
        Watch("patching", ActivationPatching(pairs), seldom),
        Watch("circuit", Circuit(pairs), seldom),
        Watch("function_vectors", FunctionVectorHeads(tasks), seldom),
        Watch("few_shot", FewShot(**drawn), seldom),
        Watch("layers", LayerRoles(tokens), seldom),
        Watch("tuned_lens", TunedLens(tokens), seldom),
        Watch("fuzzy_induction", FuzzyInduction(order, **mapped), seldom),
        Watch("curvature", Curvature(tokens, top=3, probes=8, limit=16), seldom),
    ]


def _probe(tokens: Tensor, vocab_size: int, bos: int | None, exclude: Sequence[int]) -> dict[str, Any]:
    """The fields of instruments that draw their own tokens: sequences as long as the text, 64 at most."""
    length = min(64, tokens.shape[1])
    return {"vocab_size": vocab_size, "length": length, "bos": bos, "exclude": tuple(exclude)}


def vision(
    images: Tensor, labels: Tensor, *, last: int, count: int = COUNT, blocks: str | None = None, llc: LLC | None = None
) -> list[Watch]:
    """A vision model by its weights and its layers: `images` (batch, …) of floats, `labels` (batch,) of integers.

    `blocks` is the path of the layers where they are not found (a convolutional network, whose layers differ in width).
    Watches: weights, probe, llc, and for layers of one width sketch and dimension.
    """
    if not torch.as_tensor(images).is_floating_point() or len(images) != len(labels):
        raise DataError(
            f"vision needs images of floats and as many labels, got {images.dtype}, {len(images)} and {len(labels)}"
        )
    steps = log_spaced(count, last)
    watches = [
        Watch("weights", WeightStatistics(), steps),
        Watch("probe", LinearProbe(images, labels, blocks=blocks), steps),
    ]
    if blocks is None:
        watches += [Watch("sketch", Sketch(images), steps), Watch("dimension", IntrinsicDimension(images), steps)]
    return watches if llc is None else [*watches, Watch("llc", llc, steps)]


def toy(data: Any, loss: Callable[..., Tensor], *, last: int, count: int = 100, llc: LLC | None = None) -> list[Watch]:
    """A small model of any kind by the geometry of its loss: `loss(model, batch) -> (batch,)` on `data`.

    Watches: llc (with the given settings, else nbeta n / log n and gamma 1: calibrate them), curvature, weights.
    """
    steps = log_spaced(count, last)
    return [
        Watch("llc", LLC(data, loss, gamma=1.0) if llc is None else llc, steps),
        Watch("curvature", Curvature(data, loss), log_spaced(max(2, count // 2), last)),
        Watch("weights", WeightStatistics(), steps),
    ]
