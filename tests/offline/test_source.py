"""What a command line names: scripts, modules and what they return."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from devmon.monitoring.fingerprint import identity
from devmon.offline.source import load_source, load_study

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


def test_the_part_that_a_monitor_measures_is_measured(trained: Path) -> None:
    model, watches = load_study(f"{trained / 'script.py'}:monitored")
    assert isinstance(model, torch.nn.Sequential)
    assert watches is not None
    assert [watch.name for watch in watches] == ["norm", "llc"]


SCRIPT = """
import torch

from devmon.instruments import LLC

def loss(model, batch):
    return NUMBER * model(batch).pow(2).mean(-1)

def made():
    return torch.nn.Linear(2, 1), LLC(torch.ones(4, 2), loss, lr=1e-3)
"""


def test_scripts_of_one_name_are_two_modules_and_their_identity_is_the_name_alone(tmp_path: Path) -> None:
    """Else the second would stand in for the first where something is looked up again by its module, as pickle does."""
    losses = []
    for number, folder in enumerate((tmp_path / "a", tmp_path / "b"), 2):
        folder.mkdir()
        (folder / "study.py").write_text(SCRIPT.replace("NUMBER", str(number)))
        losses.append(load_source(f"{folder / 'study.py'}:made")[1])
    one, two = losses
    model, batch = torch.nn.Linear(2, 1), torch.ones(1, 2)
    again = pickle.loads(pickle.dumps(one.loss))
    assert again(model, batch).item() == one.loss(model, batch).item()
    assert two.loss(model, batch).item() == pytest.approx(1.5 * one.loss(model, batch).item())
    assert identity(one)["fingerprint"] == identity(two)["fingerprint"]  # a run goes on from another folder
    assert identity(one)["fields"]["loss"] == "_source_study.loss"  # as runs of version 0.1.0 have it


def test_the_demo_offers_its_own_model_and_llc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from devmon.data.text import read_text
    from devmon.recipes import language_model

    (tmp_path / "own.txt").write_text("".join(f"line {i}: {i * i} quick foxes\n" for i in range(2000)))
    text = read_text(tmp_path / "own.txt")
    monkeypatch.setattr(language_model, "read_text", lambda: text)
    model, instrument = load_source("devmon.recipes.language_model:model_and_llc")
    (watch,) = (watch for watch in language_model.watches(text, 100) if watch.name == "llc")
    assert identity(instrument) == identity(watch.instrument)
    assert instrument.loss(model, instrument.data[:2]).shape == (2,)
