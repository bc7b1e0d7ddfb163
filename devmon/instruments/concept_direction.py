"""Reading vectors: the direction in which states of paired prompts differ, by layer, judged on other pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Layout, activations
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot, derive_seed

ESTIMATORS = ("mean", "svd", "logistic")
# Of the squared length of the logistic direction, for differences of mean square 1: larger turns it to the mean
# difference, smaller to the widest margin of the training pairs.
PENALTY = 0.01
NEWTON = 50  # steps at most; 5 to 10 are taken
HIGH = 0.95  # quantile of the shuffled ones


@dataclass(frozen=True, eq=False)
class ConceptDirection(ByContent):
    """The direction in which prompts with a concept differ from the same without it, and how well it tells others.

    `positive` and `negative` (pair, pos) int64 are pairs of prompts; their states h⁺, h⁻ are those of the last place at
    `site`, in every layer, their differences δ = h⁺ - h⁻ (Zou et al. 2023, 2310.01405). Half of the pairs, drawn from
    `seed`, give the direction, of length 1, in three ways: "mean", Σ δ; "svd", the first right singular vector of the δ
    as they are, with the sign that most of them have; "logistic", the w of Σ log(1 + exp(-⟨w, δ⟩)) / n + .005 ‖w‖², the
    δ scaled to mean square 1. Centred principal components are none of them: of differences that all point one way
    they take out what is sought. The other half judges.

    - `auc` (estimator, layer), share: the chance that ⟨h⁺, v⟩ of one held-out pair is above ⟨h⁻, v⟩ of another or the
      same, ties half. Null: .5, and `auc_shuffled_high`.
    - `auc_se` (estimator, layer), share: its standard error over held-out pairs.
    - `auc_shuffled` (estimator, layer), share: the same of pairs turned round at random, mean of `shuffles`.
    - `auc_shuffled_high` (estimator, layer), share: their 95% quantile.
    - `cosine_halves` (estimator, layer), 1: cosine between the directions of two halves of the pairs that give it, the
      most to expect of a cosine to another step's. Null: `cosine_random`.
    - `cosine_mean` (estimator, layer), 1: cosine to the mean difference.
    - `cosine_random`, 1: mean absolute cosine of two random directions, √(2/πd).
    - `length` (layer), share: ‖mean of δ‖ over the mean of ‖h‖.
    - `direction` (estimator, layer, dimension), 1: the direction itself, of all of its half of the pairs;
      `devmon.analysis.derive.directions` compares those of steps.

    NaN where the states of a layer are all the same. A direction that tells classes apart need not be what the model
    uses: steer with it (`Steering`). Cost: one pass of all prompts. Raises InstrumentError for a model or a site that
    is not known, DataError for fewer than 8 pairs.
    """

    positive: Tensor
    negative: Tensor
    site: str = "resid_post"
    shuffles: int = 20
    seed: int = 0
    layout: Layout | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            object.__setattr__(self, name, probe_tokens(getattr(self, name), "ConceptDirection", name, shortest=1))
        if self.positive.shape != self.negative.shape or len(self.positive) < 8 or self.shuffles < 2:
            raise DataError(
                "ConceptDirection needs at least 8 pairs, positive and negative of one shape (pair, pos), and two "
                f"shuffles; got {tuple(self.positive.shape)}, {tuple(self.negative.shape)} and {self.shuffles}"
            )
        if not isinstance(self.site, str) or self.site == "pattern":
            raise DataError(
                f"ConceptDirection needs the name of a site of vectors, such as 'resid_post'; got {self.site!r}"
            )

    def cost(self) -> Cost:
        return Cost(forwards=2 * len(self.positive), positions=self.positive.shape[1])

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        layers = self._states(snapshot)  # (layer, pair, 2, d), of the concept first
        order = torch.randperm(len(self.positive), generator=self._generator("split")).numpy()
        half = len(order) // 2
        fitted, judged = np.sort(order[:half]), np.sort(order[half:])
        turns = torch.randint(2, (self.shuffles, half), generator=self._generator("turns")).numpy() * 2 - 1
        found = [self._layer(states, fitted, judged, turns) for states in layers]

        rows = Rows(headline=["auc"], error="standard error over held-out pairs")
        dims = ("estimator", "layer")
        whole = {name: np.stack([each[name] for each in found], -1) for name in found[0]}
        mean, size = whole["auc"].mean(0), len(judged)
        se = whole["auc"].std(0, ddof=1) / np.sqrt(size)
        groups = clustered_groups(whole["auc"], np.ones(size))
        flat = "NaN where all states are the same"
        label = "held-out area under the curve of the direction"
        rows.put("auc", dims, mean, se, label, units="share", smallest_change=0.05, nan=flat, replicates=groups)
        for name, text, unit in (
            ("auc_shuffled", "the same, of pairs turned round at random", "share"),
            ("auc_shuffled_high", f"the same, {HIGH:.0%} quantile", "share"),
            ("cosine_halves", "cosine between directions of two halves of the pairs", "1"),
            ("cosine_mean", "cosine to the mean difference", "1"),
        ):
            rows.put(name, dims, whole[name], None, text, units=unit, nan=flat)
        width = layers.shape[-1]
        text = "mean absolute cosine of random directions"
        rows.put("cosine_random", (), np.sqrt(2 / (np.pi * width)), None, text, units="1")
        text = "length of the mean difference over that of the states"
        rows.put("length", "layer", whole["length"], None, text, units="share", nan=flat)
        directions = whole["direction"].transpose(0, 2, 1).astype(np.float32)  # (estimator, layer, d)
        rows.put("direction", (*dims, "dimension"), directions, None, "direction", units="1", nan=flat)
        return rows.dataset(
            estimator=np.array(ESTIMATORS, dtype=object), layer=np.arange(len(layers)), dimension=np.arange(width)
        )

    def _states(self, snapshot: Snapshot) -> np.ndarray:
        sides = []
        for prompts in (self.positive, self.negative):
            _, reads = activations(snapshot, prompts, [self.site], type(self).__name__, self.layout, self.batch_size)
            sides.append(reads.stack(self.site)[:, :, -1].flatten(2).double().cpu().numpy())
        states = np.stack(sides, 2)
        if not np.isfinite(states).all():
            raise InstrumentError(
                f"ConceptDirection: states of {self.site!r} are not finite in {int((~np.isfinite(states)).sum())} "
                "numbers: measure a step before the weights are lost"
            )
        return states

    def _layer(
        self, states: np.ndarray, fitted: np.ndarray, judged: np.ndarray, turns: np.ndarray
    ) -> dict[str, np.ndarray]:
        """What is put of one layer, from its states (pair, 2, d); `auc` by held-out pair."""
        differences = states[fitted, 0] - states[fitted, 1]
        held_out = states[judged]

        # The directions lie in the span of the differences: all but the first product is of (pair, pair) matrices.
        left, values, right = np.linalg.svd(differences, full_matrices=False)
        if not values[0] > 1e-12 * np.abs(states).max():
            return self._nothing(len(judged), states.shape[-1])
        inside = left * values  # (pair, pair), the differences in the basis `right`
        alone = np.ones((1, len(fitted)))
        own = _fit(inside, alone)[:, 0] @ right  # (estimator, d)
        shuffled = _fit(inside, turns) @ right  # (estimator, shuffle, d)

        # Halves of the pairs, each in its own span.
        ends = []
        for part in (differences[::2], differences[1::2]):
            left, values, basis = np.linalg.svd(part, full_matrices=False)
            ends.append(_fit(left * values, np.ones((1, len(part))))[:, 0] @ basis)
        chance = np.stack([[_auc(held_out @ each).mean() for each in by_turn] for by_turn in shuffled])
        return {
            "auc": np.stack([_auc(held_out @ each) for each in own], -1),
            "auc_shuffled": chance.mean(1),
            "auc_shuffled_high": np.quantile(chance, HIGH, axis=1),
            "cosine_halves": (ends[0] * ends[1]).sum(-1),
            "cosine_mean": own @ own[0],
            "length": np.linalg.norm(differences.mean(0)) / np.linalg.norm(states[fitted], axis=-1).mean(),
            "direction": own,
        }

    def _nothing(self, judged: int, width: int) -> dict[str, np.ndarray]:
        by_estimator = {
            name: np.full(3, np.nan) for name in ("auc_shuffled", "auc_shuffled_high", "cosine_halves", "cosine_mean")
        }
        rest = {"length": np.array(np.nan), "direction": np.full((3, width), np.nan)}
        return by_estimator | rest | {"auc": np.full((judged, 3), np.nan)}

    def _generator(self, what: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, "ConceptDirection", what))


def _fit(differences: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """The directions (estimator, turn, d) of length 1 of differences (pair, d), each times the signs (turn, pair)."""
    mean = turns @ differences / len(differences)

    # Signs do not change the singular vector, only which way most differences point.
    first = np.linalg.svd(differences, full_matrices=False)[2][0]
    most = np.sign((turns * np.sign(differences @ first)).sum(1))
    svd = np.where(most == 0, np.sign(mean @ first), most)[:, None] * first
    scaled = differences / np.sqrt((differences**2).sum(1).mean())
    logistic = np.stack([_logistic(signs[:, None] * scaled) for signs in turns])
    found = np.stack([mean, svd, logistic])
    return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-300)


def _logistic(rows: np.ndarray) -> np.ndarray:
    """argmin_w mean log(1 + exp(-rows w)) + PENALTY/2 ‖w‖² by Newton's steps, halved while they do not descend."""

    def loss(weights: np.ndarray) -> float:
        return float(np.logaddexp(0, -rows @ weights).mean() + PENALTY / 2 * weights @ weights)

    weights = np.zeros(rows.shape[1])
    for _ in range(NEWTON):
        wrong = 1 / (1 + np.exp(np.clip(rows @ weights, -500, 500)))
        slope = -rows.T @ wrong / len(rows) + PENALTY * weights
        bend = (rows.T * (wrong * (1 - wrong))) @ rows / len(rows) + PENALTY * np.eye(len(weights))
        step, size = np.linalg.solve(bend, slope), 1.0
        while loss(weights - size * step) > loss(weights) and size > 1e-6:
            size /= 2
        weights = weights - size * step
        if np.linalg.norm(slope) < 1e-10:
            break
    return weights


def _auc(scores: np.ndarray) -> np.ndarray:
    """By pair (pair,), what has the area under the curve as its mean and its influence as its deviations, of scores
    (pair, 2): U_k + L_k - A, U_k the share of negatives below positive k, L_k that of positives above negative k."""
    above = (scores[:, None, 0] > scores[None, :, 1]) + 0.5 * (scores[:, None, 0] == scores[None, :, 1])
    return above.mean(1) + above.mean(0) - above.mean()
