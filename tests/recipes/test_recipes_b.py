"""The recipes on grokking, induction, digits, an own instrument and three ways to train: fast forms, and parts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from devmon import DevmonError, Snapshot
from devmon.recipes import grokking, induction, own_instrument
from devmon.recipes import language_model as lm
from devmon.recipes.common import Check, conclude, crossing
from devmon.testing import InstrumentContract
from tests.recipes.fast_form import check_fast_form

FAST = ["grokking", "induction", "digits", "own_instrument", "induction_loops"]


@pytest.mark.parametrize("name", FAST)
def test_the_fast_form_hits_its_numbers(name: str, tmp_path: Path) -> None:
    check_fast_form(name, tmp_path)


def test_a_number_outside_its_interval_ends_the_recipe_and_is_kept(tmp_path: Path) -> None:
    console = Console(quiet=True)
    conclude(tmp_path, [Check("good", 1.0, 1.0, 1.0)], console, {"fact": math.nan})
    assert json.loads((tmp_path / "results.json").read_text())["fact"] is None
    for value in (0.4, 0.8, math.nan):
        with pytest.raises(DevmonError, match=r"bad: .* is outside 0.5 … 0.7"):
            conclude(tmp_path, [Check("good", 1.0), Check("bad", value, 0.5, 0.7)], console)
        assert len(json.loads((tmp_path / "results.json").read_text())["checks"]) == 2


def test_where_a_curve_passes_a_level() -> None:
    steps, values = [0, 9, 99, 999, 9999], [4.0, 3.0, 1.0, 3.0, 0.0]
    assert crossing(steps, values, 2.0) == pytest.approx(10**1.5 - 1)
    assert crossing(steps, values, 2.0, last=True) == pytest.approx(10 ** (3 + 1 / 3) - 1)
    assert math.isnan(crossing(steps, values, 5.0))


def test_the_grok_rate_and_its_exact_interval() -> None:
    runs = {str(i): {"end": {"test_accuracy": 1.0 if i < 9 else 0.4}} for i in range(10)}
    rate = grokking.grok_rate(runs)
    assert rate["rate"] == 0.9
    assert rate["interval"] == pytest.approx([0.6058, 0.9949], abs=1e-4)  # Clopper-Pearson 90% for 9 of 10
    assert grokking.grok_rate(dict(list(runs.items())[:9]))["interval"][1] == 1.0


@pytest.mark.parametrize("form", [grokking.SMALL, grokking.FULL], ids=["small", "full"])
def test_models_of_addition_answer_pairs(form: grokking.Form) -> None:
    mask = grokking.trained_pairs(form, 0)
    assert int(mask.sum()) == int(form.share * form.p**2)
    training = grokking.Training(form, 0)
    inputs, answers = training.data
    assert grokking.answer_loss(training.net, (inputs[:7], answers[:7])).shape == (7,)
    found = grokking.progress(form, mask)(Snapshot(0, training.net))
    expected = grokking.answer_loss(training.net, (inputs, answers)).mean()
    np.testing.assert_allclose(found["train_loss"], expected.detach(), rtol=1e-5)
    assert abs(float(found["test_loss"]) - math.log(form.p)) < 1


def test_a_head_s_mask_is_the_weights_that_only_it_uses() -> None:
    """Whatever is done to the masked entries of head 2, the outputs of all other heads stay as they are."""
    torch.manual_seed(0)
    net = lm.AttentionOnly(20, context=16)
    masks = [induction.head_mask(net, 1, head) for head in range(lm.HEADS)]
    for name in masks[0]:
        assert torch.stack([mask[name] for mask in masks]).sum(0).eq(1).all(), "every weight is one head's"
    attention = net.blocks[1].attention  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    attention.out.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))  # type: ignore[union-attr]
    tokens = torch.randint(20, (3, 16))
    with torch.no_grad():
        net(tokens)
        for name, mask in masks[2].items():
            net.get_parameter(name)[mask] += 1.0
        net(tokens)
    changed = (seen[0] - seen[1]).abs().amax((0, 1)).view(lm.HEADS, -1).amax(1) > 1e-6
    assert changed.tolist() == [False, False, True, False]


def test_agreement_of_groupings() -> None:
    roles = ["a"] * 5 + ["b"] * 3
    share, p = induction.agreement(roles, [1] * 5 + [2] * 3)
    assert share == 1.0
    assert p == pytest.approx(1 / math.comb(8, 3), abs=0.01)
    share, p = induction.agreement(roles, [1, 2, 1, 2, 1, 2, 1, 2])
    assert share == pytest.approx(13 / 28)
    assert p > 0.2


class TestDeadUnits(InstrumentContract):
    without_error = dict.fromkeys(["dead"], "of all given inputs")

    def instrument(self) -> own_instrument.DeadUnits:
        return own_instrument.DeadUnits(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        with torch.no_grad():
            net[0].bias[: 2 + seed] = -99.0  # type: ignore[index]
        return net

    def test_planted_dead_units_are_counted(self) -> None:
        for seed in (0, 1):
            assert float(self.measure(self.model(seed))["dead"][0]) == (2 + seed) / 8
