"""The notebooks of docs/: every cell runs, and shows what it is there to show."""

from __future__ import annotations

import re
from pathlib import Path

import notebooks
import pytest

SHOWN = {  # of each notebook, what stands in its outputs
    "demo": [r"<b>Demo: induction in a small language model</b>", r"<b>EVENTS</b>", r"prefix_matching max", r"7\d\d \[",
             r"(<svg.*){3}"],
    "pythia": [r"7 checkpoints: \[0, 1, 8, 64, 512, 4000, 143000\]", r"GPTNeoXForCausalLM", r"InductionHeads",
               r"<svg", r"gain_se"],
    "own_model": [r"anatomy = Layout\(|Layout\(", r"PreviousTokenHeads", r"<svg"],
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(notebooks.NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_itself(path: Path) -> None:
    text = notebooks.page(path)
    for wanted in SHOWN[path.stem]:
        assert re.search(wanted, text, re.DOTALL), (wanted, text[:3000])
    outputs = "".join(re.findall(r'<div class="output">.*?</div>', text, re.DOTALL))
    assert "object at 0x" not in outputs
    assert len([kind for kind, _ in notebooks.cells(path) if kind == "code"]) <= 5


def test_a_cell_gives_what_it_prints_and_its_last_value() -> None:
    names: dict[str, object] = {}
    assert notebooks.run_cell("a = 2\nprint('told')\na + 1", names) == ("told\n", 3)
    assert notebooks.run_cell("b = a", names) == ("", None)
    assert names["b"] == 2
    assert notebooks.shown("<b>") == "<pre>&#x27;&lt;b&gt;&#x27;</pre>"
