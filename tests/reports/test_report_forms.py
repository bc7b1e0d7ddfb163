"""One content as HTML, Markdown and JSON; the numbers under the figures; evidence on transitions; BibTeX; new figures."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from devmon.analysis import circuit_overlap, essential_dynamics, plots
from devmon.analysis import report as write_report
from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.representation import similarity
from devmon.analysis.derive.watch_series import series_of
from devmon.analysis.reports.bibtex import bibtex
from devmon.analysis.reports.content import Content, Figure, Items, Panel, Section, Text
from devmon.analysis.reports.evidence import evidence, type_in_words
from devmon.analysis.reports.references import CITED, references
from devmon.analysis.reports.report import content_of
from devmon.analysis.reports.story import tell
from devmon.analysis.reports.svg import compact, share_styles
from devmon.analysis.reports.writers import WRITERS, as_html, as_json, as_markdown
from devmon.analysis.series import Series
from devmon.analysis.table import Row, Table
from devmon.analysis.transitions.phases import types_between
from devmon.analysis.transitions.schedule import schedule_of
from devmon.analysis.transitions.stages import transitions
from devmon.analysis.wording import number
from devmon.errors import DataError
from devmon.store.trajectory import Trajectory
from tests.reports.test_report import TEN, Reader, detection, jump, small_run
from tests.support.synthetic import STEPS, Run, induction_run, watch

EVIL = "<b>x</b> | a_b *c* [d](http://e) `f` & $g$"
LONG = np.array([0, *np.unique(np.geomspace(1, 1000, 23).astype(int))])


def sketches(steps: np.ndarray = LONG) -> xr.Dataset:
    """A representation that is one thing before step 100 and another after it, and outputs that follow a bend."""
    rng = np.random.default_rng(0)
    early, late = rng.standard_normal((2, 2, 32, 6))
    late[1] = early[1]  # layer 1 never changes
    states = np.array([early if s < 100 else late for s in steps]) + 0.01 * rng.standard_normal((len(steps), 2, 32, 6))
    line = np.linspace(-1, 1, len(steps))
    path = np.stack([line, np.abs(line)], 1) @ rng.standard_normal((2, 128)) + 0.001 * rng.standard_normal(
        (len(steps), 128)
    )
    variables = {"sketch": (("step", "layer", "item", "feature"), states),
                 "outputs": (("step", "item", "output"), path.reshape(-1, 32, 4)), "spread": line}  # fmt: skip
    return watch(steps, variables, ["spread"], "Sketch")


def circuits(steps: np.ndarray = LONG) -> xr.Dataset:
    edges = np.array([np.arange(4) + (0 if s < 100 else 2) for s in steps])
    data = watch(steps, {"edge_id": (("step", "edge"), edges), "area": np.ones(len(steps))}, ["area"], "Circuit")
    data.attrs["edges"] = 100
    return data


def content(run: Run, *events: Any, outcomes: dict[str, str] | None = None) -> Content:
    known = {event.series for event in events} | set(outcomes or {})
    more = {one.name: "NO EVENT" for one in series_of(run) if one.name not in known}
    return content_of(run, detection=detection(*events, outcomes=(outcomes or {}) | more))


def place(panel: Panel, step: float) -> float:
    """Where the page's script puts a step: linear up to the threshold, which has the width of 0.35 / 0.9 decades."""

    def along(x: float) -> float:
        return (
            0.35 / 0.9 * x / panel.threshold if x <= panel.threshold else 0.35 / 0.9 + math.log10(x / panel.threshold)
        )

    low, high = map(along, panel.limits)
    return panel.box[0] + (along(step) - low) / (high - low) * (panel.box[2] - panel.box[0])


def figures(said: Content) -> dict[str, Figure]:
    return {one.name: one for section in said.sections for one in section.blocks if isinstance(one, Figure)}


@pytest.fixture(scope="module")
def said() -> Content:
    found = jump("loss/loss", 640, size=-0.25), jump("induction/prefix_matching max", 600)
    return content(small_run(), *found)


# ---- three forms ----


