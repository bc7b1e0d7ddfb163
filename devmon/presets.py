"""The usual watches for a kind of model, each tier with all of the one before it.

    monitor = Monitor("runs/my-run.zarr", presets.standard(tokens, vocab_size=5000, last=20_000))

A preset is a plain list of `Watch`: add to it, leave out of it, and see what it costs with `devmon cost`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Required, TypedDict, Unpack

import torch
from torch import Tensor, nn

from devmon.data import broken_repeats, symbol_tasks
from devmon.data.words import Vocabulary, case_map, unpadded, vocabulary, word_tasks
from devmon.errors import DataError
from devmon.features.objectives import BatchTopK
from devmon.features.training import Training
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
    ReferenceDrift,
    RepeatGain,
    ResidualAttribution,
    Sketch,
    SparseAutoencoder,
    TunedLens,
    WeightStatistics,
)
from devmon.watch import Watch, log_spaced

COUNT = 60  # observations of a run, in the tiers above `economy`
# Prompts of patching and circuits, and the tokens of their first copy: while induction emerges, 96 prompts of 8 show
# its effect at 4.2 standard errors, as 64 of 20 do with half as many tokens more;
# 32 of 8 show it at 2.4, below the 3 of a share.
PAIRS, PERIOD = 96, 8
# Of a dictionary at each of a tenth of the steps: 4 times the width, 8 latents a place, half a million places.
DICTIONARY, DICTIONARY_BATCH = Training(BatchTopK(8), width=4, steps=1000), 512
# The lens is applied to half of the probe batch, 16 sequences at least: each depth is a product with the vocabulary. On
# 16 × 64 tokens of text a model of 135 million weights has its divergences to 3%, its prediction depth to .23 layers.
LENSED = 16
# Frequent n-grams of an order, and as many held-out ones, each read alone: there, a ratio of 1.1 to .06.
COMMON = 200
PLACES = 32  # at which positions are embedded in HeadSpectra, its default
SHOTS = (1, 2, 4, 8)  # examples of FewShot, its default
EXACT = 16  # sites of a kind that patching measures at a step: all heads of a small model; attribution has all sites
# Of circuits: the shares that carry the area, and one draw of random edges, with an error of its own.
CIRCUIT: dict[str, Any] = {"shares": (0.005, 0.02, 0.1, 0.3, 1.0), "steps": 3, "random": 1}
GROUPS = 8  # of random heads beside those ablated: all there are of a single head among eight


class Shared(TypedDict, total=False):
    """The keywords of `economy`, which every tier takes; `count` is 60 for the tiers above it."""

    last: Required[int]
    vocab_size: int | None
    tokenizer: Any
    count: int
    bos: int | None
    exclude: Sequence[int]
    llc: LLC | None


def economy(
    tokens: Tensor,
    *,
    last: int,
    vocab_size: int | None = None,
    tokenizer: Any = None,
    count: int = 100,
    bos: int | None = None,
    exclude: Sequence[int] = (),
    llc: LLC | None = None,
) -> list[Watch]:
    """A language model by its behaviour and its attention: a handful of forward passes an observation.

    `tokens` (batch, pos) int64 are held-out text, the probe batch; `last` is the last step of training; at about
    `count` steps, spaced evenly in log(step), and at step 0 all is measured. A `tokenizer` of transformers tells which
    tokens are real, which one starts a text, and which are special or padding: they stand in no random text, and
    padding is cut off the probe batch. Without one, `vocab_size` is the model's, all tokens below it but `bos`, which
    then stands first, and `exclude` are taken for real, and no place of the probe batch for padding. `llc` is the LLC,
    measured at half as many steps: `LLC(tokens)` chooses its settings as training goes, `devmon calibrate` gives
    careful ones; without it there is none, for what it costs. Raises DataError without vocab_size and tokenizer, and
    for rows that are mostly padding. Watches: loss, repeats, induction, previous_token, weights, llc.
    """
    known = _vocabulary(vocab_size, tokenizer, bos, exclude)
    tokens = unpadded(tokens, known.pad)
    probe = _probe(tokens, known)
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

    About 11 forward passes of the probe batch an observation, the LLC apart. `corpus` (batch, pos)
    int64 is text, not of the probe batch, whose n-gram statistics the model is compared with (left out without it).
    More watches: composition, spectra, copying, attribution, lens, sketch, dimension, ngrams.
    """
    shared.setdefault("count", COUNT)
    watches = economy(tokens, **shared)
    known = _known(shared)
    tokens = unpadded(tokens, known.pad)
    probe = _probe(tokens, known)
    # the probe of copying holds no token twice, and `bos` besides; no probe is longer than the text
    different = probe | {"length": min(probe["length"] - (known.bos is not None), known.count)}
    lensed = max(LENSED, len(tokens) // 2)
    steps = log_spaced(shared["count"], shared["last"])
    watches += [
        Watch("composition", Composition(), steps),
        Watch("spectra", HeadSpectra(length=min(PLACES, probe["length"])), steps),
        Watch("copying", CopyingHeads(**different), steps),
        Watch("attribution", ResidualAttribution.repeated(**probe, ablation_prompts=0), steps),
        Watch("lens", LogitLens(tokens, sequences=lensed if lensed < len(tokens) else None), steps),
        Watch("sketch", Sketch(tokens, outputs=True), steps),
        Watch("dimension", IntrinsicDimension(tokens), steps),
    ]
    ngrams = [] if corpus is None else [Watch("ngrams", NgramStages(corpus, tokens, known.size, common=COMMON), steps)]
    return watches + ngrams


def full(tokens: Tensor, *, corpus: Tensor | None = None, **shared: Unpack[Shared]) -> list[Watch]:
    """`standard`, and what causes what: ablation, patching, circuits, function vectors, layer roles, tuned lens.

    About 80 forward passes of the probe batch more at a fifth of the steps, and 45 (circuit, tuned lens) at an eighth,
    the fewest in which an event can be found: over a run some three times `standard`, the LLC apart (`devmon cost`
    tells it for a model). With an `llc` the curvature stands beside it at an eighth of the steps, some 200 passes each.

    Tasks and token maps have to be ones that text teaches: with a `tokenizer` they are inflections of its common words.
    Without one, or with few words, tasks are symbol maps that only the prompt shows, which induction answers and no
    function vector, and there is no fuzzy_induction. More watches: ablation, patching, circuit, function_vectors,
    few_shot, layers, tuned_lens, fuzzy_induction; curvature with an `llc`.
    """
    shared.setdefault("count", COUNT)
    watches = standard(tokens, corpus=corpus, **shared)
    known, tokenizer = _known(shared), shared.get("tokenizer")
    tokens = unpadded(tokens, known.pad)
    probe = _probe(tokens, known)
    drawn = {name: probe[name] for name in ("vocab_size", "bos", "exclude")}
    seldom, rarely = (log_spaced(max(2, shared["count"] // each), shared["last"]) for each in (5, 8))

    # pairs, a query and its answer after `bos`: as many examples as the text is long enough for
    shots = tuple(k for k in SHOTS if 2 * k + 2 + (known.bos is not None) <= probe["length"])
    # induction shows in patching long before it is strong: in many prompts, as long as the text allows (a copy and a
    # half after the first token)
    pairs = broken_repeats(**drawn, prompts=PAIRS, period=min(PERIOD, (probe["length"] - 2) * 2 // 3))
    watches += [
        Watch("ablation", HeadAblation(**probe, groups=GROUPS), seldom),
        Watch("patching", ActivationPatching(pairs, exact=EXACT), seldom),
        Watch("circuit", Circuit(pairs, **CIRCUIT), rarely),
        Watch("few_shot", FewShot(**drawn, shots=shots), seldom),
        Watch("layers", LayerRoles(tokens[: max(len(tokens) // 2, 8)]), seldom),
        Watch("tuned_lens", TunedLens(tokens, steps=8), rarely),
    ]
    if shared.get("llc") is not None:
        watches.append(Watch("curvature", Curvature(tokens, top=3, probes=4, limit=16, tolerance=1e-2), rarely))
    mapped = {name: probe[name] for name in ("length", "bos", "exclude")}
    try:
        if tokenizer is None:
            raise DataError("no words are known")
        tasks, fuzzy = word_tasks(tokenizer, bos=known.bos), FuzzyInduction(case_map(tokenizer), **mapped)
    except DataError:
        tasks = symbol_tasks(**drawn, shots=3, symbols=5, query="shown", plain=True)
        return [*watches, Watch("function_vectors", FunctionVectorHeads(tasks, exact=EXACT), seldom)]
    watches.append(Watch("function_vectors", FunctionVectorHeads(tasks, exact=EXACT), seldom))
    return [*watches, Watch("fuzzy_induction", fuzzy, seldom)]


def features(
    tokens: Tensor,
    *,
    corpus: Tensor | None = None,
    sites: Sequence[tuple[str, int]] = (("resid_post", 0),),
    **shared: Unpack[Shared],
) -> list[Watch]:
    """`full`, and a sparse autoencoder of each site, trained anew at a tenth of the steps.

    It learns from `corpus` (sequence, pos), or from `tokens` without it, and is scored on `tokens`; the fewer tokens,
    the more it learns by heart (`fvu_train` beside `fvu`). `sites` are names and layers, such as ("mlp_out", 3). A
    dictionary is half a million places of training, some minutes for a model of a hundred million weights on a CPU.
    More watches: features-resid_post-0, one a site.
    """
    shared.setdefault("count", COUNT)
    watches = full(tokens, corpus=corpus, **shared)
    pad = _known(shared).pad
    held_out = unpadded(tokens, pad)
    learnt = held_out if corpus is None else unpadded(corpus, pad)
    rarely = log_spaced(max(2, shared["count"] // 10), shared["last"])
    for name, layer in sites:
        dictionary = SparseAutoencoder(learnt, held_out, (name, layer), DICTIONARY, batch=DICTIONARY_BATCH)
        watches.append(Watch(f"features-{name}-{layer}", dictionary, rarely))
    return watches


def _known(shared: Shared) -> Vocabulary:
    return _vocabulary(shared.get("vocab_size"), shared.get("tokenizer"), shared.get("bos"), shared.get("exclude", ()))


def _vocabulary(vocab_size: int | None, tokenizer: Any, bos: int | None, exclude: Sequence[int]) -> Vocabulary:
    """What is given, and for the rest what the tokenizer says."""
    if tokenizer is None:
        if vocab_size is None:
            raise DataError("expected vocab_size or a tokenizer, got neither: random probes are drawn from them")
        return Vocabulary(vocab_size, bos, None, tuple(exclude))
    own = vocabulary(tokenizer)
    size = own.size if vocab_size is None else min(own.size, vocab_size)
    first = own.bos if bos is None else bos
    left_out = {*own.exclude, *exclude, *(() if own.bos is None else (own.bos,))} - {first}
    return Vocabulary(size, first, own.pad, tuple(sorted(token for token in left_out if token < size)))


def _probe(tokens: Tensor, known: Vocabulary) -> dict[str, Any]:
    """The fields of instruments that draw their own tokens: sequences as long as the text, 64 at most."""
    length = min(64, tokens.shape[1])
    return {"vocab_size": known.size, "length": length, "bos": known.bos, "exclude": known.exclude}


def fine_tuning(task: Tensor, general: Tensor, *, reference: nn.Module, **shared: Unpack[Shared]) -> list[Watch]:
    """A pretrained language model on its way from `reference`, the model before, which is copied here.

    `task` and `general` (batch, pos) int64 are held-out text of what it is trained on and of what it could do before:
    the loss on the one says what is learned when, that on the other what is forgotten. The distance from the reference
    in outputs, losses of each token, and layers is on both; heads are followed as in `economy`. Other keywords are
    those of `economy`, whose `tokens` are `general` here; `count` is 60. Watches: task, general, task_drift,
    general_drift, repeats, induction, previous_token, llc.
    """
    shared.setdefault("count", COUNT)
    known = _known(shared)
    task, general = unpadded(task, known.pad), unpadded(general, known.pad)
    steps = log_spaced(shared["count"], shared["last"])
    behaviour = {watch.name: watch for watch in economy(general, **shared)}
    return [
        Watch("task", ProbeLoss(task), steps),
        Watch("general", ProbeLoss(general), steps),
        Watch("task_drift", ReferenceDrift(reference, task), steps),
        Watch("general_drift", ReferenceDrift(reference, general), steps),
        *(behaviour[name] for name in ("repeats", "induction", "previous_token", "llc") if name in behaviour),
    ]


def vision(
    images: Tensor, labels: Tensor, *, last: int, count: int = COUNT, blocks: str | None = None, llc: LLC | None = None
) -> list[Watch]:
    """A vision model by its weights and its layers: `images` (batch, …) of floats, `labels` (batch,) of integers.

    `blocks` is the path of the layers where they are not found, or paths, "layer1, layer2"; stages may differ in width.
    Watches: weights, probe, sketch, dimension, llc.
    """
    if not torch.as_tensor(images).is_floating_point() or len(images) != len(labels):
        raise DataError(
            f"vision needs images of floats and as many labels, got {images.dtype}, {len(images)} and {len(labels)}"
        )
    steps = log_spaced(count, last)
    watches = [
        Watch("weights", WeightStatistics(), steps),
        Watch("probe", LinearProbe(images, labels, blocks=blocks), steps),
        Watch("sketch", Sketch(images, blocks=blocks), steps),
        Watch("dimension", IntrinsicDimension(images, blocks=blocks), steps),
    ]
    return watches if llc is None else [*watches, Watch("llc", llc, steps)]


def toy(data: Any, loss: Callable[..., Tensor], *, last: int, count: int = 100, llc: LLC | None = None) -> list[Watch]:
    """A small model of any kind by the geometry of its loss: `loss(model, batch) -> (batch,)` on `data`.

    Watches: llc (with the given settings, else chosen as training goes: `devmon.instruments.LLC`), curvature, weights.
    """
    steps = log_spaced(count, last)
    return [
        Watch("llc", LLC(data, loss) if llc is None else llc, steps),
        Watch("curvature", Curvature(data, loss), log_spaced(max(2, count // 2), last)),
        Watch("weights", WeightStatistics(), steps),
    ]
