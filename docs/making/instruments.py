"""A page an instrument, from its docstring and the figures it makes, and the page that lists them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from gallery import Shown
from words import cell, docstring, escaped, table

import devmon.instruments
from devmon.cli import describe


def groups() -> dict[str, list[str]]:
    """The instruments by the comments that group them where they are listed."""
    source = Path(devmon.instruments.__file__).read_text(encoding="utf-8").partition("__all__")[2]
    found: dict[str, list[str]] = {}
    for title, name in re.findall(r"^    # (.+)$|^    \"(\w+)\",$", source, re.MULTILINE):
        if title:
            found[title] = []
        else:
            found[list(found)[-1]].append(name)
    return found


def listing() -> str:
    lines = [
        "# Instruments",
        "",
        "Each measures one thing of a snapshot of the weights. The pages are made of the docstrings, which",
        "`devmon instruments NAME` prints too; their figures come from small trainings of seconds, measured while the",
        "site is built: they show what is drawn, not what a model of size does.",
        "[Which instrument reads which family of models](../families.md);",
        "[how true the standard errors are](../errors.md); [one of your own](../own_instrument.md).",
    ]
    for title, names in groups().items():
        rows = [[f"[{name}]({name}.md)", cell(describe.summary(describe.instrument(name)))] for name in names]
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", table(["instrument", "measures"], rows)]
    return "\n".join(lines) + "\n"


def page(name: str, shown: Shown | None) -> str:
    kind = describe.instrument(name)
    parts = describe.description(inspect.getdoc(kind) or "")
    lines = [f"# {name}", "", docstring(parts.above), "", "```text", describe.signature(kind), "```"]
    if parts.variables:
        rows = [
            [f"`{held.name}`", cell(held.dims), cell(held.unit), cell(held.meaning), cell(held.null)]
            for held in parts.variables
        ]
        lines += ["", "## What it returns", "", table(["variable", "dims", "unit", "meaning", "null"], rows)]
    if parts.below:
        lines += ["", docstring(parts.below)]
    return "\n".join([*lines, *(made(shown) if shown else [])]) + "\n"


def made(shown: Shown) -> list[str]:
    """The line that was run, what it measured, and the figures."""
    lines = ["", "## The figures it makes", "", "```text", shown.line, "```", "", escaped(shown.study)]
    for figure in shown.figures:
        lines += ["", f"![{escaped(figure.caption)}](figures/{figure.name}.svg)", "", f"*{escaped(figure.caption)}*"]
    lines += ["", '??? note "The training, and the names of the line"', ""]
    return [*lines, *(f"    {line}" for line in ["```text", *shown.code.splitlines(), "```"])]


def files(shown: Mapping[str, Shown]) -> Iterator[tuple[str, str]]:
    """Paths in the site and their contents."""
    yield "instruments/index.md", listing()
    for name in devmon.instruments.__all__:
        yield f"instruments/{name}.md", page(name, shown.get(name))
    for each in shown.values():
        for figure in each.figures:
            yield f"instruments/figures/{figure.name}.svg", figure.svg
