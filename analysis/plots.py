"""Figures of a run. Every `plot_*(data, *, ax=None) -> (figure, axes)` draws on the axes given or on its own figure.

Bands are ±1.64 standard errors (90%), hollow marks are rejected estimates, a shaded strip is an event's 90% interval
with a line at its estimate. Nothing here shows a window, picks a backend or leaves a global setting changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import offset_copy

from devmon.analysis.derive import elements, units_of

if TYPE_CHECKING:
    from devmon.analysis.detect import Event
    from devmon.analysis.series import Series

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito, without yellow
EVENT_COLOURS = {"jump": "#D55E00", "turn": "#AA4499", "plateau": "#009E73", "bump": "#E69F00"}
EVENT_LINES = {"jump": "-", "turn": "--", "plateau": "-.", "bump": ":"}
REJECTED = {"downhill": "v", "diverged": "^", "not mixed": "s", "non-finite": "X", "rejected": "o"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
Z90 = 1.645  # half-width of a 90% normal interval, in standard errors
MAX_COLUMNS = 100  # checkpoints in a heat map
MAX_POINTS = 400  # points on a line

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def style() -> Iterator[None]:
    """The look of devmon's figures, for the length of a `with` block: matplotlib's own settings come back after it."""
    settings: Any = {
        "figure.dpi": 100,
        "savefig.dpi": 160,
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.5,
        "lines.markersize": 3.5,
        "axes.formatter.useoffset": False,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "devmon",  # the same figure gives the same file
        "text.usetex": False,
        "text.parse_math": False,  # a name with dollar signs is a name
    }
    with matplotlib.rc_context(settings):
        yield


def _styled(draw: Callable[P, R]) -> Callable[P, R]:
    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with style():
            return draw(*args, **kwargs)

    return inside


# ---- one curve over steps ----


@_styled
def plot_series(series: Series, events: Sequence[Event] = (), *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """One series over steps with its 90% band, rejected points hollow, and the events found in it."""
    fig, ax = _axes(ax, height=2.7)
    handles = _curve(ax, series, verdicts=None) + _strips(ax, events)
    ax.set(title=series.name, ylabel=series.units or series.name.rpartition("/")[2])
    step_axis(ax, series.steps)
    _legend(ax, handles)
    return fig, ax


@_styled
def plot_llc(derived: xr.Dataset, events: Sequence[Event] = (), *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The LLC over steps from `llc(dataset)` (`llc`, `se`, `verdict`): each rejected estimate hollow, by its verdict.

    The scale is that of the accepted estimates; a rejected one beyond it is drawn at the edge and its value told.
    """
    from devmon.analysis.series import Series

    fig, ax = _axes(ax, height=3.2)
    verdicts = np.asarray(derived["verdict"].values).astype(str)
    units = units_of(derived["llc"])
    llc, se = (np.asarray(derived[name].values, dtype=float) for name in ("llc", "se"))
    series = Series("LLC", np.asarray(derived["step"].values), llc, se, units, verdicts != "ok")
    handles = _curve(ax, series, verdicts=verdicts) + _strips(ax, events)
    note = "" if (verdicts == "ok").any() else " (every estimate is rejected)"
    ax.set(title=f"Local learning coefficient{note}", ylabel=f"LLC [{units}]" if units else "LLC")
    step_axis(ax, series.steps)
    _legend(ax, handles)
    return fig, ax


@_styled
def plot_overview(
    series: Sequence[Series], events: Sequence[Event] = (), *, ax: Sequence[Axes] | None = None
) -> tuple[Figure, list[Axes]]:
    """Series stacked on one axis of steps. An event is shaded in its own panel; its line goes through all of them."""
    if ax is None:
        fig = Figure(figsize=(8.6, 1.05 + 1.2 * len(series)), layout="constrained")
        axes = list(fig.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0])
    else:
        axes = list(ax)
        fig = _figure_of(axes[0])
    shown = {one.name for one in series}
    handles: dict[str, Any] = {}
    for i, (panel, one) in enumerate(zip(axes, series, strict=True)):
        curve = _curve(panel, one, verdicts=None, colour=COLOURS[0])
        own = [event for event in events if event.series == one.name]
        for event in events:
            if event.series in shown and event.series != one.name:
                panel.axvline(event.step, color=EVENT_COLOURS.get(event.kind, "#555555"), lw=0.7, alpha=0.45, zorder=0)
        for handle in curve + _strips(panel, own):
            handles.setdefault(str(handle.get_label()).partition(":")[0], handle)
        panel.set_title(one.name, fontsize=9.5, pad=3)
        panel.set_ylabel(one.units, fontsize=8.5)
        step_axis(panel, np.concatenate([s.steps for s in series]), label=i == len(axes) - 1)
    for label, handle in handles.items():
        handle.set_label(label)
    if ax is None:
        fig.legend(handles=list(handles.values()), loc="outside lower center", ncols=3, handlelength=1.6)
    else:
        _legend(axes[0], list(handles.values()))
    fig.align_ylabels(axes)
    return fig, axes


