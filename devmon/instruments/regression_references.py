"""Distance to the known ways of doing linear regression in a context."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import forward
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches, probe_inputs
from devmon.data.regression import pool_predictions, ridge_predictions
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class RegressionReferences(ByContent):
    """How far predictions in a context are from each known predictor of a linear regression, on fixed sequences.

    `inputs` (batch, …) is what the model takes, for which it returns predictions (batch, pair) of `y` (batch, pair),
    each from `x` (batch, pair, dim) and the pairs before; y = w·x + N(0, `noise`). The solutions: ridge regression, the
    posterior mean for w from N(0, 1); zero, which knows nothing of w; and given the `pool` (task, dim) that training
    draws w from, pool, the posterior mean over it (dMMSE of Raventós et al. 2023, 2306.15063). `_se` are over
    sequences.

    - `distance` (solution), squared error per dim: mean (model - solution)² / dim; 0 for a model that is the solution.
      Null: `distance_reference`.
    - `distance_se` (solution), squared error per dim: its standard error.
    - `distance_reference` (solution), squared error per dim: the distance of predicting 0.
    - `regret` (solution), squared error: mean squared error of the model minus that of the solution on the same y.
      Null: 0 for the solution itself.
    - `regret_se` (solution), squared error: its standard error, paired by sequence.
    - `solution_error` (solution), squared error: mean squared error of the solution.
    - `error`, squared error: the model's own.
    - `error_se`, squared error: its standard error.

    With sequences of w that are not in the pool the two posterior means part, and the distances tell which of them the
    model follows. Cost: one forward pass of `inputs`. Raises DataError for data that do not fit each other,
    InstrumentError for a model that returns other shapes.
    """

    inputs: Tensor
    x: Tensor
    y: Tensor
    noise: float
    pool: Tensor | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", probe_inputs(self.inputs, "RegressionReferences"))
        for name in ("x", "y", "pool"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, torch.as_tensor(given).detach().to("cpu", copy=True).contiguous())
        shapes = [tuple(t.shape) for t in (self.x, self.y, self.pool) if t is not None]
        pool_fits = self.pool is None or (self.pool.ndim == 2 and self.pool.shape[1] == self.x.shape[-1])
        if self.x.ndim != 3 or self.y.shape != self.x.shape[:2] or len(self.inputs) != len(self.x) or not pool_fits:
            raise DataError(
                "RegressionReferences needs as many inputs as sequences, x (batch, pair, dim), y (batch, pair) and a "
                f"pool (task, dim) or none, got {len(self.inputs)} inputs and {shapes}"
            )
        if not self.noise > 0:
            raise DataError(f"RegressionReferences needs noise > 0, the variance of y given w·x, got {self.noise}")

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        predicted = torch.cat([self._predict(snapshot, part) for part in minibatches(len(self.x), self.batch_size)])
        solutions = torch.stack(list(self._solutions.values()))  # (solution, batch, pair)
        own, theirs = (predicted - self.y).square(), (solutions - self.y).square()
        pairs, dim = self.x.shape[1:]

        each = np.full(len(self.x), pairs)
        rows, unit = Rows(headline=["distance", "regret"]), "squared error"
        for name, values, units, label in (
            ("distance", (predicted - solutions).square() / dim, f"{unit} per dim", "squared distance to the solution"),
            ("regret", own - theirs, unit, "error of the model minus error of the solution"),
        ):
            total = values.sum(2).T.numpy()  # (batch, solution)
            mean, se = clustered_mean(total, each)
            groups = clustered_groups(total, each)
            rows.put(name, "solution", mean, se, label, units=units, smallest_change=0.01, replicates=groups)
        zero, label = solutions.square().mean((1, 2)) / dim, "squared distance of 0 to the solution"
        rows.put("distance_reference", "solution", zero.numpy(), None, label, units=f"{unit} per dim")
        rows.put("solution_error", "solution", theirs.mean((1, 2)).numpy(), None, "error of the solution", units=unit)
        error, se = clustered_mean(own.sum(1).numpy(), each)
        rows.put("error", (), error, se, "mean squared error of the model", units=unit)
        return rows.dataset(solution=np.array(list(self._solutions), dtype=object))

    def cost(self) -> Cost:
        """Of tokens (batch, pos, …): a pass has as many positions as the second dimension of the inputs."""
        return Cost(forwards=len(self.inputs), positions=self.inputs.shape[1])

    @cached_property
    def _solutions(self) -> dict[str, Tensor]:
        """Predictions (batch, pair) in float64 by solution."""
        known = {"ridge": ridge_predictions(self.x, self.y, self.noise), "zero": torch.zeros_like(self.y).double()}
        if self.pool is None:
            return known
        return {"pool": pool_predictions(self.x, self.y, self.noise, self.pool), **known}

    def _predict(self, snapshot: Snapshot, part: slice) -> Tensor:
        output = forward(snapshot.model, self.inputs[part], "RegressionReferences")
        if not isinstance(output, Tensor) or output.shape != self.y[part].shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InstrumentError(
                f"RegressionReferences needs predictions {tuple(self.y[part].shape)} of y, "
                f"{type(snapshot.model).__name__} returned {got}: wrap the model so that it returns one for each pair"
            )
        return output.detach().double().cpu()
