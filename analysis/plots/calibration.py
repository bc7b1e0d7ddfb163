"""The figure of a calibration: λ̂ of its trials against the step size and the localisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import offset_copy

from devmon.analysis.derive.verdicts import accepted
from devmon.analysis.plots.style import (
    COLOURS,
    LINES,
    REJECTED,
    Z90,
    draw_legend,
    draw_note,
    figure_of,
    log_ticks,
    styled,
)


@styled
def plot_calibration(
    trials: xr.Dataset, fits: Sequence[Mapping[str, Any]] = (), *, ax: Sequence[Axes] | None = None
) -> tuple[Figure, list[Axes]]:
    """λ̂ of a calibration's trials against lr and, on a second axis, against gamma; upright lines mark what was chosen.

    A line joins the accepted trials of one model (0 is the late checkpoint, 1 the middle one) and one gamma, or one lr
    on the second axis; a trial that none of these holds is on the first. Where settings were tried twice, the first is
    faint. Bars are ±1.64 standard errors, hollow marks rejected trials, at the edge where they are off the scale of the
    accepted ones. Models stand side by side by a few points. `fits` are λ̂ in gamma, one a model, as a calibration
    stores them (`gamma`, `value`): dashed on the second axis.
    """
    if ax is None:
        fig = Figure(figsize=(8.6, 3.7), layout="constrained")
        axes = list(fig.subplots(1, 2, sharey=True))
    else:
        axes = list(ax)
        fig = figure_of(axes[0])
    table = {str(name): np.asarray(trials[name].values) for name in trials.data_vars}
    by_lr, by_gamma = _lines(table, "lr", "gamma"), _lines(table, "gamma", "lr")
    joined = {i for line in by_lr + by_gamma for i in line}
    by_lr += [np.array([i]) for i in range(trials.sizes["trial"]) if i not in joined]
    handles: dict[str, Any] = {}
    for panel, lines, along, fixed in ((axes[0], by_lr, "lr", "gamma"), (axes[1], by_gamma, "gamma", "lr")):
        handles |= _trials(panel, table, lines, along, fixed, trials.attrs)
    for model, fit in enumerate(fits):
        curve = axes[1].plot(fit["gamma"][2:], fit["value"][2:], color=COLOURS[model % 7], ls="--", lw=1, zorder=1)
        handles |= {} if model else {"fit": curve[0]}
        curve[0].set_label("fit of λ̂ in gamma")
    axes[0].set_ylabel("LLC")
    if ax is None:
        fig.legend(handles=list(handles.values()), loc="outside lower center", ncols=4, handlelength=2.4)
    else:
        draw_legend(axes[-1], list(handles.values()))
    return fig, axes


def _lines(table: dict[str, np.ndarray], along: str, fixed: str) -> list[np.ndarray]:
    """Trials that differ in `along` alone, as indices in its order; those without another such trial are left out."""
    keys = list(zip(*(table[name].tolist() for name in ("model", fixed, "nbeta") if name in table), strict=True))
    groups = (np.array([i for i, other in enumerate(keys) if other == key]) for key in sorted(set(keys)))
    ordered = [group[np.argsort(table[along][group], kind="stable")] for group in groups]
    return [line for line in ordered if len(set(table[along][line])) > 1]


def _trials(ax: Axes, table: dict[str, np.ndarray], lines: Sequence[np.ndarray], along: str, fixed: str,
            attrs: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    """One axis of `plot_calibration`; returns the legend's handles by their labels."""
    values, half = table["llc"].astype(float), Z90 * np.nan_to_num(table["se"].astype(float), posinf=0, neginf=0)
    verdicts = table["verdict"].astype(str)
    good = accepted(verdicts) & np.isfinite(values)
    # the axis is that of the accepted trials; a rejected trial beyond it is drawn at the edge
    scale = good if good.any() else np.isfinite(values)
    low, high = (float((values - half)[scale].min()), float((values + half)[scale].max())) if scale.any() else (0, 1)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    ax.set_ylim(low - margin, high + margin)
    at = np.clip(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low - margin, high + margin)
    others = sorted({table[fixed][i] for line in lines for i in line})
    handles: dict[str, Any] = {}
    # a line joins the trials of one checkpoint; checkpoints are set a few points apart, so that none hides another
    for line in lines:
        model, other = int(table["model"][line[0]]), table[fixed][line[0]]
        label = ("late checkpoint", "middle checkpoint")[model] if model < 2 else f"checkpoint {model}"
        look: dict[str, Any] = {
            "color": COLOURS[model % 7],
            "ls": LINES[others.index(other) % 4],
            "marker": "o",
            "ms": 4,
        }
        label += f", {fixed} {other:.3g}" if len(others) > 1 else ""
        aside = offset_copy(ax.transData, figure_of(ax), x=4 * model, units="points")
        fits = line[good[line]]
        # of trials of the same settings the last was the longest: the earlier ones are faint
        last = np.append(table[along][fits][1:] != table[along][fits][:-1], True)[: len(fits)]
        for here, faint in ((fits[~last], {"alpha": 0.35, "ls": ""}), (fits[last], {})):
            bars: dict[str, Any] = look | faint | {"capsize": 2, "elinewidth": 1, "transform": aside}
            if here.size:
                ax.errorbar(table[along][here], values[here], half[here], **bars)
        handles[label] = Line2D([], [], label=label, **look)
        for i in line[~good[line]]:
            hollow: dict[str, Any] = {"marker": REJECTED.get(verdicts[i], "o"), "ls": "", "mfc": "white", "ms": 6}
            ax.plot(
                table[along][i], at[i], mec=look["color"], mew=1.4, clip_on=False, zorder=5, transform=aside, **hollow
            )
            label = f"rejected, {verdicts[i]}"
            handles[label] = Line2D([], [], mec="#555555", label=label, **hollow)
    # the chosen setting may lie outside the trials of this axis, which reaches as far as it
    tried = np.array([table[along][i] for line in lines for i in line] + [attrs[along]] * (along in attrs), dtype=float)
    if along in attrs:
        ax.axvline(attrs[along], color="#333333", lw=1, ls=":", zorder=1)
        handles["chosen"] = Line2D([], [], color="#333333", lw=1, ls=":", label="chosen")
        draw_note(ax, f"chosen: {attrs[along]:.3g}")
    ax.set_xscale("log")
    ax.set_xlabel(f"{along} (log scale)")
    ax.set_title(f"λ̂ by {along}" + (f" at {fixed} {others[0]:.3g}" if len(others) == 1 else ""))
    if tried.size:
        ax.set_xlim(tried.min() / 1.25, tried.max() * 1.25)
        log_ticks(ax, *ax.get_xlim(), zero=False)
    return handles