@_styled
def plot_calibration(trials: xr.Dataset, *, ax: Sequence[Axes] | None = None) -> tuple[Figure, list[Axes]]:
    """λ̂ of a calibration's trials against lr and, on a second axis, against gamma; upright lines mark what was chosen.

    A line joins the accepted trials of one model (0 is the late checkpoint, 1 the middle one) and one gamma, or one lr
    on the second axis; a trial that none of these holds is on the first. Where settings were tried twice, the first is
    faint. Bars are ±1.64 standard errors, hollow marks rejected trials, at the edge where they are off the scale of the
    accepted ones. Models stand side by side by a few points.
    """
    if ax is None:
        fig = Figure(figsize=(8.6, 3.7), layout="constrained")
        axes = list(fig.subplots(1, 2, sharey=True))
    else:
        axes = list(ax)
        fig = _figure_of(axes[0])
    table = {str(name): np.asarray(trials[name].values) for name in trials.data_vars}
    by_lr, by_gamma = _lines(table, "lr", "gamma"), _lines(table, "gamma", "lr")
    joined = {i for line in by_lr + by_gamma for i in line}
    by_lr += [np.array([i]) for i in range(trials.sizes["trial"]) if i not in joined]
    handles: dict[str, Any] = {}
    for panel, lines, along, fixed in ((axes[0], by_lr, "lr", "gamma"), (axes[1], by_gamma, "gamma", "lr")):
        handles |= _trials(panel, table, lines, along, fixed, trials.attrs)
    axes[0].set_ylabel("LLC")
    if ax is None:
        fig.legend(handles=list(handles.values()), loc="outside lower center", ncols=4, handlelength=2.4)
    else:
        _legend(axes[-1], list(handles.values()))
    return fig, axes


# ---- arrays over layers, heads and positions ----


@_styled
def plot_heads(dataset: xr.Dataset, variable: str, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """A heat map of `variable(step, layer, head)`, one row a head and one column a checkpoint; grey has no value.

    Any other small dimensions give a row for each of their elements. A `uniform` scalar is told as the reference.
    """
    array = dataset[variable].transpose("step", ...)
    array = array.isel(step=_thin(array.sizes["step"], MAX_COLUMNS))
    rows = [(_short(label), element.values) for label, element in elements(array)]
    values = np.array([row for _, row in rows], dtype=float)
    fig, ax = _axes(ax, height=1.2 + 0.2 * min(max(len(rows), 4), 60))
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < 0 < high:
        bound = max(-low, high)
        limits: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}
    else:
        limits = {"cmap": "viridis", "vmin": min(low, 0.0) if low <= 0.25 * high else low, "vmax": high}
    colours = matplotlib.colormaps[limits.pop("cmap")].with_extremes(bad="#d9d9d9")
    image = ax.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="nearest", cmap=colours, **limits)
    units = units_of(dataset[variable])
    bar = _figure_of(ax).colorbar(image, ax=ax, pad=0.015, fraction=0.045)
    bar.set_label(units or variable.replace("_", " "))
    bar.outline.set_visible(False)
    ax.grid(False)
    named = _thin(len(rows), 48)
    ax.set_yticks(named, [rows[i][0] for i in named], fontsize=8 if len(rows) <= 24 else 6.5)
    steps = array["step"].values
    columns = _thin(len(steps), 9)
    ax.set_xticks(columns, [_number(float(steps[c])) for c in columns])
    ax.set(title=_title(dataset, variable), xlabel="step (one column a checkpoint)")
    if "uniform" in dataset and dataset["uniform"].dims == ("step",):
        _caption(ax, f"uniform attention: {float(dataset['uniform'].mean()):.3g}")
    return fig, ax


