"""Plateaus and bumps beside jumps and turns have a mark, a word, a legend entry; what a page draws and leaves out."""

from __future__ import annotations

import base64
import inspect
import io
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from devmon.analysis import plots
from devmon.analysis.derive.watch_series import series_of
from devmon.analysis.plots.style import EVENT_COLOURS, EVENT_LINES, EVENT_MARKS, brief, outline
from devmon.analysis.reports.content import Items, Paragraph
from devmon.analysis.reports.findings import Findings, examine
from devmon.analysis.reports.glossary import GLOSSARY
from devmon.analysis.reports.svg import compact
from devmon.analysis.reports.tables import transitions_table
from devmon.analysis.reports.watches import panels_each
from devmon.analysis.series import Series
from devmon.analysis.transitions.clusters import transitions
from tests.support.reports import content, detection, figures, jump, told
from tests.support.synthetic import STEPS, Run, traces, watch


def examine_quiet(run: Run) -> Findings:
    return examine(run, detection=detection(outcomes={series.name: "NO EVENT" for series in series_of(run)}))


KINDS = ("jump", "turn", "plateau", "bump")


def event(kind: str, step: float = 300.0, size: float = 0.5, span: Any = (200.0, 400.0)) -> Any:
    return replace(jump("a/x", step), kind=kind, size=size, span=span)


def test_every_kind_has_a_colour_a_line_a_mark_and_a_meaning_of_its_own() -> None:
    for looks in (EVENT_COLOURS, EVENT_LINES, EVENT_MARKS):
        assert set(looks) == set(KINDS)
        assert len(set(looks.values())) == 4
    assert set(KINDS) <= {term for term, _ in GLOSSARY}


@pytest.mark.parametrize(("found", "words"), [
    (event("plateau"), "a/x has a plateau over steps 200–400, flattest at step 300 [295, 305] (p = 0.005, q = 0.01)"),
    (event("bump"), "a/x has a bump of 0.5 over steps 200–400 at step 300 [295, 305] (p = 0.005, q = 0.01)"),
    (event("bump", size=-0.5, span=None), "a/x has a dip of 0.5 at step 300 [295, 305] (p = 0.005, q = 0.01)"),
    (event("turn", span=None, size=-1), "a/x has a minimum at step 300 [295, 305] (p = 0.005, q = 0.01)"),
    (event("jump", size=-1), "a/x falls abruptly by 1 at step 300 [295, 305] (p = 0.005, q = 0.01)"),
    (event("swirl", span=None), "a/x has a swirl at step 300 [295, 305] (p = 0.005, q = 0.01)"),
])  # fmt: skip
def test_an_event_in_words(found: Any, words: str) -> None:
    assert found.in_words() == words


def test_the_forest_marks_each_kind_and_names_only_those_it_holds() -> None:
    rows = [event(kind, 100.0 * i) for i, kind in enumerate(KINDS, 1)]
    _, ax = plots.plot_events(rows)
    marks = [
        (line.get_marker(), to_hex(line.get_markeredgecolor()).upper())
        for line in ax.lines
        if line.get_marker() != "None"
    ]
    assert marks == [(EVENT_MARKS[kind], EVENT_COLOURS[kind].upper()) for kind in KINDS]
    words = "circle: jump, diamond: maximum, square: plateau, triangle: bump"
    assert ax.texts[-1].get_text() == f"{words}; hollow: q > 0.05"
    _, ax = plots.plot_events(rows[2:3])
    assert ax.texts[-1].get_text() == "square: plateau; hollow: q > 0.05"


def test_figures_call_a_jump_only_what_is_abrupt() -> None:
    rise, fall = (replace(event("jump", step, size=size), abrupt=False) for step, size in ((300.0, 1), (600.0, -1)))
    low = event("turn", 900.0, size=-1)
    _, ax = plots.plot_events([rise, fall, low])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a/x (rise)", "a/x (fall)", "a/x (minimum)"]
    assert ax.texts[-1].get_text() == "circle: rise/fall, diamond: minimum; hollow: q > 0.05"
    _, ax = plots.plot_series(Series("a/x", STEPS, np.log1p(STEPS)), [rise, fall])
    legend = ax.get_legend()
    assert legend is not None
    assert "rise/fall, 90% interval shaded" in [text.get_text() for text in legend.get_texts()]
    assert "<b>rise</b>" in rise._repr_html_()