def test_all_forms_hold_the_same_words_and_numbers(said: Content) -> None:
    html, text, data = as_html(said), as_markdown(said), json.loads(as_json(said))
    titles = [section.title for section in said.sections]
    assert re.findall(r"<h2>([^<]*)</h2>", html) == titles
    assert re.findall(r"^## (.*)$", text, re.M) == titles
    assert [section["title"] for section in data["sections"]] == titles
    sentence = next(one for section in said.sections for block in section.blocks if isinstance(block, Items)
                    for one in block.items if "p-values below" in one)  # fmt: skip
    assert all(sentence in form for form in (html, text, json.dumps(data, ensure_ascii=False)))
    assert data["events"][0]["interval"] == [595.0, 605.0]
    loss = next(one for one in data["series"] if one["name"] == "loss/loss")
    np.testing.assert_allclose(loss["values"], small_run()["loss"]["loss"].values, rtol=1e-4)
    llc = next(one for one in data["series"] if one["name"] == "llc/llc")
    assert llc["rejected"] == list(range(10))


def test_the_ending_chooses_the_form_and_markdown_brings_its_pictures(tmp_path: Path) -> None:
    run = Run({"mine": watch(TEN, {"x": np.sin(TEN)}, None, "Mine")}, {"title": "T"})
    with pytest.raises(DataError, match=r"\.html, \.htm, \.md, \.json, got 'a\.pdf'"):
        write_report(run, tmp_path / "a.pdf")
    assert json.loads(write_report(run, tmp_path / "a.json").read_text())["title"] == "T"
    text = write_report(run, tmp_path / "a.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert shown
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in shown)


def test_markdown_escapes_and_keeps_its_tables_square() -> None:
    table = Table(["a|b", EVIL], [Row([EVIL, "1\n2"]), Row(["# x", "2"], weak=True)], "- note")
    text = as_markdown(Content(EVIL, "", "", [Section("k", EVIL, [table, Text("1. not a list")])], [], []))
    assert "<b>" not in text.replace("\\<b", "")
    assert "[d](" not in text.replace("\\[d", "")
    for line in [line for line in text.splitlines() if line.startswith("| ")]:
        assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
    assert "\n\\- note" in text
    assert "\n\\1. not a list" in text or "\n1\\. not a list" in text
    assert "http\u200b://" not in text or "http://" not in text


def test_json_has_no_nan_and_html_numbers_cannot_end_their_script() -> None:
    values = np.where(TEN == 30, np.nan, np.where(TEN == 40, np.inf, 1.5))
    run = Run({"</script><i>": watch(TEN, {"x": values}, None, "Mine")})
    made = content(run)
    json.loads(as_json(made), parse_constant=pytest.fail)
    one = json.loads(as_json(made))["series"][0]
    assert one["values"][2:6] == [1.5, None, None, 1.5]
    html = as_html(made)
    assert html.count("</script>") == 2
    inner = re.search(r'id="numbers">(.*?)</script>', html, re.S)
    assert inner is not None
    assert not set(inner[1]) & set("<>&")
    assert json.loads(inner[1])["series"][0]["name"] == "</script><i>/x"
    odd = Content("", "", "", [], [], [{"width": float("nan"), "span": (1.0, float("inf"))}])
    assert json.loads(as_json(odd))["events"] == [{"width": None, "span": [1.0, None]}]


# ---- what lies under the figures ----


def test_a_panel_says_where_each_step_is_drawn(said: Content) -> None:
    one = figures(said)["overview"]
    assert [panel.lines for panel in one.panels] == [["loss/loss"], ["llc/llc"], ["induction/prefix_matching max"]]
    width = float(one.svg.split('viewBox="0 0 ')[1].split()[0])
    for panel in one.panels:
        left, top, right, bottom = panel.box
        assert 0 < left < right <= width
        assert top < bottom
        assert (panel.scale, panel.threshold) == ("symlog", 1.0)
        assert f'id="{panel.group}"' in one.svg
        drawn = np.array(re.findall(r'<use [^>]*x="([\d.]+)"', one.svg), dtype=float)
        measured = [place(panel, float(s)) for s in STEPS[[12, 30, -1]]]
        assert all(np.abs(drawn - x).min() < 0.02 for x in measured), measured  # a mark lies there
        assert np.diff([place(panel, s) for s in (0.0, 0.5, 1.0, 1.1)]) @ [1, -1, 0] == pytest.approx(0)


def test_a_heat_map_says_its_rows_and_values() -> None:
    made = figures(content(Run({"sketch": sketches(), "circuit": circuits()})))
    (panel,) = made["circuit-overlap"].panels
    assert panel.scale == "square"
    assert panel.rows[0] == "with step 1000"  # the first row is the top one, the last step
    assert panel.unit == 0.01
    assert panel.values[0][-1] == 100
    assert panel.values[0][0] == 33  # 2 of 6
    assert (
        "0.023" in made["circuit-overlap"].caption
    )  # of two random sets of 4 of 100 edges: 0.14575 / 7 + 0.00698 · 2 / 6 + …


