"""A quick part of benchmarks/detection.py: the script runs, and on clear events the detector is ahead of every
baseline."""

from __future__ import annotations

import numpy as np
import pytest
from detection import near, ours, published, theirs
from detection_baselines import BASELINES
from detection_families import POSITIVES, grid, staged

CLEAR = {
    "jump": "width 0.2, SNR 10",
    "turn": "sd 1.0, SNR 10",
    "plateau": "width 1.0, SNR 10",
    "bump": "width 0.4, SNR 10",
}
QUICK = [name for name in BASELINES if name not in ("PELT rbf", "hidden Markov")]


@pytest.mark.parametrize("family", CLEAR)
def test_f1_on_clear_events_is_the_best(family: str) -> None:
    steps = grid("log", 60)
    drawn = [POSITIVES[family][CLEAR[family]](np.random.default_rng([5, i]), steps) for i in range(8)]
    scores = {}
    for name, search in {"devmon": ours, **{name: theirs(BASELINES[name]) for name in QUICK}}.items():
        hits = false = 0
        for found, (_, truth) in zip(search(steps, [y for y, _ in drawn]), drawn, strict=True):
            hit = any(near(event[0], truth[0]) for event in found)
            hits += hit
            false += len(found) - hit
        scores[name] = 2 * hits / (hits + false + len(drawn))
    best = max(score for name, score in scores.items() if name != "devmon")
    assert scores["devmon"] > best, scores


def test_boundaries_of_published_shapes() -> None:
    rows = published(2, 11, points=(100,), others=("GP slope minima",))
    for name, row in rows.items():
        ours_row = row["devmon"]
        assert ours_row["boundaries found"] >= (0.99 if "regression" in name else 0.74), rows
        assert ours_row["events too many"] <= 1, rows
        assert ours_row["events too many"] < row["GP slope minima"]["events too many"], rows


def test_boundaries_under_noise_that_may_be_a_walk() -> None:
    """Five times the noise, on uneven steps: such series are taken for a random walk or for a wild curve with little
    noise, and prominences must be in a unit that is the same for both (in noise sd 0 and 1 of 4 are found)."""
    steps = np.unique(np.round(np.append(np.linspace(0, 500_000, 51), np.geomspace(1, 500_000, 50))))
    drawn = [staged("in-context regression", steps, np.random.default_rng([0, i]), "smooth", sd=0.5) for i in range(4)]
    found = [[event[0] for event in events] for events in ours(steps, [y for y, _ in drawn])]
    for boundary in (1000, 40_000):
        assert sum(any(abs(np.log(max(step, 1) / boundary)) < 0.1 for step in one) for one in found) >= 3, boundary
