"""`ReferenceDrift` and `presets.fine_tuning`: how far a model is from the one before, by hand and in relations."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from devmon import IdentityError, LoopMonitor, Snapshot, Trajectory, Watch, every, presets
from devmon.errors import InstrumentError
from devmon.instruments import ReferenceDrift
from devmon.monitoring.fingerprint import identity
from devmon.testing import InstrumentContract
from tests.anatomy.proposing.client_models import MinGPT, shaken
from tests.support.models import VOCAB, random_model

REFERENCE = random_model(9)
TOKENS = torch.randint(VOCAB, (5, 12), generator=torch.Generator().manual_seed(0))


def test_it_is_what_a_loop_over_tokens_gives() -> None:
    model, reference = random_model(0), random_model(1)
    row = ReferenceDrift(reference, TOKENS)(Snapshot(0, model))
    p, r = (torch.softmax(m(TOKENS), -1).detach() for m in (model, reference))
    kl, change = [], np.zeros((5, 11))
    for s in range(5):
        for t in range(11):
            kl.append(sum(float(r[s, t, v]) * math.log(float(r[s, t, v] / p[s, t, v])) for v in range(VOCAB)))
            answer = int(TOKENS[s, t + 1])
            change[s, t] = math.log(float(r[s, t, answer])) - math.log(float(p[s, t, answer]))
    assert row["kl"].item() == pytest.approx(np.mean(kl), rel=1e-9)
    assert row["kl_se"].item() == pytest.approx(np.reshape(kl, (5, 11)).mean(1).std(ddof=1) / math.sqrt(5), rel=1e-9)
    np.testing.assert_allclose(row["loss_change_by_token"], change, rtol=1e-8, atol=1e-10)
    assert row["loss_change"].item() == pytest.approx(change.mean(), rel=1e-8)

    # What enters the first block of each, by hand.
    entered: list[torch.Tensor] = []
    for m in (model, reference):
        handle = m.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0].detach()))
        m(TOKENS)
        handle.remove()
    moved = (entered[0] - entered[1])[:, 1:].norm(dim=-1) / entered[1][:, 1:].norm(dim=-1)
    assert row["drift"].values[0] == pytest.approx(float(moved.mean()), rel=1e-5)


def test_the_model_before_has_not_moved_and_what_moves_in_one_layer_shows_from_there_on() -> None:
    torch.manual_seed(0)
    model = shaken(MinGPT())
    instrument = ReferenceDrift(model, TOKENS % 29)
    still = instrument(Snapshot(0, model))
    for name, value in (("kl", 0.0), ("loss_change", 0.0), ("drift", 0.0), ("alignment", 1.0)):
        np.testing.assert_allclose(still[name], value, atol=1e-6)
    moved = copy.deepcopy(model)
    moved.blocks[1].mlp[2].weight.data += 0.1 * torch.randn(16, 64)
    row = instrument(Snapshot(1, moved))
    assert row["drift"].values[:2] == pytest.approx(0, abs=1e-6)
    assert row["drift"].values[2] > 0.01
    assert row["kl"].item() > 0
    # A scale of the last stream that the final norm undoes: the stream drifts, the outputs do not.
    scaled = copy.deepcopy(model)
    scaled.blocks[1].register_forward_hook(lambda module, args, output: 2 * output)
    row = instrument(Snapshot(2, scaled))
    assert row["drift"].values[2] == pytest.approx(1, rel=1e-5)
    assert row["alignment"].values[2] == pytest.approx(1, rel=1e-5)
    assert row["kl"].item() < 1e-3


def test_the_reference_is_copied_and_known_by_its_weights(tmp_path: Path) -> None:
    reference = random_model(1)
    one, same, other = ReferenceDrift(reference, TOKENS), ReferenceDrift(random_model(1), TOKENS), random_model(2)
    assert one == same
    assert identity(one)["fingerprint"] == identity(same)["fingerprint"]
    assert identity(one)["fingerprint"] != identity(ReferenceDrift(other, TOKENS))["fingerprint"]
    before = one(Snapshot(0, random_model(0)))["kl"].item()
    next(reference.parameters()).data.mul_(3)  # training goes on with the model that was handed over
    assert one(Snapshot(0, random_model(0)))["kl"].item() == before
    with LoopMonitor(tmp_path / "run.zarr", [Watch("d", one, every(1))]) as monitor:
        monitor.step(0, random_model(0))
    with pytest.raises(IdentityError, match="digest"):
        LoopMonitor(tmp_path / "run.zarr", [Watch("d", ReferenceDrift(other, TOKENS), every(1))]).step(
            0, random_model(0)
        )


def test_a_reference_of_another_form_is_refused() -> None:
    for wrong, told in (
        (random_model(1, vocab=VOCAB + 1), "same vocabulary"),
        (random_model(1, width=24), "same layers"),
    ):
        with pytest.raises(InstrumentError, match=told):
            ReferenceDrift(wrong, TOKENS)(Snapshot(0, random_model(0)))


def test_the_preset_follows_task_and_general_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shaken(MinGPT())
    task, general = torch.randint(29, (6, 16)), torch.randint(29, (6, 16))
    watches = presets.fine_tuning(task, general, reference=model, last=30, vocab_size=29, count=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    with LoopMonitor(tmp_path / "run.zarr", watches) as monitor:
        monitor.step(0, model)
        for step in range(1, 31):
            optimizer.zero_grad()
            model(task[:, :-1], task[:, 1:])[1].backward()
            optimizer.step()
            monitor.step(step, model)
    run = Trajectory(tmp_path / "run.zarr", "r")
    assert set(run) == {"task", "general", "task_drift", "general_drift", "repeats", "induction", "previous_token"}
    assert run["task"]["loss"].values[-1] < run["task"]["loss"].values[0] - 0.5
    changes = run["general_drift"]["loss_change"].values
    np.testing.assert_allclose(changes, run["general"]["loss"].values - run["general"]["loss"].values[0], atol=1e-5)
    assert run["task_drift"]["kl"].values[0] == pytest.approx(0, abs=1e-6)
    assert (np.diff(run["task_drift"]["kl"].values) > 0).all()


class TestContract(InstrumentContract):
    def model(self, seed: int) -> nn.Module:
        return random_model(seed)

    def instrument(self) -> ReferenceDrift:
        return ReferenceDrift(REFERENCE, TOKENS)
