"""The same numbers however the chains are run, seeded and dealt."""

import numpy as np
import pytest

from devmon.sampling import classification_loss
from tests.support.sampling_toys import Bowl, net_and_data, run, slopes


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("shared_batches", [False, True])
def test_stacked_looped_grouped_and_dealt_chains_are_the_same(control_variate, shared_batches):
    net, data = net_and_data()
    settings = {"control_variate": control_variate, "shared_batches": shared_batches, "steps_per_draw": 2}
    settings |= {"chains": 4, "draws": 12, "burn_in": 3, "lr": 1e-3, "loss": classification_loss}
    once = run(net, data, stacked=True, **settings)
    for other in (
        run(net, data, stacked=False, **settings),
        run(net, data, stacked=True, group=3, **settings),
        run(net, data, stacked=None, **settings),
    ):
        for name in once:
            np.testing.assert_allclose(other[name], once[name], rtol=1e-9, atol=1e-12, err_msg=name)
    some = run(net, data, stacked=False, chains_only=[3, 1], **settings)
    assert some["chain"].values.tolist() == [3, 1]
    np.testing.assert_allclose(some["loss"], once["loss"].sel(chain=[3, 1]), rtol=1e-9)


def test_chains_have_their_own_noise_and_their_own_minibatches_unless_they_share_them():
    net, data = net_and_data()
    settings = {"chains": 3, "draws": 5, "burn_in": 0, "lr": 1e-3, "loss": classification_loss}
    for shared, minibatches in ((False, 3), (True, 1)):
        traces = run(net, data, shared_batches=shared, **settings)
        different = [
            len(np.unique(losses)) for losses in traces["baseline"].values.T
        ]  # at w*: only the examples differ
        assert different == [minibatches] * 5, different
        assert len(np.unique(traces["distance"].values[:, -1])) == 3


def test_seed_decides_and_checkpoint_does_not():
    first = run(chains=2, draws=5, burn_in=0, seed=1)
    np.testing.assert_array_equal(first["loss"], run(chains=2, draws=5, burn_in=0, seed=1)["loss"])
    assert (first["loss"].values[:, 1:] != run(chains=2, draws=5, burn_in=0, seed=2)["loss"].values[:, 1:]).all()
    elsewhere = run(Bowl(offset=-7.0), chains=2, draws=5, burn_in=0, seed=1)  # the same bowl around other weights
    np.testing.assert_allclose(elsewhere["distance"], first["distance"], rtol=1e-9)


def test_steps_per_draw_averages_the_same_chain():
    fine = run(chains=2, draws=12, burn_in=0, data=slopes(size=1.0))
    coarse = run(chains=2, draws=4, burn_in=0, steps_per_draw=3, data=slopes(size=1.0))
    np.testing.assert_allclose(coarse["loss"], fine["loss"].values.reshape(2, 4, 3).mean(2), rtol=1e-12)
    np.testing.assert_allclose(
        coarse["distance"], (fine["distance"].values ** 2).reshape(2, 4, 3).mean(2) ** 0.5, rtol=1e-12
    )
