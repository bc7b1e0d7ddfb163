"""The recipe on features in its smallest form: it runs to its end, and finds the births that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from devmon import Trajectory
from devmon.analysis.plots import plot_feature_circuit, plot_steering
from devmon.features import load_dictionary
from devmon.recipes.features import ATTENTION, Form, checks, study
from devmon.recipes.models.planted_births import planted_run

TINY = Form(steps=30, context=32, observed=3, looks=4, fits=30, planted=30, prompts=8, learnt=250, held_out=16)


def test_births_that_are_known_are_found_and_none_beside_them() -> None:
    known = planted_run(600)  # two fifths of the steps of the recipe
    assert known["false"] == 0
    assert known["found"] == known["inside"] >= 12, known
    assert known["cosine"] > 0.98


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_all_of_it_runs_and_an_untrained_model_hits_none_of_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = dict.fromkeys(("found", "inside", "false", "cosine"), 0.0)  # the test above is of that
    monkeypatch.setattr("devmon.recipes.features.planted_run", lambda steps: nothing)
    facts, quality = study(tmp_path, TINY, Console(quiet=True))
    run = Trajectory(tmp_path / "trajectory.zarr")
    assert set(run) == {
        *("loss", "induction", "features-stream", "features-mlp", "fresh", "fresh-twin", "circuit", "steering")
    }
    for name in ("births", "densities", "crosscoder", "circuit", "steering"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert load_dictionary(tmp_path / "dictionaries" / "stream").dictionary.latents == 192
    assert run["circuit"]["site"].values.tolist()[:2] == [f"{name} {layer}" for name, layer in ATTENTION]
    assert (run["steering"]["slope_se"] > 0).all()
    plot_feature_circuit(run["circuit"], step=0)
    plot_steering(run["steering"])

    # 30 steps are before the transition: what comes of it is not there
    held = {check.what: check.holds for check in checks(facts, quality)}
    assert not held["signal of the induction circuit at the end, nats"]
    assert not held["steering slope at the end, over that of random ones"]
    assert np.isfinite([row["fvu"] for row in quality.values()]).all()
