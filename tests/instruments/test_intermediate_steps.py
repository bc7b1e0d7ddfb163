"""IntermediateSteps and step_depths on a model that takes the two steps in two layers, and on one that takes none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from devmon.analysis import step_depths
from devmon.errors import DataError, InstrumentError
from devmon.instruments import IntermediateSteps
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract, even
from devmon.testing.handbuilt import AttentionOnly
from tests.support.models import LENGTH, random_model
from tests.support.models import VOCAB as WORDS

VOCAB, RELATION, SURE = 24, 1, 10.0
SHARP = 800.0  # its exponential underflows: other places get 0 exactly, and logits that are tied stay so
A = torch.arange(2, 18)
TO_B = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
TO_C = (torch.arange(VOCAB) + 5) % VOCAB  # no answer is its own bridge
PROMPTS = torch.stack([A, torch.full_like(A, RELATION)], 1)


def two_steps() -> AttentionOnly:
    """The last place reads a from the place before and writes b (layer 0), then takes b away and writes c (layer 1)."""
    token, out, place = slice(0, VOCAB), slice(VOCAB, 2 * VOCAB), slice(2 * VOCAB, 2 * VOCAB + 2)
    eye = torch.eye(2 * VOCAB + 2, dtype=torch.float64)
    before, first, itself, second = (torch.zeros_like(eye) for _ in range(4))
    before[place, place] = SHARP * torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double()
    first[token, out] = SURE * torch.eye(VOCAB, dtype=torch.float64)[TO_B]
    itself[place, place] = SHARP * torch.eye(2).double()
    second[out, out] = torch.eye(VOCAB, dtype=torch.float64)[TO_C] - torch.eye(VOCAB, dtype=torch.float64)
    heads = [[(before, first)], [(itself, second)]]
    return AttentionOnly(eye[token], eye[place], heads, eye[:, out])


def probe(**settings: int) -> IntermediateSteps:
    return IntermediateSteps(PROMPTS, TO_B[A], TO_C[TO_B[A]], **settings)


def test_the_bridge_is_read_at_one_depth_and_the_answer_at_the_next() -> None:
    found = probe(batch_size=5)(Snapshot(0, two_steps()))
    tied, behind = 1 / ((VOCAB + 1) / 2), 1 / (1 + VOCAB / 2)  # all logits equal; one token above all the others
    np.testing.assert_allclose(found["bridge"], [tied, 1, behind], rtol=1e-12)
    np.testing.assert_allclose(found["answer"], [tied, behind, 1], rtol=1e-12)
    np.testing.assert_allclose(found["bridge_other"], [tied, behind, behind], rtol=1e-12)
    np.testing.assert_allclose(found["log_p"], SURE - math.log(math.exp(SURE) + VOCAB - 1), rtol=1e-9)


def test_the_state_at_the_last_place_moves_the_answer_from_where_the_bridge_is() -> None:
    """Before layer 0 the last place holds the relation alone, which all prompts share."""
    found = probe()(Snapshot(0, two_steps()))
    np.testing.assert_allclose(found["moved"], [0, 1, 1], atol=1e-9)
    np.testing.assert_allclose(found["moved_se"], 0, atol=1e-9)


def run_of(*models: nn.Module) -> xr.Dataset:
    rows = [probe()(Snapshot(step, model)) for step, model in enumerate(models)]
    return xr.concat([row.expand_dims(step=[i]) for i, row in enumerate(rows)], "step")


def test_depths_of_half_maximum_and_the_lag_of_one_layer() -> None:
    found = step_depths(run_of(even(VOCAB, 2), two_steps()))
    for name, depth in (("bridge", 0.5), ("answer", 1.5), ("lag", 1.0)):
        assert np.isnan(found[name][0]), "a model that takes no step has no depth"
        np.testing.assert_allclose(found[name][1], depth, rtol=1e-6)
        np.testing.assert_allclose(found[f"{name}_se"][1], 0, atol=1e-6)


def test_errors_of_depths_are_those_of_prompts() -> None:
    """Of half of the prompts the bridge comes a layer later: the half-maximum lies on the line between, and shakes."""
    rng = np.random.default_rng(0)
    truth, stds, errors = 1.25, [], []
    for _ in range(200):
        late = rng.random(64) < 0.5
        curve = np.stack([np.zeros(64), np.where(late, 0.0, 1.0), np.ones(64), np.ones(64)], 1)
        data = xr.Dataset(coords={"depth": np.arange(4), "step": [0]})
        groups = np.stack([curve[i::8].mean(0) for i in range(8)])
        for name in ("bridge", "answer"):
            data[name] = (("step", "depth"), groups.mean(0)[None])
            data[f"{name}_se"] = (("step", "depth"), np.full((1, 4), 0.01))
            data[f"{name}_other"] = (("step", "depth"), np.zeros((1, 4)))
            data[f"{name}_replicates"] = (("replicate", "step", "depth"), groups[:, None])
        found = step_depths(data)
        stds.append(float(found["bridge"][0]))
        errors.append(float(found["bridge_se"][0]))
        assert float(found["lag"][0]) == 0
        assert float(found["lag_se"][0]) == 0, "the same prompts"
    assert abs(np.mean(stds) - 1) < 0.3, truth
    assert 0.5 < np.mean(errors) / np.std(stds) < 2


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="bridge"):
        IntermediateSteps(PROMPTS, TO_B[A][:3], TO_C[A])
    with pytest.raises(DataError, match="four prompts"):
        IntermediateSteps(PROMPTS[:3], A[:3], A[:3])
    with pytest.raises(DataError, match="IntermediateSteps"):
        step_depths(xr.Dataset({"loss": ("step", [1.0])}))
    with pytest.raises(InstrumentError, match="24 logits"):
        IntermediateSteps(PROMPTS, TO_B[A], A + 20)(Snapshot(0, two_steps()))


class TestIntermediateSteps(InstrumentContract):
    def instrument(self) -> IntermediateSteps:
        tokens = torch.randint(WORDS, (12, LENGTH), generator=torch.Generator().manual_seed(0))
        return IntermediateSteps(tokens, torch.arange(12) % WORDS, torch.arange(3, 15) % WORDS)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
