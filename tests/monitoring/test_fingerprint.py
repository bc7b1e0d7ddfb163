from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from devmon.monitoring.fingerprint import describe, identity


@dataclass(frozen=True)
class Probe:
    """Measures a thing.

    More words.
    """

    tokens: torch.Tensor
    scale: float = 1.0
    loss: object = torch.nn.functional.cross_entropy


BASE = Probe(torch.arange(6).reshape(2, 3))
CHANGED = [
    replace(BASE, tokens=torch.tensor([[0, 1, 2], [3, 4, 6]])),
    replace(BASE, tokens=torch.arange(6).reshape(3, 2)),
    replace(BASE, tokens=torch.arange(6, dtype=torch.int32).reshape(2, 3)),
    replace(BASE, scale=1.0 + 1e-12),
    replace(BASE, loss=torch.nn.functional.mse_loss),
    replace(BASE, loss=lambda model, batch: model(batch)),
]


def test_equal_content_is_one_identity() -> None:
    assert identity(BASE) == identity(Probe(torch.arange(6).reshape(2, 3).clone()))
    assert identity(BASE)["doc"] == "Measures a thing."
    assert identity(BASE)["fields"]["scale"] == "1.0"


@pytest.mark.parametrize("other", CHANGED)
def test_every_change_of_a_field_shows(other: Probe) -> None:
    assert identity(other)["fingerprint"] != identity(BASE)["fingerprint"]


def test_no_address_gets_in() -> None:
    for value in (
        lambda: 0,
        object(),
        torch.nn.Linear(1, 1),
        {"a": [np.ones(2, np.float32), {3}]},
        torch.ones(2).bfloat16(),
    ):
        assert "0x" not in describe(value)
