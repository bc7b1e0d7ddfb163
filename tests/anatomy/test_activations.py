"""What one instrument has read serves the others of its step, and nobody else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from devmon import Snapshot, Trajectory, Watch, observe
from devmon.anatomy import Anatomy, activations
from devmon.recipes.language_model import AttentionOnly

TOKENS = torch.randint(20, (7, 9), generator=torch.Generator().manual_seed(0))
CALLS: Counter[str] = Counter()


class Counted(AttentionOnly):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        CALLS["forward"] += len(tokens) > 1  # a layout is tried on one sequence
        return super().forward(tokens)


@dataclass(frozen=True)
class Size:
    site: str
    break_it: bool = False

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        output, reads = activations(snapshot, TOKENS, [self.site], "Size", batch_size=4)
        if self.break_it:
            snapshot.model.embed.weight.data.zero_()
        return xr.Dataset({"size": float(reads[self.site, 1].norm() + output.norm())})


def model() -> Counted:
    torch.manual_seed(0)
    return Counted(20)


def test_a_site_is_computed_once_for_all_watches_of_a_step(tmp_path: Path) -> None:
    trajectory, net = Trajectory(tmp_path / "run.zarr"), model()
    watches = [Watch(name, Size("z", name == "a"), range(9)) for name in "abc"] + [Watch("d", Size("q"), range(9))]
    CALLS.clear()
    observe(3, net, watches, trajectory)
    assert CALLS["forward"] == 4  # two parts for z, and two more for q
    sizes = [float(trajectory[name]["size"][0]) for name in "abcd"]
    assert sizes[0] == sizes[1] == sizes[2] != sizes[3]
    CALLS.clear()
    with torch.no_grad():
        net.embed.weight.mul_(2)
    observe(4, net, watches[:2], trajectory)
    assert CALLS["forward"] == 2
    changed = trajectory["a"]["size"].values
    assert changed[1] != changed[0]
    np.testing.assert_array_equal(changed, trajectory["b"]["size"].sel(step=[3, 4]).values)


def test_the_parts_are_those_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot(0, model())
    output, reads = activations(snapshot, TOKENS, ["z", ("pattern", 1)], "test", batch_size=3)
    whole, sites = Anatomy(snapshot.model).run(TOKENS, ["z", ("pattern", 1)])
    torch.testing.assert_close(output, whole)
    for key, value in sites.items():
        torch.testing.assert_close(reads[key], value)
    monkeypatch.setattr("devmon.anatomy.passes.kept.MOST_KEPT", 0)
    other = Snapshot(0, model())
    activations(other, TOKENS, ["z"], "test")
    assert not any(kept for key, kept in other.memo.items() if key[0] == "shared")
