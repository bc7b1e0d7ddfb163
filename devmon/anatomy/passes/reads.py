"""What an instrument asks to see of the model's passes over its probe, and what it is shown of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.forward import logits, original, scores_in
from devmon.anatomy.layout import Layout
from devmon.anatomy.sites import Reads, Site
from devmon.anatomy.vocabulary import chunks, log_softmax_
from devmon.errors import DataError, InstrumentError

TOGETHER = 32  # inputs that pass at once, where an instrument does not ask for fewer: only equal numbers share a pass


@dataclass(frozen=True, eq=False)
class Read:
    """`inputs` (batch, …) pass the model, at most `batch_size` at a time, and `reduce` makes something small of each
    minibatch: it is kept until the instrument asks, so it should be sums, or the states of a few places.

    - `of`: the instrument that reads
    - `sites`: shown as `Seen.sites`, as `layout` places them; `optional`: those that are left out where there are none
    - `patterns`: whether `Seen.patterns` are shown
    - `stream`: whether `Seen.stream` is; in float32 for a model in half precision, whose roundings are as large as the
      distances between neighbouring states. `blocks` is its path; without it the blocks are looked for
    - `predicts`: whether `Seen.log_p` is shown, of "all" places or of the "last" one
    """

    of: Any
    inputs: Tensor
    reduce: Callable[[Seen], Any]
    batch_size: int = TOGETHER
    _: KW_ONLY
    sites: Sequence[Site] = ()
    optional: Sequence[Site] = ()
    layout: Layout | None = None
    patterns: bool = False
    stream: bool = False
    blocks: str | None = None
    predicts: Literal["all", "last"] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"{self.who}: batch_size must be at least 1, got {self.batch_size}")

    @property
    def who(self) -> str:
        return type(self.of).__name__

    @cached_property
    def data(self) -> tuple[str, torch.Size, torch.dtype, bool]:
        """The same for reads that may share passes: the same inputs, whoever holds them, at all places or the last."""
        return digest(self.inputs), self.inputs.shape, self.inputs.dtype, self.predicts == "last"

    @property
    def meets_patterns(self) -> bool:
        return self.patterns or any(site == "pattern" or site[0] == "pattern" for site in self.sites)


def digest(inputs: Tensor) -> str:
    """SHA-256 of the bytes of a tensor."""
    data = inputs.detach().cpu().contiguous()
    return hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()


@dataclass
class Pass:
    """One pass of a minibatch, common to all of its reads; what several of them need is worked out once."""

    model: nn.Module
    rows: slice
    inputs: Tensor
    output: Any
    patterns: Callable[[str], dict[int, Tensor]] | None
    streams: dict[str, Callable[[str], list[Tensor]]]

    def log_p(self, who: str) -> Tensor:
        if self.output is not None:
            # Where the unembedding was given the last place alone, there is one.
            given = scores_in(self.output)
            narrow = isinstance(given, Tensor) and given.ndim == 3 and given.shape[1] == 1
            scores = logits(self.model, self.inputs[:, -1:] if narrow else self.inputs, who, output=self.output)
            self._log_p, self.output = log_softmax_(self.model, scores), None
        return self._log_p

    @cached_property
    def nats(self) -> Tensor:
        target = self.inputs[:, 1:].to(self._log_p.device)
        return -self._log_p[:, :-1].gather(-1, target[..., None])[..., 0].double().cpu()

    @cached_property
    def best(self) -> Tensor:
        return self._log_p.argmax(-1)


@dataclass
class Seen:
    """One pass of a minibatch, as one read is shown it. Nothing of it is to be written into, nor kept as a whole.

    - `rows`: which of the inputs these are
    - `inputs` (batch, …): they themselves, on the CPU
    - `model`: that which ran; `sites`: what was read of it; `anatomy`: where
    - `patterns`: by layer, as `layer_patterns` gives them
    - `stream`: as `residual_stream` gives it; of inputs of floats, such as images, the mean over places, (batch, 1, d)
    - `log_p` (batch, pos, vocab): log-probabilities in nats, in float32 at least; of the last place (batch, 1, vocab)
    - `nats` (batch, pos - 1): loss of the next token, in float64 on the CPU; column i is that of token i + 1
    - `best` (batch, pos): the most likely token

    All but the first five raise InstrumentError where the model does not show them.
    """

    read: Read
    sites: Reads
    whole: Pass
    found: Anatomy | None

    @property
    def rows(self) -> slice:
        return self.whole.rows

    @property
    def inputs(self) -> Tensor:
        return self.whole.inputs

    @property
    def model(self) -> nn.Module:
        return original(self.whole.model)

    @property
    def anatomy(self) -> Anatomy:
        assert self.found is not None
        return self.found

    @property
    def patterns(self) -> dict[int, Tensor]:
        assert self.whole.patterns is not None
        return self.whole.patterns(self.read.who)

    @property
    def stream(self) -> list[Tensor]:
        states = self.whole.streams[self.read.blocks or ""](self.read.who)
        return [state.mean(1, keepdim=True) for state in states] if self.inputs.is_floating_point() else states

    @property
    def log_p(self) -> Tensor:
        log_p, who = self.whole.log_p(self.read.who), self.read.who
        if int(self.inputs.max()) >= log_p.shape[-1]:
            raise InstrumentError(
                f"{who}: the tokens go up to {int(self.inputs.max())} but {type(self.model).__name__} "
                f"has {log_p.shape[-1]} logits: give tokens of this model's vocabulary"
            )
        return log_p[:, -1:] if self.read.predicts == "last" else log_p

    @property
    def nats(self) -> Tensor:
        assert self.log_p is not None
        return self.whole.nats

    @property
    def best(self) -> Tensor:
        assert self.log_p is not None
        return self.whole.best

    def chunks(self) -> Iterator[slice]:
        """Slices of the places of `log_p.flatten(0, 1)`, each small enough to work on copies of it."""
        return chunks(self.log_p.flatten(0, 1))
