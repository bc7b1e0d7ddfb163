"""The reference: every public name with its signature, docstring and methods, and every command with its options."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import typer
from words import cell, docstring, table

from devmon.cli import app

PACKAGES = {
    "devmon": "what to meet first",
    "devmon.presets": "the usual watches",
    "devmon.callbacks": "Lightning, Fabric, the Trainer, sharded trainings",
    "devmon.analysis": "series, events, transitions, reports, without torch",
    "devmon.sampling": "λ̂ outside of a run, kernels, calibration",
    "devmon.anatomy": "where the parts of a model are",
    "devmon.data": "probe tokens, languages, rows",
    "devmon.features": "dictionaries of features",
    "devmon.testing": "the contract of an instrument, known models",
}


def public(package: str) -> dict[str, Any]:
    """What a package hands on, by name; of a module without `__all__` what it defines itself."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == package
    ]
    return {name: getattr(module, name) for name in names if not name.startswith("__")}


def entry(name: str, value: Any, level: str = "##") -> list[str]:
    lines = ["", f"{level} {name}", ""]
    if not callable(value):
        return [*lines, f"`{type(value).__name__}`"] if not inspect.ismodule(value) else [*lines, doc(value)]
    return [*lines, "```text", signature(name, value), "```", "", doc(value), *methods(name, value)]


def doc(value: Any) -> str:
    return docstring(inspect.getdoc(value) or "")


def signature(name: str, value: Any) -> str:
    """A call as one writes it, a parameter a line where the line is long."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    text = f"{name}{found}"
    if len(text) <= 100:
        return text
    returned = "" if found.return_annotation is found.empty else f" -> {found.return_annotation}"
    given = "".join(f"    {parameter},\n" for parameter in found.parameters.values())
    return f"{name}(\n{given}){returned}"


def methods(name: str, value: Any) -> list[str]:
    """The public methods of a class that have a docstring, and are its own."""
    if not inspect.isclass(value):
        return []
    lines: list[str] = []
    for key, held in vars(value).items():
        inner = held.__func__ if isinstance(held, classmethod | staticmethod) else held
        text = getattr(inner, "__doc__", None)
        if key.startswith("_") or not text or not (inspect.isfunction(inner) or isinstance(inner, property)):
            continue
        shown = key if isinstance(inner, property) else signature(key, inner)
        lines += ["", f"### {name}.{key}", "", "```text", shown, "```", "", docstring(inspect.cleandoc(text))]
    return lines


def page(package: str) -> str:
    module = importlib.import_module(package)
    lines = [f"# {package}", "", doc(module)]
    for name, value in public(package).items():
        lines += entry(name, value)
    return "\n".join(lines) + "\n"


def commands() -> str:
    """The commands of `devmon` with their arguments and options, as `--help` has them."""
    group: Any = typer.main.get_command(app)
    lines = ["# The command line", "", "`devmon COMMAND --help` prints the same."]
    for name, command in group.commands.items():
        if command.hidden:
            continue
        lines += ["", f"## devmon {name}", "", docstring(inspect.cleandoc(command.help or ""))]
        rows = [
            [f"`{called(given)}`", cell(getattr(given, "help", None) or "")]
            for given in command.params
            if given.name != "help"
        ]
        if rows:
            lines += ["", table(["option", "meaning"], rows)]
    return "\n".join(lines) + "\n"


def called(given: Any) -> str:
    """An option by its names, an argument by what stands for it."""
    return ", ".join(given.opts) if given.param_type_name == "option" else given.metavar or str(given.name).upper()


def files() -> Iterator[tuple[str, str]]:
    rows = [[f"[{package}]({package}.md)", about] for package, about in PACKAGES.items()]
    rows += [["[devmon.instruments](../instruments/index.md)", "what is measured, a page each"]]
    yield "reference/index.md", "# Reference\n\n" + table(["package", ""], rows) + "\n"
    yield "reference/commands.md", commands()
    for package in PACKAGES:
        yield f"reference/{package}.md", page(package)
