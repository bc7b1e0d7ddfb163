"""What a notebook shows of events, of a search, of estimates and of a trajectory."""

from __future__ import annotations

from pathlib import Path

from devmon.analysis.derive.llc import llc
from devmon.analysis.wording import number
from devmon.store.trajectory import Trajectory
from tests.support.reports import detection, jump
from tests.support.synthetic import induction_run


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
        "<p><b>jump</b>: &lt;b&gt;/x rises abruptly by 1 at step 640 [635, 645] (p = 0.005, q = 0.01). "
        "Not resolved in time: measure step 600.</p>"
    )