def test_the_forest_numbers_the_transitions_over_their_spans() -> None:
    found = transitions(detection(jump("a/x", 100, span=10), jump("b/x", 600, span=50)))
    _, ax = plots.plot_events([jump("a/x", 100)], found, steps=STEPS)
    strips = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
    assert strips == [(90, 110), (550, 650)]
    numbered = [(text.get_text(), text.xy[0]) for text in ax.texts if text.get_gid()]
    assert numbered == [("1", 100), ("2", 600)]
    assert ax.get_xlim()[1] > 2000  # the axis is the run's


def test_what_lasts_has_a_bar_over_its_span_and_a_legend_entry() -> None:
    one = Series("a/x", STEPS, np.log1p(STEPS))
    _, ax = plots.plot_series(one, [event("plateau"), event("bump", span=None), event("jump")])
    bars = [tuple(line.get_xdata()) for line in ax.lines if line.get_linewidth() == 3]
    assert bars == [(200.0, 400.0)]  # of the plateau alone: a jump's span is in the forest
    legend = ax.get_legend()
    assert legend is not None
    named = {text.get_text().partition(",")[0] for text in legend.get_texts()}
    assert {"plateau", "bump", "jump"} <= named


def test_a_run_with_a_plateau_alone_has_no_transition() -> None:
    head, happened, _ = told(event("plateau"))
    assert head == "EVENTS"
    assert happened.startswith("No transition of the whole run, but 1 event: a: x has a plateau at step 300")


def test_the_table_of_transitions_counts_and_orders() -> None:
    events = [jump("a/x", 600, size=2.0), jump("b/x", 605, size=-0.3, q=0.03),
              jump("c/x", 20, span=5, resolved=False)]  # fmt: skip
    table = transitions_table(transitions(detection(*events)), ["A (0.97)", "–"], {})
    assert [row.cells for row in table.rows] == [
        ["2: main", "602 [595, 610]", "550–655", "2", "0.01", "2 of 2", "–", "a/x ↑ 2, b/x ↓ 0.3"],
        ["1: minor", "20 [15, 25]", "15–25", "0.4", "0.01", "0 of 1", "A (0.97)", "c/x ↑ 1"],
    ]


def test_the_page_opens_with_outcome_transitions_and_timeline() -> None:
    run = Run({"a": watch(STEPS, {"x": np.log1p(STEPS)}, None, "Mine")})
    story = content(run, jump("a/x", 600)).sections[0].blocks
    assert [type(block).__name__ for block in story] == ["Paragraph", "Paragraph", "Columns"]
    assert isinstance(story[1], Paragraph)
    assert story[1].text == "At step 600 [595, 605] a: x rises by 1."
    quiet = content(run).sections[0].blocks[1]
    assert isinstance(quiet, Paragraph)
    assert quiet.text.startswith("Nothing happens: 1 series was searched")


def test_what_could_not_be_searched_is_not_counted_as_searched() -> None:
    data = {"llc": traces(STEPS[:20], np.full(20, -300.0), np.random.default_rng(0)),
            "a": watch(STEPS[:20], {"x": np.ones(20)}, None, "Mine")}  # fmt: skip
    said = content(Run(data), outcomes={"llc/llc": "SAMPLER REJECTED"})
    text = " ".join(block.text for block in said.sections[0].blocks if isinstance(block, Paragraph))
    assert "1 series was searched (1 more could not be searched)" in text
    (against,) = [section for section in said.sections if section.key == "against"]
    (items,) = against.blocks
    assert isinstance(items, Items)
    assert "all 20 estimates of λ̂ are rejected (negative 20)" in items.items[0]
    assert "measure later checkpoints, or raise gamma (devmon calibrate)" in items.items[0]


# ---- large runs ----


def test_outline_keeps_ends_and_every_spike_within_its_limit() -> None:
    values = np.sin(np.arange(20_000) / 700)
    spikes = [3, 7777, 19_998]
    values[spikes] = [9.0, -9.0, 8.0]
    kept = outline(values, 400)
    assert {0, 19_999, *spikes} <= set(kept.tolist())
    assert len(kept) <= 402
    assert np.all(np.diff(kept) > 0)
    np.testing.assert_array_equal(outline(values[:400], 400), np.arange(400))


