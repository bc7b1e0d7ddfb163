"""Settings that an LLC leaves open: chosen where it can be, kept for the run, and confirmed later."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from devmon import LoopMonitor, Snapshot, Trajectory, Watch, every, observe
from devmon.analysis import llc
from devmon.analysis.derive.verdicts import accepted
from devmon.instruments import LLC
from devmon.monitoring.fingerprint import identity
from tests.support.sampling_toys import Bowl, bowl_loss, slopes

LENGTH = {"chains": 3, "draws": 60, "burn_in": 40, "batch_size": 20, "nbeta": 50.0}


def open_llc() -> LLC:
    return LLC(slopes(size=0.1), bowl_loss, **LENGTH)


def bowl(away: float) -> Bowl:
    model = Bowl()
    with torch.no_grad():
        model.w.add_(away)
    return model


def run(trajectory: Trajectory, steps: range, strict: bool = False) -> None:
    """Weights far from the minimum at steps below 4, and at it from there."""
    for step in steps:
        observe(step, bowl(5.0 if step < 4 else 0.0), [Watch("llc", open_llc(), every(1))], trajectory, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_no_settings_are_chosen_where_weights_allow_it_and_kept(tmp_path: Path, strict: bool) -> None:
    trajectory = Trajectory(tmp_path / "run.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(trajectory, range(9), strict)
    failures = trajectory.failures("llc")
    assert min(trajectory.steps("llc")) in (4, 5)
    assert "w* is perhaps no minimum" in failures[0]
    assert "tried again from" in failures[1] or "no minimum" in failures[1]
    record = trajectory.attrs["chosen"]["llc"]
    assert record["confirmed"]["accepted"]
    assert record["confirmed"]["step"] > record["step"] == min(trajectory.steps("llc"))
    rows = trajectory["llc"]
    assert {name: rows.attrs[name] for name in ("lr", "gamma")} == {n: record["settings"][n] for n in ("lr", "gamma")}
    assert accepted(llc(rows)["verdict"].values).all()


def test_of_few_examples_all_are_a_minibatch() -> None:
    few = LLC(slopes(n=12, size=0.1), bowl_loss, chains=3, draws=60, burn_in=40, nbeta=50.0)  # 32 by default
    chosen = few.settle(few.choose([bowl(0.0)], seed=0))
    assert chosen.batch_size == 12
    assert accepted(llc(chosen(Snapshot(0, bowl(0.0))))["verdict"].values).all()
    many = replace(open_llc(), nbeta=50.0)
    assert "batch_size" not in many.choose([bowl(0.0)], seed=0)["settings"]


def test_another_process_goes_on_with_the_same_settings(tmp_path: Path) -> None:
    once, twice = Trajectory(tmp_path / "once.zarr", seed=3), Trajectory(tmp_path / "twice.zarr", seed=3)
    run(once, range(4, 8))
    run(twice, range(4, 6))
    run(Trajectory(tmp_path / "twice.zarr", "a"), range(6, 8))
    again = Trajectory(tmp_path / "twice.zarr", "r")
    assert again.attrs["chosen"]["llc"]["settings"] == once.attrs["chosen"]["llc"]["settings"]
    assert (again["llc"]["loss"].values == once["llc"]["loss"].values).all()


def test_training_anew_from_before_the_choice_chooses_anew(tmp_path: Path) -> None:
    watches = [Watch("llc", open_llc(), every(1))]
    for start in (5, 2):
        with LoopMonitor(tmp_path / "run.zarr", watches) as monitor:
            monitor.step(start, bowl(0.0))
            chosen = Trajectory(tmp_path / "run.zarr", "r").attrs["chosen"]["llc"]
            assert chosen["step"] == start


def test_the_choice_suits_the_curvature_and_lets_chains_rest() -> None:
    instrument = open_llc()
    for scale in (0.01, 1.0, 100.0):
        model = Bowl(tuple(scale * h for h in (4.0, 1.0, 0.3, 0.05)))
        settings = instrument.choose([model], 0)["settings"]
        top = 50 * 4.0 * scale
        assert settings["lr"] * (10 * top + settings["gamma"]) == pytest.approx(1, rel=0.02)
        longer = replace(instrument.settle({"settings": settings}), chains=64, draws=100)
        found = llc(longer(Snapshot(0, model)))
        assert found["verdict"].item() == "ok", found
    alone = llc(replace(instrument, chains=64, draws=100)(Snapshot(0, Bowl())))  # by itself: for these weights
    assert alone["verdict"].item() == "ok", alone


def test_one_setting_given_is_the_identity_that_it_always_was() -> None:
    data = slopes()
    for given in ({"lr": 1e-3}, {"gamma": 2.0}):
        whole = LLC(data, bowl_loss, **({"lr": 1e-4, "gamma": 300.0} | given))
        assert identity(LLC(data, bowl_loss, **given)) == identity(whole)
        assert LLC(data, bowl_loss, **given).settled
    assert not LLC(data, bowl_loss).settled