def test_sections_are_those_of_what_the_run_holds() -> None:
    keys = [section.key for section in content(Run({"sketch": sketches(), "circuit": circuits()})).sections]
    assert keys == ["story", "overview", "stages", "events", "representation", "circuits", "provenance", "reading"]
    plain = content(Run({"w": watch(TEN, {"x": np.sin(TEN)}, None, "Mine")}))
    assert [s.key for s in plain.sections] == [
        "story",
        "overview",
        "stages",
        "events",
        "watches",
        "provenance",
        "reading",
    ]


def test_too_short_a_path_is_told_and_not_drawn() -> None:
    made = content(Run({"sketch": sketches(LONG[:5])}))
    section = next(one for one in made.sections if one.key == "representation")
    notes = [block.text for block in section.blocks if isinstance(block, Text) and block.look == "note"]
    assert any("needs 8 values" in note for note in notes), notes
    assert any(name.startswith("sketch-similarity") for name in figures(made))


# ---- SVG ----


def test_compact_svg_keeps_its_references_and_drops_the_rest(said: Content) -> None:
    for one in figures(said).values():
        ids = re.findall(r'\bid="([^"]+)"', one.svg)
        asked = {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', one.svg)}
        assert len(ids) == len(set(ids))
        assert asked <= set(ids), asked - set(ids)
        assert {i for _, parts in one.parts for i in parts} <= set(ids)
    shared, rules = share_styles(['<a style="x: 1"/><b style="y: 2"/>', '<c style="x: 1"/>'])
    assert shared == ['<a class="s0"/><b style="y: 2"/>', '<c class="s0"/>']
    assert rules == ".s0 { x: 1 }"
    assert compact('<?xml?><svg width="1" viewBox="0"><path id="q" d="M 1.23456 2 \nL 3 4 \nz"/></svg>', "p") == (
        '<svg viewBox="0"><path d="M1.23 2L3 4z"/></svg>'
    )


# ---- evidence ----


def series(name: str, before: float, after: float, se: float | None) -> Series:
    steps = np.arange(0, 1001, 50)
    return Series(name, steps, np.where(steps < 600, before, after), None if se is None else np.full(21, se))


@pytest.mark.parametrize(("lam", "loss", "kind"), [((20, 60), (3.0, 2.5), "Type A"), ((60, 20), (3.0, 2.5), "Type B"), ((20, 60), (2.5, 3.0), "Neither")])  # fmt: skip
def test_the_type_is_told_with_both_changes(lam: Any, loss: Any, kind: str) -> None:
    one, other = series("loss/loss", *loss, 0.01), series("llc/llc", *lam, 1.0)
    found = detection(jump("loss/loss", 600, span=100), jump("llc/llc", 600, span=100))
    run = Run({})
    (row,) = evidence(run, [one, other], found)
    told = " ".join(row.told)
    assert f"{kind} " in told
    assert "probability > 0.99" in told
    assert f"the loss changes by {'−' if loss[1] < loss[0] else '+'}0.5" in told
    assert f"λ̂ by {'+' if lam[1] > lam[0] else '−'}40" in told
    assert ("lower free energy" in told) == (kind == "Type A")
    (rejected,) = types_between(
        one, Series("l", other.steps, other.values, other.se, "", np.ones(21, bool)), [(500, 700)]
    )
    assert "cannot be told: λ lacks two accepted values" in type_in_words(rejected)


def test_without_an_llc_no_type_is_told() -> None:
    (row,) = evidence(Run({}), [series("loss/loss", 3, 2, None)], detection(jump("loss/loss", 600)))
    assert not any("Type" in words for words in row.told)


def test_which_led_within_a_transition_and_when_none_did() -> None:
    early, late = jump("a/x", 600, span=100), jump("b/x", 640, span=100)
    (row,) = evidence(Run({}), [], detection(late, early))
    assert row.told == ["Within it a/x led, 40 steps before b/x (probability > 0.99)."]
    blurred = jump("c/x", 500, span=150, resolved=False)
    (row,) = evidence(Run({}), [], detection(blurred, early))
    assert "no series certainly led (earliest: c/x" in row.told[0]
    (row,) = evidence(Run({}), [], detection(jump("b/x", 601), early))
    assert "no series certainly led (earliest: a/x" in row.told[0]


def test_schedule_mirage_and_resolution_argue_against() -> None:
    data = watch(TEN, {"accuracy": np.ones(10), "nll": np.ones(10)}, ["accuracy", "nll"], "Mine")
    data["accuracy"].attrs["continuous_twin"] = "nll"
    run = Run({"w": data}, {"settings": {"warm_up": 600}})
    steps = np.arange(0, 5001, 50)
    every = [Series("w/accuracy", steps, steps * 1.0)]
    thresholded = jump("w/accuracy", 610, resolved=False, note="abruptness unresolved: measure step 605")
    (row,) = evidence(run, every, detection(thresholded, outcomes={"w/nll": "NO EVENT"}))
    text = " ".join(row.against)
    assert "learning-rate schedule: kink at step 600" in text
    assert "w/accuracy jumps only as a thresholded score: w/nll has no jump there" in text
    assert "measure step 605" in text
    (clean,) = evidence(Run({"w": data}), every, detection(jump("w/accuracy", 610), jump("w/nll", 612)))
    two = detection(jump("w/accuracy", 610), jump("w/accuracy", 3000), jump("w/nll", 612))
    first, second = evidence(Run({"w": data}), every, two)
    assert first.against == []
    assert "only as a thresholded score" in second.against[0]
    assert clean.against == []
    assert "w/accuracy jumps with its continuous twin w/nll." in clean.told


def test_kinks_that_the_settings_tell_are_those_of_the_schedule() -> None:
    for settings, expected in (
        ({"kinks": [500, 900]}, [500.0, 900.0]),
        ({"warm_up": 20, "kinks": [500]}, [20.0, 500.0]),
        ({"kinks": []}, None),
        ({"warm_up": 0, "kinks": "no"}, None),
        ({}, None),
    ):
        assert schedule_of(Run({}, {"settings": settings}), []) == expected


def test_evidence_stands_with_its_own_transition(said: Content) -> None:
    found = [jump("a/x", 100, span=10), jump("b/x", 2000, span=10, resolved=False, note="measure step 1999")]
    steps = np.arange(0, 3000, 100)
    made = content(Run({"a": watch(steps, {"x": steps * 1.0}, None, "Mine")}), *found)
    assert len(transitions(found)) == 2
    lines = as_markdown(made).splitlines()
    assert any(line.startswith("- Transition 2: ") and "measure step 1999" in line for line in lines)
    assert not any(line.startswith("- Transition 1") for line in lines)
    named = [Series("a/x", steps, steps * 1.0)]
    story = tell(named, detection(*found), {}, control=False, beside=[["Of the one."], ["Of the other."]])
    assert story.happened[0].endswith("2 transitions, at about steps 100, 2000.")
    assert [words.rpartition(". ")[2] for words in story.happened[1:3]] == ["Of the one.", "Of the other."]


# ---- BibTeX ----


def test_every_reference_is_a_bibtex_entry_with_its_own_key() -> None:
    cited = references(CITED)
    text = bibtex(cited)
    keys = re.findall(r"^@\w+\{(\w+),$", text, re.M)
    assert len(keys) == len(set(keys)) == len(cited)
    assert text.count("{") == text.count("}")
    numbers = [one.rpartition("arXiv:")[2] for one in cited if "arXiv:" in one]
    assert re.findall(r"eprint = \{(.*)\}", text) == numbers
    assert "author = {Olsson and others}" in text
    assert "author = {Hewitt and Liang}" in text
    assert re.search(r"@article\{vehtari.*?volume = \{16\},\n  number = \{2\}", text, re.S)


def test_the_report_cites_only_what_was_used() -> None:
    html = as_html(content(Run({"sketch": sketches()})))
    assert "eprint = {1905.00414}" in html
    assert "2209.11895" not in html


# ---- new figures ----


def test_similarity_has_blocks_and_its_last_row_on_top() -> None:
    found = similarity(sketches())
    _, ax = plots.plot_similarity(found.isel(layer=0))
    shown = np.asarray(ax.images[0].get_array())
    early, late = LONG < 100, LONG >= 100
    assert shown[np.ix_(early, early)].min() > 0.9
    assert shown[np.ix_(early, late)].max() < 0.5
    assert ax.images[0].origin == "lower"
    assert ax.images[0].get_clim() == (0, 1)
    assert np.asarray(plots.plot_similarity(found.isel(layer=1))[1].images[0].get_array()).min() > 0.9
    _, ax = plots.plot_similarity(circuit_overlap(circuits()), "jaccard")
    assert ax.get_title(loc="right").startswith("by chance: 0.023")


def test_path_goes_from_ring_to_square_and_marks_cusps() -> None:
    found = essential_dynamics(sketches()["outputs"], walks=50)
    found["cusp"][:] = found["step"].values == found["step"].values[12]
    _, ax = plots.plot_essential(found)
    marks = {line.get_marker(): line for line in ax.lines if line.get_marker() in "os*"}
    path = found["pc"].values
    for marker, at in (("o", 0), ("s", -1), ("*", 12)):
        np.testing.assert_allclose(np.column_stack(marks[marker].get_data())[0], path[at, :2])
    assert f"({float(found['explained'][0]):.0%} of the variance)" in ax.get_xlabel()
    found["cusp"][:] = False
    assert "no turn sharper" in plots.plot_essential(found)[1].get_title(loc="right")


def test_pairs_that_rise_highest_come_first_above_their_null() -> None:
    values = np.full((4, 3, 2, 2, 2, 2), np.nan)
    values[:, :, 1, :, 0, :] = 0.1
    values[:, 1, 1, 0, 0, 1] = [0.1, 0.2, 0.9, 0.5]
    values[:, 2, 1, 1, 0, 0] = 0.8
    dims = ("step", "kind", "layer", "head", "layer_from", "head_from")
    null = np.tile([0.1, 0.1, 0.75], (4, 1))
    data = watch(
        np.array([0, 1, 10, 100]), {"composition": (dims, values), "null": (("step", "kind"), null)}, [], "Composition"
    )
    data = data.assign_coords(kind=np.array(["Q", "K", "V"], dtype=object))
    _, ax = plots.plot_pairs(data, most=3)
    assert [label.get_text() for label in ax.get_yticklabels()][:2] == ["K L1H0 from L0H1", "V L1H1 from L0H0"]
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array())[0], [0.0, 0.1, 0.8, 0.4], atol=1e-12)


