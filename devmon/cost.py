"""What an observation costs, before it is made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from devmon.anatomy.parts import Parts
from devmon.anatomy.passes.kept import MOST_KEPT
from devmon.anatomy.passes.reads import Read
from devmon.anatomy.vocabulary import CHUNK, LOGITS
from devmon.errors import DevmonError, InstrumentError
from devmon.watch import Watch, unique_names

# What is no product counts as the multiplications that take as long, on a core whose products run at full speed (some
# 3e10 a second): numbers move by a half from machine to machine, as memory is faster or slower beside arithmetic.

# A number that is read and written once, as in a sum or a copy: 2 ns.
SWEEP = 60
# A number of the vocabulary beside the product that makes it: exponential, logarithm, sums, the largest. Two sweeps.
SOFTMAX = 110
# A number of an attention pattern where it is read: its softmax again, copies, sums. Five sweeps.
PATTERN = 300
# The tokens of a pass that cost as much as reading all weights once, which the shortest pass does.
READING = 12
# What an instrument does whatever it measures: it finds the parts, hooks them, labels its numbers. 20 ms.
OVERHEAD = 600_000_000
# A layout is tried (`devmon.anatomy.fit`) in three passes of 8 tokens, and all maps once more, watched and compared
# layer by layer: as much as six passes.
LAYOUT_PASSES, LAYOUT_TOKENS = 6, 8
# A normal number that is drawn, in float64: 25 ns.
DRAWN = 800


def eigenvalues(n: int) -> int:
    """Multiplications that all eigenvalues of a symmetric matrix of size n are worth: its reduction, which waits for
    memory, and some hundred operations for each pair of rows. With the vectors 2.5 times, in float64."""
    return 2 * n**3 + 600 * n**2


def general_eigenvalues(n: int) -> int:
    """The same of a matrix that is not symmetric."""
    return 40 * n**3 + 1800 * n**2


def trials(positions: int = 0, passes: int = 0, layout: bool = True) -> int:
    """The tokens that the short passes are worth which come before what is measured: `passes` of one sequence (how
    large the logits are, where the blocks are, and two for whether a place sees later ones), and those of the layout.
    """
    return passes * (positions + READING) + layout * LAYOUT_PASSES * (LAYOUT_TOKENS + READING)


@dataclass(frozen=True)
class Shape:
    """The sizes of a language model by which instruments cost; those of GPT-2 small where nothing is known.

    `weights` are those that a token meets in a pass, the unembedding apart; `tied`: it is the table of embeddings.
    """

    layers: int = 12
    heads: int = 12
    d_model: int = 768
    vocab: int = 50257
    weights: int = 85_000_000
    tied: bool = True

    @classmethod
    def of(cls, model: nn.Module) -> Shape | None:
        """The shape of a model, None where its parts are not known."""
        try:
            parts = Parts(model)
            unembedding = parts.W_U.shape if parts.has_logits else (parts.d_model, 0)
            tables = len(parts.W_E) * parts.W_E.shape[1] if parts.layout.embed else 0
        except InstrumentError:
            return None
        own = {id(p): p.numel() for p in parts.model.parameters()}
        tied = parts.has_logits and getattr(parts.unembedding, "weight", None) is getattr(
            parts.optional(None, "embed"), "weight", ...
        )
        rest = sum(own.values()) - tables - (0 if tied else unembedding[0] * unembedding[1])
        return cls(parts.layers, parts.heads, parts.d_model, unembedding[1], max(rest, 1), tied)

    @property
    def readout(self) -> int:
        """Multiplications of the unembedding, for one place."""
        return self.d_model * self.vocab

    @property
    def softmax(self) -> int:
        """Multiplications that the log-probabilities of one place are worth."""
        return SOFTMAX * self.vocab

    def patterns(self, sequences: int, positions: int) -> int:
        """Multiplications that reading the attention patterns of all layers is worth."""
        return self.layers * sequences * positions**2 * (self.d_model + PATTERN * self.heads)

    @property
    def d_head(self) -> int:
        return max(self.d_model // self.heads, 1)


GPT2_SMALL = Shape()


@dataclass(frozen=True)
class Cost:
    """What one observation does; an instrument tells it with a method `cost() -> Cost`, which may take a `shape`.

    - `forwards`, `backwards`: sequences that pass, each of `positions` tokens (or patches). A backward pass costs about
      two forward passes.
    - `copies`: what it holds at most beside the model, in float32 copies of the parameters, None where that is unknown:
      the activations of the examples that pass at once (`micro_batch` or `batch_size`) come on top.
    - `unembedded`: the places of these passes that are unembedded; None for all.
    - `products`: places that are unembedded beside these passes, counted each time.
    - `softmaxes`: places whose log-probabilities are made, counted each time.
    - `operations`: multiplications with weights, or with what was read, beside all this.
    - `trials`: tokens of the short passes before (`trials`), which all instruments of a step share.
    - `held`: bytes of what it makes of its passes, or of weights: the passes themselves come on top (`memory`).
    """

    forwards: int = 0
    backwards: int = 0
    positions: int = 0
    copies: float | None = None
    unembedded: int | None = None
    products: int = 0
    softmaxes: int = 0
    operations: float = 0.0
    trials: int = 0
    held: int = 0

    @property
    def work(self) -> int:
        """Of the passes, in tokens passed forward."""
        return (self.forwards + 2 * self.backwards) * self.positions

    def tokens(self, shape: Shape | None = None) -> int:
        """All of it, in tokens that pass forward through a model of this shape (GPT-2 small where it is not known)."""
        shape = GPT2_SMALL if shape is None else shape
        here = self.work if self.unembedded is None else self.unembedded
        products = self.work * shape.weights + (here + self.products) * shape.readout
        products += self.trials * (shape.weights + shape.readout)
        beside = self.softmaxes * shape.softmax + self.operations + (OVERHEAD if self.trials else 0)
        return round((products + beside) / (shape.weights + shape.readout))

    def bytes(self, parameters: int) -> int | None:
        """The memory of `copies`, for a model of so many parameters."""
        return None if self.copies is None else int(4 * self.copies * parameters)


@dataclass(frozen=True)
class Estimate:
    """What a watch will cost up to the last step: `observations` times `cost` (None: the instrument gives none), on a
    model of this `shape`. `saved` of it, in tokens passed forward, are passes that an earlier watch makes as often.
    `memory` are the bytes beside the model at most, None where that is not known."""

    name: str
    instrument: str
    observations: int
    cost: Cost | None
    shape: Shape | None = None
    saved: int = 0
    memory: int | None = None

    @property
    def work(self) -> int | None:
        """In tokens passed forward, all observations together."""
        return None if self.cost is None else self.cost.tokens(self.shape) * self.observations


def estimates(watches: Iterable[Watch], last: int, model: nn.Module | None = None) -> list[Estimate]:
    """What each watch costs in a run of the steps 0 to `last`, on a model like this. Raises DevmonError for a `last`
    below 0."""
    if last < 0:
        raise DevmonError(f"the last step must be at least 0, got {last}")
    estimated, made = [], dict[object, tuple[int, int]]()
    shape = None if model is None else Shape.of(model)
    for watch in unique_names(watches):
        observations = sum(1 for step in range(last + 1) if step in watch.steps)
        name = getattr(type(watch.instrument), "__name__", "")
        passes = _passes(watch.instrument, GPT2_SMALL if shape is None else shape)
        saved = 0
        for data, tokens in passes.items():
            often, most = made.get(data, (0, 0))
            saved += observations * (min(tokens, most) if often >= observations else 0)
            made[data] = max(observations, often), max(tokens, most)
        cost, held = cost_of(watch.instrument, shape), memory([watch.instrument], shape or GPT2_SMALL, model)
        estimated.append(Estimate(watch.name, name, observations, cost, shape, saved, held))
    return estimated


def together(watches: Iterable[Watch], model: nn.Module | None = None) -> int | None:
    """`memory` of an observation with all of these watches."""
    shape = None if model is None else Shape.of(model)
    return memory([watch.instrument for watch in watches], shape or GPT2_SMALL, model)


def memory(instruments: Iterable[Any], shape: Shape, model: nn.Module | None = None) -> int | None:
    """Bytes that one observation takes at most beside the model, of these instruments together; those that say nothing
    of theirs are left out, None where all are.

    Of a pass: the keys and values that the model returns, what is read of it, and the widest activations or, later, the
    logits. Of `copies` of the parameters, where the `model` is given, without the activations of the examples; where
    several runs of chains begin at the weights, with what they share there (`devmon.sampling.center`).
    """
    instruments = list(instruments)
    copy = 0 if model is None else 4 * sum(p.numel() for p in model.parameters())
    several = sum(getattr(instrument, "runs", 0) for instrument in instruments) > 1
    shared = copy if several and 2 * copy <= MOST_KEPT else 0  # the variances; the gradient is among the copies
    groups: dict[object, list[Read]] = {}
    beside: dict[object, int] = {}  # of the instruments that read a group, what they make of it
    peaks = []
    for instrument in instruments:
        cost, reads = cost_of(instrument, shape), []
        if hasattr(instrument, "reads"):
            with suppress(Exception):  # a probe that cannot be drawn is told when it is measured
                reads = list(instrument.reads())
        for read in reads:
            groups.setdefault(read.data, []).append(read)
        held = 0 if cost is None else cost.held
        for data in {read.data for read in reads}:
            beside[data] = beside.get(data, 0) + held
        if cost is not None and cost.copies is not None and model is not None:
            peaks.append(cost.copies * copy + shared)
        elif held and not reads:
            peaks.append(held)
    peaks += [_of_a_pass(reads, shape, beside[data]) + 2 * shared for data, reads in groups.items()]
    return int(max(peaks)) if peaks else None


def at_once(sequences: int, positions: int, batch_size: int, shape: Shape) -> int:
    """How many sequences pass together: equal parts, with no more than LOGITS bytes of logits each."""
    most = max(1, LOGITS // max(4 * shape.vocab * positions, 1))
    return math.ceil(sequences / math.ceil(sequences / min(batch_size, most)))


def _of_a_pass(reads: list[Read], shape: Shape, beside: int) -> int:
    """Bytes of one minibatch that is shown to all of these reads, which have the same inputs, and make `beside` of it
    in the end."""
    inputs = reads[0].inputs
    positions = inputs.shape[1] if inputs.ndim > 1 else 1
    size = at_once(len(inputs), positions, max(read.batch_size for read in reads), shape)
    state = 4 * size * positions * shape.d_model
    pattern = 4 * size * shape.heads * positions**2
    # what is read of all layers, each site once; patterns are as large as sequences are long
    sites = {site for read in reads for site in (*read.sites, *read.optional)}
    names = [(site, shape.layers) if isinstance(site, str) else (site[0], 1) for site in sites]
    shown = sum(count * state for name, count in names if name != "pattern")
    shown += (shape.layers + 1) * state * any(read.stream for read in reads)
    patterns = any(read.meets_patterns for read in reads)
    shown += shape.layers * pattern * patterns
    # keys and values stay; an MLP holds some four times its width, a pattern is four of its size while it is made
    logits = 4 * size * shape.vocab * (positions if any(read.predicts == "all" for read in reads) else 1)
    widest = max(16 * state + 4 * pattern * patterns, logits + min(CHUNK, logits) + beside)
    return 2 * shape.layers * state + shown + widest


def _passes(instrument: Any, shape: Shape) -> dict[object, int]:
    """What an instrument shares with others: the data of each pass that it reads (`devmon.anatomy.passes`), what chains
    need of the loss at the weights (`devmon.sampling.center`), and the short passes before, each with its work in
    tokens."""
    found: dict[object, int] = {}
    with suppress(Exception):  # a probe that cannot be drawn is told when it is measured
        for read in instrument.reads():
            cost = Cost(len(read.inputs), positions=read.inputs[0].numel())
            cost = cost if read.predicts == "all" else replace(cost, unembedded=len(read.inputs))
            found[read.data] = max(found.get(read.data, 0), cost.tokens(shape))
    with suppress(Exception):  # data that cannot be read are told when they are measured
        data, count, positions = instrument.at_center()
        found[data] = Cost(count, count, positions).tokens(shape)
    cost_told = cost_of(instrument, shape)
    return found | ({"trials": cost_told.trials} if cost_told is not None and cost_told.trials else {})


def cost_of(instrument: Any, shape: Shape | None = None) -> Cost | None:
    """What an instrument says that it costs on a model of this shape; None where it says nothing."""
    cost = getattr(instrument, "cost", None)
    if not callable(cost):
        return None
    sized = "shape" in inspect.signature(cost).parameters
    return cost(GPT2_SMALL if shape is None else shape) if sized else cost()
