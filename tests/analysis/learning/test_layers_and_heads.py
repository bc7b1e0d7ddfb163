"""What is derived of stored scores by layer and by head: centres, succession of heads, what training added."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from devmon.analysis import head_succession, layer_centre, layer_centres, since_first
from devmon.analysis.series import Series
from devmon.errors import DataError

STEPS = np.array([0, 10, 30, 100, 300, 1000, 3000])


def of_layers(score: np.ndarray, **more: Any) -> xr.Dataset:
    """A watch of `score` (step, layer), with other variables by name as (dims, values, units)."""
    data = xr.Dataset({"score": (("step", "layer"), score, {"units": "share"})}, attrs={"headline": ["score"]})
    data = data.assign_coords(step=STEPS[: len(score)], layer=np.arange(score.shape[1]))
    return data.assign({name: (dims, values, {"units": unit}) for name, (dims, values, unit) in more.items()})


def test_the_centre_of_known_weights() -> None:
    found = layer_centre(of_layers(np.array([[1.0, 1, 1, 1], [0, 0, 3, 1], [2, 0, 0, -1]])), "score")
    np.testing.assert_allclose(found["centre"], [1.5, 2.25, -3.0])
    assert float(found["even"]) == 1.5


def test_the_null_of_a_score_is_taken_off_and_that_of_another_unit_is_not() -> None:
    score = np.array([[0.5, 0.5, 0.9, 0.7]])
    for name in ("score_null", "control_score", "score_reference"):
        whole = of_layers(score, **{name: (("step", "layer"), np.full((1, 4), 0.5), "share")})
        np.testing.assert_allclose(layer_centre(whole, "score")["centre"], (2 * 0.4 + 3 * 0.2) / 0.6)
    majority = of_layers(score, majority=("step", np.array([0.5]), "share"))
    np.testing.assert_allclose(layer_centre(majority, "score")["centre"], (2 * 0.4 + 3 * 0.2) / 0.6)
    other = of_layers(score, uniform=("step", np.array([0.5]), "attention"))
    np.testing.assert_allclose(layer_centre(other, "score")["centre"], (score @ np.arange(4)) / score.sum())


def test_heads_are_added_and_so_are_their_nulls() -> None:
    score = np.array([[[0.3, 0.1], [0.1, 0.5]]])
    data = xr.Dataset(
        {
            "prefix": (("step", "layer", "head"), score, {"units": "attention"}),
            "uniform": ("step", [0.1], {"units": "attention"}),
        },
        coords={"step": [0], "layer": [0, 1]},
    )
    np.testing.assert_allclose(layer_centre(data, "prefix")["centre"], 0.4 / 0.6)


@pytest.mark.parametrize("replicates", [True, False])
def test_the_error_of_a_centre_is_its_spread(replicates: bool) -> None:
    """Over repeated draws of items, with groups of them and without."""
    rng = np.random.default_rng(0)
    centres, errors = [], []
    for _ in range(300):
        items = np.array([1.0, 2.0, 4.0, 1.0]) + 3 * rng.standard_normal((64, 4))
        groups = np.stack([items[i::8].mean(0) for i in range(8)])
        more: dict[str, Any] = {"score_se": (("step", "layer"), items.std(0, ddof=1)[None] / 8, "share")}
        if replicates:
            more["score_replicates"] = (("replicate", "step", "layer"), groups[:, None], "share")
        found = layer_centre(of_layers(items.mean(0)[None], **more), "score")
        centres.append(float(found["centre"][0]))
        errors.append(float(found["centre_se"][0]))
    assert 0.85 < np.nanmean(errors) / np.nanstd(centres) < 1.15


def test_a_score_of_noise_has_no_centre() -> None:
    rng = np.random.default_rng(1)
    errors = ("step", "layer"), np.full((7, 4), 0.5), "share"
    found = layer_centre(of_layers(0.5 * rng.standard_normal((7, 4)), score_se=errors), "score")
    assert found["centre"].isnull().all()
    with pytest.raises(DataError, match="over step and layer"):
        layer_centre(found, "centre")


class Run:
    """What the analysis asks of a run."""

    attrs: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, **watches: xr.Dataset) -> None:
        self.watches = watches

    def names(self) -> list[str]:
        return list(self.watches)

    def __getitem__(self, name: str) -> xr.Dataset:
        return self.watches[name]


def test_every_followed_score_by_layer_has_a_series() -> None:
    score = np.tile([0.1, 0.2, 0.3], (7, 1))
    plain = xr.Dataset({"loss": ("step", np.ones(7))}, coords={"step": STEPS})
    unfollowed = of_layers(score).assign_attrs(headline=["other"])
    found = layer_centres(Run(a=of_layers(score), b=plain, c=unfollowed))
    assert [series.name for series in found] == ["a/score centre"]
    np.testing.assert_allclose(found[0].values, 0.8 / 0.6)
    assert found[0].units == "layers"


LAYERS, HEADS = 3, 20


def turning(rng: np.random.Generator, former: bool) -> tuple[xr.Dataset, xr.Dataset]:
    """Scores of 60 heads: heads 3 and 7 of layer 1 become function-vector heads at step 1000; with `former` they were
    the best induction heads at step 100."""
    shape = (len(STEPS), LAYERS, HEADS)
    matching, effect = 0.05 * rng.random(shape), 0.05 * rng.random(shape)
    effect[5:, 1, [3, 7]] = [[2.0, 1.5], [2.0, 1.6]]
    if former:
        matching[3:, 1, [3, 7]] = [[0.9, 0.8], [0.6, 0.7], [0.3, 0.2], [0.1, 0.2]]
    coords = {"step": STEPS, "layer": np.arange(LAYERS), "head": np.arange(HEADS)}
    dims = ("step", "layer", "head")
    return (
        xr.Dataset({"prefix_matching": (dims, matching)}, coords=coords),
        xr.Dataset({"logit_effect": (dims, effect)}, coords=coords),
    )


def test_heads_that_turned_from_one_kind_to_the_other() -> None:
    found = head_succession(*turning(np.random.default_rng(0), True), share=2 / 60)
    assert found["layer"].values.tolist() == [1, 1]
    assert found["head"].values.tolist() == [3, 7]
    np.testing.assert_allclose(found["peak"], [0.9, 0.8])
    assert found["peak_step"].values.tolist() == [100, 100]
    assert ((found["vector_step"] > 300) & (found["vector_step"] < 1000)).all()
    np.testing.assert_allclose(found["lead"], np.log10((found["vector_step"] + 1) / 101))
    assert float(found["first"]) == 1
    assert float(found["mean_peak"]) == pytest.approx(0.85)
    assert float(found["mean_peak_p"]) < 0.02
    assert float(found["mean_peak_null"]) < 0.2
    assert found["overlap"].values.tolist()[3] < 1
    np.testing.assert_allclose(found["overlap"][5], 1.0)  # still the best two by prefix matching then
    assert float(found["correlation_p"][3]) > 0.01, "two of sixty heads do not make a rank correlation"


def test_the_null_of_unrelated_heads_is_even() -> None:
    """Over repeated draws the p of heads that have nothing to do with each other is small as seldom as it says."""
    ps = np.array(
        [
            [float(found["mean_peak_p"]), float(found["correlation_p"][0])]
            for seed in range(120)
            for found in [head_succession(*turning(np.random.default_rng(seed), False), share=2 / 60, permutations=99)]
        ]
    )
    assert ((ps <= 0.1).mean(0) < 0.2).all()
    assert ((ps <= 0.5).mean(0) > 0.35).all()


def test_a_layer_that_holds_both_kinds_is_no_evidence() -> None:
    """Where all heads of a layer match as much, that the function-vector heads are among them says nothing."""
    matching, effect = turning(np.random.default_rng(0), False)
    matching["prefix_matching"][3, 1] = 0.9
    found = head_succession(matching, effect, share=2 / 60)
    assert float(found["mean_peak"]) == pytest.approx(0.9)
    assert float(found["mean_peak_p"]) == 1.0


def test_effects_before_there_is_a_task_are_none() -> None:
    matching, effect = turning(np.random.default_rng(0), True)
    effect["logit_effect"][:4] = np.nan
    found = head_succession(matching, effect, share=2 / 60)
    assert found["correlation"][:4].isnull().all()
    assert float(found["first"]) == 1
    with pytest.raises(DataError, match="in this order"):
        head_succession(effect, matching)
    with pytest.raises(DataError, match="three steps"):
        head_succession(matching.isel(step=[0, 1]), effect)


def test_what_training_added_with_paired_errors() -> None:
    rng = np.random.default_rng(0)
    item = rng.standard_normal(8)
    replicates = item[:, None] + np.array([0.0, 1.0, 2.0]) + 0.01 * rng.standard_normal((8, 3))
    series = Series("probe/accuracy", [0, 5, 9], replicates.mean(0), np.full(3, item.std(ddof=1) / 8**0.5), "share")
    plain = since_first(series)
    np.testing.assert_allclose(plain.values, series.values - series.values[0])
    np.testing.assert_allclose(plain.se[1:], 2**0.5 * series.se[1:])
    assert plain.name == "probe/accuracy since step 0"
    paired = since_first(Series("p", [0, 5, 9], replicates.mean(0), series.se, replicates=replicates))
    assert paired.se[0] == 0
    assert (paired.se[1:] < 0.02).all(), "what the items share at both steps cancels"
    late = since_first(Series("p", [0, 5, 9], [np.nan, 1.0, 3.0]))
    np.testing.assert_allclose(late.values, [np.nan, 0, 2])
    with pytest.raises(DataError, match="no good value"):
        since_first(Series("p", [0, 1], [np.nan, np.nan]))
