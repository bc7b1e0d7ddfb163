"""What the detector takes and gives back: plain arrays, tables, CSV files; frames and JSON with provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from devmon.analysis.derive.tables.from_tables import series_of_table
from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.results import Detection
from devmon.analysis.detection.search import detect
from devmon.analysis.series import Series
from devmon.errors import DataError

STEPS = np.unique(np.append(0, np.round(np.geomspace(1, 5000, 40))))
QUICK = Detector(n_null=59, kinds=("jump",))


def rise(seed: int = 0, at: float = 200.0) -> np.ndarray:
    noise = np.random.default_rng([11, seed]).standard_normal(len(STEPS))
    return 10 / (1 + (at / np.maximum(STEPS, 0.1)) ** 12) + 0.5 * noise


def same(a: Detection, b: Detection) -> None:
    assert a.events == b.events
    assert {n: f.notes for n, f in a.fits.items()} == {n: f.notes for n, f in b.fits.items()}


@pytest.mark.parametrize(
    "make", [list, tuple, np.asarray, pd.Series, lambda x: pd.Series(x, index=np.arange(len(x))[::-1]), pd.array]
)
def test_any_sequence_gives_the_same_events(make: Any) -> None:
    expected = QUICK.fit(STEPS, rise()).events()
    assert len(expected) == 1
    assert QUICK.fit(make(STEPS), make(rise())).events() == expected


def test_missing_points_are_skipped_with_a_note() -> None:
    y = rise()
    y[[4, 9]] = np.nan
    fit = QUICK.fit(STEPS, y)
    assert fit.notes[0] == f"2 of {len(STEPS)} points are NaN: skipped"
    assert fit.events() == QUICK.fit(np.delete(STEPS, [4, 9]), np.delete(y, [4, 9])).events()
    se = np.ones(len(STEPS))
    se[7] = np.nan
    assert QUICK.fit(STEPS, rise(), se).notes[0].startswith("1 of")
    few = QUICK.fit(STEPS, np.where(np.arange(len(STEPS)) < 7, y, np.nan))
    assert few.outcome == "UNRESOLVED"
    assert few.notes[1].endswith("NaN: skipped")
    flat = QUICK.fit(STEPS, np.where(np.isnan(y), np.nan, 3.0))
    assert flat.outcome == "NO EVENT"
    assert flat.notes == (f"2 of {len(STEPS)} points are NaN: skipped", "all values are equal")


def test_replicates_that_do_not_differ_tell_no_noise() -> None:
    """Equal ones, and ones apart by levels alone (in float32): the noise is estimated, not taken as none."""
    y = rise()
    expected = QUICK.fit(STEPS, y)
    for apart in (0.0, 1.0):
        same_ones = (y + apart * np.arange(4)[:, None]).astype(np.float32)
        fit = QUICK.fit(STEPS, y, replicates=same_ones)
        assert fit.notes[0] == "the replicates differ at no step: taken as not given"
        assert fit.events() == expected.events()
        assert fit.noise is not None
        assert fit.noise.source == "estimated"
    nothing = np.full(len(STEPS), np.nan)
    assert QUICK.fit(STEPS, nothing, replicates=np.tile(nothing, (4, 1))).notes == ("no finite value",)


def test_errors_that_are_all_missing_are_named() -> None:
    assert QUICK.fit(STEPS, rise(), np.full(len(STEPS), np.nan)).notes == (
        f"{len(STEPS)} of {len(STEPS)} points have no finite se",
    )


def test_sizes_are_plain_numbers_with_replicates_too() -> None:
    y = rise()
    drawn = y + 0.5 * np.random.default_rng(0).standard_normal((8, len(STEPS)))
    (event,) = QUICK.fit(STEPS, drawn.mean(0), replicates=drawn).events()[:1]
    assert type(event.size) is float


def test_rejected_points_are_not_told_twice() -> None:
    bad, y = np.arange(len(STEPS)) % 9 == 0, rise()
    y[3] = np.nan
    notes = detect(Series("llc", STEPS, y, np.full(len(y), 2.0), rejected=bad), QUICK).fits["llc"].notes
    assert notes == (f"{bad.sum()} of {len(bad)} points rejected", f"1 of {(~bad).sum()} points are NaN: skipped")


@pytest.mark.parametrize("values,match", [(rise() + 0j, "complex"), (np.where(rise() > 5, np.inf, 0), "infinity")])
def test_numbers_that_are_none(values: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        QUICK.fit(STEPS, values)


def test_a_wide_table_is_its_series(tmp_path: Path) -> None:
    error = np.linspace(0.4, 0.6, len(STEPS))
    table = pd.DataFrame({"step": STEPS, "loss": rise(), "loss_se": error, "note": "x", "score": rise(1, 900)})
    expected = detect([Series("loss", STEPS, rise(), error), Series("score", STEPS, rise(1, 900))], QUICK)
    assert {event.series for event in expected.events} == {"loss", "score"}
    same(detect(table, QUICK), expected)
    table.to_csv(tmp_path / "run.csv", index=False)
    from_file = detect(tmp_path / "run.csv", QUICK)
    assert [event.series for event in from_file.events] == ["loss", "score"]
    assert from_file.provenance["run"] == {"file": "run.csv"}
    np.testing.assert_allclose([e.step for e in from_file.events], [e.step for e in expected.events], rtol=1e-6)


def test_a_long_table_is_its_series() -> None:
    one = pd.DataFrame({"watch": "z", "variable": "x", "step": STEPS, "value": rise(), "se": np.nan, "units": "nats"})
    two = pd.DataFrame({"watch": "b", "variable": "llc", "step": STEPS, "value": rise(1), "se": 0.5, "units": "1",
                        "verdict": np.where(np.arange(len(STEPS)) < 5, "negative", "ok")})  # fmt: skip
    a, b = series_of_table(pd.concat([one, two]))
    assert (a.name, a.units, a.se, a.rejected) == ("z/x", "nats", None, None)
    assert (b.name, b.units) == ("b/llc", "")
    np.testing.assert_array_equal(b.se, 0.5)
    np.testing.assert_array_equal(b.rejected, np.arange(len(STEPS)) < 5)
    np.testing.assert_array_equal(b.values, rise(1))
    (named,) = series_of_table(pd.DataFrame({"series": "s", "step": STEPS, "value": rise()}))
    assert named.name == "s"
    (bare,) = series_of_table(pd.DataFrame({"step": STEPS, "value": rise()}))
    assert bare.name == "value"


@pytest.mark.parametrize(
    "table,match",
    [
        (pd.DataFrame({"t": [1, 2], "x": [1, 2]}), "named 'step', got t, x"),
        (pd.DataFrame({"step": [1, 2], "x": ["a", "b"]}), "no numbers beside 'step'"),
        (pd.DataFrame({"step": [1, 2], "value": ["a", "b"]}), "column 'value' must hold numbers"),
        (pd.DataFrame([[1, 2, 3]], columns=["step", "x", "x"]), "x is there more than once"),
        (pd.DataFrame({"step": [-1, 1], "x": [1.0, 2]}), "count from 0, got -1"),
        ("nowhere.csv", "no file nowhere.csv"),
        (5, "got int"),
        ([1.0, 2.0], "expected a list of Series, got float"),
    ],
)
def test_bad_tables(table: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        detect(table)


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="empty.csv does not read as CSV"):
        detect(str(tmp_path / "empty.csv"))


def test_the_frame_has_one_row_an_event() -> None:
    detection = detect([Series("up", STEPS, rise()), Series("flat", STEPS, np.ones(len(STEPS)))], QUICK)
    frame = detection.to_frame()
    (event,) = detection.events
    row = frame[frame["series"] == "up"].iloc[0]
    assert (row["kind"], row["step"], row["low"], row["high"]) == ("jump", event.step, *event.interval)
    assert (row["size"], row["size_low"], row["size_high"]) == (event.size, *event.size_interval)
    assert (row["width"], row["p_value"], row["q_value"], row["resolved"]) == (
        event.width, event.p_value, event.q_value, event.resolved)  # fmt: skip
    flat = frame[frame["series"] == "flat"].iloc[0]
    assert (flat["outcome"], flat["note"]) == ("NO EVENT", "all values are equal")
    assert pd.isna(flat["step"])
    nothing = detect([], QUICK).to_frame()
    assert len(nothing) == 0
    assert {"kind", "series", "low"} <= set(nothing.columns)


def test_json_says_where_the_numbers_came_from() -> None:
    y = rise()
    stored = json.loads(detect(Series("up", STEPS, y, units="nats"), QUICK).to_json())
    assert set(stored["provenance"]["versions"]) == {"devmon", "numpy", "scipy"}
    told = stored["provenance"]["series"]["up"]
    assert (told["points"], told["steps"], told["units"], told["se"]) == (len(STEPS), [0, 5000], "nats", False)
    assert stored["settings"]["n_null"] == 59
    assert (stored["series"]["up"]["noise"], stored["series"]["up"]["smallest"] > 0) == ("estimated", True)
    assert stored["settings"]["seed"] == 0
    again = json.loads(detect(Series("up", STEPS, y.copy()), QUICK).to_json())["provenance"]["series"]["up"]
    assert again["sha256"] == told["sha256"]
    y[0] += 1e-9
    other = json.loads(detect(Series("up", STEPS, y), QUICK).to_json())["provenance"]["series"]["up"]
    assert other["sha256"] != told["sha256"]
