"""Values on fixed groups of items, and the errors of contrasts over steps that follow from them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from devmon.data import clustered_groups, clustered_mean
from devmon.data.probe import REPLICATES
from devmon.data.rows import MAX_REPLICATES, Rows
from devmon.data.shares import share, share_groups


def spread(groups: np.ndarray) -> np.ndarray:
    return np.asarray(groups.std(0, ddof=1) / np.sqrt(len(groups)))


def test_groups_of_equal_counts_are_means_of_one_item_a_round_dealt_from_the_next_group_on() -> None:
    total = np.random.default_rng(0).normal(size=(32, 3))
    groups = clustered_groups(total, np.ones(32))
    members = [[8 * b + (r - b) % 8 for b in range(4)] for r in range(8)]
    np.testing.assert_allclose(groups, np.stack([total[mine].mean(0) for mine in members]))


@pytest.mark.parametrize("turns", [2, 4, 8])
def test_kinds_of_sequences_that_take_turns_are_in_all_groups_alike(turns: int) -> None:
    """Half of a probe batch may be of another kind, in turn: dealt by i mod 8, whole groups would be of one kind."""
    kind = np.arange(64) % turns
    groups = clustered_groups(1.0 * (kind < turns // 2), np.ones(64))
    np.testing.assert_allclose(groups, 0.5)


def test_by_hand_on_unequal_counts() -> None:
    # θ = 12 / 8; the groups are the items: θ + 3 (S_r - 1.5 C_r) / 8
    groups = clustered_groups(np.array([2.0, 4.0, 6.0]), np.array([1, 1, 6]))
    np.testing.assert_allclose(groups, 1.5 + 3 * np.array([0.5, 2.5, -3.0]) / 8)


@pytest.mark.parametrize("items", [2, 3, 8, 9, 40])
def test_the_mean_of_the_groups_is_the_value_and_their_spread_its_error(items: int) -> None:
    rng = np.random.default_rng(items)
    count = rng.integers(1, 9, items)
    total = rng.normal(2, 1, (items, 2000)) * count[:, None]
    mean, se = clustered_mean(total, count)
    groups = clustered_groups(total, count)
    assert groups.shape == (min(items, REPLICATES), 2000)
    np.testing.assert_allclose(groups.mean(0), mean, rtol=1e-12)
    np.testing.assert_allclose((spread(groups) ** 2).mean(), (se**2).mean(), rtol=0.1)
    if items <= REPLICATES:
        np.testing.assert_allclose(spread(groups), se)


def test_counts_of_each_element_are_those_of_one_element_at_a_time() -> None:
    rng = np.random.default_rng(1)
    total, count = rng.normal(size=(11, 2, 3)), rng.uniform(1, 2, (11, 2, 3))
    together = clustered_groups(total, count)
    np.testing.assert_allclose(together[:, 1, 2], clustered_groups(total[:, 1, 2], count[:, 1, 2]))


def test_items_of_no_weight_leave_the_others_where_they_are() -> None:
    """A head that raises nothing on a sequence at one step must not move later sequences to other groups."""
    total, count = np.arange(16.0), np.ones(16)
    count[3], total[3] = 0, 0
    moved = clustered_groups(total, count) - total.sum() / 15
    np.testing.assert_allclose(moved[4], 8 * (4 + 11 - 2 * total.sum() / 15) / 15)


def test_nothing_is_nan_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(clustered_groups(np.zeros((4, 2)), np.zeros(4))).all()
        assert np.isnan(clustered_groups(np.array([np.inf, 1.0]), np.ones(2))).all()
        assert clustered_groups(np.zeros((0, 2)), np.zeros(0)).shape == (0, 2)


def test_a_share_by_groups_is_the_share_and_no_number_where_it_is_none() -> None:
    rng = np.random.default_rng(2)
    whole = rng.normal(1, 0.3, 24)
    part = whole[:, None] * [0.2, 0.7] + rng.normal(0, 0.1, (24, 2))
    ratio, se = share(part, whole)
    groups = share_groups(part, whole)
    np.testing.assert_allclose(groups.mean(0), ratio)
    assert ((spread(groups) / se < 2) & (spread(groups) / se > 0.5)).all()
    assert np.isnan(share_groups(part, whole - whole.mean())).all()


@pytest.mark.parametrize("same_items", [True, False])
def test_what_items_have_in_common_over_steps_drops_out_of_a_contrast(same_items: bool) -> None:
    """Items of level N(0, 1) change by 0.1 ± 0.05 from a step to the next: the error of the change is 0.05 / √64, a
    twentieth of what two independent errors of the levels would give. Other groups at each step would hide that."""
    rng = np.random.default_rng(3)
    count, errors, levels = np.ones(64), [], []
    for _ in range(200):
        before = rng.normal(size=64)
        after = before + 0.1 + 0.05 * rng.normal(size=64)
        shown = [before, after] if same_items else [rng.permutation(before), rng.permutation(after)]
        first, second = (clustered_groups(items, count) for items in shown)
        errors.append(spread(second - first) ** 2)
        levels.append(clustered_mean(before, count)[1] ** 2 + clustered_mean(after, count)[1] ** 2)
    error, independent = float(np.sqrt(np.mean(errors))), float(np.sqrt(np.mean(levels)))
    assert (error == pytest.approx(0.05 / 8, rel=0.1)) is same_items
    assert (error < independent / 20) is same_items


def dataset_of(sizes: dict[str, tuple[int, ...]], headline: list[str]) -> list[str]:
    rows = Rows(headline=headline)
    for name, (groups, *shape) in sizes.items():
        dims = [f"{name}_{i}" for i in range(len(shape))]
        rows.put(name, dims, np.zeros(shape), None, name, units="nats", replicates=np.zeros((groups, *shape)))
    return [str(name) for name in rows.dataset().data_vars if str(name).endswith("_replicates")]


def test_a_row_keeps_replicates_of_headlines_that_are_small_enough() -> None:
    most = MAX_REPLICATES // REPLICATES
    sizes = {"a": (8,), "b": (8,), "c": (8, most), "d": (8, most + 1)}
    assert dataset_of(sizes, ["a", "c", "d"]) == ["a_replicates", "c_replicates"]
    assert dataset_of({"a": (1,)}, ["a"]) == []
    assert dataset_of({"a": (4,), "b": (6,)}, ["a", "b"]) == ["b_replicates"]


def test_replicates_stand_first_by_group_in_float32() -> None:
    rows = Rows(headline=["a"])
    rows.put("a", "layer", [0.5, 1.5], [0.1, 0.1], "a thing", units="nats", replicates=np.ones((8, 2)))
    (made,) = (variable for name, variable in rows.dataset(layer=[0, 1]).items() if name == "a_replicates")
    assert made.dims == ("replicate", "layer")
    assert made.dtype == np.float32
    assert made.attrs == {"long_name": "a thing, by group of items", "units": "nats"}
    assert made["replicate"].values.tolist() == list(range(8))
