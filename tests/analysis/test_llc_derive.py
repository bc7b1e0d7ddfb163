"""λ̂ and its error bar, derived from traces whose truth is known because this file drew them."""

import numpy as np
import pytest
import xarray as xr
from scipy import signal

from devmon.analysis import llc
from devmon.analysis.derive.errors import mean_and_error, paired_batches
from devmon.analysis.derive.verdicts import accepted
from devmon.errors import DataError

NBETA, LEVEL = 50.0, 20.0


def traces(chains=4, draws=300, tau=5.0, spread=4.0, seed=0, level=LEVEL, **attrs):
    """Paired traces of a stationary chain with autocorrelation exp(-t / tau) around `level` = λ̂."""
    excess = level + spread * autoregressive(chains, draws, tau, seed)
    baseline = 3 + 0.1 * np.random.default_rng(seed + 1).standard_normal((chains, draws))
    variables = {
        "loss": (("chain", "draw"), baseline + excess / NBETA),
        "baseline": (("chain", "draw"), baseline),
        "distance": (("chain", "draw"), np.full((chains, draws), 1.0)),
    }
    defaults = {"kind": "llc", "nbeta": NBETA, "gamma": 1.0, "burn_in": 100, "n": 1000, "parameters": 400}
    return xr.Dataset(variables, attrs=defaults | attrs)


def autoregressive(chains, draws, tau, seed):
    rng = np.random.default_rng(seed)
    phi = np.exp(-1 / tau) if tau else 0.0
    shocks = rng.standard_normal((chains, draws + 1000))
    return signal.lfilter([np.sqrt(1 - phi**2)], [1, -phi], shocks, axis=1)[:, 1000:]


def test_value_is_nbeta_times_the_paired_difference_after_burn_in():
    data = traces()
    data["loss"].values[:, :100] += 5.0  # burn-in far off
    result = llc(data)
    by_hand = NBETA * (data.loss - data.baseline).values[:, 100:].mean()
    assert result["llc"].item() == pytest.approx(by_hand)
    assert result["llc_chain"].values == pytest.approx(NBETA * (data.loss - data.baseline).values[:, 100:].mean(1))
    assert result["wbic"].item() == pytest.approx(1000 * data.loss.values[:, 100:].mean())
    assert result["verdict"].item() == "ok", result


def test_linear_noise_is_subtracted():
    data = traces()
    noise = np.random.default_rng(3).standard_normal(data.loss.shape) * 10
    noisy = data.assign(loss=data.loss + noise, linear=(("chain", "draw"), noise))
    assert llc(noisy)["llc"].item() == pytest.approx(llc(data)["llc"].item())


@pytest.mark.parametrize("chains, draws, tau", [(4, 200, 0.0), (4, 200, 10.0), (4, 200, 40.0), (10, 100, 20.0)])
def test_nominal_90_percent_intervals_cover_whatever_the_autocorrelation(chains, draws, tau):
    covered = [
        abs(mean) < 1.645 * se
        for mean, se, _ in (mean_and_error(autoregressive(chains, draws, tau, seed)) for seed in range(400))
    ]
    assert 0.85 <= np.mean(covered) <= 0.95, np.mean(covered)


def test_shared_minibatches_are_not_averaged_away():
    """Noise common to all chains: the error of the mean does not shrink with the number of chains."""
    common = autoregressive(1, 400, 0.0, 5)
    values = np.repeat(common, 8, 0) + 0.01 * autoregressive(8, 400, 0.0, 6)
    true = 1 / np.sqrt(400)
    assert mean_and_error(values, shared=True)[1] == pytest.approx(true, rel=0.5)
    covered = []
    for seed in range(300):
        values = np.repeat(autoregressive(1, 200, 0.0, seed), 4, 0) + autoregressive(4, 200, 0.0, 10_000 + seed)
        mean, se, _ = mean_and_error(values, shared=True)
        covered.append(abs(mean) < 1.645 * se)
    assert 0.85 <= np.mean(covered) <= 0.97, np.mean(covered)


def spoil(data, kind):
    if kind == "non-finite":
        data["loss"].values[2, 150:] = np.nan
    if kind == "negative":
        data["loss"].values -= 2 * LEVEL / NBETA
    if kind == "not mixed":
        data["loss"].values += (np.array([-10, -5, 5, 10]) / NBETA)[:, None]
    if kind == "diverged":
        data["distance"].values[1] = np.exp(np.linspace(0, 8, 300))
    return data


@pytest.mark.parametrize("kind", ["non-finite", "negative", "not mixed", "diverged"])
def test_each_illness_has_its_verdict(kind):
    result = llc(spoil(traces(), kind))
    assert result["verdict"].item() == kind, result
    assert np.isnan(result["llc"].item()) == (kind == "non-finite")
    assert int(np.isnan(result["llc_chain"].values).sum()) == (kind == "non-finite")


def test_a_chain_that_dies_in_burn_in_is_not_averaged_away():
    data = traces()
    data["loss"].values[0, 5:20] = np.inf
    assert llc(data)["verdict"].item() == "non-finite"


@pytest.mark.parametrize(
    ("slope", "verdict"),
    [
        (7.8, "ok"),
        (7.4, "ok"),
        (9.2, "finite-time"),
        (1.0, "finite-time"),
        (20.0, "diverged"),
        (-2.0, "negative"),
    ],
)
def test_temperature_and_slope(slope, verdict):
    """nbeta slope + gamma distance² must average to the number of parameters (400) in the right law."""
    data = traces().assign(slope=(("chain", "draw"), slope + 0.01 * autoregressive(4, 300, 0.0, 9)))
    result = llc(data)
    assert result["verdict"].item() == verdict
    assert result["temperature"].item() == pytest.approx((NBETA * slope + 1) / 400, rel=1e-2)


