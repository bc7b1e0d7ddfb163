"""A calibration as it is drawn, and as a report shows it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from devmon.analysis import plots
from devmon.analysis import report as write_report
from tests.support.calibration_toys import trials
from tests.support.synthetic import Run


def joined(ax: Axes) -> list[Line2D]:
    """The lines of accepted trials (caps of error bars are lines, too)."""
    return [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) > 1]


def test_lines_join_one_checkpoint_and_one_gamma() -> None:
    fig, (by_lr, by_gamma) = plots.plot_calibration(trials())
    assert [list(line.get_xdata()) for line in joined(by_lr)] == [[1e-3, 3e-3, 1e-2]] * 2
    assert list(joined(by_lr)[1].get_ydata()) == pytest.approx([3.1, 3.3, 4.0])
    assert [list(line.get_xdata()) for line in joined(by_gamma)] == [[1.0, 10.0, 100.0]] * 2  # the lr sweep was at 10
    upright = [
        [line.get_xdata()[0] for line in ax.lines if list(line.get_ydata()) == [0, 1]] for ax in (by_lr, by_gamma)
    ]
    assert upright == [[1e-3], [10.0]]
    assert (by_lr.get_xscale(), by_gamma.get_xscale()) == ("log", "log")
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    assert words == ["late checkpoint", "middle checkpoint", "chosen"]


def test_of_settings_tried_twice_the_later_trial_is_on_the_line() -> None:
    rows = [
        {"model": 0, "lr": rate, "gamma": 10.0, "llc": value} for rate, value in ((1e-3, 9.0), (1e-2, 2.0), (1e-3, 3.0))
    ]
    _, (by_lr, _) = plots.plot_calibration(trials(rows))
    (line,) = joined(by_lr)
    assert list(line.get_ydata()) == [3.0, 2.0]
    faint = [one for one in by_lr.lines if one.get_marker() == "o" and one.get_alpha() is not None]
    assert [list(one.get_ydata()) for one in faint] == [[9.0]]


def test_the_fit_in_gamma_is_dashed_from_below_the_trials() -> None:
    fit = {"gamma": [0.0, 1.0, 0.1, 1.0, 100.0], "value": [3.0, 2.5, 2.9, 2.5, 1.0], "limit": 3.0}
    fig, (by_lr, by_gamma) = plots.plot_calibration(trials(), [fit])
    (dashed,) = (line for line in by_gamma.lines if line.get_label() == "fit of λ̂ in gamma")
    assert (list(dashed.get_xdata()), list(dashed.get_ydata())) == ([0.1, 1.0, 100.0], [2.9, 2.5, 1.0])
    assert "fit of λ̂ in gamma" in [text.get_text() for text in fig.legends[0].get_texts()]
    assert not any(line.get_label() == "fit of λ̂ in gamma" for line in by_lr.lines)


def test_bars_are_1_645_standard_errors() -> None:
    _, (by_lr, _) = plots.plot_calibration(trials())
    bars = [segment for bars in by_lr.collections for segment in bars.get_segments()]
    assert bars[0][:, 1] == pytest.approx([2.1 - 0.1645, 2.1 + 0.1645])


def test_rejected_trials_are_hollow_off_the_line_and_off_the_scale() -> None:
    tried = ((0.1, math.nan, "non-finite"), (0.01, 1e6, "diverged"), (1e-3, 2.0, "ok"), (1e-4, 2.2, "ok"))
    rows = [{"model": 0, "lr": lr, "gamma": 10.0, "llc": llc, "verdict": verdict} for lr, llc, verdict in tried]
    fig, (by_lr, by_gamma) = plots.plot_calibration(trials(rows))
    hollow = {line.get_xdata()[0]: line for line in by_lr.lines if line.get_markerfacecolor() == "white"}
    assert sorted(hollow) == [1e-2, 1e-1]
    low, high = by_lr.get_ylim()
    assert (hollow[1e-2].get_ydata()[0], high) == (high, pytest.approx(2.4, abs=0.1))
    assert low <= hollow[1e-1].get_ydata()[0] <= high
    (line,) = joined(by_lr)
    assert list(line.get_xdata()) == [1e-4, 1e-3]
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    assert {"rejected, diverged", "rejected, non-finite"} <= set(words)
    assert joined(by_gamma) == []


def test_trials_of_several_gammas_are_several_lines_and_a_single_trial_is_shown() -> None:
    rows = [{"model": 0, "lr": rate, "gamma": g, "llc": g} for g in (1.0, 2.0) for rate in (1e-3, 1e-2)]
    rows.append({"model": 1, "lr": 0.5, "gamma": 7.0, "llc": 1.0})
    fig, (by_lr, _) = plots.plot_calibration(trials(rows))
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    assert {"late checkpoint, gamma 1", "late checkpoint, gamma 2", "middle checkpoint, gamma 7"} <= set(words)
    assert len({line.get_linestyle() for line in joined(by_lr)}) == 2
    assert 0.5 in [line.get_xdata()[0] for line in by_lr.lines]


def test_axes_that_are_given_are_drawn_on_and_no_setting_changes() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    fig = Figure()
    axes = list(fig.subplots(1, 2))
    assert plots.plot_calibration(trials(), ax=axes) == (fig, axes)
    assert all(ax.has_data() for ax in axes)
    nothing = trials([{"model": 0, "lr": 1.0, "gamma": 1.0, "llc": math.nan, "se": math.inf, "verdict": "non-finite"}])
    assert plots.plot_calibration(nothing)[1][0].has_data()
    assert dict(matplotlib.rcParams) == before


def test_missing_numbers_and_foreign_words_are_shown_as_they_are(tmp_path: Path) -> None:
    table = {name: column.values.tolist() for name, column in trials().items()}
    table["llc"][0], table["verdict"][0] = None, "<b>"
    kept = {
        "reasons": "<script>",
        "settings": {"lr": 1e-3, "gamma": 10.0},
        "steps": {"late": 4, "middle": 2},
        "trials": table,
    }
    text = write_report(Run({}, {"calibration": kept}), tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.count("<script") == 2  # the page's own
    assert "&lt;script&gt;" in text
    assert "<td>&lt;b&gt;</td>" in text
    assert text.count('<tr class="weak">') == 1
    other = write_report(Run({}, {"calibration": "by hand"}), tmp_path / "s.html").read_text(encoding="utf-8")
    assert "by hand" in other
    assert 'id="calibration"' not in other
