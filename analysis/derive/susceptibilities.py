"""Principal components of susceptibilities over a run, their drift, and changes of sign."""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy.linalg import subspace_angles
from scipy.special import ndtr

from devmon.errors import DataError

NOISE_DRAWS = 20  # noisy copies of a step's matrix whose angles to it are the null; knows their mean to a fifth


def on_the_whole(dataset: xr.Dataset, whole: str) -> xr.DataArray:
    """χ with ℓ − L centred on its mean where the component `whole`, the whole model, is free: the papers' form.

    χ + λ̂_C nβ (E_whole[ℓ − L] − E_C[ℓ − L]), (…, component, token): beside the answer of the component's own law it
    counts how likely the law of all parameters finds the others at rest at w* (Baker et al. 2025, 2504.18274, where φ
    holds a delta function). Its noise is that of `whole` for all components. Raises DataError without that component.
    """
    if "susceptibility" not in dataset or whole not in dataset["component"].values:
        raise DataError(f"on_the_whole needs susceptibilities of a component {whole!r} in which all parameters move")
    away = dataset["token_llc"].astype(np.float64) - dataset["llc"]
    moved = away.sel(component=whole, drop=True) - away
    return dataset["susceptibility"].astype(np.float64) + dataset["llc"] * moved


def susceptibility_components(dataset: xr.Dataset, count: int = 3, *, seed: int = 0) -> xr.Dataset:
    """Principal components of the kept tokens' χ as points in the space of components of the model.

    `dataset` is the watch of `devmon.instruments.Susceptibilities`, (step, component, token). Each component's χ is
    divided by its root mean square over tokens and steps, so that none rules by size; one basis is fitted to the tokens
    of all steps together. Steps at which a χ is not finite are left out. The result has

    - `loading` (pc, component), 1: the unit vectors of that basis, the largest entry positive
    - `score` (step, token, pc), 1: the tokens in it
    - `centre`, `spread` (step, pc), 1: mean and standard deviation of the scores over tokens
    - `explained` (step, pc), share: of the variance over that step's own tokens
    - `noise` (step), share: of that variance which the errors of χ explain: above a half, a picture of noise
    - `angle` (step, pc), degrees: principal angles between the step's own first components and the basis, 0 where
      they span the same. `angle_null`: those of copies of the step with as much noise again, against the step

    Raises DataError without steps, for fewer tokens or components than `count`, and for χ that do not vary.
    """
    values, errors, steps = _matrix(dataset, count)
    scale = np.sqrt((values**2).mean((0, 1)))
    if not (scale > 0).all():
        raise DataError("susceptibility_components: the susceptibilities of a component are all 0")
    values, errors = values / scale, errors / scale

    # one basis for all steps: what differs between steps is then the run's, not the basis's
    pooled = values.reshape(-1, values.shape[2])
    basis = _basis(pooled, count)
    score = (values - pooled.mean(0)) @ basis.T
    about = values - values.mean(1, keepdims=True)
    total = (about**2).sum((1, 2))
    own = [_basis(step, count) for step in values]
    angle = np.array([_angles(mine, basis) for mine in own])

    # the null: how far as much noise again turns a step's own components
    generator = np.random.default_rng(seed)
    null = np.zeros_like(angle)
    for i, (step, error, mine) in enumerate(zip(values, errors, own, strict=True)):
        noisy = (step + error * generator.normal(size=step.shape) for _ in range(NOISE_DRAWS))
        null[i] = np.mean([_angles(_basis(each, count), mine) for each in noisy], axis=0)
    explained = ((about @ basis.T) ** 2).sum(1) / total[:, None]
    words = {"units": "1"}
    return xr.Dataset(
        {
            "loading": (("pc", "component"), basis, words | {"long_name": "loading of a component"}),
            "score": (("step", "token", "pc"), score, words | {"long_name": "score of a token"}),
            "centre": (("step", "pc"), score.mean(1), words | {"long_name": "mean score"}),
            "spread": (("step", "pc"), score.std(1), words | {"long_name": "standard deviation of the scores"}),
            "explained": (("step", "pc"), explained, {"long_name": "explained variance", "units": "share"}),
            "noise": ("step", (errors**2).sum((1, 2)) / total, {"long_name": "variance of errors", "units": "share"}),
            "angle": (("step", "pc"), angle, {"long_name": "angle to the common basis", "units": "degrees"}),
            "angle_null": (("step", "pc"), null, {"long_name": "angle that noise makes", "units": "degrees"}),
        },
        coords={"step": steps, "pc": np.arange(1, count + 1), "component": dataset["component"].values}
        | {name: dataset[name] for name in ("token", "label", "probe_of") if name in dataset.coords},
        attrs={"headline": ["spread"]},
    )


