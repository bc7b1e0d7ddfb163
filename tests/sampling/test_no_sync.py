"""No step of a chain, and no pass that is read, waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from devmon.anatomy import Anatomy
from devmon.sampling import Settings, next_token_loss, sample
from devmon.sampling.group import _Lane
from devmon.testing import induction
from tests.anatomy.families import VOCAB, family
from tests.sampling.no_sync import no_synchronisation

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
VARIANTS: dict[str, dict[str, Any]] = {
    "sgld": {"sampler": "sgld"},
    "baoab": {"sampler": "baoab"},
    "sgnht": {"sampler": "sgnht"},
    "preconditioned": {"sampler": "preconditioned"},
    "acceptance": {"acceptance": True},
    "control variates": {"control_variate": True, "shared_batches": True},
    "micro-batches in bfloat16": {"micro_batch": 2, "precision": "bfloat16"},
}


def tokens(rows: int = 12) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:λ̂ moves by")  # what rounding moves is no matter here
def test_a_step_of_a_chain(variant: str, stacked: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = [], _Lane.step

    def watched(self: _Lane, *given: Any, **more: Any) -> None:
        with no_synchronisation(device):
            step(self, *given, **more)
        steps.append(1)

    monkeypatch.setattr(_Lane, "step", watched)
    settings = Settings(**{"lr": 1e-6, "chains": 2, "draws": 2, "burn_in": 0, "batch_size": 4} | VARIANTS[variant])
    sample(induction(VOCAB, 8).float().to(device), next_token_loss, tokens(), settings, stacked=stacked)
    assert len(steps) >= (2 if stacked else 4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_pass_that_is_read_and_written(device: str) -> None:
    anatomy = Anatomy(family("gpt_neox").to(device))
    given = tokens().to(device)
    anatomy.run(given, ["z"])  # a layout is tried once, and says so
    with no_synchronisation(device):
        anatomy.run(given, ["z", "pattern", "resid_post", "neurons"], {("z", 0): lambda z: z * 0.5})


def test_what_would_wait_is_seen() -> None:
    values, works = torch.randn(4), nn.Linear(4, 4)
    for waits in (
        lambda: float(values.sum()),
        lambda: bool((values > 0).any()),
        lambda: values[values > 0],
        lambda: (values > 0).nonzero(),
        lambda: values.unique(),
    ):
        with no_synchronisation(), pytest.raises(RuntimeError, match="waits for the device"):
            waits()
    with no_synchronisation():
        works(values).square().mean().backward()
