"""Replay of curves in the form of published ones: mapping of columns, seeds, boundaries, chance, and bad files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event
from devmon.analysis.runs.replay import _compare, _near, replay
from devmon.errors import DataError

STEPS = np.unique(np.round(np.geomspace(1, 50_000, 60)))
QUICK = Detector(n_null=59, kinds=("jump",))
PLACES = (100, 2000)


def curves(seeds: int = 2) -> pd.DataFrame:
    """A staircase with its rises at PLACES (a little later in each seed); the rows in no order."""
    parts = []
    for seed in range(seeds):
        rng, x = np.random.default_rng([13, seed]), np.log10(STEPS)
        value = sum(20 / (1 + np.exp(-(x - np.log10(p) - 0.01 * seed) / 0.02)) for p in PLACES)
        value = value + rng.standard_normal(len(x))
        parts.append(
            pd.DataFrame(
                {"t": STEPS, "rng": seed, "lambda": value, "err": np.linspace(0.7, 1.4, len(x)), "model": "LR"}
            )
        )
    return pd.concat([*parts, parts[0].assign(model="LM", **{"lambda": 0.0})]).sample(frac=1, random_state=0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    curves().to_csv(tmp_path / "curves.csv", index=False)
    return tmp_path / "curves.csv"


def run(file: Path, **more: Any) -> Any:
    given = {"step": "t", "value": "lambda", "seed": "rng", "where": {"model": "LR"}, "detector": QUICK} | more
    return replay(file, **given)


def test_boundaries_of_a_staircase_are_found(file: Path) -> None:
    found = run(file, boundaries=[*PLACES, 20_000], error="err")
    assert (found.hits, found.of, found.further) == (4, 6, 0), found.to_text()
    assert list(found.fits) == ["0", "1"]
    table = found.table
    assert table[table["found"]]["boundary"].tolist() == [*PLACES, *PLACES]
    assert table[table["found"]]["off"].abs().max() < 0.1
    assert not table[table["boundary"] == 20_000]["found"].any()
    assert found.p_value is not None
    assert found.p_value < 0.02
    assert 0 < found.expected < 1
    text = found.to_text()
    assert "4 of 6 boundaries found within 10% of the step; 0 events beside them" in text
    assert found.provenance["file"] == "curves.csv"
    assert str(file.parent) not in str(found.provenance)
    assert found.provenance["columns"]["value"] == "lambda"
    # each seed alone is what the detector says of it
    rows = curves().query("model == 'LR' and rng == 1").sort_values("t")
    fit = QUICK.fit(rows["t"], rows["lambda"], rows["err"], name="1")
    assert found.fits["1"].events() == fit.events()


def test_without_boundaries_events_are_listed(file: Path) -> None:
    found = run(file)
    assert (found.of, found.hits, found.further, found.p_value) == (0, 0, 4, None)
    assert "boundaries" not in found.to_text()
    nothing = run(file, seed=None, where={"model": "LM"}, boundaries=[100])
    assert nothing.to_text().splitlines()[0] == "1 seed. all rows: NO EVENT"
    assert (nothing.hits, nothing.of, nothing.p_value) == (0, 1, None)


def event(step: float) -> Event:
    return Event("jump", step, (step * 0.97, step * 1.01), 1, (1, 1), None, None, 0.01, None, True, "", "")


def test_an_event_serves_one_boundary() -> None:
    rows = _compare("s", [event(104), event(5000)], np.array([100.0, 108.0, 900.0]), 0.1)
    assert [row[:3] for row in rows] == [("s", 100, False), ("s", 108, True), ("s", 900, False), ("s", None, False)]
    assert rows[1][4:] == (104, 104 * 0.97, 104 * 1.01, 0.01, 104 / 108 - 1, False)
    # both boundaries are served although the nearest event of both is the same
    rows = _compare("s", [event(104), event(96)], np.array([100.0, 106.0]), 0.1)
    assert [row[4] for row in rows] == [96, 104]
    # a pairing that is nearer in sum, but finds no boundary, is not taken
    rows = _compare("s", [event(131.5), event(145.3)], np.array([105.0, 126.4]), 0.1)
    assert [row[2] for row in rows] == [False, True, False]
    edges = _compare("s", [event(109.9), event(1 / 1.101)], np.array([100.0, 1.0]), 0.1)
    assert [row[2] for row in edges] == [True, False, False]  # ten per cent in log step, both ways
    assert _compare("s", [], np.array([3.0]), 0.1)[0][2] is False
    assert len(_compare("s", [event(5)], np.array([]), 0.1)) == 1


def test_hits_by_chance_are_the_share_of_log_step() -> None:
    places = np.random.default_rng(0).uniform(np.log(101), np.log(10_001), (40_000, 1))
    assert _near(np.log([[102, 103, 501]]), np.array([100.0, 500.0, 900.0]), 0.1).tolist() == [
        2
    ]  # boundaries, not events
    share = _near(places, np.array([1000.0]), 0.1).mean()
    assert share == pytest.approx(2 * np.log(1.1) / np.log(100), rel=0.05)


def test_a_pickle_only_where_it_is_allowed(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "curves.pkl"
    curves().set_index("t").to_pickle(path)
    with pytest.raises(DataError, match="unpickling runs code"):
        run(path)
    assert run(path, allow_pickle=True).fits["0"].events() == run(file).fits["0"].events()
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(DataError, match="holds a list, expected a pandas DataFrame"):
        run(path, allow_pickle=True)
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="does not unpickle here"):
        run(path, allow_pickle=True)
    with pytest.raises(DataError, match="no file"):
        run(tmp_path / "none.pkl", allow_pickle=True)


@pytest.mark.parametrize(
    "more,match",
    [
        ({"step": "step"}, "no column 'step' for the steps; the table has t, rng, lambda"),
        ({"value": "model"}, "column 'model' must hold numbers"),
        ({"error": "se"}, "no column 'se' for the standard errors"),
        ({"seed": "run"}, "no column 'run' for the seed"),
        ({"seed": None}, "the table has more than one row for step 1: .*--seed COLUMN"),
        ({"where": {}}, "seed 0 has more than one row for step 1"),
        ({"where": {"model": "XL"}}, "no row has model = XL; it holds L"),
        ({"where": {"kind": "LR"}}, "no column 'kind' to choose rows by"),
        ({"boundaries": [0]}, "boundaries are steps above 0"),
        ({"tolerance": 0}, "tolerance is a share"),
    ],
)
def test_bad_requests(file: Path, more: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        run(file, **more)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        run(tmp_path / "none.csv")
