"""What is in memory at once: copies of the parameters, examples of a pass, and what is tried where memory ends."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from devmon.cost import GPT2_SMALL, memory
from devmon.errors import InstrumentError
from devmon.instruments.llc import LLC
from devmon.monitoring.fingerprint import identity
from devmon.sampling import (
    BAOAB,
    SGLD,
    SGNHT,
    PreconditionedSGLD,
    Settings,
    classification_loss,
    regression_loss,
    sample,
)
from devmon.sampling.constants import BLOCK
from devmon.sampling.schedule import Schedule
from devmon.snapshot import Snapshot
from devmon.testing.memory import peak_bytes
from tests.support.sampling_toys import net_and_data, run

SMALL = {"chains": 3, "draws": 6, "burn_in": 0, "lr": 1e-3, "loss": classification_loss}


# -- copies of the parameters ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """21 million parameters in twenty layers, each of them as large as a block."""
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(20)))
    return model, (torch.randn(8, 1024), torch.randn(8, 1024))


def copies(model, data, **settings):
    """Float32 copies of the parameters at peak, beside the model: as many as were told, and blocks."""
    settings = Settings(**({"lr": 1e-9, "chains": 1, "draws": 2, "burn_in": 0, "batch_size": 4} | settings))
    size = sum(p.numel() for p in model.parameters())
    found = peak_bytes(lambda: sample(model, regression_loss, data, settings)) / size / 4
    assert found < settings.copies() + 0.5
    return found


@pytest.mark.parametrize(("kernel", "most"), [("sgld", 2.4), ("baoab", 3.4), ("sgnht", 3.4), ("preconditioned", 4.4)])
def test_a_chain_holds_its_position_its_kernel_s_state_and_blocks(wide, kernel, most):
    """And the gradient at w*. w* is in the model itself."""
    found = copies(*wide, sampler=kernel)
    assert most - 0.5 < found < most


def test_what_several_runs_share_is_a_copy_more_and_is_told(wide):
    model, data = wide
    llc = LLC(data, regression_loss, lr=1e-9, chains=1, draws=2, burn_in=0, batch_size=4)
    snapshot = Snapshot(0, model)
    found, told = peak_bytes(lambda: [llc(snapshot), llc(snapshot)]), memory([llc, llc], GPT2_SMALL, model)
    copy = 4 * sum(p.numel() for p in model.parameters())
    assert 3 < found / copy < 3.4
    assert found < told < 1.3 * found
    assert memory([llc], GPT2_SMALL, model) == told - copy


def test_micro_batches_control_variates_masks_and_judges_cost_a_copy_each(wide):
    model, data = wide
    entries = {f"{i}.weight": torch.ones(1024, 1024, dtype=torch.bool) for i in range(20)}
    entries["0.weight"][0] = False
    assert copies(model, data, micro_batch=2) < 3.4  # gradients of parts are summed
    assert copies(model, data, control_variate=True) < 3.5
    assert copies(model, data, mask=entries) < 2.7  # a byte a parameter
    assert copies(model, data, acceptance=True) < 4.5
    assert copies(model, data, chains=3) < 2.4  # in turn
    assert copies(copy.deepcopy(model).bfloat16(), data) < 2.4


def test_the_count_of_live_bytes_is_that_of_storages():
    def work():
        kept = torch.zeros(1000)
        views = [kept[:10], kept.view(10, 100), kept.add_(1)]
        dropped = torch.ones(500) + 1  # two of them at once
        del dropped
        return views, torch.ones(300)

    assert peak_bytes(work) == 4 * (1000 + 500 + 500)


# -- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 5, BLOCK + 16, 2 * BLOCK + 37])
def test_normals_in_blocks_are_those_of_one_call(size, dtype):
    schedule = Schedule(draws=1, batch_size=1)
    once = torch.Generator().manual_seed(schedule_seed(schedule))
    normals = schedule.normals("noise", [0], torch.empty(1, size, dtype=dtype))
    for _ in range(2):
        expected = torch.empty(size, dtype=dtype).normal_(generator=once)
        found = torch.full((size,), torch.nan, dtype=dtype)
        for part, noise in next(normals):
            found[part] = noise[0]
        assert torch.equal(found, expected)


def schedule_seed(schedule):
    from devmon.snapshot import derive_seed

    return derive_seed(schedule.seed, "noise", 0)


@pytest.mark.parametrize("kernel", [SGLD, BAOAB, SGNHT, PreconditionedSGLD])
@pytest.mark.parametrize("extra", [{}, {"control_variate": True}, {"acceptance": True, "prior": 2.0}])
def test_blocks_of_any_size_give_the_same_traces(monkeypatch, kernel, extra):
    net, data = net_and_data()
    mask = {"layers.0.weight": torch.arange(35).view(7, 5) % 3 > 0, "layers.2.weight": torch.ones(3, 7)}
    prior = extra.get("prior", 0.0)
    settings = SMALL | {"draws": 60, "sampler": kernel(1e-3, 50.0, 2.0, prior), "mask": mask} | extra
    whole = run(net, data, **settings)
    for module in ("schedule", "flat", "kernels.preconditioned"):
        monkeypatch.setattr(f"devmon.sampling.{module}.BLOCK", 16)
    monkeypatch.setattr("devmon.sampling.schedule.NOISE_BLOCK", 1)  # a step in several calls
    monkeypatch.setattr("devmon.sampling.schedule.Schedule.normals", in_one_call)
    for stacked in (True, False):
        blocks = run(net, data, stacked=stacked, **settings)
        for name in whole:
            np.testing.assert_allclose(blocks[name], whole[name], rtol=1e-9, atol=1e-12, err_msg=name)


def in_one_call(self, what, chains, like):
    """Blocks of 16 parameters of the normals that a small model gets."""
    from devmon.snapshot import derive_seed

    generators = [torch.Generator().manual_seed(derive_seed(self.seed, what, chain)) for chain in chains]
    steps = 8192 // like.shape[1]
    while True:
        rows = [like.new_empty(steps, like.shape[1]).normal_(generator=g) for g in generators]
        for noise in torch.stack(rows, 1):
            yield iter([(slice(i, i + 16), noise[:, i : i + 16]) for i in range(0, like.shape[1], 16)])


# -- micro-batches and precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("extra", [{}, {"control_variate": True}, {"acceptance": True}, {"shared_batches": True}])
def test_micro_batches_change_no_number(stacked, extra):
    net, data = net_and_data()
    whole = run(net, data, stacked=stacked, **SMALL, **extra)
    for micro in (1, 4, 7):  # 10 examples: unequal parts
        parts = run(net, data, stacked=stacked, micro_batch=micro, **SMALL, **extra)
        for name in whole:
            np.testing.assert_allclose(parts[name], whole[name], rtol=1e-9, atol=1e-12, err_msg=name)
        assert parts.attrs == whole.attrs


def test_a_parameter_that_some_parts_do_not_reach_keeps_the_gradient_of_the_others():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return torch.stack([(row * (self.a if row[0] > 0 else self.b)).sum() for row in x])

    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    settings = SMALL | {"batch_size": 8, "loss": lambda model, batch: model(batch) ** 2, "float64": False}
    whole = run(Experts(), data, stacked=False, **settings)
    np.testing.assert_allclose(run(Experts(), data, stacked=False, micro_batch=1, **settings)["loss"], whole["loss"])


def test_what_changes_cost_alone_is_no_part_of_the_identity():
    plain = LLC(torch.zeros(4, 3), nbeta=3.0)
    assert "precision" not in identity(plain)["fields"]
    assert identity(LLC(plain.data, nbeta=3.0, micro_batch=2)) == identity(plain)
    low = identity(LLC(plain.data, nbeta=3.0, precision="bfloat16"))
    assert low["fields"].keys() - identity(plain)["fields"].keys() == {"precision"}


@pytest.mark.parametrize("stacked", [True, False])
def test_bfloat16_passes_move_chains_in_float32_and_say_how_far_lambda_moves(stacked):
    net, data = net_and_data()
    settings = SMALL | {"draws": 40, "float64": False, "batch_size": 60, "nbeta": 50.0, "chains": 4}
    plain = run(net, data, stacked=stacked, **settings)
    low = run(net, data, stacked=stacked, precision="bfloat16", **settings)
    assert low.attrs["precision"] == "bfloat16"
    assert "precision" not in plain.attrs
    assert "precision_shift" not in plain
    moved = abs(low["loss"] - plain["loss"]).max().item()
    assert 1e-5 < moved < 0.02  # another precision, the same chains
    trial = [
        run(net, data, stacked=stacked, **(settings | {"draws": 20} | extra))
        for extra in ({"precision": "bfloat16"}, {})
    ]
    excess = [50 * (t["loss"] - t["baseline"])[:, 10:].mean("draw") for t in trial]
    np.testing.assert_allclose(low["precision_shift"], excess[0] - excess[1], rtol=1e-6)


def test_a_precision_that_moves_lambda_is_warned_of():
    """Weights of 300 with a spread of .1: bfloat16 knows them to 1."""
    model = nn.Linear(3, 1, bias=False)
    model.weight.data.fill_(300.0)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    settings = Settings(
        lr=1e-3, gamma=1.0, nbeta=50.0, chains=4, draws=30, burn_in=10, batch_size=50, precision="bfloat16"
    )
    with pytest.warns(UserWarning, match=r"λ̂ moves by .* in a paired trial, of .*: use precision='float32'"):
        sample(model, regression_loss, (x, model(x).detach()), settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"precision": "float16"}, "precision must be one of"),
        ({"precision": "bfloat16", "float64": True}, "bfloat16 without float64, got 'bfloat16' with float64=True"),
        ({"micro_batch": 0}, "micro_batch must be at least 1 or None, got 0"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(InstrumentError, match=message):
        run(**settings)
