"""One content as HTML, Markdown and JSON; the numbers under the figures; SVG made small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from devmon.analysis import report as write_report
from devmon.analysis.reports.content import Content, Items, Paragraph, Section
from devmon.analysis.reports.svg import compact, share_styles
from devmon.analysis.reports.writers import WRITERS, as_html, as_json, as_markdown
from devmon.analysis.table import Row, Table
from devmon.errors import DataError
from tests.support.reports import TEN, Reader, circuits, content, figures, jump, place, sketches, small_run
from tests.support.synthetic import STEPS, Run, induction_run, watch

EVIL = "<b>x</b> | a_b *c* [d](http://e) `f` & $g$"


@pytest.fixture(scope="module")
def said() -> Content:
    found = jump("loss/loss", 640, size=-0.25), jump("induction/prefix_matching max", 600)
    return content(small_run(), *found)


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
    text = as_markdown(Content(EVIL, "", "", [Section("k", EVIL, [table, Paragraph("1. not a list")])], [], []))
    assert "<b>" not in text.replace("\\<b", "")
    assert "[d](" not in text.replace("\\[d", "")
    for line in [line for line in text.splitlines() if line.startswith("| ")]:
        assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
    assert "\n\\- note" in text
    assert "\n\\1. not a list" in text or "\n1\\. not a list" in text
    assert "http\u200b://" not in text or "http://" not in text


def test_markdown_escapes_no_digit() -> None:
    """A backslash before a digit is shown (CommonMark 2.4): a list is escaped at its dot, a decimal not at all."""
    section = Section("k", "S", [Paragraph("1. no list"), Paragraph("0.55 is")])
    told = as_markdown(Content("T", "", "", [section], [], []))
    assert "1\\. no list" in told
    assert "\n0.55 is" in told


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


def test_any_writer_takes_a_run_of_every_kind() -> None:
    run = induction_run()
    every = Run(run.data | {"sketch": sketches(), "circuit": circuits()}, run.attrs)
    made = content(every)
    assert Reader(as_html(made)).open == []
    assert all(len(write(made)) > 1000 for write in WRITERS.values())


def test_markdown_has_no_backslash_where_nothing_is_markup() -> None:
    """Some readers show them, and the file is read as it is."""
    words = "induction[2,3] at step 650 [600, 700] with q < 0.05, ~3 nats & more, 2 > 1, $5, a_b_c; x|y"
    for text in (words, "p <0.05", "λ̂(nβ) ~ d/2"):
        section = Section("k", "t", [Paragraph(text), Table(["series", "90% [of its jumps]"], [Row([text, "1"])])])
        told = as_markdown(Content("T", "", "", [section], [], []))
        assert told.replace("x\\|y", "x|y").count(text) == 2, told
    for markup in ("[a](b)", "[x] done", "<b>c</b>", "&lt; &#60;", "$a$ and ~~b~~", "> quoted", "*a* `b`", "[^1]"):
        told = as_markdown(Content("T", "", "", [Section("k", "t", [Paragraph(markup)])], [], []))
        assert f"\n{markup}" not in told, told