@_styled
def plot_layers(dataset: xr.Dataset, variable: str, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """One line a layer of `variable(step, layer)`; its `control_<variable>` dashed and a `majority` baseline grey."""
    fig, ax = _axes(ax, height=3.2)
    array = dataset[variable].transpose("step", "layer")
    pick = _thin(array.sizes["step"], MAX_POINTS)
    steps = array["step"].values[pick]
    handles: list[Any] = []
    for i, layer in enumerate(array["layer"].values if "layer" in array.coords else range(array.sizes["layer"])):
        look: dict[str, Any] = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markevery": max(1, len(pick) // 25)}
        values = array.values[pick, i].astype(float)
        handles += ax.plot(steps, values, label=f"layer {layer}", **look)
        if (error := dataset.get(f"{variable}_se")) is not None and error.dims == dataset[variable].dims:
            half = Z90 * error.transpose("step", "layer").values[pick, i]
            ax.fill_between(steps, values - half, values + half, color=look["color"], alpha=0.15, lw=0)
        if (control := dataset.get(f"control_{variable}")) is not None and "layer" in control.dims:
            ax.plot(steps, control.transpose("step", "layer").values[pick, i], color=look["color"], ls="--", lw=1.1)
    if f"control_{variable}" in dataset:
        handles.append(Line2D([], [], color="#555555", ls="--", lw=1.1, label="control task (dashed)"))
    if variable == "accuracy" and "majority" in dataset and "step" in dataset["majority"].dims:
        majority = dataset["majority"].transpose("step", ...).values.reshape(len(dataset["step"]), -1)[pick, 0]
        handles += ax.plot(steps, majority, color="#777777", ls=":", label="majority class")
    units = units_of(dataset[variable])
    ax.set(title=_title(dataset, variable), ylabel=units or variable.replace("_", " "))
    step_axis(ax, steps)
    _legend(ax, handles)
    return fig, ax


@_styled
def plot_position_loss(
    dataset: xr.Dataset, variable: str = "loss_by_position", *, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """The loss by position in the sequence (log axis, the first predicted token is 1) at up to six checkpoints."""
    fig, ax = _axes(ax, height=3.2)
    array = dataset[variable].transpose("step", ...)
    steps = np.asarray(array["step"].values)
    rank = np.log10(steps + (steps[steps > 0].min() if (steps > 0).any() else 1))
    chosen = sorted({int(np.abs(rank - at).argmin()) for at in np.linspace(rank[0], rank[-1], 6)})
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(chosen)))
    positions = np.arange(1, array.shape[1] + 1)
    handles: list[Any] = []
    for shade, index, line in zip(shades, chosen, LINES * 2, strict=False):
        label = f"step {_number(float(steps[index]))}"
        handles += ax.plot(positions, array.values[index], color=shade, ls=line, label=label)
    ax.set_xscale("log")
    _ticks(ax, 1, len(positions), zero=False)
    ax.set(title=_title(dataset, variable), xlabel="position in the sequence (log scale)")
    ax.set_ylabel(units_of(array) or "loss")
    _legend(ax, handles)
    return fig, ax


# ---- events ----


