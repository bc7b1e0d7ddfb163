"""Bayesian influence: which training examples the loss of a query hangs on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import xarray as xr

from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.verdicts import accepted
from devmon.cost import Cost
from devmon.data.rows import Rows
from devmon.errors import InstrumentError
from devmon.sampling.center import Sampled
from devmon.sampling.data import as_examples
from devmon.sampling.losses import Loss, next_token_loss
from devmon.sampling.responses.covariances import Response, influences, responses, unpaired
from devmon.sampling.responses.labels import chosen, evenly, label
from devmon.sampling.responses.scores import Excess, ItemLoss, Scored, next_token_losses
from devmon.sampling.traces import Settings, sample
from devmon.snapshot import Snapshot

# Bytes of one pair of query and example in a row: influence, its error and the correlation, two each.
PAIR_BYTES = 6
DATA = " data"  # the set of the examples; no query can have the name


@dataclass(frozen=True)
class _Of:
    """The fields before the settings."""

    data: Any
    queries: Mapping[str, Any]
    loss: Loss = next_token_loss
    token_loss: ItemLoss = next_token_losses


@dataclass(frozen=True, eq=False, kw_only=True)
class BayesianInfluence(Sampled, Settings, _Of):
    """Influence of training examples on queries: −nβ² Cov[ℓ_example(w), ℓ_query(w)] in the law around the weights.

    The local Bayesian influence function (Kreer et al. 2025, 2509.26544, times nβ²): with a weight of 1 + h of the
    example in nβ L, where all together weigh 1, nβ E[ℓ_query] changes by h times it. Below 0 the example lowers the
    query's loss. For a regular model and large nβ it is the classical influence, −nβ gᵀH⁻¹g; no Hessian is inverted,
    and none has to be regular.

    `examples` examples of the data are followed, at equal distances, and all of `queries`, which maps names to data of
    the form that `loss` takes. `by` "sequence" takes one loss an example, `loss`; "token" each token's, `token_loss`.
    Settings are those of `devmon.sampling.Settings`, a mask included; noise and batches are the same at every
    checkpoint. Errors are over batches of draws. Null by shuffling: the examples of one chain with the queries of
    another, which share nothing but what minibatches they share.

    A row keeps at most `budget` bytes of pairs, always of the same items: with more, as many of each side as fit.

    - `llc`, 1: λ̂ of the chains. Null: 0.
    - `temperature`, 1: their configurational temperature; 1 in the law asked for.
    - `accepted`, 1: 1 where their verdict is "ok" or "finite-time" (`devmon.analysis.llc`).
    - `mean` (set), 1: influence of the mean of all followed examples on the mean of a set of queries. Null:
      `mean_shuffled`.
    - `mean_se` (set), 1: its standard error.
    - `mean_shuffled` (set), 1: the same by shuffling.
    - `spread` (set), 1: root mean square correlation over the kept pairs of a set. Null: `spread_shuffled`.
    - `spread_shuffled` (set), 1: the same by shuffling: what draws as few as these make of nothing.
    - `influence` (query, example), 1: of the kept pairs, float16. Null: 0 with `influence_se`.
    - `influence_se` (query, example), 1: its standard error, float16.
    - `correlation` (query, example), 1: correlation of the two losses over draws, float16; above 0 they move as one.
      Null: `spread_shuffled`.
    - `example_loss` (example), loss: loss of a kept example at the weights, float32.
    - `query_loss` (query), loss: loss of a kept query at the weights, float32.

    Pitfalls: influence on the loss around these weights, not on the path that led to them; large for examples of large
    loss, so look at correlations too. Raises InstrumentError for settings that cannot be run and a loss that is not
    finite at the weights.
    """

    examples: int = 64
    by: Literal["sequence", "token"] = "sequence"
    budget: int = 65536
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.queries or DATA in self.queries:
            raise InstrumentError('expected queries by name, e.g. {"held out": tokens}, got none')
        if self.by not in ("sequence", "token"):
            raise InstrumentError(f"by must be 'sequence' or 'token', got {self.by!r}")
        if self.examples < 1 or self.budget < PAIR_BYTES * len(self.queries):
            raise InstrumentError(
                f"examples must be at least 1 and the budget hold a pair of each set, {PAIR_BYTES * len(self.queries)} "
                f"bytes, got {self.examples} and {self.budget}"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        # The chains; what is scored on the way are the followed examples and the queries.
        sets = self._sets()
        excess = Excess(sets, range(self.chains), self.draws, self.burn_in, memo=snapshot.memo)
        settings = Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})
        settings = replace(settings, examples=0)
        how: dict[str, Any] = {"probe": excess, "memo": snapshot.memo}
        traces = sample(snapshot.model, self.loss, self.data, settings, seed=snapshot.seed, **how)
        health, nbeta = llc(traces), float(traces.attrs["nbeta"])

        # The pairs that are kept: a function of the sizes alone.
        names = list(self.queries)
        queries = np.concatenate([excess.kept[name] for name in names], 2)
        sizes = [excess.kept[name].shape[2] for name in names]
        rows, columns = self._kept(sizes, excess.kept[DATA].shape[2])
        ends = np.cumsum([0, *sizes])
        which = np.searchsorted(ends, rows, "right") - 1
        with np.errstate(invalid="ignore", over="ignore"):
            pairs, correlation = influences(excess.kept[DATA][:, :, columns], queries[:, :, rows], nbeta)
            _, by_chance = influences(excess.kept[DATA][:, :, columns], unpaired(queries[:, :, rows]), nbeta)
            means = [self._mean(excess.kept[DATA], excess.kept[name], nbeta) for name in names]
            null = [self._mean(excess.kept[DATA], unpaired(excess.kept[name]), nbeta) for name in names]

        result = Rows(
            headline=["mean"],
            error="standard error over batches of draws (90% interval / 1.645)",
            kind="influence",
            nbeta=nbeta,
            gamma=self.gamma,
        )
        result.put("llc", (), float(health["llc"]), None, "local learning coefficient", units="1")
        result.put("temperature", (), float(health["temperature"]), None, "configurational temperature", units="1")
        result.put("accepted", (), int(accepted(health["verdict"].item())), None, "1 for healthy chains", units="1")
        value, se, groups = (np.concatenate([part[i] for part in means], -1) for i in range(3))
        long_name = "influence of the data on the queries"
        result.put("mean", "set", _finite(value), _finite(se), long_name, units="1", replicates=_finite(groups))
        shuffled = np.array([part.value[0] for part in null])
        result.put("mean_shuffled", "set", _finite(shuffled), None, "the same by shuffling", units="1")
        for name, of in (("spread", correlation), ("spread_shuffled", by_chance)):
            squares = [np.sqrt((of[which == i] ** 2).mean()) for i in range(len(names))]
            result.put(name, "set", squares, None, "root mean square correlation", units="1")
        shape = (len(rows), len(columns))
        about = "influence of an example on a query"
        value, se = (_half(getattr(pairs, key).reshape(shape)) for key in ("value", "se"))
        result.put("influence", ("query", "example"), value, se, about, units="1")
        result.put("correlation", ("query", "example"), _half(correlation), None, "correlation of losses", units="1")
        start = {name: excess.start[name].ravel()[excess.items[name]].astype(np.float32) for name in (DATA, *names)}
        own, asked = start[DATA][columns], np.concatenate([start[name] for name in names])[rows]
        result.put("example_loss", "example", own, None, "loss of the example at the weights", units="loss")
        result.put("query_loss", "query", asked, None, "loss of the query at the weights", units="loss")
        dataset = result.dataset(set=np.array(names, dtype=object), query=rows, example=columns)
        return dataset.assign_coords(
            query_label=("query", self._labels(sets, excess, names, which, rows - ends[which])),
            example_label=("example", self._labels(sets, excess, [DATA], np.zeros(len(columns), int), columns)),
            set_of=("query", np.array([names[i] for i in which], dtype=object)),
        )

    def cost(self) -> Cost:
        """The steps of the chains, and a forward pass of examples and queries at each draw; what is known at w* is
        shared with other watches (`at_center`)."""
        data = as_examples(self.data)
        steps = (self.draws + self.burn_in) * self.steps_per_draw * self.chains * self.batch_size
        scored = sum(each.examples.n for each in self._sets().values())
        twice = 2 if self.control_variate else 1
        whole = self.of_gradient(data.n)
        seen = max(whole, min(data.n, steps))
        forwards = twice * steps + seen + (self.draws * self.chains + 1) * scored
        backwards = twice * steps + whole
        return Cost(forwards=forwards, backwards=backwards, positions=data.positions())

    def _sets(self) -> dict[str, Scored]:
        data = as_examples(self.data)
        followed = as_examples(data.batch(evenly(data, self.examples)))
        loss = self.loss if self.by == "sequence" else self.token_loss
        given = {DATA: followed} | {name: as_examples(query) for name, query in self.queries.items()}
        return {name: Scored(examples, loss, self.batch_size) for name, examples in given.items()}

    def _kept(self, queries: list[int], examples: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the queries and of the examples whose pairs fit into the budget."""
        pairs = self.budget // PAIR_BYTES
        rows = min(sum(queries), max(pairs // examples, math.isqrt(pairs), len(queries)))
        kept = chosen(queries, rows)
        columns = chosen([examples], min(examples, pairs // len(kept)))
        return kept[:, 1] + np.cumsum([0, *queries])[kept[:, 0]], columns[:, 1]

    def _mean(self, examples: np.ndarray, queries: np.ndarray, nbeta: float) -> Response:
        """Influence of the mean example on the mean query."""
        return responses(examples.mean(2, dtype=np.float64), queries.mean(2, keepdims=True, dtype=np.float64), nbeta)

    def _labels(
        self, sets: dict[str, Scored], excess: Excess, names: list[str], which: np.ndarray, items: np.ndarray
    ) -> np.ndarray:
        return np.array(
            [
                label(sets[name].examples, excess.start[name].shape, int(excess.items[name][item]), self.words)
                for name, item in zip((names[i] for i in which), items, strict=True)
            ],
            dtype=object,
        )


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _half(values: np.ndarray) -> np.ndarray:
    """As float16: three digits, at most 65504 in size; what is not finite is NaN."""
    largest = float(np.finfo(np.float16).max)
    return np.clip(_finite(values), -largest, largest).astype(np.float16)
