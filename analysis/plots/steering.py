"""The curves of steering: what a direction does to an answer and to other text, beside random directions."""

from __future__ import annotations

from typing import cast

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from devmon.analysis.plots.style import COLOURS, Z90, draw_note, step_axis, styled
from devmon.errors import DataError


@styled
def plot_steering(
    dataset: xr.Dataset, direction: int | None = None, *, ax: tuple[Axes, Axes] | None = None
) -> tuple[Figure, tuple[Axes, Axes]]:
    """Left the slope of the answer at each strength with its 90% band, right the divergence on other text.

    `dataset` is what `devmon.instruments.Steering` stores, over steps; `direction` one of its, by default the one of
    steepest slope at the last step. The grey band holds 90% of random directions, were their slopes normal; the grey
    line on the right is their mean divergence at the largest strength.

    Raises DataError for another dataset or direction.
    """
    if not {"slope", "slope_random_sd", "kl"} <= set(dataset.data_vars) or "step" not in dataset.dims:
        raise DataError("plot_steering draws slope, slope_random_sd and kl over steps, as a Steering stores them")
    names = dataset["direction"].values.tolist()
    if direction is not None and direction not in names:
        raise DataError(f"direction {direction} was not measured; there are {names}")
    steepest = np.nan_to_num(np.abs(dataset["slope"].isel(step=-1).transpose("direction", "strength").values)).max(1)
    which = names.index(direction) if direction is not None else int(steepest.argmax())
    own, steps = dataset.isel(direction=which), dataset["step"].values
    fig = Figure(figsize=(10.4, 3.6), layout="constrained") if ax is None else cast(Figure, ax[0].figure)
    left, right = fig.subplots(1, 2) if ax is None else ax

    # the direction at each strength, behind it what random ones do
    spread = Z90 * dataset["slope_random_sd"].transpose("step", "strength").values[:, 0]
    left.fill_between(steps, -spread, spread, color="#bbbbbb", alpha=0.5, lw=0, label="90% of random directions")
    for colour, strength in zip(COLOURS, dataset["strength"].values, strict=False):
        at = own.sel(strength=strength)
        for axes, name in ((left, "slope"), (right, "kl")):
            value, band = at[name].values, Z90 * at[f"{name}_se"].values
            axes.plot(steps, value, color=colour, marker="o", label=f"{strength:g} σ")
            axes.fill_between(steps, value - band, value + band, color=colour, alpha=0.2, lw=0)
    null = dataset["kl_random"].transpose("step", "strength").values[:, -1]
    right.plot(steps, null, color="#777777", ls="--", label=f"random, {dataset['strength'].values[-1]:g} σ")
    for axes, title, unit in (
        (left, f"Steering along direction {names[which]}", "slope (nats per unit)"),
        (right, "Side effect on other text", "divergence (nats per token)"),
    ):
        step_axis(axes, steps)
        axes.set(title=title, ylabel=unit)
        axes.legend(loc="best")
    draw_note(left, f"p {float(own['slope_p'].isel(step=-1).min()):.2g} at the last step")
    return fig, (left, right)
