"""The look of devmon's figures, and the parts they are made of: axes of steps, curves with bands, strips of events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from matplotlib.ticker import AutoLocator, FixedLocator, NullLocator

if TYPE_CHECKING:
    from devmon.analysis.detection.events import Event
    from devmon.analysis.series import Series

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito, without yellow
EVENT_COLOURS = {"jump": "#D55E00", "turn": "#AA4499", "plateau": "#009E73", "bump": "#E69F00"}
EVENT_LINES = {"jump": "-", "turn": "--", "plateau": "-.", "bump": ":"}
EVENT_MARKS = {"jump": "o", "turn": "D", "plateau": "s", "bump": "^"}
REJECTED = {"negative": "v", "diverged": "^", "not mixed": "s", "non-finite": "X", "rejected": "o"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
Z90 = 1.645  # half-width of a 90% normal interval, in standard errors
MAX_COLUMNS = 100  # checkpoints in a heat map
MAX_POINTS = 400  # points on a line
MARGINS = (0.85, 0.95, 0.12, 0.24)  # of a figure of panels: left, bottom, right, top, in inches
MAX_MARKS = 150  # points on a line that each get a mark

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
        "axes.titley": 1.0,  # where it comes to lie anyway; to look for ticks above it takes a tenth of a drawing
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


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with style():
            return draw(*args, **kwargs)

    return inside


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
        log_ticks(ax, first, last, zero=zero)
    elif steps.size and steps.max() > steps.min():
        margin = 0.02 * (steps.max() - steps.min())
        ax.set_xlim(steps.min() - margin, steps.max() + margin)
    if label:
        ax.set_xlabel(f"optimizer step ({kind})" if kind != "linear" else "optimizer step")


def log_ticks(ax: Axes, first: float, last: float, *, zero: bool) -> None:
    powers = range(int(np.floor(np.log10(first))), int(np.ceil(np.log10(last))) + 1)
    digits = (1,) if np.log10(last / first) > 2.6 else (1, 2, 5)
    ticks = [d * 10.0**p for p in powers for d in digits if first * 0.999 <= d * 10.0**p <= last * 1.001]
    ticks = [0.0, *ticks] if zero else ticks
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(lambda value, _: step_number(value))
    ax.xaxis.set_minor_locator(NullLocator())


def draw_curve(ax: Axes, series: Series, *, verdicts: np.ndarray | None, colour: str = COLOURS[0]) -> list[Any]:
    """The accepted points as a line with its band, the rejected ones hollow; returns the legend's handles.

    Of more than `MAX_POINTS` those are drawn that keep the line's outline: see `outline`.
    """
    steps, values = np.asarray(series.steps), np.asarray(series.values, dtype=float)
    rejected = np.zeros(len(steps), bool) if series.rejected is None else np.asarray(series.rejected, dtype=bool)
    good = np.isfinite(values) & ~rejected
    drawn = np.flatnonzero(good)[outline(values[good], MAX_POINTS)]
    handles: list[Any] = []
    if good.any():
        look = "-o" if len(drawn) <= MAX_MARKS else "-"
        handles += ax.plot(steps[drawn], values[drawn], look, color=colour, ms=2.8, label=f"checkpoints: {good.sum()}")
    half = np.zeros(len(steps))
    if series.se is not None:
        half = Z90 * np.nan_to_num(np.asarray(series.se, dtype=float), posinf=0.0, neginf=0.0)
        if good.any():
            ax.fill_between(steps[drawn], (values - half)[drawn], (values + half)[drawn], color=colour, alpha=0.2, lw=0)
            handles.append(Patch(color=colour, alpha=0.2, lw=0, label="±1.64 standard errors"))
    # rejected points do not stretch the axis: it is that of the accepted ones with their errors
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
        names = np.full(len(steps), "rejected") if verdicts is None else verdicts
        handles += [
            _rejected(ax, steps, values, rejected & (names == name), name) for name in np.unique(names[rejected])
        ]
    return handles


def _rejected(ax: Axes, steps: np.ndarray, values: np.ndarray, mask: np.ndarray, name: str) -> Line2D:
    low, high = ax.get_ylim()
    at = np.clip(np.nan_to_num(values[mask], nan=low, posinf=high, neginf=low), low, high)
    shown = thin(len(at), MAX_POINTS)
    look: dict[str, Any] = {"marker": REJECTED.get(name, "o"), "ls": "", "mfc": "white", "mec": "#555555", "ms": 5.5}
    ax.plot(steps[mask][shown], at[shown], clip_on=False, zorder=5, **look)
    out = values[mask][(values[mask] < low) | (values[mask] > high)]
    # what lies off the scale is drawn at its edge, and the legend says where it is
    off_scale = ""
    if len(out):
        off_scale = (
            f"\noff scale: {out[0]:.4g}" if len(out) == 1 else f"\noff scale: {out.min():.4g} to {out.max():.4g}"
        )
    label = name if name == "rejected" else f"rejected, {name}"
    return Line2D([], [], label=f"{label}: {int(mask.sum())}{off_scale}".replace(" -", " −"), **look)


def draw_strips(ax: Axes, events: Sequence[Event]) -> list[Any]:
    """Each event's interval shaded, with a line at its estimate; what lasts (plateau, bump) has a bar over its span."""
    handles: dict[str, Any] = {}
    for event in events:
        colour = EVENT_COLOURS.get(event.kind, "#555555")
        ax.axvspan(*event.interval, color=colour, alpha=0.2, lw=0, zorder=0)
        ax.axvline(event.step, color=colour, ls=EVENT_LINES.get(event.kind, ":"), lw=1.3, zorder=1)
        if event.span is not None and event.kind != "jump":
            ax.plot(event.span, [0.98, 0.98], color=colour, lw=3, transform=ax.get_xaxis_transform(), zorder=1)
        look: dict[str, Any] = {"color": colour, "ls": EVENT_LINES.get(event.kind, ":"), "lw": 1.3}
        label = f"{words_of(events, event.kind)}, 90% interval shaded"
        handles.setdefault(event.kind, Line2D([], [], label=label, **look))
    return list(handles.values())


