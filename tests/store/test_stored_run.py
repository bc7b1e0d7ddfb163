"""A run written by version 0.1.0 opens, is read, gives the same numbers when measured again, and continues."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from devmon import IdentityError, Snapshot, Trajectory, Watch, observe
from devmon.monitoring.fingerprint import identity
from tests.support.stored_run import STEPS, STORED, model, watches

# Variables that mean something else since then, as CHANGELOG.md says.
CHANGED = {
    "dimension": {"twonn", "participation_ratio", "effective_rank", "distinct"},  # without the first place
    "attribution": {"top_share", "participation"},  # their errors, by the bootstrap
    "neurons": {"mean_entropy", "mean_purity", "mean_kurtosis"},  # their errors, over sequences
    "circuit": {"area"},  # its error, with that of the ranking
    "mdl": {"control_mdl", "control_compression", "selectivity", "mdl", "extra_mdl", "compression", "prior_mdl"},
    "probe": {"control_accuracy", "selectivity"},  # a mean over draws
    "ablation": {"size_random", "delta_loss_random", "excess_loss", "gain_share_random", "gain_share_by_group"},
}


def test_every_watch_is_read_with_its_steps() -> None:
    run = Trajectory(STORED, "r")
    assert set(run.names()) == {watch.name for watch in watches()}
    assert {name: run.steps(name) for name in run.names()} == {name: list(STEPS) for name in run.names()}


def test_the_identities_of_then_are_those_of_now() -> None:
    run = Trajectory(STORED, "r")
    for watch in watches():
        then, now = run[watch.name].attrs, identity(watch.instrument)
        assert (then["instrument"], then["fingerprint"]) == (now["instrument"], now["fingerprint"]), watch.name


def test_the_same_weights_give_the_same_numbers(tmp_path: Path) -> None:
    stored, again = Trajectory(STORED, "r"), Trajectory(tmp_path / "again.zarr", "a", seed=0)
    for step in STEPS:
        observe(step, model(step), watches(), again)
    for name in stored.names():
        then, now = stored[name], again[name]
        for variable in then.data_vars:
            old, new = then[variable].values, now[variable].values
            if variable.partition("_se")[0].partition("_reference")[0] in CHANGED.get(name, ()):
                assert (old.shape, old.dtype) == (new.shape, new.dtype)
                continue
            assert then[variable].dims == now[variable].dims, f"{name}/{variable}"
            assert then[variable].attrs.get("units") == now[variable].attrs.get("units"), f"{name}/{variable}"
            assert old.dtype == new.dtype, f"{name}/{variable}"
            if old.dtype.kind == "f":  # sums in another order on another machine
                np.testing.assert_allclose(new, old, rtol=2e-3, atol=2e-4, err_msg=f"{name}/{variable}")
            else:
                assert np.array_equal(old, new), f"{name}/{variable}"


def test_it_continues_and_refuses_another_configuration(tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "run.zarr")
    run = Trajectory(tmp_path / "run.zarr", "a")
    assert observe(4, model(4), watches(), run) == []
    assert sorted(observe(5, model(5), watches(), run)) == sorted(run.names())
    assert run.steps("llc") == [*STEPS, 5]
    llc = next(watch for watch in watches() if watch.name == "llc")
    with pytest.raises(IdentityError, match="gamma"):
        observe(6, model(6), [Watch("llc", replace(llc.instrument, gamma=20.0), llc.steps)], run)


class Replicated:
    """A mean and, from this version on, the same by groups of items."""

    def __init__(self, groups: bool) -> None:
        self._groups = groups  # a private field: no part of the identity

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        by_group = np.arange(4.0) + snapshot.step
        dataset = xr.Dataset({"score": ((), by_group.mean())}, attrs={"headline": ["score"]})
        if self._groups:
            dataset["score_replicates"] = ("replicate", by_group.astype(np.float32))
            dataset.coords["replicate"] = np.arange(4)
        return dataset


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_with_replicates_or_without_as_it_began(tmp_path: Path, first: bool, reopened: bool) -> None:
    run = Trajectory(tmp_path / "run.zarr", "a")
    observe(0, model(0), [Watch("score", Replicated(first), range(9))], run)
    if reopened:
        run = Trajectory(tmp_path / "run.zarr", "a")
    for step in (1, 2):
        observe(step, model(step), [Watch("score", Replicated(True), range(9))], run)
    rows = run["score"]
    assert ("score_replicates" in rows) is first
    assert ("replicate" in rows.coords) is first
    assert rows["score"].values.tolist() == [1.5, 2.5, 3.5]
