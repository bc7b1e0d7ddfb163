"""Notebooks as they show themselves: their cells are run one after the other, in Python alone, and become a page."""

from __future__ import annotations

import ast
import contextlib
import html
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib.figure import Figure

from devmon import Trajectory
from devmon.analysis import report
from tests.support.hub import Hub

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "docs" / "notebooks"
DEMO = ROOT / "tests" / "stored" / "demo.zarr"  # the demo with seed 1, five of its watches


def cells(path: Path) -> list[tuple[str, str]]:
    """The kind ("markdown" or "code") and text of each cell."""
    held = json.loads(path.read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in held["cells"]]


def run_cell(source: str, names: dict[str, Any]) -> tuple[str, Any]:
    """What a cell prints, and the value of its last line where that is an expression, else None."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None
    return printed.getvalue(), value


def shown(value: Any) -> str:
    """A value as a notebook shows it: its HTML, a drawing, or its words."""
    if isinstance(value, Figure):
        image = io.StringIO()
        value.savefig(image, format="svg")
        svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", image.getvalue(), flags=re.DOTALL)
        return re.sub(r"\s*\n\s*", " ", svg[svg.index("<svg") :])
    made = getattr(value, "_repr_html_", lambda: None)()
    return f"<pre>{html.escape(repr(value))}</pre>" if made is None else re.sub(r"\n\s*\n", "\n", made)


def page(path: Path) -> str:
    """The Markdown page of a notebook, run in a folder of its own in which `prepared` stands ready."""
    names: dict[str, Any] = {"__name__": "__main__"}
    parts = [f"[The notebook]({path.name})"]
    with prepared(path.stem), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, source in cells(path):
            if kind == "markdown":
                parts.append(source)
                continue
            printed, value = run_cell(source, names)
            parts.append(f"```python\n{source}\n```")
            if printed:
                parts.append(f"```text\n{printed.rstrip()}\n```")
            if value is not None:
                parts.append(f'<div class="output">{shown(value)}</div>')
    return "\n\n".join(parts) + "\n"


@contextlib.contextmanager
def prepared(name: str) -> Iterator[None]:
    """A working folder with what the notebook of this name expects: the demo's run, or a hub that has Pythia."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        os.chdir(folder)
        stack.callback(os.chdir, before)
        if name == "demo":
            Path("runs/demo").mkdir(parents=True)
            os.symlink(DEMO, "runs/demo/trajectory.zarr")
        elif name == "pythia":
            stack.enter_context(stand_in(Path(folder, "hub")))
        yield


@contextlib.contextmanager
def stand_in(folder: Path) -> Iterator[None]:
    """A hub on this machine whose `EleutherAI/pythia-70m` is a small model of its architecture at seven steps.

    Weights go from random ones towards other random ones: what is measured on them means nothing.
    """
    import huggingface_hub
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=32, max_position_embeddings=64)  # fmt: skip
    steps = [0, 1, 8, 64, 512, 4000, 143_000]
    for index, step in enumerate(steps):
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * index * torch.randn_like(parameter))
        model.save_pretrained(folder / f"step{step}")
    hub = Hub(folder, ["main", *(f"step{step}" for step in steps)], repositories=["EleutherAI/pythia-70m"])
    held = huggingface_hub.constants
    named = ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_CACHE")
    before = {name: getattr(held, name) for name in named}
    with hub.serving() as url:
        held.ENDPOINT, held.HF_HUB_CACHE = url, str(folder.with_name("cache"))
        held.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(held, name, value)


def demo_report() -> str:
    """The report of the demo's run, the page that devmon writes."""
    with tempfile.TemporaryDirectory() as folder:
        return report(Trajectory(DEMO, "r"), Path(folder, "report.html")).read_text(encoding="utf-8")


def files() -> Iterator[tuple[str, str]]:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        yield f"notebooks/{path.stem}.md", page(path)
    yield "demo_report.html", demo_report()
