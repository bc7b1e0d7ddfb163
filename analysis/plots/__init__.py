"""Figures of a run. Every `plot_*(data, *, ax=None) -> (figure, axes)` draws on the axes given or on its own figure.

Bands are ±1.64 standard errors (90%), hollow marks are rejected estimates, a shaded strip is an event's 90% interval
with a line at its estimate. Nothing here shows a window, picks a backend or leaves a global setting changed.
"""

from devmon.analysis.plots.calibration import plot_calibration
from devmon.analysis.plots.components import plot_components
from devmon.analysis.plots.curves import (
    plot_layers,
    plot_llc,
    plot_overview,
    plot_position_loss,
    plot_runs,
    plot_series,
)
from devmon.analysis.plots.events import plot_events, plot_matched
from devmon.analysis.plots.feature_circuit import plot_feature_circuit
from devmon.analysis.plots.features import plot_births, plot_crosscoder, plot_densities
from devmon.analysis.plots.fine_tuning import plot_fine_tuning
from devmon.analysis.plots.heatmaps import plot_heads, plot_pairs, plot_similarity
from devmon.analysis.plots.ladder import plot_ladder
from devmon.analysis.plots.path import plot_essential
from devmon.analysis.plots.steering import plot_steering
from devmon.analysis.plots.style import step_axis, style
from devmon.analysis.plots.summary import plot_order, plot_stages
from devmon.analysis.plots.susceptibilities import plot_susceptibilities
from devmon.analysis.plots.tokens import plot_token_learning

__all__ = [  # noqa: RUF022
    # curves over steps
    "plot_series",
    "plot_stages",
    "plot_llc",
    "plot_overview",
    "plot_runs",
    "plot_fine_tuning",
    "plot_layers",
    "plot_position_loss",
    "plot_token_learning",
    "plot_calibration",
    "plot_ladder",
    # heat maps
    "plot_heads",
    "plot_components",
    "plot_similarity",
    "plot_pairs",
    # the path of the outputs
    "plot_essential",
    # features of dictionaries
    "plot_densities",
    "plot_births",
    "plot_crosscoder",
    # tokens in the components of susceptibilities
    "plot_susceptibilities",
    # features
    "plot_feature_circuit",
    "plot_steering",
    # events
    "plot_events",
    "plot_order",
    "plot_matched",
    # parts
    "step_axis",
    "style",
]