def test_any_writer_takes_a_run_of_every_kind() -> None:
    run = induction_run()
    every = Run(run.data | {"sketch": sketches(), "circuit": circuits()}, run.attrs)
    made = content(every)
    assert Reader(as_html(made)).open == []
    assert all(len(write(made)) > 1000 for write in WRITERS.values())


# ---- notebooks ----


def test_a_notebook_shows_events_and_outcome_escaped() -> None:
    html = detection(jump("<b>/x", 640), jump("c/x", 20, q=0.4), outcomes={"d/x": "NO EVENT"})._repr_html_()
    assert "<b>EVENTS</b>: 3 series, 40 tests, 1 series without an event" in html
    assert "&lt;b&gt;/x" in html
    assert "640 [635, 645]" in html
    assert html.count("<tr style=opacity:.55>") == 1
    assert "<b>NO EVENT</b>" in detection(outcomes={"d/x": "NO EVENT"})._repr_html_()


def test_a_notebook_shows_the_estimates_and_greys_the_rejected() -> None:
    derived = llc(induction_run()["llc"])
    html = derived._repr_html_()
    assert "49 of 59 estimates accepted" in html
    assert html.count("<tr style=opacity:.55>") == 10
    assert f"<td>{number(float(derived['llc'][-1]), 4)}</td>" in html
    assert "1 of 1 estimates accepted" in llc(induction_run()["llc"].isel(step=-1))._repr_html_()
    assert "estimates accepted" not in derived[["se"]]._repr_html_()


def test_a_notebook_shows_a_trajectory_and_an_event_escaped(tmp_path: Path) -> None:
    store = Trajectory(tmp_path / "run.zarr", seed=3, title="<i>T</i>")
    store.declare("w", {"instrument": "mine.<b>Norm", "fields": {}, "fingerprint": "ab", "doc": ""})
    html = store._repr_html_()
    assert "&lt;i&gt;T&lt;/i&gt;" in html
    assert "seed 3" in html
    assert "<td>&lt;b&gt;Norm</td>" in html
    assert "<i>T" not in html
    one = jump("<b>/x", 640, resolved=False, note="measure step 600")
    assert one._repr_html_() == (
        "<p><b>jump</b>: &lt;b&gt;/x rises by 1 at step 640 [635, 645] (p = 0.005, q = 0.01). Not resolved in time: measure step 600.</p>"
    )
