"""The other kernels, masks, data forms, and devinterp on our traces."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from devmon.analysis import llc
from devmon.errors import DataError, InstrumentError
from devmon.sampling import (
    BAOAB,
    SGLD,
    SGNHT,
    PreconditionedSGLD,
    Settings,
    classification_loss,
    next_token_loss,
    sample,
)
from devmon.sampling.data import as_examples, draw_batches, leaves
from devmon.sampling.devinterp_tree import sample_tree, token_losses
from devmon.sampling.masks import as_mask
from devmon.testing import exact
from tests.support.sampling_toys import CURVATURE, Bowl, assert_within_ess_gated, bowl_loss, net_and_data, run, slopes

# -- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_baoab_has_no_step_size_bias_on_quadratics(momentum):
    lr = 0.015  # lr a = 3: SGLD's own law is four times too wide here in the stiff direction
    expected = exact.gibbs_quadratic(CURVATURE, 50, 2)
    assert exact.sgld_quadratic(CURVATURE, 50, 2, lr) > 1.5 * expected
    kernel = BAOAB(lr=lr, nbeta=50, gamma=2, momentum=momentum)
    assert_within_ess_gated(llc(run(sampler=kernel)), expected, percent=1.0)


@pytest.mark.parametrize("lr", [0.01, 0.015])
def test_the_thermostat_keeps_the_law_of_quadratics(lr):
    kernel = SGNHT(lr=lr, nbeta=50, gamma=2)
    assert_within_ess_gated(llc(run(sampler=kernel)), exact.gibbs_quadratic(CURVATURE, 50, 2), percent=1.0)


def test_the_thermostat_removes_most_of_isotropic_noise():
    data, law = slopes(size=0.8), exact.gibbs_quadratic(CURVATURE, 50, 2)
    bias = [llc(run(data=data, sampler=k(lr=0.002, nbeta=50, gamma=2)))["llc"].item() - law for k in (BAOAB, SGNHT)]
    assert bias[0] > 0.15 * law
    assert abs(bias[1]) < 0.25 * bias[0], bias


@pytest.mark.parametrize("kernel", [SGLD, BAOAB, SGNHT])
def test_the_prior_pulls_towards_zero(kernel):
    """Precision 3 around 0 beside 2 around w* = 1.5: the law moves as well as narrows."""
    sampler = kernel(lr=0.002, nbeta=50, gamma=2, prior=3)
    a = 50 * np.array(CURVATURE) + 5
    variance = 1 / (a * (1 - (0.002 * a / 4 if kernel is SGLD else 0)))
    expected = (0.5 * 50 * np.array(CURVATURE) * (variance + (3 * 1.5 / a) ** 2)).sum()
    data = run(sampler=sampler)
    assert data.attrs["prior"] == 3
    assert_within_ess_gated(llc(data), expected, percent=1.5)


def test_a_kernel_brings_its_own_settings():
    data = run(sampler=SGLD(lr=0.002, nbeta=20, gamma=7), chains=2, draws=3, burn_in=0)
    assert {name: data.attrs[name] for name in ("lr", "nbeta", "gamma")} == {"lr": 0.002, "nbeta": 20, "gamma": 7}


def test_momentum_mixes_flat_directions_faster():
    ess = []
    for momentum in (0.0, 0.8):
        kernel = BAOAB(lr=0.002, nbeta=50, gamma=2, momentum=momentum)
        ess.append(
            llc(run(Bowl((0.5,)), sampler=kernel, loss=bowl_loss, data=torch.zeros(10, 1).double()))["ess"].item()
        )
    assert ess[1] > 2 * ess[0], ess


def test_frozen_preconditioner_has_sgld_s_law_with_a_step_a_coordinate():
    kernel = PreconditionedSGLD(lr=0.01, nbeta=50, gamma=2, adapt=60, eps=0.1)
    assert_within_ess_gated(llc(run(sampler=kernel, chains=512, draws=500)), preconditioned_law(kernel), percent=1.5)


def preconditioned_law(kernel, chains=512):
    """The chains' own M, learned by 60 steps in a loop that shares only the kernel's formula, then the exact law."""
    h, rng = np.array(CURVATURE), np.random.default_rng(0)
    a, w, square, m = 50 * h + 2, np.zeros((chains, 4)), np.zeros((chains, 4)), np.ones((chains, 4))
    for t in range(1, 61):
        drift = a * w
        square += (drift**2 - square) / t
        m = 1 / (np.sqrt(square) + 0.1 * np.sqrt(square.mean(1, keepdims=True)) + 1e-300)
        m /= m.mean(1, keepdims=True)
        w = w - 0.005 * m * drift + np.sqrt(0.01 * m) * rng.standard_normal(w.shape)
    return np.mean([exact.sgld_quadratic(h, 50, 2, 0.01 * row) for row in m])


@pytest.mark.parametrize("sampler", ["preconditioned", "baoab", "sgnht"])
def test_every_kernel_is_the_same_stacked_and_looped(sampler):
    net, data = net_and_data()
    settings = {"sampler": sampler, "chains": 3, "draws": 70, "burn_in": 0, "lr": 1e-3, "loss": classification_loss}
    stacked, looped = (run(net, data, stacked=flag, **settings) for flag in (True, False))
    np.testing.assert_allclose(stacked["loss"], looped["loss"], rtol=1e-8)


# -- masks -----------------------------------------------------------------------------------------------------------


def test_masked_parameters_rest_and_the_rest_has_its_law():
    entries = torch.tensor([True, False, True, False])
    for sampler in ("sgld", "baoab", "sgnht", "preconditioned"):
        data = run(mask={"w": entries}, sampler=sampler, draws=300)
        assert data.attrs["parameters"] == 2
        if sampler != "preconditioned":
            moving = np.array(CURVATURE)[[0, 2]]
            law = (
                exact.sgld_quadratic(moving, 50, 2, 0.01) if sampler == "sgld" else exact.gibbs_quadratic(moving, 50, 2)
            )
            assert_within_ess_gated(llc(data), law, percent=1.5)


def test_masks_by_name_pattern_and_list():
    net, data = net_and_data()
    settings = {"chains": 2, "draws": 3, "burn_in": 0, "lr": 1e-3, "loss": classification_loss}
    sizes = {"layers.0.weight": 35, "layers.0.*": 42, ("layers.0.bias", "layers.2.bias"): 10, "*.weight": 56}
    for mask, size in sizes.items():
        assert run(net, data, mask=mask, **settings).attrs["parameters"] == size
    with pytest.raises(InstrumentError, match="'nothing' selects no parameter: .*'layers.0.weight'"):
        run(net, data, mask="nothing", **settings)
    with pytest.raises(InstrumentError, match="selects no entry"):
        run(net, data, mask={"layers.0.bias": torch.zeros(7, dtype=torch.bool)}, **settings)
    with pytest.raises(InstrumentError, match="names 'layers.9'"):
        run(net, data, mask={"layers.9": torch.ones(7)}, **settings)
    with pytest.raises(InstrumentError, match=r"shape \(3,\), the parameter \(7,\)"):
        run(net, data, mask={"layers.0.bias": torch.tensor([True, False, True])}, **settings)


@pytest.fixture(scope="module")
def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=19,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )
    return GPTNeoXForCausalLM(config)


def test_components_of_hugging_face_models(neox):
    head = as_mask("layer 1 head 1", neox)
    assert {n.split(".")[2] for n in head.names} == {"1"}
    assert head.entries["gpt_neox.layers.1.attention.query_key_value.weight"].sum() == 3 * 4 * 8
    assert all(".mlp." in name and ".0." in name for name in as_mask("layer 0 mlp", neox).names)
    assert as_mask("embed", neox).names == ("gpt_neox.embed_in.weight",)
    with pytest.raises(InstrumentError, match="Layer 7 out of range"):
        as_mask("layer 7 mlp", neox)
    assert as_mask("unembed", neox).names == ("lm_head.weight",)  # devinterp looks for its older name, and finds none


def test_hugging_face_outputs_dropout_and_attention_masks(neox):
    tokens = torch.randint(19, (20, 6), generator=torch.Generator().manual_seed(1))
    settings = {"chains": 2, "draws": 6, "burn_in": 0, "lr": 1e-4, "loss": next_token_loss, "float64": False}
    plain = run(neox, tokens, stacked=False, **settings)
    np.testing.assert_array_equal(plain["loss"].values[:, 0], plain["baseline"].values[:, 0])  # dropout is off
    columns = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    np.testing.assert_allclose(run(neox, columns, stacked=False, **settings)["loss"], plain["loss"], rtol=1e-5)
    columns["attention_mask"][:, 4:] = 0
    neox.eval()
    expected = token_losses(neox, tokens)[:, :3].mean(1)
    np.testing.assert_allclose(next_token_loss(neox, columns).detach(), expected, rtol=1e-4)


# -- data ------------------------------------------------------------------------------------------------------------


def test_every_form_of_data_gives_the_same_examples():
    from datasets import Dataset

    x, y = torch.arange(12.0).view(6, 2), torch.arange(6)
    pairs = TensorDataset(x, y)
    forms = {
        "tuple": ((x, y), tuple),
        "loader": (DataLoader(pairs, batch_size=4), list),
        "batches": ([(x[:4], y[:4]), (x[4:], y[4:])], tuple),
        "dataset": (pairs, list),
        "mapping": ({"x": x, "y": y}, dict),
        "hugging face": (Dataset.from_dict({"x": x.tolist(), "y": y.tolist()}), dict),
        "tensor": (x, torch.Tensor),
    }
    for name, (data, kind) in forms.items():
        examples = as_examples(data)
        batch = examples.batch(torch.tensor([[5, 0], [1, 1]]))
        assert examples.n == 6, name
        assert isinstance(batch, kind), name
        assert torch.equal(leaves(batch)[0], x[torch.tensor([[5, 0], [1, 1]])]), name


def test_data_that_cannot_be_used_is_refused():
    for data, message in (
        (torch.zeros(0, 3), "at least one example"),
        ((torch.zeros(3), torch.zeros(4)), r"leading dimensions \[3, 4\]"),
        ([], "got none from the list"),
        ([1.0, 2.0], "batches of tensors"),
        (iter([1]), "got list_iterator"),
        (torch.tensor(3.0), "at least one example"),
    ):
        with pytest.raises(DataError, match=message):
            as_examples(data)


@pytest.mark.parametrize("n, size", [(1000, 20), (40, 12), (30, 14), (25, 24), (7, 7), (9, 1)])
def test_batches_are_distinct_uniform_and_independent(n, size):
    batches = draw_batches(n, size, 4000, torch.Generator().manual_seed(0))
    assert batches.shape == (4000, size)
    assert all(len(set(row)) == size for row in batches.tolist())
    counts = torch.bincount(batches.flatten(), minlength=n).double()
    expected = 4000 * size / n
    spread = (expected * (1 - size / n)) ** 0.5
    assert (counts - expected).abs().max() <= 5 * spread
    if size < n:
        overlap = np.mean(
            [len(set(a) & set(b)) for a, b in zip(batches[:-1].tolist(), batches[1:].tolist(), strict=True)]
        )
        assert overlap == pytest.approx(size**2 / n, rel=0.1, abs=0.05)  # an epoch's batches would not overlap


@pytest.mark.parametrize("n, size, spare", [(1000, 20, 6), (10**8, 20, 6), (40, 12, 0)])  # of 64 bits; some too short
def test_a_batch_is_the_first_different_numbers_of_a_list(n, size, spare, monkeypatch):
    monkeypatch.setattr("devmon.sampling.data.SPARE_SIGMAS", spare)
    batches = draw_batches(n, size, 50, torch.Generator().manual_seed(0))
    generator, needed = torch.Generator().manual_seed(0), -n * math.log1p(-size / n)
    lists = torch.randint(n, (50, math.ceil(needed + spare * (needed - size) ** 0.5 + spare)), generator=generator)
    for batch, numbers in zip(batches.tolist(), lists.tolist(), strict=True):
        different = list(dict.fromkeys(numbers))[:size]
        if len(different) < size:
            different = torch.randperm(n, generator=generator)[:size].tolist()
        assert batch == different


# -- devinterp -------------------------------------------------------------------------------------------------------


def test_devinterp_reads_our_tree(neox, tmp_path):
    from devinterp.slt.bif import compute_bif
    from devinterp.slt.llc import compute_llc
    from devinterp.slt.susceptibilities import compute_susceptibilities

    generator = torch.Generator().manual_seed(2)
    tokens, probe = torch.randint(19, (40, 6), generator=generator), torch.randint(19, (5, 6), generator=generator)
    settings = Settings(lr=1e-4, gamma=10.0, nbeta=20.0, chains=2, draws=8, burn_in=3, batch_size=8)
    observables = {"data": tokens[:6], "probe": probe}
    tree = sample_tree(neox, tokens, observables, settings)
    head = sample_tree(neox, tokens, observables, replace(settings, mask="layer 1 head 0"))
    ours = llc(sample(neox, next_token_loss, tokens, settings))
    assert compute_llc(tree)["llc_mean"].item() == pytest.approx(ours["llc"].item(), rel=1e-4, abs=1e-5)
    neox.eval()
    assert not np.allclose(tree["loss_probe"].values[0, 0], token_losses(neox, probe), atol=1e-6)
    assert tree["loss_probe"].values[0, 0] == pytest.approx(token_losses(neox, probe), abs=0.5)
    bif = compute_bif(tree, loss_keys=["probe"], device="cpu")
    assert np.isfinite(bif["influences"].values).all()
    susceptibilities = compute_susceptibilities({"full": tree, "head": head}, "data")
    assert np.isfinite(susceptibilities["susceptibilities"]["sus"].values).all()
