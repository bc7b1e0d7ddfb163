"""The hidden Markov model against enumeration of all paths, EM that never falls, and planted training maps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import norm

from devmon.analysis.runs import hmm
from devmon.analysis.runs.hmm import Chain
from devmon.analysis.runs.maps import choose_order, in_order, training_map
from devmon.analysis.series import Series
from devmon.errors import DataError

STEPS = np.unique(np.round(np.geomspace(1, 20_000, 60)))


def chain(states: int = 3, dims: int = 2, seed: int = 0) -> Chain:
    rng = np.random.default_rng([3, seed])
    return Chain(
        rng.dirichlet(np.ones(states)), rng.dirichlet(np.ones(states), states), rng.standard_normal((states, dims)),
        rng.uniform(0.5, 1.5, (states, dims)),
    )  # fmt: skip


def joint(one: Chain, y: np.ndarray) -> dict[tuple[int, ...], float]:
    """p(y, path) of every path, term by term."""
    found = {}
    for path in itertools.product(range(len(one.start)), repeat=len(y)):
        p = one.start[path[0]]
        for a, b in itertools.pairwise(path):
            p *= one.transition[a, b]
        for value, state in zip(y, path, strict=True):
            for v, mean, sd in zip(value, one.mean[state], one.sd[state], strict=True):
                p *= norm.pdf(v, mean, sd) if np.isfinite(v) else 1.0
        found[path] = float(p)
    return found


@pytest.fixture
def short() -> np.ndarray:
    y = np.random.default_rng(4).standard_normal((2, 5, 2))
    y[0, 2, 1] = y[1, 3] = np.nan  # one series missing, then all
    return y


def test_likelihood_posterior_and_path_by_enumeration(short: np.ndarray) -> None:
    one = chain()
    total, state, path = hmm.log_likelihood(one, short), hmm.posterior(one, short), hmm.viterbi(one, short)
    for r, y in enumerate(short):
        paths = joint(one, y)
        assert total[r] == pytest.approx(np.log(sum(paths.values())), abs=1e-10)
        expected = np.zeros((5, 3))
        for which, p in paths.items():
            expected[np.arange(5), which] += p
        np.testing.assert_allclose(state[r], expected / expected.sum(1, keepdims=True), atol=1e-10)
        assert tuple(path[r]) == max(paths, key=lambda which: paths[which])


def test_many_models_at_once_are_each_alone(short: np.ndarray) -> None:
    models = [chain(seed=i) for i in range(3)]
    parts = ([getattr(one, name) for one in models] for name in ("start", "transition", "mean", "sd"))
    many = Chain(*(np.stack(part) for part in parts))
    together = hmm.log_likelihood(many, short)
    np.testing.assert_allclose(together, [hmm.log_likelihood(one, short) for one in models], rtol=1e-12)
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(hmm.log_likelihood(models[0].ordered(order), short), together[0], rtol=1e-12)


def test_values_far_from_every_state_do_not_overflow() -> None:
    one = chain()
    y = np.full((1, 400, 2), 300.0)
    total = hmm.log_likelihood(one, y)
    assert np.isfinite(total).all()
    assert total[0] < -1e6
    np.testing.assert_allclose(hmm.posterior(one, y).sum(-1), 1)


def test_one_round_is_the_weighted_means_of_the_paths(short: np.ndarray) -> None:
    one = chain()
    many = Chain(*(part[None] for part in (one.start, one.transition, one.mean, one.sd)))
    updated, objective = hmm._round(short, many, np.ones((1, 2)), 0.0)
    assert objective[0] == pytest.approx(hmm.log_likelihood(one, short).sum())
    start, moves, mass, first, second = np.zeros(3), np.zeros((3, 3)), *np.zeros((3, 3, 2))
    for y in short:
        paths = joint(one, y)
        evidence = sum(paths.values())
        for path, p in paths.items():
            start[path[0]] += p / evidence
            for a, b in itertools.pairwise(path):
                moves[a, b] += p / evidence
            for value, k in zip(y, path, strict=True):
                for d in range(2):
                    if np.isfinite(value[d]):
                        mass[k, d] += p / evidence
                        first[k, d] += p / evidence * value[d]
                        second[k, d] += p / evidence * value[d] ** 2
    np.testing.assert_allclose(updated.start[0], start / 2)
    np.testing.assert_allclose(updated.transition[0], moves / moves.sum(1, keepdims=True))
    np.testing.assert_allclose(updated.mean[0], first / mass)
    np.testing.assert_allclose(updated.sd[0], np.sqrt(second / mass - (first / mass) ** 2), rtol=1e-6)


@pytest.mark.parametrize("prior", [0.0, 0.1])
def test_no_round_lowers_the_objective(prior: float) -> None:
    y = np.random.default_rng(5).standard_normal((4, 30, 2)).cumsum(1)
    y = (y - y.mean((0, 1))) / y.std((0, 1))
    y[1, 4:9, 0] = np.nan
    y[2, :12, 1] = y[2, 0, 1]  # a stretch without any spread meets the floor
    _, course = hmm.fit(y, 4, restarts=4, prior=prior)
    assert len(course) > 5
    assert np.diff(course, axis=0).min() >= -1e-8, np.diff(course, axis=0).min()


def test_runs_left_out_do_not_count() -> None:
    y = np.random.default_rng(6).standard_normal((4, 25, 1))
    spoiled = y.copy()
    spoiled[3] = 50
    used = np.array([[1.0, 1, 1, 0]])
    clean, dirty = (hmm.fit(data, 2, used=used, restarts=3)[0] for data in (y, spoiled))
    np.testing.assert_array_equal(clean.mean, dirty.mean)
    np.testing.assert_allclose(clean.mean, hmm.fit(y[:3], 2, restarts=3)[0].mean, rtol=1e-6)


def test_fits_side_by_side_are_each_alone() -> None:
    y = np.concatenate([np.random.default_rng(6).standard_normal((4, 25, 1)), 5 + np.zeros((1, 25, 1))])
    used = np.array([[1.0, 1, 1, 1, 0], [1, 0, 1, 0, 1], [0, 0, 1, 1, 1]])
    together, _ = hmm.fit(y, 3, used=used, restarts=2)
    for f, row in enumerate(used):
        alone, _ = hmm.fit(y, 3, used=row[None], restarts=2)
        np.testing.assert_allclose(together.mean[f], alone.mean[0], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(together.transition[f], alone.transition[0], rtol=1e-7)


# maps


def planted(runs: int, *, detour: bool = False, seed: int = 0) -> tuple[dict[str, list[Series]], dict[str, np.ndarray]]:
    """Three states in turn, entered near steps 30 and 1000; with `detour`, half of the runs pass through a fourth."""
    rng = np.random.default_rng([7, seed])
    found, truth = {}, {}
    levels = np.array([[0.0, 0], [2, -1], [2, 3], [-2, 2]])
    for r in range(runs):
        a, b = 15 + rng.integers(-3, 4), 40 + rng.integers(-3, 4)
        path = np.repeat([0, 1, 2], [a, b - a, len(STEPS) - b])
        if detour and r % 2:
            path[a : a + 10] = 3
        y = levels[path] + 0.4 * rng.standard_normal((len(STEPS), 2))
        found[f"seed {r}"] = [Series("norm", STEPS, y[:, 0]), Series("loss", STEPS, 5000 + 100 * y[:, 1])]
        truth[f"seed {r}"] = path
    return found, truth


def test_three_planted_states_are_recovered() -> None:
    runs, truth = planted(5)
    found = training_map(runs, ["norm", "loss"], most_states=4, restarts=3)
    assert found.outcome == "MAP", found.orders
    assert len(found.states) == 3, found.orders
    wrong = sum(int(np.sum(found.paths[run] != truth[run])) for run in runs)
    assert wrong <= 3, wrong  # of 300
    assert found.certain > 0.97
    for state, (norm_, loss) in zip(found.states, [(0, 5000), (2, 4900), (2, 5300)], strict=True):
        assert state.mean["norm"] == pytest.approx(norm_, abs=0.15)
        assert state.mean["loss"] == pytest.approx(loss, abs=15)
        assert state.sd["loss"] == pytest.approx(40, rel=0.25)
        entries = [float(STEPS[(path == state.index).argmax()]) for path in truth.values()]
        assert state.step == pytest.approx(np.median(entries), rel=0.2)
        assert (state.interval, state.coverage) == ((min(state.entry.values()), max(state.entry.values())), 0.9375)
    assert [(e.origin, e.target, len(e.runs), e.times) for e in found.edges] == [(0, 1, 5, 5), (1, 2, 5, 5)]
    assert found.edges[0].interval == pytest.approx((0.05 ** (1 / 5), 1))  # exact binomial, 5 of 5
    assert found.detours == ()
    assert found.to_frame()["of"].tolist() == [5, 5]


def test_a_detour_of_some_runs_is_named() -> None:
    runs, truth = planted(6, detour=True)
    found = training_map(runs, ["norm", "loss"], most_states=4, restarts=3)
    assert len(found.states) == 4, found.orders
    (detour,) = found.detours
    assert set(found.states[detour].entry) == {run for run, path in truth.items() if (path == 3).any()}
    assert found.states[detour].mean["norm"] == pytest.approx(-2, abs=0.2)
    assert "raise most_states" in found.note
    before = next(edge for edge in found.edges if edge.target == detour)
    assert before.share == 0.5


def test_states_are_numbered_by_their_entry() -> None:
    one, paths = chain(), np.array([[1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 0]])
    ordered, named = in_order(one, paths, np.arange(6.0))
    np.testing.assert_array_equal(named, [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 2]])
    np.testing.assert_array_equal(ordered.mean[named], one.mean[paths])
    np.testing.assert_array_equal(ordered.transition[1, 2], one.transition[2, 0])


def test_noise_alone_is_one_state() -> None:
    rng = np.random.default_rng(8)
    runs = {str(r): [Series("x", STEPS, rng.standard_normal(len(STEPS)))] for r in range(5)}
    found = training_map(runs, ["x"], most_states=3, restarts=3)
    assert (found.outcome, len(found.states), found.edges) == ("ONE STATE", 1, ())


def test_one_state_scores_as_one_normal() -> None:
    y = np.random.default_rng(9).standard_normal((5, 20, 2))
    (order,) = choose_order(y, 1, restarts=1)
    scores = []
    for r in range(5):
        rest = np.delete(y, r, axis=0)
        scores.append(norm.logpdf(y[r], rest.mean((0, 1)), rest.std((0, 1))).mean())
    assert order.held_out == pytest.approx(np.mean(scores))
    assert order.behind_se == 0


def test_differences_missing_points_and_shared_steps() -> None:
    runs, _ = planted(5)
    cut = {
        run: [
            Series(s.name, s.steps[r:], s.values[r:].copy(), rejected=np.arange(len(s.steps) - r) == 7) for s in members
        ]
        for r, (run, members) in enumerate(runs.items())
    }
    for members in cut.values():
        members[0].values[7] = 1e6
    found = training_map(cut, ["norm"], form="differences", most_states=2, restarts=2)
    assert all(state.sd["norm"] < 3 for state in found.states)
    assert found.steps[0] == STEPS[5]
    assert all(len(path) == len(found.steps) for path in found.paths.values())


def test_too_few_runs() -> None:
    found = training_map(planted(4)[0], ["norm"])
    assert (found.outcome, found.note, found.states) == ("not enough runs", "4 runs, a map needs at least 5", ())


def test_bad_maps() -> None:
    runs, _ = planted(5)
    steps = len(STEPS)
    flat = {run: [*members, Series("flat", STEPS, np.ones(steps)), Series("empty", STEPS, np.full(steps, np.nan))]
            for run, members in runs.items()}  # fmt: skip
    for arguments, match in (
        ({"series": ["norm"], "form": "both"}, "one of levels, differences"),
        ({"series": []}, "needs a series"),
        ({"series": ["x"]}, "run 'seed 0' has no series x; it has norm, loss"),
        ({"series": ["flat", "norm"]}, "flat never changes in any run"),
        ({"series": ["empty"]}, "empty never has a value"),
    ):
        with pytest.raises(DataError, match=match):
            training_map(flat, **arguments)  # type: ignore[arg-type]
    apart = {run: [Series("norm", STEPS + r, members[0].values)] for r, (run, members) in enumerate(runs.items())}
    with pytest.raises(DataError, match="at least 8 steps that all series of all runs share"):
        training_map(apart, ["norm"])