def words_of(events: Sequence[Event], kind: str) -> str:
    """What the events of a kind are called, each word once: a mark is a kind's, a word an event's."""
    return "/".join(dict.fromkeys(event.word for event in events if event.kind == kind))


def axes_on(ax: Axes | None, *, height: float, width: float = 8.6) -> tuple[Figure, Axes]:
    if ax is not None:
        return figure_of(ax), ax
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots()


def panels_on(axes: Sequence[Axes] | None, count: int, height: float) -> tuple[Figure, list[Axes]]:
    """The axes given, or a new figure of `count` panels of this height in inches, one above the other.

    Its margins are fixed: to measure every label first would take longer than to draw.
    """
    if axes is not None:
        return figure_of(axes[0]), list(axes)
    fig = Figure()
    made = list(fig.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    _lay_out(fig, made, height)
    return fig, made


def cleared(fig: Figure, axes: Sequence[Axes], height: float) -> None:
    """Panels of `panels_on` as they were, without curves and legend: to draw on them again takes half as long as to
    make new ones."""
    for artist in [
        *fig.legends,
        *(each for ax in axes for each in (*ax.lines, *ax.collections, *ax.patches, *ax.texts)),
    ]:
        artist.remove()
    for ax in axes:
        ax.yaxis.set_major_locator(AutoLocator())
    _lay_out(fig, axes, height)


def _lay_out(fig: Figure, axes: Sequence[Axes], height: float) -> None:
    width, inches = 8.6, height * len(axes) + MARGINS[1] + MARGINS[3]
    left, bottom, right, top = MARGINS
    fig.set_size_inches(width, inches)
    fig.subplots_adjust(left / width, bottom / inches, 1 - right / width, 1 - top / inches, hspace=0.4)
    for ax in axes:
        ax.yaxis.set_label_coords(-0.65 / (width - left - right), 0.5)


def legend_below(fig: Figure, handles: Sequence[Any]) -> None:
    """A legend in three columns under the panels of `panels_on`, and as much room for it as it needs."""
    (_, below, _, top), bottom = MARGINS, 0.5 + 0.19 * -(-len(handles) // 3)
    inches = fig.get_figheight() - below + bottom
    fig.set_figheight(inches)
    fig.subplots_adjust(bottom=bottom / inches, top=1 - top / inches)
    fig.legend(handles=handles, loc="lower center", ncols=3, handlelength=1.6, borderaxespad=0.15)


def figure_of(ax: Axes) -> Figure:
    fig = ax.get_figure(root=True)
    assert fig is not None
    return fig


def draw_legend(ax: Axes, handles: Sequence[Any]) -> None:
    if handles:
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.005, 1.0), borderaxespad=0.0, handlelength=1.6)


def draw_note(ax: Axes, text: str) -> None:
    """In grey above the axes, on the right."""
    ax.set_title(text, loc="right", fontsize=8.5, fontweight="normal", color="#555555")


def title_of(dataset: xr.Dataset, variable: str) -> str:
    return str(dataset[variable].attrs.get("long_name") or variable.replace("_", " "))


def outline(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices of at most about `limit` values: both ends, and of each of equally many runs of neighbours the lowest and
    the highest, so that no spike is lost."""
    if len(values) <= limit:
        return np.arange(len(values))
    runs = np.array_split(np.arange(len(values)), limit // 2)
    kept = [run[pick] for run in runs for pick in (values[run].argmin(), values[run].argmax())]
    return np.unique([0, *kept, len(values) - 1])


def thin(count: int, limit: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def brief(label: str, most: int = 56) -> str:
    """A label short enough to leave room for the axes beside it: the middle of a longer one goes."""
    return label if len(label) <= most else f"{label[: most // 2]}…{label[most // 2 + 1 - most :]}"


def step_number(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"