def test_a_long_line_is_drawn_by_its_outline_and_counted_whole() -> None:
    steps = np.arange(5000)
    values = np.zeros(5000)
    values[1234] = 5.0
    _, ax = plots.plot_series(Series("a/x", steps, values, np.full(5000, 0.1)))
    (line,) = ax.lines
    assert len(line.get_xdata()) <= 402
    assert 1234 in np.asarray(line.get_xdata())
    assert line.get_label() == "checkpoints: 5000"
    assert line.get_marker() == "None"


def test_a_page_draws_a_bounded_number_of_panels_and_says_what_it_left_out() -> None:
    walk = np.random.default_rng(0).standard_normal((400, 30)).cumsum(1)
    run = Run(
        {f"w{i}": watch(np.arange(30), {f"v{k}": walk[20 * i + k] for k in range(20)}, None, "Mine") for i in range(20)}
    )
    made = content(run, jump("w0/v19", 15), jump("w19/v7", 15))
    drawn = [line for figure in figures(made).values() for panel in figure.panels for line in panel.lines]
    assert len(drawn) == 6 + 20 * 3  # the overview, and for each watch its share of the page's 72
    assert {"w0/v19", "w19/v7"} < set(drawn[6:])  # those with an event go before the others, in the last watch too
    notes = [b.text for s in made.sections for b in s.blocks if isinstance(b, Paragraph) and b.look == "note"]
    assert {f"17 of 20 series of w{i} are not drawn here: choose them under Any series." for i in range(20)} <= set(
        notes
    )
    assert len(made.series) == 400  # their numbers are there


def test_a_watch_of_few_series_leaves_its_room_to_the_others() -> None:
    few = {f"w{i}": watch(np.arange(30), {"x": np.arange(30.0)}, None, "Mine") for i in range(48)}
    many = watch(np.arange(30), {f"v{k}": np.arange(30.0) for k in range(20)}, None, "Mine")
    assert panels_each(examine_quiet(Run(few | {"large": many}))) == 12  # 48 + 12 fit
    assert panels_each(examine_quiet(Run(few | {"a": many, "b": many, "c": many}))) == 8  # 48 + 3 * 8
    assert panels_each(examine_quiet(Run({f"u{i}": many for i in range(100)}))) == 1


# ---- the shape of the library ----


@pytest.mark.parametrize("name", [name for name in plots.__all__ if name.startswith("plot_")])
def test_every_plot_takes_data_and_axes_by_name(name: str) -> None:
    first, *_, last = inspect.signature(getattr(plots, name)).parameters.values()
    assert first.default is inspect.Parameter.empty
    assert (last.name, last.kind, last.default) == ("ax", inspect.Parameter.KEYWORD_ONLY, None)


def test_labels_are_cut_in_the_middle() -> None:
    assert brief("a" * 56) == "a" * 56
    assert brief("start" + "x" * 100 + "end") == "start" + "x" * 23 + "…" + "x" * 24 + "end"
    fig, _ = plots.plot_events([jump("layer/" + "x" * 300, 640)])
    fig.draw_without_rendering()  # no warning of axes without room


def test_of_many_layers_four_are_compared_at_all_pairs_of_steps() -> None:
    states = np.random.default_rng(0).standard_normal((12, 9, 16, 4))
    data = watch(np.arange(12), {"sketch": (("step", "layer", "item", "feature"), states)}, [], "Sketch")
    drawn = {name: one for name, one in figures(content(Run({"sketch": data}))).items() if "similarity" in name}
    captions = [one.caption for one in drawn.values()]
    assert [caption.partition("layer ")[2].partition(" ")[0] for caption in captions] == ["0", "3", "5", "8"]
    assert "4 of 9 layers are drawn" in captions[0]


def test_a_heat_map_in_the_page_has_the_same_pixels_in_fewer_bytes() -> None:
    values = np.random.default_rng(0).random((40, 6, 8))
    data = watch(np.arange(40), {"score": (("step", "layer", "head"), values)}, ["score"], "Heads")
    fig, _ = plots.plot_heads(data, "score")
    drawn = io.BytesIO()
    with plots.style():
        fig.savefig(drawn, format="svg")
    pictures = [
        re.findall(r'data:image/png;base64,([^"]*)', svg)
        for svg in (drawn.getvalue().decode(), compact(drawn.getvalue().decode(), "p"))
    ]
    for before, after in zip(*pictures, strict=True):
        one, two = (
            np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in (before, after)
        )
        np.testing.assert_array_equal(one, two)
        assert len(after) <= len(before)
    assert len(pictures[1][0]) < 0.75 * len(pictures[0][0])