@_styled
def plot_events(events: Sequence[Event], *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """A forest plot, one row an event: its 90% interval as a bar, its estimate as a mark, hollow where q > 0.05."""
    fig, ax = _axes(ax, height=0.95 + 0.24 * max(len(events), 2))
    rows = sorted(events, key=lambda event: (event.step, event.series))
    for y, event in enumerate(rows):
        sure = event.q_value is None or event.q_value <= 0.05
        colour = EVENT_COLOURS.get(event.kind, "#555555")
        ax.plot(event.interval, [y, y], color=colour, lw=3.5, alpha=0.55, solid_capstyle="butt")
        marker = "D" if event.kind == "turn" else "o"
        ax.plot(event.step, y, marker, ms=6, mec=colour, mfc=colour if sure else "white", mew=1.4)
        told = f"q = {event.q_value:.3g}" if event.q_value is not None else f"p = {event.p_value:.3g}"
        ax.annotate(told, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, annotation_clip=False)
    ax.set_yticks(range(len(rows)), [f"{event.series} ({event.kind})" for event in rows], fontsize=8.5)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_title("Events with 90% intervals")
    _caption(ax, "hollow: q > 0.05")
    step_axis(ax, np.array([x for event in rows for x in (event.step, *event.interval)]))
    return fig, ax


@_styled
def plot_lead_lag(
    rows: Sequence[tuple[str, float, tuple[float, float], bool]], main: str = "main event", *, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Lag behind the main event, a row an event: (label, lag in steps, 90% interval, whether the order is settled)."""
    fig, ax = _axes(ax, height=1.1 + 0.26 * max(len(rows), 2))
    for y, (_, lag, interval, settled) in enumerate(rows):
        colour = COLOURS[0] if settled else "#777777"
        ax.plot(interval, [y, y], color=colour, lw=3.5, alpha=0.5, solid_capstyle="butt")
        ax.plot(lag, y, "o", ms=6, mec=colour, mfc=colour if settled else "white", mew=1.4)
    ax.axvline(0, color="#333333", lw=1)
    ax.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=8.5)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.margins(x=0.08)
    ax.set_title(f"Lag behind {main}")
    ax.set_xlabel("optimizer steps; left of 0 came first, hollow: order not settled")
    return fig, ax


# ---- the parts ----


def step_axis(ax: Axes, steps: np.ndarray, *, label: bool = True) -> None:
    """A logarithmic axis of steps with a place for step 0; a linear one where steps span less than a factor 8."""
    steps = np.asarray(steps, dtype=float)
    steps = steps[np.isfinite(steps) & (steps >= 0)]
    positive = steps[steps > 0]
    kind = "linear"
    if positive.size and positive.max() / positive.min() >= 8:
        first, last, zero = float(positive.min()), float(positive.max()), bool((steps == 0).any())
        kind = "log scale"
        ax.set_xscale("symlog", linthresh=first, linscale=0.35) if zero else ax.set_xscale("log")
        ax.set_xlim(-0.15 * first if zero else first / 1.08, last * (last / first) ** 0.015)
        _ticks(ax, first, last, zero=zero)
    elif steps.size and steps.max() > steps.min():
        margin = 0.02 * (steps.max() - steps.min())
        ax.set_xlim(steps.min() - margin, steps.max() + margin)
    if label:
        ax.set_xlabel(f"optimizer step ({kind})" if kind != "linear" else "optimizer step")


def _ticks(ax: Axes, first: float, last: float, *, zero: bool) -> None:
    powers = range(int(np.floor(np.log10(first))), int(np.ceil(np.log10(last))) + 1)
    digits = (1,) if np.log10(last / first) > 2.6 else (1, 2, 5)
    ticks = [d * 10.0**p for p in powers for d in digits if first * 0.999 <= d * 10.0**p <= last * 1.001]
    ticks = [0.0, *ticks] if zero else ticks
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(lambda value, _: _number(value))
    ax.xaxis.set_minor_locator(NullLocator())


def _curve(ax: Axes, series: Series, *, verdicts: np.ndarray | None, colour: str = COLOURS[0]) -> list[Any]:
    """The accepted points as a line with its band, the rejected ones hollow; returns the legend's handles."""
    pick = _thin(len(series.steps), MAX_POINTS)
    steps, values = np.asarray(series.steps)[pick], np.asarray(series.values, dtype=float)[pick]
    rejected = np.zeros(len(pick), bool) if series.rejected is None else np.asarray(series.rejected, dtype=bool)[pick]
    good = np.isfinite(values) & ~rejected
    handles: list[Any] = []
    if good.any():
        handles += ax.plot(steps[good], values[good], "-o", color=colour, ms=2.8, label=f"checkpoints: {good.sum()}")
    half = np.zeros(len(pick))
    if series.se is not None:
        half = Z90 * np.nan_to_num(np.asarray(series.se, dtype=float)[pick], posinf=0.0, neginf=0.0)
        if good.any():
            ax.fill_between(steps[good], (values - half)[good], (values + half)[good], color=colour, alpha=0.2, lw=0)
            handles.append(Patch(color=colour, alpha=0.2, lw=0, label="±1.64 standard errors"))
    scale = good if good.any() else np.isfinite(values)
    if not scale.any():
        ax.set_ylim(0, 1)
        ax.set_yticks([])
        ax.text(0.5, 0.5, "no finite value", transform=ax.transAxes, ha="center", va="center", color="#777777")
    else:
        low, high = float((values - half)[scale].min()), float((values + half)[scale].max())
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        ax.set_ylim(low - margin, high + margin)
    if rejected.any():
        names = np.full(len(pick), "rejected") if verdicts is None else verdicts[pick]
        handles += [
            _rejected(ax, steps, values, rejected & (names == name), name) for name in np.unique(names[rejected])
        ]
    return handles


def _rejected(ax: Axes, steps: np.ndarray, values: np.ndarray, mask: np.ndarray, name: str) -> Line2D:
    low, high = ax.get_ylim()
    at = np.clip(np.nan_to_num(values[mask], nan=low, posinf=high, neginf=low), low, high)
    look: dict[str, Any] = {"marker": REJECTED.get(name, "o"), "ls": "", "mfc": "white", "mec": "#555555", "ms": 5.5}
    ax.plot(steps[mask], at, clip_on=False, zorder=5, **look)
    out = values[mask][(values[mask] < low) | (values[mask] > high)]
    told = (
        f"\noff scale: {out.min():.4g} to {out.max():.4g}"
        if len(out) > 1
        else f"\noff scale: {out[0]:.4g}"
        if len(out)
        else ""
    )
    label = name if name == "rejected" else f"rejected, {name}"
    return Line2D([], [], label=f"{label}: {int(mask.sum())}{told}".replace(" -", " −"), **look)


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
    good = (verdicts == "ok") & np.isfinite(values)
    scale = good if good.any() else np.isfinite(values)
    low, high = (float((values - half)[scale].min()), float((values + half)[scale].max())) if scale.any() else (0, 1)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    ax.set_ylim(low - margin, high + margin)
    at = np.clip(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low - margin, high + margin)
    others = sorted({table[fixed][i] for line in lines for i in line})
    handles: dict[str, Any] = {}
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
        aside = offset_copy(ax.transData, _figure_of(ax), x=4 * model, units="points")
        fits = line[good[line]]
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
            told = f"rejected, {verdicts[i]}"
            handles[told] = Line2D([], [], mec="#555555", label=told, **hollow)
    tried = np.array([table[along][i] for line in lines for i in line] + [attrs[along]] * (along in attrs), dtype=float)
    if along in attrs:
        ax.axvline(attrs[along], color="#333333", lw=1, ls=":", zorder=1)
        handles["chosen"] = Line2D([], [], color="#333333", lw=1, ls=":", label="chosen")
        _caption(ax, f"chosen: {attrs[along]:.3g}")
    ax.set_xscale("log")
    ax.set_xlabel(f"{along} (log scale)")
    ax.set_title(f"λ̂ by {along}" + (f" at {fixed} {others[0]:.3g}" if len(others) == 1 else ""))
    if tried.size:
        ax.set_xlim(tried.min() / 1.25, tried.max() * 1.25)
        _ticks(ax, *ax.get_xlim(), zero=False)
    return handles


def _strips(ax: Axes, events: Sequence[Event]) -> list[Any]:
    handles: dict[str, Any] = {}
    for event in events:
        colour = EVENT_COLOURS.get(event.kind, "#555555")
        ax.axvspan(*event.interval, color=colour, alpha=0.2, lw=0, zorder=0)
        ax.axvline(event.step, color=colour, ls=EVENT_LINES.get(event.kind, ":"), lw=1.3, zorder=1)
        look: dict[str, Any] = {"color": colour, "ls": EVENT_LINES.get(event.kind, ":"), "lw": 1.3}
        handles.setdefault(event.kind, Line2D([], [], label=f"{event.kind}, 90% interval shaded", **look))
    return list(handles.values())


def _axes(ax: Axes | None, *, height: float) -> tuple[Figure, Axes]:
    if ax is not None:
        return _figure_of(ax), ax
    fig = Figure(figsize=(8.6, height), layout="constrained")
    return fig, fig.subplots()


def _figure_of(ax: Axes) -> Figure:
    fig = ax.get_figure(root=True)
    assert fig is not None
    return fig


def _legend(ax: Axes, handles: Sequence[Any]) -> None:
    if handles:
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.005, 1.0), borderaxespad=0.0, handlelength=1.6)


def _caption(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="right", fontsize=8.5, fontweight="normal", color="#555555")


def _title(dataset: xr.Dataset, variable: str) -> str:
    return str(dataset[variable].attrs.get("long_name") or variable.replace("_", " "))


def _thin(count: int, limit: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def _short(label: str) -> str:
    parts = dict(part.split("=", 1) for part in label.split(", "))
    return f"L{parts['layer']}H{parts['head']}" if set(parts) == {"layer", "head"} else label


def _number(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"
