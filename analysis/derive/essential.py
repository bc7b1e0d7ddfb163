"""Essential dynamics: the path of a network's outputs during training, in its first principal components."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from devmon.errors import DataError

Array = NDArray[np.float64]


def essential_dynamics(
    values: Any,
    steps: Any = None,
    *,
    components: int = 3,
    smoothing: float = 2.0,
    walks: int = 200,
    level: float = 0.05,
    seed: int = 0,
) -> xr.Dataset:
    """Principal components over time of outputs on fixed inputs, and where their path turns, beside random walks.

    `values` is (step, ...): outputs at each step, such as `trajectory["sketch"]["outputs"]` of a
    `Sketch(outputs=True)`; `steps` are optimizer steps, by default the coordinate `step`. Hoogland et al. 2024
    (2402.02364): with all other dimensions taken as one, γ(t) are the scores of the first `components`, smoothed by a
    Gaussian of `smoothing` checkpoints. The result has

    - `pc` (step, component): γ, in the units of the values times √size; `raw_pc` (step, component): unsmoothed
    - `explained` (component): share of the variance over time
    - `speed` (step): distance, in the plane of the first two components, between the neighbours of a checkpoint over
      the steps between them
    - `radius` (step) and `centre` (step, axis) of the osculating circle in that plane, through the checkpoint and its
      neighbours; infinite and NaN on a straight stretch, NaN at both ends
    - `turning` (step): the angle in [0, π] between the chords that lead to and from the checkpoint over `window` (an
      attribute) checkpoints: 0 straight on, π straight back. A cusp of γ has a small radius and a large turning.

    PCA of a random walk draws cosines: component k of a walk in many dimensions is cos(π k (i + ½) / n) with a share
    of 6 / (π k)² of the variance (Antognini & Sohl-Dickstein 2018, 1806.08805), with turns of its own. So everything
    is compared with `walks` simulated Brownian walks of as many checkpoints, with the lengths of the observed moves
    and as many dimensions as the *random* part of the moves has (attribute `dimension`: from how alike the differences
    of successive moves are, which leave out what is smooth). Without walks all of these are NaN and false:

    - `explained_p` (component): share of walks that explain as much; `explained_reference`: their mean
    - `cosine` (component): R² of γ on that cosine; `cosine_p`: share of walks that follow it no better, small where
      the path is no walk; `cosine_reference`: their mean
    - `turning_p` (step): share of walks whose largest turning (each place in standard deviations of the walks there)
      reaches that of this checkpoint: corrected for the number of checkpoints
    - `cusp` (step): turning_p <= `level` and no larger turning within the window

    Walks whose moves keep their direction over several checkpoints (momentum) explain more and follow cosines less
    well: a small explained_p says that the path is no Brownian walk, not that it has stages. The number of checkpoints
    and how they are spaced shape γ: on log-spaced steps the start fills the picture. Each PCA is of one run; joint ones
    need the runs stacked in the other dimensions. What is tested is the *shape* of the path; that it moves at all is
    `drift`'s to say.

    Raises DataError for fewer than 8 steps, steps that do not increase, values that are not finite and paths at rest.
    """
    path, steps = _checked(values, steps)
    count = len(path)
    if not (1 <= components < count and smoothing >= 0 and walks >= 0):
        raise DataError(
            f"essential_dynamics needs 1 <= components < {count} steps, smoothing >= 0 and walks >= 0; got "
            f"{components}, {smoothing}, {walks}"
        )
    # the plane of the first two components is always needed; a chord spans the smoothing on either side
    components = max(components, 2)
    window = max(1, round(2 * smoothing))
    shape = _shape(path @ path.T, components, smoothing, window)
    # walks with moves as long as these, in as many dimensions as their random part has
    moves = np.diff(path, axis=0)
    dimension = _dimension(moves)
    lengths = np.linalg.norm(moves, axis=1)
    generator = np.random.default_rng(seed)
    null = [_shape(_walk(lengths, dimension, generator), components, smoothing, window) for _ in range(walks)]
    speed, radius, centre = _circles(shape.smooth[:, :2], steps)
    p = _compare(shape, null, window)
    # of neighbouring checkpoints that turn together only the sharpest is a cusp
    cusp = (p["turning_p"] <= level) & (shape.turning >= _neighbourhood(np.nan_to_num(shape.turning), window))
    ratio = {"units": "1"}
    place = {"units": "output"}
    result = xr.Dataset(
        {
            "pc": (("step", "component"), shape.smooth, {"long_name": "smoothed principal component"} | place),
            "raw_pc": (("step", "component"), shape.raw, {"long_name": "principal component"} | place),
            "explained": ("component", shape.explained, {"long_name": "share of the variance"} | ratio),
            "cosine": ("component", shape.cosine, {"long_name": "R² on the cosine of a random walk"} | ratio),
            "speed": ("step", speed, {"long_name": "speed in the first two components", "units": "output per step"}),
            "radius": ("step", radius, {"long_name": "radius of the osculating circle"} | place),
            "centre": (("step", "axis"), centre, {"long_name": "centre of the osculating circle"} | place),
            "turning": ("step", shape.turning, {"long_name": "change of direction", "units": "rad"}),
            "cusp": ("step", cusp, {"long_name": "a turn that random walks do not make"} | ratio),
        },
        coords={"step": steps, "component": np.arange(1, components + 1), "axis": [1, 2]},
        attrs={"window": window, "dimension": dimension, "walks": walks, "seed": seed},
    )
    for name, numbers in p.items():
        dims = "step" if name == "turning_p" else "component"
        long_name = "p-value against random walks" if name.endswith("_p") else "mean over random walks"
        result[name] = (dims, numbers, {"long_name": long_name} | ratio)
    return result


class _Shape(NamedTuple):
    """raw and smooth (step, component), explained and cosine (component,), turning (step,)."""

    raw: Array
    smooth: Array
    explained: Array
    cosine: Array
    turning: Array


def _checked(values: Any, steps: Any) -> tuple[Array, Array]:
    if isinstance(values, xr.DataArray):
        if "step" not in values.dims:
            raise DataError(f"essential_dynamics needs values over step, got dimensions {values.dims}")
        values = values.transpose("step", ...)
        steps = values["step"].values if steps is None and "step" in values.coords else steps
    path = np.asarray(values, dtype=np.float64)
    path = path.reshape(len(path), -1) if path.ndim > 1 else path[:, None]
    times = np.arange(len(path), dtype=np.float64) if steps is None else np.asarray(steps, dtype=np.float64)
    if len(path) < 8 or times.shape != (len(path),) or not (np.diff(times) > 0).all():
        raise DataError(
            f"essential_dynamics needs 8 values at increasing steps, got {len(path)} values and steps of shape "
            f"{times.shape}: sort them and keep one a step"
        )
    if not np.isfinite(path).all():
        bad = times[~np.isfinite(path).all(1)]
        raise DataError(f"essential_dynamics needs finite values, they are not at step {bad[0]:g}: leave it out")
    path = path - path.mean(0)
    if not path.any():
        raise DataError("essential_dynamics needs a path that moves, all values are the same at all steps")
    return path, times


def _shape(gram: Array, components: int, smoothing: float, window: int) -> _Shape:
    """What is measured of a path, from the inner products (step, step) of its centred points."""
    from scipy.ndimage import gaussian_filter1d  # slow to import, for all who read a run without outputs

    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    values = np.where(values > 10 * len(values) * np.finfo(float).eps * values[0], values, 0)  # the rest is rounding
    raw = vectors[:, :components] * np.sqrt(values[:components])
    raw = raw * np.where(raw[-1] < 0, -1, 1)  # a sign of its own: components end above 0
    smooth = gaussian_filter1d(raw, smoothing, axis=0, mode="nearest") if smoothing > 0 else raw
    order = np.arange(1, components + 1)
    cosines = np.cos(np.pi * order * (np.arange(len(raw))[:, None] + 0.5) / len(raw))
    size = (raw**2).sum(0) * (cosines**2).sum(0)
    cosine = np.divide((raw * cosines).sum(0) ** 2, size, out=np.full(components, np.nan), where=size > 0)
    return _Shape(raw, smooth, values[:components] / values.sum(), cosine, _turning(smooth[:, :2], window))


def _turning(curve: Array, window: int) -> Array:
    """Angle between the chords before and after each point, NaN where there is none on both sides."""
    turning = np.full(len(curve), np.nan)
    before, after = curve[window:-window] - curve[: -2 * window], curve[2 * window :] - curve[window:-window]
    cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    turning[window:-window] = np.abs(np.arctan2(cross, (before * after).sum(1)))
    return turning


def _circles(curve: Array, steps: Array) -> tuple[Array, Array, Array]:
    """Speed (step,), radius (step,) and centre (step, 2) of the circle through each point and its neighbours."""
    first, last = np.arange(len(curve)) - 1, np.arange(len(curve)) + 1
    first[0], last[-1] = 0, len(curve) - 1
    speed = np.linalg.norm(curve[last] - curve[first], axis=1) / (steps[last] - steps[first])
    radius, centre = np.full(len(curve), np.nan), np.full((len(curve), 2), np.nan)
    a, b = curve[:-2] - curve[1:-1], curve[2:] - curve[1:-1]
    area = 2 * (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])
    weights = ((a**2).sum(1)[:, None] * b - (b**2).sum(1)[:, None] * a) @ np.array([[0.0, -1.0], [1.0, 0.0]])
    bent = area != 0
    away = np.divide(weights, area[:, None], out=np.full_like(weights, np.nan), where=bent[:, None])
    radius[1:-1] = np.where(bent, np.linalg.norm(away, axis=1), np.inf)
    centre[1:-1] = curve[1:-1] + away
    return speed, radius, centre


def _dimension(moves: Array) -> int:
    """How many dimensions the random part of the moves spreads over.

    Differences of successive moves leave out what is smooth. Two of them that share no move are independent, and the
    mean of (u·v)² over unit vectors in q equal dimensions is 1 / q.
    """
    changes = np.diff(moves, axis=0)
    lengths = np.linalg.norm(changes, axis=1)
    moved = lengths > 1e-9 * lengths.max(initial=0)
    unit = np.divide(changes, lengths[:, None], out=np.zeros_like(changes), where=moved[:, None])
    apart = np.subtract.outer(np.arange(len(unit)), np.arange(len(unit))) >= 2
    pairs = apart & moved[:, None] & moved
    alike = float(((unit @ unit.T)[pairs] ** 2).mean()) if pairs.any() else 1.0
    return int(np.clip(round(1 / max(alike, 1e-9)), 2, 4 * len(moves)))


def _walk(lengths: Array, dimension: int, generator: np.random.Generator) -> Array:
    """Inner products of the centred points of one random walk with moves of these lengths."""
    moves = generator.normal(size=(len(lengths), dimension))
    moves *= (lengths / np.linalg.norm(moves, axis=1))[:, None]
    path = np.concatenate([np.zeros((1, dimension)), moves.cumsum(0)])
    path -= path.mean(0)
    return path @ path.T


def _compare(shape: _Shape, null: list[_Shape], window: int) -> dict[str, Array]:
    """p-values of the path's shape against the shapes of the walks, and the walks' means."""
    if not null:
        nothing = np.full(len(shape.explained), np.nan)
        names = ("explained_reference", "explained_p", "cosine_reference", "cosine_p")
        return dict.fromkeys(names, nothing) | {"turning_p": np.full(len(shape.turning), np.nan)}
    explained, cosine = (np.array([getattr(walk, name) for walk in null]) for name in ("explained", "cosine"))
    turning = np.array([walk.turning for walk in null])[:, window:-window]
    mean, sd = turning.mean(0), np.maximum(turning.std(0), 1e-12)
    largest = ((turning - mean) / sd).max(1)
    own = np.full(len(shape.turning), np.nan)
    own[window:-window] = (shape.turning[window:-window] - mean) / sd
    exceeded = (largest[:, None] >= own).sum(0)
    return {
        "explained_reference": explained.mean(0),
        "explained_p": (1 + (explained >= shape.explained).sum(0)) / (1 + len(null)),
        "cosine_reference": cosine.mean(0),
        "cosine_p": np.where(np.isnan(shape.cosine), np.nan, (1 + (cosine <= shape.cosine).sum(0)) / (1 + len(null))),
        "turning_p": np.where(np.isnan(own), np.nan, (1 + exceeded) / (1 + len(null))),
    }


def _neighbourhood(values: Array, window: int) -> Array:
    """The largest value within `window` places of each."""
    padded = np.pad(values, window, constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * window + 1).max(1)
