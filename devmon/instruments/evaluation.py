"""A task of one's own: multiple choice or cloze, scored by the log-likelihood of the answers, without generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy.passes import Read, Seen, need_causal, read
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot

SMALLEST = {"share": 0.02, "nats per answer": 0.05}  # changes of a headline below these are no events


@dataclass(frozen=True, eq=False)
class Evaluation(ByContent):
    """How well a model answers the items of a task, by the log-likelihood of their answers after their contexts.

    A row of `tokens` (row, pos) int64 is a context and one answer, padded on the right with any token; the answer has
    the places `start` (row) to `stop` (row), exclusive. Rows of one `item` (row), 0, 1, 2, …, are the choices of one
    question, one of which is `right` (row); `characters` (row) are those of the answers, for their normalisation.
    `Evaluation.of_text` makes all of it from texts. Items of several choices are multiple choice:

    - `accuracy`, share: items whose right answer has the highest log-likelihood; ties count in part. Null: `chance`.
    - `accuracy_se`, share: its standard error over items.
    - `accuracy_by_token`, share: the same of the log-likelihood per token of the answer. Null: `chance`.
    - `accuracy_by_token_se`, share: its standard error over items.
    - `accuracy_by_character`, share: the same per character, with `characters`: the acc_norm of
      lm-evaluation-harness (there by bytes). Null: `chance`.
    - `accuracy_by_character_se`, share: its standard error over items.
    - `chance`, share: mean of 1 / choices.
    - `choice_nats`, nats per answer: -log of the right answer's share of the probability of the choices, the
      continuous twin of `accuracy`. Null: `choice_chance`.
    - `choice_nats_se`, nats per answer: its standard error over items.
    - `choice_chance`, nats per answer: mean of log(choices).

    Items of one choice are cloze; the reference is the same answers after the contexts of the next items:

    - `exact`, share: items whose answer has the highest logit at every place. Null: `exact_reference`.
    - `exact_se`, share: its standard error over items.
    - `exact_reference`, share: the same in the reference.
    - `exact_reference_se`, share: its standard error over items.

    Of both kinds:

    - `nats`, nats per answer: -log-likelihood of the right answer, summed over its tokens. Null: of cloze items,
      `nats_reference`.
    - `nats_se`, nats per answer: its standard error over items.
    - `nats_reference`, nats per answer: the same in the reference, for cloze.
    - `nats_reference_se`, nats per answer: its standard error over items.

    Accuracy has thresholds, which make jumps of smooth changes (Schaeffer et al. 2023, 2304.15004): follow its twin.
    Without normalisation short answers win, with it long ones; which is right depends on the task (Brown et al. 2020,
    2005.14165, section 2.4). Cost: a forward pass of all rows, two for cloze. Raises DataError for rows that are no
    task, InstrumentError for a model without logits at every position.
    """

    tokens: Tensor
    item: Tensor
    start: Tensor
    stop: Tensor
    right: Tensor
    characters: Tensor | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "Evaluation"))
        rows, length = self.tokens.shape
        for name, kind in (("item", torch.int64), ("start", torch.int64), ("stop", torch.int64), ("right", torch.bool)):
            held = torch.as_tensor(getattr(self, name)).detach().to("cpu", kind).contiguous()
            if held.shape != (rows,):
                raise DataError(f"Evaluation needs {name} (row,) of the {rows} rows of tokens, got {tuple(held.shape)}")
            object.__setattr__(self, name, held)
        if self.characters is not None:
            held = torch.as_tensor(self.characters).detach().to("cpu", torch.int64).contiguous()
            if held.shape != (rows,) or int(held.min()) < 1:
                raise DataError(f"Evaluation needs characters (row,) of at least 1, got {tuple(held.shape)}")
            object.__setattr__(self, "characters", held)
        # a task: items in order, one right answer each, all multiple choice or all cloze
        counts = torch.bincount(self.item) if int(self.item.min()) >= 0 else torch.zeros(1)
        rights = torch.bincount(self.item, weights=self.right.double()) if int(self.item.min()) >= 0 else counts
        if not bool((self.item.diff() >= 0).all()) or int(counts.min()) < 1 or not bool((rights == 1).all()):
            raise DataError("Evaluation needs the rows of items 0, 1, 2, … one item after another, one of them right")
        if int(counts.min()) == 1 < int(counts.max()):
            raise DataError("Evaluation needs items of several choices, or of one (cloze), not both: make two of it")
        if len(counts) < 2:
            raise DataError("Evaluation needs two items at least: its errors are over items")
        if int(self.start.min()) < 1 or bool((self.stop <= self.start).any()) or int(self.stop.max()) > length:
            raise DataError(
                f"Evaluation needs 1 <= start < stop <= {length} in every row: an answer of one token at least, after "
                "a context of one (a beginning of text will do)"
            )

    @classmethod
    def of_text(cls, items: Sequence[Mapping[str, Any]], tokenizer: Any, *, batch_size: int = 32) -> Evaluation:
        """The task of items {"context", "choices", "answer"}: texts, and the index of the right choice; or, cloze,
        {"context", "answer"} with the answer's text.

        Context and answer are made tokens together, without special tokens but the tokenizer's beginning of text where
        a context is empty; the answer's are those past the context's. A space between them belongs to the answer.
        Raises DataError for an item of another form.
        """
        encode: Callable[[str], list[int]] = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        rows, item, start, stop, right, characters = [], [], [], [], [], []
        for n, entry in enumerate(items):
            choices, answer = entry.get("choices"), entry.get("answer")
            if choices is None:
                choices, answer = [answer], 0
            if not all(isinstance(text, str) and text for text in choices) or answer not in range(len(choices)):
                raise DataError(
                    f"item {n} is no question: expected context, choices (texts) and answer (an index), or context and "
                    f"answer (a text), got {dict(entry)}"
                )
            first = getattr(tokenizer, "bos_token_id", None)
            context = encode(str(entry.get("context", ""))) or ([] if first is None else [first])
            for index, text in enumerate(choices):
                whole = encode(str(entry.get("context", "")) + text) if entry.get("context") else context + encode(text)
                rows.append(whole)
                item.append(n)
                start.append(min(len(context), len(whole) - 1))  # a token that joins both is the answer's
                stop.append(len(whole))
                right.append(index == answer)
                characters.append(len(text.strip()) or 1)
        if not rows:
            raise DataError("Evaluation needs items, got none")
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])
        item_, start_, stop_, right_, size = (torch.tensor(part) for part in (item, start, stop, right, characters))
        return cls(tokens, item_, start_, stop_, right_, size, batch_size)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        # by row: the answer's log-likelihood, its tokens, whether all have the highest logit
        need_causal(snapshot, self.tokens, type(self).__name__)
        (total, hits), *elsewhere = (_joined(parts) for parts in read(snapshot, self))
        right = self.right.numpy()
        result = Rows(headline=self._headline, error="standard error over items")
        if self._cloze:
            # the same answers after the contexts of the next items
            [(other, other_hits)] = elsewhere
            self._put(result, "exact", hits, "items whose answer has the highest logits", "share")
            self._put(result, "exact_reference", other_hits, "the same after another item's context", "share")
            unit = "nats per answer"
            self._put(result, "nats_reference", -other, "-log-likelihood after another item's context", unit)
        else:
            lengths = (self.stop - self.start).numpy()
            scores = {"accuracy": total, "accuracy_by_token": total / lengths}
            if self.characters is not None:
                scores["accuracy_by_character"] = total / self.characters.numpy()
            for name, score in scores.items():
                self._put(result, name, self._best(score), "items whose right answer is the likeliest", "share")
            each = [len(group) for group in self._items()]
            chance = np.mean([1 / count for count in each])
            result.put("chance", (), chance, None, "mean of 1 / choices", units="share")
            shares = [_log_share(total[group], right[group]) for group in self._items()]
            self._put(result, "choice_nats", -np.array(shares), "-log share of the right answer", "nats per answer")
            blind = np.mean(np.log(each))
            result.put("choice_chance", (), blind, None, "mean of log(choices)", units="nats per answer")
        self._put(result, "nats", -total[right], "-log-likelihood of the right answer", "nats per answer")
        return result.dataset()

    def reads(self) -> list[Read]:
        rows = [(self.tokens, self.start, self.stop), *([self._elsewhere()] if self._cloze else [])]
        return [
            Read(self, tokens, partial(_scores, start, stop), self.batch_size, predicts="all")
            for tokens, start, stop in rows
        ]

    def cost(self) -> Cost:
        return Cost(forwards=len(self.tokens) * (2 if self._cloze else 1), positions=self.tokens.shape[1])

    @property
    def _cloze(self) -> bool:
        return len(self.item) == int(self.item[-1]) + 1

    @property
    def _headline(self) -> list[str]:
        return ["exact", "nats"] if self._cloze else ["accuracy", "choice_nats", "nats"]

    def _items(self) -> list[np.ndarray]:
        """The rows of each item."""
        return np.split(np.arange(len(self.item)), np.flatnonzero(np.diff(self.item.numpy())) + 1)

    def _put(self, result: Rows, name: str, values: np.ndarray, label: str, units: str) -> None:
        """The mean of values by item, with its error, and by groups of items where it is a headline."""
        each = np.ones(len(values))
        mean, se = clustered_mean(values, each)
        change = SMALLEST[units] if name in self._headline else None
        groups = clustered_groups(values, each)
        result.put(name, (), float(mean), float(se), label, units=units, smallest_change=change, replicates=groups)

    def _best(self, score: np.ndarray) -> np.ndarray:
        """Of each item 1 where its right answer has the highest score, shared where several have."""
        right, hits = self.right.numpy(), []
        for group in self._items():
            best = score[group] == score[group].max()
            hits.append(float(best[right[group]].sum()) / float(best.sum()))
        return np.array(hits)

    def _elsewhere(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's answer after the context of the next row; the last has the first's."""
        after = torch.arange(len(self.item)).roll(-1)
        rows = [
            torch.cat([self.tokens[j, : self.start[j]], self.tokens[i, self.start[i] : self.stop[i]]])
            for i, j in enumerate(after.tolist())
        ]
        start = self.start[after]
        longest = max(map(len, rows))
        padded = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])
        return padded, start, start + self.stop - self.start


def _scores(start: Tensor, stop: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
    """Of each row (row,) the log-likelihood of its answer and whether each of its tokens has the highest logit."""
    nats, tokens = seen.nats, seen.inputs.cpu()
    place = torch.arange(1, tokens.shape[1])  # column i predicts position i + 1
    within = (place >= start[seen.rows, None]) & (place < stop[seen.rows, None])
    hits = seen.best[:, :-1].cpu() == tokens[:, 1:]
    return -torch.where(within, nats.double().cpu(), 0.0).sum(1), (hits | ~within).all(1).double()


def _joined(parts: list[tuple[Tensor, Tensor]]) -> list[np.ndarray]:
    """What `_scores` makes of minibatches, of all rows."""
    return [torch.cat(column).numpy() for column in zip(*parts, strict=True)]


def _log_share(scores: np.ndarray, right: np.ndarray) -> float:
    """log of the right answer's share of exp(scores)."""
    highest = scores.max()
    return float(scores[right][0] - highest - np.log(np.exp(scores - highest).sum()))