def cold(excess):
    """Traces of this `excess` over (chain, draw) after burn-in, at a temperature of .13."""
    data = traces()
    data["loss"].values[:, 100:] = data["baseline"].values[:, 100:] + excess / NBETA
    return llc(data.assign(slope=(("chain", "draw"), 1.0 + 0.01 * autoregressive(4, 300, 0.0, 9))))


def test_chains_on_their_way_are_finite_time_and_rejected_only_where_they_disagree():
    """Refusing a common drift as "not mixed" would leave nothing of a run at settings that do not equilibrate."""
    way = 20 * (1 - np.exp(-np.arange(200) / 150)) + autoregressive(4, 200, 0.0, 1)
    assert cold(way)["verdict"].item() == "finite-time"
    assert cold(way + 3 * np.arange(4)[:, None])["verdict"].item() == "not mixed"
    assert accepted(["ok", "finite-time", "not mixed", "diverged"]).tolist() == [True, True, False, False]


def test_a_temperature_is_judged_by_its_own_error():
    """Few noisy draws of a right law: .15 from 1, and no further than twice their error."""
    hot = traces().assign(slope=(("chain", "draw"), 9.2 + 20 * autoregressive(4, 300, 5.0, 9)))
    result = llc(hot)
    assert abs(result["temperature"].item() - 1) > 0.1
    assert result["verdict"].item() == "ok", result


def test_more_than_the_number_of_parameters_is_no_coefficient():
    assert llc(traces(level=500.0))["verdict"].item() == "diverged"


def test_steps_are_derived_one_by_one_and_changes_use_the_common_noise():
    first, second = traces(), traces()
    second["loss"].values += 3.0 / NBETA + 0.001 * autoregressive(4, 300, 0.0, 8)  # same noise, other level
    both = xr.concat([first, second], dim=xr.Variable("step", [10, 20]), combine_attrs="override")
    result = llc(both)
    assert result["llc"].dims == ("step",)
    assert result["llc_chain"].dims == ("step", "chain")
    assert result["step"].values.tolist() == [10, 20]
    for i, alone in enumerate((llc(first), llc(second))):
        for name in ("llc", "ess", "rhat", "verdict"):
            assert result[name].values[i] == alone[name].item(), name
        assert result["se"].values[i] == pytest.approx(alone["se"].item(), rel=0.3)  # pooled over the steps
    assert np.isnan(result["change"].values[0])
    assert result["change"].values[1] == pytest.approx(3.0, abs=0.01)
    assert result["change_se"].values[1] < 0.02 * result["se"].values[1]


def test_one_draw_or_one_chain_still_answers():
    assert np.isnan(llc(traces(chains=1, draws=101))["se"].item())
    assert llc(traces(chains=1, draws=101))["verdict"].item() == "not mixed"
    single = llc(traces(chains=1, draws=900, tau=0.0))
    assert abs(single["llc"].item() - LEVEL) < 3 * single["se"].item()


def test_bad_traces_are_refused():
    with pytest.raises(DataError, match="baseline"):
        llc(traces().drop_vars("baseline"))
    with pytest.raises(DataError, match="burn_in must leave"):
        llc(traces(), burn_in=300)


def test_the_derivation_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, devmon.analysis.derive.llc; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def paired_traces(phi: float, chains: int = 4, draws: int = 256, steps: int = 12) -> np.ndarray:
    """Traces (step, chain, draw) that share a slow noise over steps, and differ by AR(1) noise of each."""
    g = np.random.default_rng(3)

    def ar(shape: tuple[int, ...]) -> np.ndarray:
        noise = g.standard_normal(shape)
        for i in range(1, shape[-1]):
            noise[..., i] = phi * noise[..., i - 1] + np.sqrt(1 - phi**2) * noise[..., i]
        return noise

    return 10 * ar((1, chains, draws)) + ar((steps, chains, draws)) + np.arange(steps)[:, None, None]


@pytest.mark.parametrize("phi", [0.0, 0.9])
def test_paired_batches_know_the_error_of_a_change(phi: float) -> None:
    values = paired_traces(phi)
    batches = paired_batches(values)
    assert np.allclose(batches.mean(0), values.mean((1, 2)))  # 256 draws divide evenly: the mean of the batches is λ̂
    contrast = np.diff(batches, axis=1)  # the noise that all steps share is gone
    told = np.sqrt(np.mean(contrast.var(0, ddof=1)) / len(batches))
    true = np.sqrt(2 * (1 + phi) / (1 - phi) / values[0].size)
    assert 0.8 < told / true < 1.25
    assert (len(batches) > 16) == (phi == 0)  # long memory leaves few batches


def test_paired_batches_of_chains_that_share_minibatches_are_of_their_average() -> None:
    values = paired_traces(0.0)
    assert np.allclose(paired_batches(values, shared=True), paired_batches(values.mean(1, keepdims=True)))


def test_replicates_are_nan_where_a_chain_met_infinity() -> None:
    values = paired_traces(0.0)
    values[5, 2, 10] = np.inf
    assert np.isnan(paired_batches(values)).any(0).tolist() == [i == 5 for i in range(12)]


def test_batches_where_nothing_changes_or_no_step_is_finite() -> None:
    assert np.array_equal(paired_batches(np.ones((3, 2, 64))), np.ones((32, 3)))
    assert np.isnan(paired_batches(np.full((2, 4, 300), np.nan))).all()
