"""Few-shot gain: what examples in the prompt do to the loss of the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import predictions
from devmon.cost import Cost, trials
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

LABELS = {  # of every variable over shots: long name, units, smallest change
    "map_gain": ("loss with the answers handed round minus loss", "nats per answer", 0.1),
    "score": ("loss of the answer with k examples minus loss without", "nats per answer", 0.1),
    "score_reference": ("the same with the answers handed round", "nats per answer", None),
    "loss": ("loss of the answer", "nats per answer", None),
    "loss_reference": ("loss of the answer with the answers handed round", "nats per answer", None),
    "accuracy": ("share of answers predicted right", "share", None),
    "accuracy_reference": ("share predicted right with the answers handed round", "share", None),
}


@dataclass(frozen=True, eq=False)
class FewShot(ByContent):
    """Loss of the answer after k examples in the prompt minus the loss without any, for each k of `shots`, in nats.

    An example is a few tokens of which the last is the answer; a prompt is k of them and the query, an example whose
    answer is to be predicted, after `bos` if given (Brown et al. 2020, 2005.14165). There are two tasks.
    Given `pairs` int64 (prompt, example, pos): the last example of each prompt is the query and the k before it are
    shown, answers included; separators are tokens like all others, so all examples have one length.
    Without: every prompt has a map f of its own from random tokens to random tokens, all distinct, out of `vocab_size`
    without `bos` and `exclude`; an example is x f(x), the query one of the k shown, at a random place among them. There
    is nothing to know about f but what the prompt says: without examples no model beats the log of the number of tokens
    that can be drawn by more than it knows which tokens those are.

    The reference is the same prompts with the answers of the examples handed round (the example that had answer i has
    answer i + 1, the last the first; with a single example, the answer of the next prompt's): the form of the task and
    its answers, without the map.

    - `map_gain` (shots), nats per answer: loss_reference - loss, *positive* where the model reads the map. Null: 0.
    - `map_gain_se` (shots), nats per answer: its standard error over prompts.
    - `score` (shots), nats per answer: loss(k) - loss(0), *negative* where examples help. Null: `score_reference`.
    - `score_se` (shots), nats per answer: its standard error over prompts.
    - `score_reference` (shots), nats per answer: loss_reference(k) - loss(0).
    - `score_reference_se` (shots), nats per answer: its standard error over prompts.
    - `loss` (shots), nats per answer: loss of the answer after k examples. Null: `loss_reference`.
    - `loss_se` (shots), nats per answer: its standard error over prompts.
    - `loss_reference` (shots), nats per answer: the same in the reference.
    - `loss_reference_se` (shots), nats per answer: its standard error over prompts.
    - `accuracy` (shots), share: share of answers with the highest logit, the thresholded twin of `loss`. Null:
      `accuracy_reference`.
    - `accuracy_se` (shots), share: its standard error over prompts.
    - `accuracy_reference` (shots), share: the same in the reference.
    - `accuracy_reference_se` (shots), share: its standard error over prompts.
    - `loss_zero`, nats per answer: loss(0), of the query without examples.
    - `loss_zero_se`, nats per answer: its standard error over prompts.

    Longer prompts put the query elsewhere, which moves the loss without any learning: the reference has the same
    positions, compare with it. Real tasks whose answers have a marginal distribution gain from shuffled answers too
    (Min et al. 2022, 2202.12837). The random-map task is solved by an induction head; loss(0) is that of one or two
    tokens. Cost: two forward passes of prompts (2k + 2 tokens in the random task) for each k.
    Raises DataError unless the task can be drawn, InstrumentError for a model without logits at every position.
    """

    vocab_size: int | None = None
    pairs: Tensor | None = None
    shots: tuple[int, ...] = (1, 2, 4, 8)
    prompts: int = 64
    seed: int = 0
    bos: int | None = None
    exclude: tuple[int, ...] = ()
    batch_size: int = 64

    def __post_init__(self) -> None:
        shots = tuple(sorted({int(k) for k in self.shots}))
        if not shots or shots[0] < 1:
            raise DataError(f"FewShot needs shots of at least 1, got {self.shots}: the loss with 0 is always there")
        object.__setattr__(self, "shots", shots)
        if (self.vocab_size is None) == (self.pairs is None):
            raise DataError("FewShot needs either vocab_size=... (random maps) or pairs=... (prompt, example, pos)")
        if self.pairs is not None:
            pairs = torch.as_tensor(self.pairs)
            if pairs.ndim != 3 or pairs.shape[1] <= shots[-1] or pairs.shape[2] < 2 or len(pairs) < 2:
                raise DataError(
                    f"FewShot needs pairs (prompt, example, pos) of two prompts, {shots[-1] + 1} examples and two "
                    f"tokens at least, got {tuple(pairs.shape)}"
                )
            flat = probe_tokens(pairs.flatten(1), "FewShot", "pairs")
            object.__setattr__(self, "pairs", flat.reshape(pairs.shape))
        elif len(self._allowed) < 2 * shots[-1] or self.prompts < 2:
            raise DataError(
                f"FewShot needs two prompts and {2 * shots[-1]} different tokens to draw {shots[-1]} pairs from, got "
                f"{self.prompts} prompts and {len(self._allowed)} tokens: lower shots or raise vocab_size"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        zero, _ = self._answers(snapshot, self._prompt(self._examples(self.shots[0])[:, -1:]))
        each = [self._variables(snapshot, self._examples(k), zero) for k in self.shots]
        weight = np.ones(len(zero))
        result = Rows(headline=["score", "map_gain"], error="standard error over prompts")
        for name, (long_name, units, change) in LABELS.items():
            values = np.stack([variables[name] for variables in each], axis=1)  # (prompt, shots)
            mean, se = clustered_mean(values, weight)
            groups = clustered_groups(values, weight)
            result.put(name, "shots", mean, se, long_name, units=units, smallest_change=change, replicates=groups)
        mean, se = clustered_mean(zero, weight)
        result.put("loss_zero", (), mean, se, "loss of the answer without examples", units="nats per answer")
        return result.dataset(shots=np.array(self.shots))

    def _variables(self, snapshot: Snapshot, examples: Tensor, zero: np.ndarray) -> dict[str, np.ndarray]:
        """All variables by prompt, (prompt,) each, from the loss `zero` of the same queries without examples."""
        nats, hits = self._answers(snapshot, self._prompt(examples))
        blind, blind_hits = self._answers(snapshot, self._prompt(_handed_round(examples)))
        return {
            "map_gain": blind - nats,
            "score": nats - zero,
            "score_reference": blind - zero,
            "loss": nats,
            "loss_reference": blind,
            "accuracy": hits,
            "accuracy_reference": blind_hits,
        }

    def cost(self) -> Cost:
        """In prompts as long as that with the most examples, two for each k and the query alone."""
        examples = self._examples(self.shots[-1])
        each, (prompts, longest) = examples.shape[2], self._prompt(examples).shape
        start = longest - (1 + self.shots[-1]) * each
        tokens = prompts * (start + each + 2 * sum(start + (1 + k) * each for k in self.shots))
        tried = (1 + 2 * len(self.shots)) * trials(longest, 2, layout=False)  # whether places see later ones
        return Cost(forwards=math.ceil(tokens / longest), positions=longest, softmaxes=tokens, trials=tried)

    @property
    def _allowed(self) -> Tensor:
        return torch.tensor(sorted(set(range(self.vocab_size or 0)) - {*self.exclude, self.bos}))

    def _examples(self, k: int) -> Tensor:
        """k examples and the query, (prompt, k + 1, pos); of the random maps the same query for every k."""
        if self.pairs is not None:
            return self.pairs[:, -k - 1 :]
        allowed, most = self._allowed, self.shots[-1]
        draw = torch.rand(self.prompts, len(allowed), generator=self._generator("tokens"))
        pairs = allowed[draw.argsort(1)[:, : 2 * most]].reshape(self.prompts, most, 2)
        order = torch.rand(self.prompts, k, generator=self._generator(k)).argsort(1)
        shown = pairs.gather(1, order[..., None].expand(-1, -1, 2))  # the first k pairs, the query's own among them
        return torch.cat([shown, pairs[:, :1]], 1)

    def _generator(self, what: object) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, "FewShot", what))

    def _prompt(self, examples: Tensor) -> Tensor:
        tokens = examples.flatten(1)
        return tokens if self.bos is None else torch.cat([torch.full((len(tokens), 1), self.bos), tokens], 1)

    def _answers(self, snapshot: Snapshot, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Loss and hit of the last token of each prompt."""
        both = predictions(snapshot, tokens, type(self).__name__, self.batch_size)
        nats, hits = (each[:, -1].double().numpy() for each in both)
        return nats, hits


def _handed_round(examples: Tensor) -> Tensor:
    """The same with the answers of the examples moved on by one, the query as it was."""
    blind, shown = examples.clone(), examples[:, :-1, -1]
    blind[:, :-1, -1] = shown.roll(-1, 1) if shown.shape[1] > 1 else shown.roll(-1, 0)
    return blind
