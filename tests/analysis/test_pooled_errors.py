"""Errors along a run against the true spread over seeds, and mixing tests against chains that are sound or not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import signal

from devmon.analysis.derive.errors import covariance, paired_batches, pooled_errors
from devmon.analysis.derive.mixing import chains_agree, drifts, memory_of, rhat_limit

TIMES = [1, 3, 8, 20]


def autoregressive(shape: tuple[int, ...], time: float, rng: np.random.Generator) -> np.ndarray:
    """Stationary AR(1) chains of unit variance along the last axis, with integrated autocorrelation time `time`."""
    phi = (time - 1) / (time + 1)
    shocks = rng.standard_normal((*shape[:-1], shape[-1] + 200))
    return signal.lfilter([np.sqrt(1 - phi**2)], [1, -phi], shocks, axis=-1)[..., 200:]


def run(time: float, rng: np.random.Generator, common: float = 0.7, shape: tuple[int, int] = (4, 100)) -> np.ndarray:
    """Eight steps (step, chain, draw) whose noise has the share `common` of its variance in common."""
    shared, own = autoregressive((1, *shape), time, rng), autoregressive((8, *shape), time, rng)
    return np.sqrt(common) * shared + np.sqrt(1 - common) * own


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("of", ["level", "change"])
def test_errors_are_the_spread_over_seeds_whatever_the_memory(time: float, of: str) -> None:
    """Without pooling the reported error is 1.2–1.5 times the true one; without the memory it is 4 times too small."""
    rng, means, errors = np.random.default_rng(0), [], []
    for _ in range(300):
        values = run(time, rng) if of == "level" else np.diff(run(time, rng), axis=0)
        means.append(values.mean((1, 2)))
        errors.append(pooled_errors(values)[0])
    spread, reported = np.std(means), np.array(errors)
    covered = np.mean(np.abs(means) < 1.645 * reported)
    assert 0.8 < reported.mean() / spread < 1.25, reported.mean() / spread
    assert 0.85 <= covered <= 0.95, covered


def test_chains_that_remember_longer_than_they_last_have_the_error_of_their_means() -> None:
    """A slow part that each chain keeps from start to end: nothing within a chain shows it."""
    rng, means, errors = np.random.default_rng(1), [], []
    for _ in range(200):
        values = run(1, rng, common=0.0) + rng.standard_normal((1, 4, 1))
        means.append(values.mean())
        errors.append(pooled_errors(values)[0].mean())
    assert 0.8 < np.mean(errors) / np.std(means) < 1.6


def test_steps_of_one_noise_count_as_one_look() -> None:
    rng = np.random.default_rng(2)
    same, different = run(3, rng, common=1.0), run(3, rng, common=0.0)
    assert memory_of(same).looks == pytest.approx(1.0)
    assert memory_of(different).looks > 6
    assert memory_of(same).dof < memory_of(different).dof / 3


def test_an_infinite_draw_spoils_its_own_step_only() -> None:
    values = run(1, np.random.default_rng(3))
    values[5, 2, 10] = np.inf
    se, dof = pooled_errors(values)
    assert np.isnan(se).tolist() == [i == 5 for i in range(8)]
    assert dof[5] == 0


def test_shared_minibatches_do_not_shrink_the_error() -> None:
    values = np.repeat(run(1, np.random.default_rng(4), shape=(1, 400)), 8, axis=1)
    values += 0.01 * np.random.default_rng(5).standard_normal(values.shape)
    assert pooled_errors(values, shared=True)[0] == pytest.approx(np.full(8, 1 / 20), rel=0.25)


@pytest.mark.parametrize("time", [1, 3, 5, 8, 20])
def test_the_memory_is_that_of_the_chains_with_a_common_drift_or_without(time: float) -> None:
    rng = np.random.default_rng(6)
    drift = np.linspace(0, 5, 400)
    measured = [memory_of(autoregressive((1, 4, 400), time, rng) + drift).time for _ in range(100)]
    assert np.mean(measured) == pytest.approx(time, rel=0.1)


def accepted(values: np.ndarray) -> bool:
    memory = memory_of(values[None])
    return chains_agree(values, memory) and not drifts(values, memory)


@pytest.mark.parametrize("shape", [(3, 50), (4, 100)])
@pytest.mark.parametrize("time", [1, 3, 5, 8, 10])
def test_sound_chains_are_accepted_and_chains_apart_refused(shape: tuple[int, int], time: float) -> None:
    """A fixed R̂ of 1.1 refuses half of the sound chains at 8; a limit by an ESS that holds their spread, none apart."""
    rng = np.random.default_rng(7)
    sound = [autoregressive(shape, time, rng) for _ in range(400)]
    refused = sum(not accepted(values) for values in sound)
    assert refused <= 9, refused  # more than 9 of 400 has probability .008 at 1%
    apart = np.mean([not accepted(values + 3 * np.arange(shape[0])[:, None]) for values in sound])
    # Three chains of five independent draws each cannot be told apart more surely.
    assert apart > (0.75 if shape[1] / time < 10 else 0.95), apart


def test_a_drift_is_refused_where_draws_can_show_it_and_it_matters() -> None:
    rng, line = np.random.default_rng(8), np.linspace(-0.5, 0.5, 100)
    chains = [autoregressive((4, 100), 1, rng) for _ in range(200)]
    assert np.mean([drifts(x + line, memory_of((x + line)[None])) for x in chains]) > 0.95
    long, slow = autoregressive((4, 20_000), 1, rng), np.linspace(0, 0.3, 20_000)
    assert not drifts(long + slow, memory_of((long + slow)[None]))


def test_the_limit_of_rhat_rises_with_the_memory_and_never_falls_below_its_usual_value() -> None:
    rng = np.random.default_rng(9)
    limits = [rhat_limit((4, 100), memory_of(autoregressive((20, 4, 100), time, rng))) for time in TIMES]
    assert limits[0] == 1.1, limits
    assert limits[1] <= limits[2] - 0.1 <= limits[3] - 0.2, limits


@pytest.mark.parametrize("time", TIMES)
def test_the_covariance_over_steps_knows_the_error_of_every_change(time: float) -> None:
    """Neighbours and far steps alike: what is common cancels, and the diagonal is the error of a level."""
    rng, means, matrices = np.random.default_rng(10), [], []
    for _ in range(200):
        values = run(time, rng)
        means.append(values.mean((1, 2)))
        matrices.append(covariance(values))
        assert np.sqrt(np.diag(matrices[-1])) == pytest.approx(pooled_errors(values)[0])
    spread, told = np.array(means), np.mean(matrices, 0)
    for i, j in ((0, 1), (0, 7), (2, 5)):
        true, said = spread[:, i] - spread[:, j], told[i, i] + told[j, j] - 2 * told[i, j]
        assert 0.8 < np.sqrt(said) / true.std() < 1.25, (i, j)
    assert 0.8 < np.sqrt(told[0, 0]) / spread[:, 0].std() < 1.25


@pytest.mark.parametrize("shared", [False, True])
def test_covariance_and_replicates_tell_the_same_error_of_a_change(shared: bool) -> None:
    values = run(3, np.random.default_rng(11), shape=(4, 400))
    matrix, batches = covariance(values, shared), paired_batches(values, shared)
    said = np.diag(matrix)[1:] + np.diag(matrix)[:-1] - 2 * np.diag(matrix, -1)
    by_batch = np.diff(batches, axis=1).var(0, ddof=1) / len(batches)
    assert np.sqrt(said.mean() / by_batch.mean()) == pytest.approx(1, rel=0.25)
    assert np.array_equal(matrix, matrix.T)


def test_covariance_where_a_draw_is_infinite_or_nothing_changes() -> None:
    values = run(1, np.random.default_rng(12))
    values[5, 2, 10] = np.inf
    assert np.isnan(np.diag(covariance(values))).tolist() == [i == 5 for i in range(8)]
    same = np.repeat(run(1, np.random.default_rng(13))[:1], 3, axis=0)
    matrix = covariance(same)
    assert matrix == pytest.approx(np.full((3, 3), pooled_errors(same)[0][0] ** 2))


def test_a_step_at_which_nothing_varies_says_nothing_of_the_others() -> None:
    """Two checkpoints of the same weights have a change of exactly 0."""
    values = np.random.default_rng(0).normal(size=(8, 4, 100)).cumsum(2)
    still = values.copy()
    still[3] = 1.5
    with np.errstate(all="raise"):
        se, dof = pooled_errors(still)
    others, other_dof = pooled_errors(np.delete(values, 3, 0))
    assert se[3] == 0
    np.testing.assert_allclose(np.delete(se, 3), others, rtol=1e-9)
    np.testing.assert_allclose(np.delete(dof, 3), other_dof, rtol=0.2)
