"""What the benchmarks measured, from their JSON files: how each was run, when, and its numbers."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from words import cell, escaped, table

ROOT = Path(__file__).parents[2]
SETTINGS = {
    *("machine", "options", "settings", "note", "torch", "numpy", "python", "platform", "load", "cpus", "which"),
    "probes",
}
MOST = 160  # numbers of a file that are shown; what is left out is named


def flat(held: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """The single numbers and words of nested dictionaries, by their path; settings and long lists are left out."""
    if isinstance(held, Mapping):
        for key, value in held.items():
            if key not in SETTINGS:
                yield from flat(value, (*path, str(key)))
    elif isinstance(held, list):
        if 0 < len(held) <= 8 and all(isinstance(value, int | float | str) for value in held):
            yield " / ".join(path), ", ".join(map(shown, held))
    elif held is not None:
        yield " / ".join(path), shown(held)


def tables(numbers: list[tuple[str, str]]) -> str:
    """Numbers that are the same of several things side by side, a row a thing; the others one below the other."""
    things: dict[str, dict[str, str]] = {}
    for path, value in numbers:
        thing, _, what = path.rpartition(" / ")
        things.setdefault(thing, {})[what] = value
    alike: dict[tuple[str, ...], list[str]] = {}
    for thing, held in things.items():
        alike.setdefault(tuple(held), []).append(thing)
    parts = []
    for columns, names in alike.items():
        if len(names) > 1:
            rows = [[cell(name), *(cell(things[name][column]) for column in columns)] for name in names]
            parts.append(table(["", *map(cell, columns)], rows))
        else:
            (name,) = names
            rows = [[cell(f"{name} / {what}" if name else what), cell(things[name][what])] for what in columns]
            parts.append(table(["what", "measured"], rows))
    return "\n\n".join(parts)


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def changed(path: Path) -> str:
    """The day on which a file was committed last, where git knows it."""
    command = ["git", "log", "-1", "--format=%cs", "--", str(path)]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "not committed"
    except OSError:
        return "unknown: no git"


def script_of(path: Path) -> Path:
    """The script that writes a JSON file: that of its name, or of the longest beginning of it."""
    scripts = [other for other in path.parent.glob("*.py") if path.stem.startswith(other.stem)]
    return max(scripts, key=lambda other: len(other.stem))


def results() -> str:
    """A part for each file of results."""
    parts = []
    for path in sorted((ROOT / "benchmarks").rglob("*.json")):
        if path.parent.name == "curves":
            continue  # the labels
        held, script = json.loads(path.read_text(encoding="utf-8")), script_of(path)
        about = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        numbers = list(flat(held))
        machine = held.get("machine", "") if isinstance(held, dict) else ""
        if isinstance(machine, dict):
            machine = ", ".join(f"{key} {value}" for key, value in machine.items())
        parts += [
            f"## {path.relative_to(ROOT / 'benchmarks').with_suffix('')}",
            escaped(" ".join(about.split())),
            f"`python {script.relative_to(ROOT)}`; results in `{path.relative_to(ROOT)}`, last changed {changed(path)}."
            + (f" Machine: {escaped(str(machine))}." if machine else ""),
            tables(numbers[:MOST]),
        ]
        if more := len(numbers) - MOST:
            parts += [f"{more} more numbers are in the file."] if more > 0 else []
    return "\n\n".join(parts)
