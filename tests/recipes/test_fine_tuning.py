"""The recipe on fine-tuning: its fast form, and its adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from devmon import Trajectory
from devmon.recipes import fine_tuning
from devmon.recipes.common import packed
from devmon.recipes.fine_tuning import FACTS, LoRA, app, with_lora


@pytest.mark.filterwarnings("ignore")
def test_the_fast_form_learns_forgets_and_moves(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--fast", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text())["found"]
    for way in ("full", "lora"):
        run = Trajectory(tmp_path / way / "trajectory.zarr", "r")
        assert run.steps("task") == [0, 1, 3, 10, 30]
        assert run["gradients"]["update_ratio"].values[-1] > 0  # by Trainer and by Lightning
        assert (tmp_path / way / "report.html").stat().st_size > 10_000
        # What is forgotten by the losses of each token is what the loss says.
        change = run["general"]["loss"].values[-1] - run["general"]["loss"].values[0]
        assert found[way]["general, change"] == pytest.approx(change, abs=1e-4)
    assert (tmp_path / "fine_tuning.png").stat().st_size > 10_000


def test_an_adapter_is_a_low_rank_change_that_begins_at_none() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 4).double()
    weight = base.weight.clone()
    adapter = LoRA(base, 2, 4.0, torch.Generator().manual_seed(0)).double()
    x = torch.randn(3, 6).double()
    assert torch.equal(adapter(x), base(x))
    adapter.up.data.normal_()
    whole = weight + 2.0 * adapter.up @ adapter.down
    torch.testing.assert_close(adapter(x), x @ whole.T + base.bias)
    model = with_lora(nn.ModuleDict({"q_proj": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)}))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["q_proj.down", "q_proj.up"]


def test_every_capital_is_that_of_one_country_and_texts_fill_their_rows() -> None:
    assert len(dict(FACTS)) == len({capital for _, capital in FACTS}) == 24
    rows = packed(["ab", "cd"], lambda text: list(text.encode()), 5, 3, 0)
    assert rows.shape == (3, 5)
    assert set(rows.flatten().tolist()) <= set(b"abcd\n")
    assert torch.equal(rows, packed(["ab", "cd"], lambda text: list(text.encode()), 5, 3, 0))
    assert fine_tuning.WAYS.keys() == {"full", "lora"}
