"""The plateaus of `recipes/superposition.py`: their names along a run, λ̂ on the way and at the critical points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from devmon import Trajectory
from devmon.analysis import Detector, detect, phase_types, series_of
from devmon.analysis.transitions.phases import critical_n
from devmon.sampling import estimate_llc
from devmon.testing.exact import gibbs_quadratic
from devmon.testing.superposition import Plateau, errors, plateau, plateaus

FEATURES = 6
NBETA, GAMMA = 145.0, 10.0  # of λ̂ on the way: n / log n of the 1000 examples, and what keeps the chains at the plateau


class Toy(nn.Module):
    """ReLU(Wᵀ W x + b) of x (batch, features)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.hidden = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.hidden.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.hidden(x) @ self.hidden.weight + self.bias)


def named(name: str) -> Plateau:
    """The critical point "5+" of FEATURES features."""
    return plateau(int(name[0]), name.count("+"), FEATURES)


def names_of(run: Mapping[str, xr.Dataset]) -> list[str]:
    """The name of the plateau at each step of the watch `loss`, "" between plateaus."""
    rows = run["loss"]
    pairs = zip(rows["sides"].values.astype(int), rows["positive"].values.astype(int), strict=True)
    return [f"{sides}{'+' * positive}" if sides else "" for sides, positive in pairs]


def path_of(run: Mapping[str, xr.Dataset]) -> list[str]:
    """The plateaus in the order of their visits, those that lasted a twentieth of the run without a gap."""
    names, steps = names_of(run), run["loss"]["step"].values
    path: list[str] = []
    start = 0
    for i, name in enumerate(names):
        if name != names[start]:
            start = i
        if name and steps[i] - steps[start] >= steps[-1] / 20 and path[-1:] != [name]:
            path.append(name)
    return path


def rows_of_plateaus(runs: Mapping[str, Mapping[str, xr.Dataset]]) -> dict[str, dict[str, Any]]:
    """For each plateau that was visited: exact and measured level, and λ̂ on the way, over seeds."""
    rows = {corner.name: _row(corner, runs) for corner in plateaus(FEATURES)}
    return {name: row for name, row in rows.items() if row["seeds"]}


def _row(corner: Plateau, runs: Mapping[str, Mapping[str, xr.Dataset]]) -> dict[str, Any]:
    levels, estimates = [], []
    for run in runs.values():
        if corner.name not in path_of(run):  # passed through at most
            continue
        loss = run["loss"]["loss"]
        inside = [int(s) for s, name in zip(loss["step"].values, names_of(run), strict=True) if name == corner.name]
        levels.append(float(loss.sel(step=inside).mean()))
        (llc,) = (s for s in series_of(run) if s.name == "llc/llc")  # type: ignore[arg-type]
        good = np.isin(llc.steps, inside) & ~np.asarray(llc.rejected)
        estimates += [float(np.mean(llc.values[good]))] if good.any() else []
    known = not math.isnan(corner.llc)
    return {
        "seeds": len(levels),
        "level": corner.level,
        "measured": float(np.mean(levels)) if levels else math.nan,
        "λ": corner.llc,
        "λ̂ on the way": float(np.mean(estimates)) if estimates else math.nan,
        "sd over seeds": float(np.std(estimates, ddof=1)) if len(estimates) > 1 else math.nan,
        "law": gibbs_quadratic(np.maximum(corner.curvatures(), 0), NBETA, GAMMA) if known else math.nan,
    }


def exact_point_llc(name: str, *, draws: int = 120, seed: int = 0) -> xr.Dataset:
    """λ̂ at the critical point of that name, on the population loss: nbeta so large and gamma such that the law is
    that of λ itself, up to a percent, while the chains stay where the landscape is that of the point."""

    def loss(model: Any, active: Tensor) -> Tensor:
        return errors(model.hidden.weight, model.bias)[active[:, 0].long()]

    index = torch.arange(FEATURES)[:, None]
    return estimate_llc(
        Toy(*named(name).point()),
        loss,
        index,
        nbeta=1e6,
        gamma=1e3,
        lr=4e-7,
        chains=8,
        draws=draws,
        steps_per_draw=5,
        batch_size=FEATURES,
        control_variate=False,
        float64=True,
        seed=seed,
    )


def transitions_of(run: Trajectory) -> list[dict[str, Any]]:
    """Every transition that the detector finds in loss and λ̂, with its type and the names before and after it."""
    curves = [curve for curve in series_of(run) if curve.name in ("loss/loss", "llc/llc")]
    names = dict(zip(run["loss"]["step"].values.tolist(), names_of(run), strict=True))
    rows = []
    for phase in phase_types(curves, detect(curves, Detector(n_null=99))):
        before = [name for step, name in names.items() if name and step <= phase.start]
        after = [name for step, name in names.items() if name and step >= phase.end]
        crossing = None if phase.crossing is None else {"n": phase.crossing.n, "interval": phase.crossing.interval}
        row = {"from": before[-1] if before else "", "to": after[0] if after else ""}
        row |= {"start": phase.start, "end": phase.end, "type": phase.kind, "probabilities": phase.probabilities}
        rows.append(row | {"crossing": crossing, "note": phase.note})
    return rows


def predicted_crossings() -> dict[str, float]:
    """The n from which the later polygon has the lower free energy, of pairs whose λ are known and differ."""
    known = [corner for corner in plateaus(FEATURES) if not math.isnan(corner.llc)]
    return {
        f"{a.name} → {b.name}": float(critical_n(b.level - a.level, b.llc - a.llc))
        for a in known
        for b in known
        if b.level < a.level and b.llc > a.llc
    }
