"""What follows from stored susceptibilities and influence: components and their drift, signs, data of a transition."""

from __future__ import annotations

import numpy as np
import pytest

from devmon.analysis.derive.influence import transition_data
from devmon.analysis.derive.susceptibilities import on_the_whole, sign_changes, susceptibility_components
from devmon.analysis.derive.watch_series import series_of_watch
from devmon.errors import DataError
from tests.support.synthetic import influences, susceptibilities


def test_components_of_a_plane_are_the_plane() -> None:
    still = susceptibilities().isel(step=slice(0, 3))
    found = susceptibility_components(still, 2)
    np.testing.assert_allclose(found["explained"].sum("pc"), 1, atol=0.06)
    assert float(found["angle"].max()) < 5
    assert float(found["noise"].max()) < 0.1
    # tokens go outward as (1 + i): so do the spreads
    spread = found["spread"].sel(pc=1).values
    np.testing.assert_allclose(spread / spread[0], [1, 2, 3], rtol=0.05)
    loading = found["loading"].values
    np.testing.assert_allclose(loading @ loading.T, np.eye(2), atol=1e-12)
    assert (np.take_along_axis(loading, np.abs(loading).argmax(1)[:, None], 1) > 0).all()


def test_a_turn_of_the_plane_is_an_angle_above_its_null() -> None:
    run = susceptibilities()
    found = susceptibility_components(run, 2)
    assert (found["angle"].max("pc") > 5 * found["angle_null"].max("pc")).all()  # the basis lies between the two planes
    still = susceptibility_components(run.isel(step=slice(0, 3)), 2)
    assert (still["angle"].max("pc") < 3 * still["angle_null"].max("pc") + 1).all()
    # noise alone: the angle says nothing, and says so
    noisy = susceptibilities(noise=60.0)
    found = susceptibility_components(noisy, 2)
    assert (found["noise"] > 0.5).all()
    assert (found["angle_null"].max("pc") > 30).all()


def test_size_alone_does_not_rule() -> None:
    run = susceptibilities()
    louder = run.copy()
    times = np.array([100.0, 1, 1, 1])[None, :, None]
    for name in ("susceptibility", "susceptibility_se"):
        louder[name] = run[name].dims, run[name].values.astype(float) * times
    one, two = (susceptibility_components(of, 2) for of in (run, louder))
    np.testing.assert_allclose(one["loading"], two["loading"], atol=1e-6)


def test_steps_that_are_not_finite_are_left_out() -> None:
    run = susceptibilities()
    run["susceptibility"][2, 1, 5] = np.nan
    assert susceptibility_components(run, 2)["step"].values.tolist() == [0, 100, 300, 400, 500]
    with pytest.raises(DataError, match="5 components need"):
        susceptibility_components(run, 5)
    with pytest.raises(DataError, match="step"):
        susceptibility_components(run.isel(step=0))


def test_signs_change_where_they_surely_do() -> None:
    found = sign_changes(susceptibilities(steps=9))
    assert found.sizes["change"] == 2  # the rising mean of both probes; those that stay on one side do not
    assert set(found["component"].values) == {"layer 0 head 0"}
    one = found.isel(change=int(np.flatnonzero(found["probe"].values == "code")[0]))
    assert int(one["to"]) == 1
    assert int(one["after"]) < 400 < int(one["before"])
    assert float(one["p"]) < 0.01
    quiet = susceptibilities(steps=9)
    quiet["mean_se"] = quiet["mean_se"] * 10
    assert sign_changes(quiet).sizes["change"] == 0


def test_signs_of_noise_rarely_change() -> None:
    rng, alarms = np.random.default_rng(0), 0
    run = susceptibilities(steps=12)
    for _ in range(200):
        run["mean"] = run["mean"].dims, 0.3 * rng.normal(size=run["mean"].shape)
        alarms += sign_changes(run).sizes["change"] > 0
    assert alarms <= 10


def test_the_means_are_series_to_be_searched() -> None:
    names = [series.name for series in series_of_watch("s", susceptibilities())]
    assert "s/mean[component=layer 0 head 0, probe=code]" in names


def test_the_papers_form_adds_what_the_whole_model_knows() -> None:
    run = susceptibilities()
    np.testing.assert_allclose(on_the_whole(run, "layer 0 head 1"), run["susceptibility"].astype(float))  # all alike
    run["token_llc"][:, 1] += 1
    away = on_the_whole(run, "layer 0 head 1") - run["susceptibility"].astype(float)
    np.testing.assert_allclose(away.isel(component=0), 5.0)
    np.testing.assert_allclose(away.isel(component=1), 0.0)
    with pytest.raises(DataError, match="all parameters"):
        on_the_whole(run, "all")


def test_a_transition_comes_from_the_examples_whose_influence_changed() -> None:
    found = transition_data(influences(), 10, 20, "a")
    assert int(found["example"][0]) == 7
    assert float(found["influence_change"][0]) == -8
    assert float(found["loss_change"][0]) == -0.75
    assert float(found["p"][0]) < 1e-10
    assert (found["p"][1:] == 1).all()
    assert (transition_data(influences(), 10, 20, "b")["p"] == 1).all()
    assert float(transition_data(influences(), 10, 20)["influence_change"][0]) == -4
    for steps, queries in (((10, 15), "a"), ((10, 20), "c")):
        with pytest.raises(DataError, match="measured steps"):
            transition_data(influences(), *steps, queries)


def test_a_mean_of_unhealthy_chains_is_rejected() -> None:
    run = susceptibilities()
    accepted = np.ones((6, 4), np.int64)
    accepted[2, 0] = 0
    run["accepted"] = ("step", "component"), accepted
    found = {series.name: series for series in series_of_watch("s", run)}
    marked = found["s/mean[component=layer 0 head 0, probe=code]"].rejected
    assert marked.tolist() == [False, False, True, False, False, False]
    assert not found["s/mean[component=layer 0 head 1, probe=code]"].rejected.any()
    assert not found["s/mean max"].rejected.any()  # the largest at that step is another one
