"""The pages of docs/: every block of Python runs as printed, one after the other, and every page is in the site."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from devmon import Watch
from devmon.data import broken_repeats
from devmon.features import Dictionary
from devmon.sampling import regression_loss
from tests.support.stored_run import STORED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = {
    page.name: blocks
    for page in sorted(DOCS.glob("*.md"))
    if (blocks := re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
}
ELSEWHERE = {"your_model.md": "tests/anatomy/proposing/test_your_model.py"}  # a model for each block
SHORTER = {"features.md": [("steps=2000", "steps=8"), ("batch=4096", "batch=512"), ("BatchTopK(32)", "BatchTopK(4)")]}


def line() -> dict[str, Any]:
    """A regression at its minimum."""
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Linear(3, 1, bias=False)
    return {"model": model, "loss": regression_loss, "data": (x, model(x).detach())}


def language() -> dict[str, Any]:
    config = GPT2Config(vocab_size=VOCAB, n_positions=12, n_embd=8, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0)
    tokens = torch.randint(VOCAB, (64, 12), generator=torch.Generator().manual_seed(0))
    return {"model": GPT2LMHeadModel(config).eval(), "tokens": tokens}


def directions() -> dict[str, Any]:
    """What stands for a user's own prompts, text and dictionaries."""
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    held = Dictionary(rows.T.contiguous(), torch.zeros(12), rows, torch.zeros(8))
    transcoder = Dictionary(rows.T.contiguous(), torch.zeros(12), rows, torch.zeros(8), centred=False)
    text = torch.randint(VOCAB, (24, 12), generator=torch.Generator().manual_seed(0))
    return {"positive": text[:12], "negative": text[12:], "pairs": broken_repeats(VOCAB, 8, 4), "text": text,
            "prompts": text[:2], "directions": rows[:1], "dictionary": held, "transcoder": transcoder,
            "transcoder_1": transcoder, "Watch": Watch, "steps": range(3)}  # fmt: skip


def stored() -> dict[str, Any]:
    """The run of the page is one that lies with the tests."""
    Path("runs/demo").mkdir(parents=True)
    os.symlink(STORED, "runs/demo/trajectory.zarr")
    return {}


VOCAB = 20
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "llc.md": line,
    "features.md": language,
    "steering.md": directions,
    "reports.md": stored,
}


@pytest.mark.parametrize("page", sorted(BLOCKS.keys() - ELSEWHERE.keys()))
def test_the_blocks_of_a_page_run_as_printed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page", **GIVEN.get(page, dict)()}
    for block in BLOCKS[page]:
        for long, short in SHORTER.get(page, []):
            block = block.replace(long, short)
        exec(compile(block, page, "exec"), names)


def test_each_page_of_which_another_test_takes_care_is_there() -> None:
    assert set(ELSEWHERE) | set(SHORTER) | set(GIVEN) <= set(BLOCKS)
    for page, pairs in SHORTER.items():
        assert all(long in "".join(BLOCKS[page]) for long, _ in pairs)
