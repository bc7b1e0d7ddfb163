"""What a report says of single tokens: when they were learned."""

from __future__ import annotations

import numpy as np
import xarray as xr

from devmon.analysis import plots
from devmon.analysis.derive.learning.tokens import token_learning
from devmon.analysis.reports.content import Block, Paragraph
from devmon.analysis.reports.drawing import Page, curves
from devmon.analysis.series import Series
from devmon.analysis.table import Row, thinned
from devmon.analysis.wording import number, step


def token_blocks(page: Page, name: str, data: xr.Dataset) -> list[Block]:
    """When the tokens of a probe were learned: a sentence, the distribution over steps, its table."""
    learning = token_learning(data)
    kind = learning["kind"].values
    learned, lost = (float((kind == word).mean()) for word in ("learned", "unlearned"))
    words = (
        f"Of {len(kind)} tokens {learned:.0%} are learned; {lost:.0%} get as much worse, which noise does either way."
    )
    low, half, high = (float(value) for value in learning["when"].values)
    if np.isfinite(half):
        ends = [float(learning[f"when_{end}"].values[1]) for end in ("low", "high")]
        interval = f" [{step(ends[0])}, {step(ends[1])}]" if np.isfinite(ends).all() else ""
        words += (
            f" Half of these are by step {step(half)}{interval}, four in five between {step(low)} and {step(high)}."
        )
    drawing, ax = plots.plot_token_learning(learning)
    caption = (
        f"{name}: share of tokens whose loss has passed half of its fall for good. Band: ±1.64 standard errors over "
        "sequences. Bars: those learned from one checkpoint to the next. Dotted: tokens whose loss rises as much."
    )
    steps, share, error = (learning[key].values for key in ("step", "share", "share_se"))
    rows = [
        Row([str(int(at)), number(float(value), 3), number(float(se), 2), number(float(noise), 2)])
        for at, value, se, noise in zip(steps, share, error, learning["lost"].values, strict=True)
    ]
    table = thinned(["step", "learned", "± standard error", "unlearned"], rows)
    where = [curves(ax, [Series(f"{name}/share of tokens learned", steps, share)])]
    return [Paragraph(words), page.add(f"{name}-learned", drawing, caption, table, where)]