def sign_changes(dataset: xr.Dataset, level: float = 0.05) -> xr.Dataset:
    """Series of `mean` (step, component, probe) that change sign, as intervals of steps, (change,).

    - `p`, 1: of the null that χ never has both signs: the larger of the two least one-sided p-values, times the number
      of steps and the number of series
    - `component`, `probe`; `after`, `before`: the change is after the last sure step of the old sign and before the
      first of the new, step numbers; `to`: the new sign, 1 or −1

    A step is sure where its own one-sided p-value, so corrected, is below `level`. Those with p < `level` are listed,
    in order of `before`; there may be none. The errors' tails are taken as normal. Raises DataError without steps.
    """
    if "mean" not in dataset or set(dataset["mean"].dims) != {"step", "component", "probe"}:
        raise DataError("sign_changes needs mean over (step, component, probe), as Susceptibilities stores it")
    mean, error = (dataset[name].transpose("step", "component", "probe") for name in ("mean", "mean_se"))
    steps, z = mean["step"].values, np.asarray(mean.values / error.values, dtype=np.float64)
    tries = np.prod(z.shape)
    rows = []
    for (i, component), (j, probe) in (
        (a, b) for a in enumerate(mean["component"].values) for b in enumerate(mean["probe"].values)
    ):
        one = z[:, i, j]
        if not np.isfinite(one).any():
            continue
        p = float(min(1.0, tries * max(ndtr(-np.nanmax(one)), ndtr(np.nanmin(one)))))
        sure = np.flatnonzero(np.nan_to_num(ndtr(-np.abs(one)), nan=1.0) * tries < level)
        pairs = [(a, b) for a, b in zip(sure[:-1], sure[1:], strict=True) if one[a] * one[b] < 0] if p < level else []
        rows += [(steps[a], steps[b], int(np.sign(one[b])), p, str(component), str(probe)) for a, b in pairs]
    rows.sort(key=lambda row: (row[1], row[0]))
    names, units = ("after", "before", "to", "p", "component", "probe"), ("step", "step", "1", "1", "", "")
    kinds = (np.int64, np.int64, np.int64, np.float64, object, object)
    return xr.Dataset({
        name: ("change", np.array([row[k] for row in rows], dtype=kinds[k]), {"units": units[k], "long_name": name})
        for k, name in enumerate(names)
    })  # fmt: skip


def _matrix(dataset: xr.Dataset, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """χ and its errors (step, token, component) and the steps, those with a χ that is not finite left out."""
    dims = ("step", "token", "component")
    if "susceptibility" not in dataset or set(dataset["susceptibility"].dims) != set(dims):
        raise DataError("expected susceptibility over (step, component, token), as Susceptibilities stores it")
    names = ("susceptibility", "susceptibility_se")
    values, errors = (dataset[name].transpose(*dims).values.astype(np.float64) for name in names)
    good = np.isfinite(values).all((1, 2))
    if not good.any() or count < 1 or min(values.shape[1:]) < count:
        raise DataError(
            f"{count} components need a step that is finite and as many tokens and components of the model, got "
            f"{int(good.sum())} steps, {values.shape[1]} tokens and {values.shape[2]} components"
        )
    return values[good], np.nan_to_num(errors[good]), dataset["step"].values[good]


def _basis(points: np.ndarray, count: int) -> np.ndarray:
    """The first right singular vectors (pc, component) of centred points, each with its largest entry positive."""
    rows = np.linalg.svd(points - points.mean(0), full_matrices=False)[2][:count]
    largest = rows[np.arange(len(rows)), np.abs(rows).argmax(1)]
    return np.asarray(rows * np.where(largest < 0, -1.0, 1.0)[:, None])


def _angles(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Principal angles of the row spaces in degrees, the smallest first."""
    return np.asarray(np.degrees(subspace_angles(one.T, two.T)[::-1]))
