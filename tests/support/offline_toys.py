"""Toys of the offline tests: two studies as scripts, series of checkpoints for them, and the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

from devmon import Trajectory, Watch, every
from devmon.callbacks import CheckpointSeries, Monitor
from devmon.cli.root import app
from tests.anatomy.test_anatomy_sites import VOCAB, family
from tests.support.lightning_toys import train

WORDS = [f"w{n}" for n in range(VOCAB - 1)]

# a study of the toy network of lightning_toys: the norm at every step, an LLC at every third
SCRIPT = """
import torch

from devmon import Watch, every
from devmon.instruments import LLC
from devmon.callbacks import Monitor
from tests.support.lightning_toys import Net, Norm

def loss(model, batch):
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x), y, reduction="none")

def watches():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    llc = LLC((x, (x[:, 0] > 0).long()), loss, nbeta=20, gamma=10, lr=1e-3, chains=2, draws=5, burn_in=2, batch_size=8)
    return [Watch("norm", Norm(), every(1)), Watch("llc", llc, every(3))]

def study():
    return Net(), watches()

def model():
    return Net()

def monitored():
    return Net(), Monitor("unused", watches(), model="net")

def nothing():
    return 3
"""


# a study whose processes need no lightning: what is drawn, an instrument that kills its process once, an unfit one
PLAIN = """
import os
from dataclasses import dataclass

import torch
import xarray as xr

from devmon import InstrumentError, Watch, every

@dataclass(frozen=True)
class Drawn:
    kills: bool = False

    def __call__(self, snapshot):
        if self.kills and snapshot.step == 6 and not os.path.exists("GONE"):
            open("GONE", "w").close()
            os.kill(os.getpid(), 9)
        noise = torch.randn(5, generator=snapshot.generator("noise"))
        return xr.Dataset({"x": ((), (snapshot.model(noise) ** 2).sum().item())})

class Unfit:
    def __call__(self, snapshot):
        raise InstrumentError("made for another model")

def model():
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

def study():
    return model(), [Watch("drawn", Drawn(True), every(1)), Watch("seldom", Drawn(), every(4))]

def unfit():
    return model(), [Watch("unfit", Unfit(), every(1))]
"""


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of training, its monitor's trajectory and its checkpoints at even steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "script.py").write_text(SCRIPT)
    names: dict[str, Any] = {}
    exec(SCRIPT, names)
    names["loss"].__module__ = "_source_script"  # as the script's own
    torch.set_num_threads(1)
    monitor = Monitor(folder / "online.zarr", names["watches"]())
    train([monitor, CheckpointSeries(folder / "saved", every(2))])
    return folder


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    for seed, step in enumerate([0, 100, 1000]):
        family("gpt_neox", seed).save_pretrained(folder / "hf" / f"checkpoint-{step}")
    torch.save(torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(0)), folder / "tokens.pt")
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(PLAIN.replace("GONE", str(tmp_path / "gone")))
    (tmp_path / "saved").mkdir()
    for step in range(0, 14, 2):
        torch.manual_seed(step)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        save_file(model.state_dict(), tmp_path / "saved" / f"step{step}.safetensors")
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One token a word, the last of the vocabulary at the end of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*WORDS, "<end>"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    return str(folder)


def text_of(words: range) -> str:
    return " ".join(WORDS[n % len(WORDS)] for n in words)


def measure(*args: object) -> Result:
    return CliRunner().invoke(app, ["measure", *map(str, args)])


def rows(run: Path | str) -> dict[str, xr.Dataset]:
    trajectory = Trajectory(run, "r")
    found = {name: trajectory[name].drop_vars("seconds") for name in trajectory}
    for dataset in found.values():
        dataset.attrs.pop("failures", None)  # of folded rows only
    return found


def same(one: dict[str, xr.Dataset], two: dict[str, xr.Dataset]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        xr.testing.assert_identical(one[name], two[name])


def with_watches(monkeypatch: pytest.MonkeyPatch, model: Any, watches: list[Watch]) -> None:
    monkeypatch.setattr("devmon.offline.study.load_study", lambda source: (model, tuple(watches)))
