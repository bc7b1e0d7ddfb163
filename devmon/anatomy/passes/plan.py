"""Which reads share their passes: the plan of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from torch import Tensor

from devmon.anatomy import vocabulary
from devmon.anatomy.attention import hides_patterns
from devmon.anatomy.forward import check_causal, forward, scores_in
from devmon.anatomy.passes.reads import Read
from devmon.anatomy.passes.run import in_half_precision, run
from devmon.snapshot import Snapshot


class Plan:
    """The reads of all instruments of a step: those of one group share passes, made when the first is asked for.

    An instrument whose reads are planned has a method `reads() -> list[Read]`, and asks for them with `read`. `runs`
    counts those of chains that begin at the weights (`devmon.sampling.center`), of all instruments.
    """

    def __init__(self, instruments: Iterable[Any]) -> None:
        instruments = list(instruments)
        self.runs = sum(getattr(instrument, "runs", 0) for instrument in instruments)
        self.waiting: dict[tuple[int, int], Read] = {}
        self.made: dict[tuple[int, int], list[Any] | Exception] = {}
        for instrument in instruments:
            with suppress(Exception):  # a probe that cannot be drawn is told by the instrument itself
                reads = enumerate(instrument.reads())
                self.waiting |= {(id(instrument), i): each for i, each in reads if isinstance(each, Read)}

    def knows(self, instrument: Any) -> bool:
        return any(key[0] == id(instrument) for key in (*self.waiting, *self.made))

    def take(self, snapshot: Snapshot, instrument: Any, index: int) -> list[Any] | None:
        """What a read gave, once. None where it was not planned, or its group could not be run together."""
        # The first that is asked for makes the passes of its group, and what they gave waits for the others.
        asked = self.waiting.get((id(instrument), index))
        if asked is not None:
            with suppress(Exception):  # each is then read alone, and says itself what is wrong with it
                same = _group(snapshot, asked)
                group = {key: each for key, each in self.waiting.items() if _group(snapshot, each) == same}
                self.waiting = {key: each for key, each in self.waiting.items() if key not in group}
                self.made |= zip(group, run(snapshot, list(group.values()), same[0]), strict=True)
        made = self.made.pop((id(instrument), index), None)
        if isinstance(made, Exception):
            raise made
        return made


def read(snapshot: Snapshot, instrument: Any) -> list[list[Any]]:
    """For each of the reads of an instrument what its `reduce` made of each minibatch.

    The numbers are the same whoever else reads: minibatches, precision and kernels depend on the read alone. To be
    called before the model is changed. Raises what `reduce` raises, and InstrumentError as `forward` does.
    """
    # Alone, or in parts of its memory, it has a plan of its own: several reads of the same data are one pass there too.
    plan = snapshot.memo.get("plan")
    plan = plan if isinstance(plan, Plan) and plan.knows(instrument) else Plan([instrument])
    made = [(plan.take(snapshot, instrument, index), each) for index, each in enumerate(instrument.reads())]
    return [read_one(snapshot, each) if parts is None else parts for parts, each in made]


def read_one(snapshot: Snapshot, asked: Read) -> list[Any]:
    """The same for one read, by itself."""
    [made] = run(snapshot, [asked], _group(snapshot, asked)[0])
    if isinstance(made, Exception):
        raise made
    return made


def need_causal(snapshot: Snapshot, tokens: Tensor, who: str) -> None:
    """`check_causal` of tokens (batch, pos), once a step and length: what a place sees is the model's, not the
    tokens'."""
    key = ("causal", tokens.shape[1])
    if key not in snapshot.memo and len(tokens.unique()) > 1:  # of one token alone nothing is found out
        check_causal(snapshot.model, tokens, who)
        snapshot.memo[key] = True


def _group(snapshot: Snapshot, asked: Read) -> tuple[Any, ...]:
    """Reads of one group share their passes; it begins with how many inputs pass at once."""
    # Equal parts, of as many as its logits and its batch size allow; never of who else reads.
    most = max(1, vocabulary.LOGITS // max(_logits_of_one(snapshot, asked), 1))
    parts = math.ceil(len(asked.inputs) / min(asked.batch_size, most))
    # What rounds otherwise is another group: a copy in float32, and the kernel that shows its patterns.
    raised = asked.stream and in_half_precision(snapshot.model)
    other_kernel = asked.meets_patterns and hides_patterns(snapshot.model)
    return math.ceil(len(asked.inputs) / parts), asked.data, raised, other_kernel


def _logits_of_one(snapshot: Snapshot, asked: Read) -> int:
    """Bytes of the logits of one sequence; 0 for a model without any, and for inputs of floats, which have few."""
    if asked.inputs.is_floating_point() or asked.inputs.ndim != 2:
        return 0
    if "vocab" not in snapshot.memo:
        scores = scores_in(forward(snapshot.model, asked.inputs[:1], asked.who))
        wide = isinstance(scores, Tensor) and scores.ndim == 3
        snapshot.memo["vocab"] = scores.shape[-1] * max(4, scores.element_size()) if wide else 0
    return int(snapshot.memo["vocab"] * asked.inputs.shape[1])
