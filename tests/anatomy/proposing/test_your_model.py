"""docs/your_model.md: each block of lines, on a small model of the form that it is for, gives a first row."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from devmon import Trajectory
from tests.anatomy.proposing import client_models as C

PAGE = (Path(__file__).parents[3] / "docs" / "your_model.md").read_text()
BLOCKS = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    for section in PAGE.split("\n### ")[1:]
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "minGPT": C.MinGPT,
    "nanoGPT": C.NanoGPT,
    "nanochat": C.Nanochat,
    "x-transformers": C.XTransformer,
    "litgpt": C.LitGPT,
    "nn.TransformerEncoder": C.TorchEncoder,
    "Lightning's demo Transformer": C.LightningDemo,
}


def test_every_block_of_the_page_is_of_ten_lines_at_most() -> None:
    assert set(BLOCKS) == set(MODELS)
    lines = {name: sum(bool(line.strip()) for line in block.splitlines()) for name, block in BLOCKS.items()}
    assert max(lines.values()) <= 10, lines


@pytest.mark.parametrize("name", MODELS)
def test_its_lines_give_a_first_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    kind = type(MODELS[name]())
    model = C.shaken(type(kind.__name__, (kind,), {})())  # a class of its own, on which the lines set their attribute
    script: dict[str, Any] = {
        "model": model, "raw_model": model, "orig_model": model, "iter_num": 0, "step": 0, "steps": 100,
        "heads": C.HEADS,
        "tokens": torch.randint(C.VOCAB, (12, 16)), "vocab_size": C.VOCAB,
        "fabric": L.Fabric(accelerator="cpu", devices=1),
        "trainer": SimpleNamespace(set_callback=lambda name, callback: None),
    }  # fmt: skip
    exec(BLOCKS[name], script)
    script["monitor"].close()
    run = Trajectory(script["monitor"].path, "r")
    assert {name: run.steps(name) for name in run} == {name: [0] for name in run}
    expected = 13 if "standard" in BLOCKS[name] else 2
    assert len(run.names()) >= expected - 1, run.names()
    assert {name: run.failures(name) for name in run} == {name: {} for name in run}
