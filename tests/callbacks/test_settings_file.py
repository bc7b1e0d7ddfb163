"""LightningCLI: the callbacks of the file of settings that docs/callbacks.md prints, and those with one watch."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from devmon import Trajectory, log_spaced
from devmon.callbacks import checkpoints

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        importlib.util.find_spec("jsonargparse") is None and not os.environ.get("CI"),
        reason="pip install 'devmon[cli]' brings jsonargparse",
    ),
]
PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"
ONE_WATCH = """
trainer:
  max_steps: 4
  callbacks:
    - {class_path: devmon.callbacks.InductionMonitor,
       init_args: {trajectory: runs/one/trajectory.zarr, vocab_size: 50, length: 24, steps: every(2)}}
    - {class_path: devmon.callbacks.InductionMonitor,
       init_args: {trajectory: runs/usual/trajectory.zarr, vocab_size: 50, length: 24}}
"""


class Language(L.LightningModule):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(50, width), nn.Linear(width, 50)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.unembed(self.block(self.embed(tokens), src_mask=mask, is_causal=True))

    def training_step(self, tokens: torch.Tensor, _: int) -> Any:
        return nn.functional.cross_entropy(self(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Text(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randint(50, (48, 24)), batch_size=4)


def fit(settings: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.chdir(folder)
    Path("settings.yaml").write_text(settings)
    switches = [f"--trainer.{name}=false" for name in
                ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")]  # fmt: skip
    arguments = ["fit", "--config", "settings.yaml", "--trainer.accelerator=cpu", *switches]
    LightningCLI(Language, Text, args=arguments, save_config_callback=None)


def test_the_file_of_the_page_watches_and_saves_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    fit(settings, monkeypatch, tmp_path)
    run = Trajectory("runs/settings/trajectory.zarr", "r")
    assert run.steps("induction") == [step for step in range(13) if step in log_spaced(6, 12)]
    assert run.steps("weights") == [0, 4, 8, 12]
    assert {name: run.failures(name) for name in run} == {"induction": {}, "weights": {}}
    saved = sorted(checkpoints("runs/settings/checkpoints"))
    assert saved == sorted({0, 6, 12} | {step for step in range(13) if step in log_spaced(4, 12)})


def test_monitors_of_one_watch_take_steps_as_text_and_have_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(ONE_WATCH, monkeypatch, tmp_path)
    assert Trajectory("runs/one/trajectory.zarr", "r").steps("induction") == [0, 2, 4]
    assert Trajectory("runs/usual/trajectory.zarr", "r").steps("induction") == [0]  # every(100)
