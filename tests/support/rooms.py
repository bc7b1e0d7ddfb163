"""The import picture of the project: `python -m tests.support.rooms` prints rooms, arrows, circles and sizes.

A room is a folder of modules; an arrow goes from a room to one that it imports from, through its face (its `__init__`)
or not. Imports inside functions count, those under TYPE_CHECKING do not. Between files a face only hands names on: it
has no arrows.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
FOLDERS = {  # packages and the folders that hold them
    "devmon": "devmon",
    "devmon.analysis": "analysis",
    "devmon.callbacks": "callbacks",
    "devmon.recipes": "recipes",
}
ANALYSIS = ("derive", "detection", "transitions", "runs", "plots", "reports")  # each imports what stands left of it
NUMERIC = ("sampling", "analysis/detection", "anatomy")  # rooms whose long functions are told stage by stage


def modules() -> dict[str, Path]:
    """Every module by its name, `__main__` left out, which runs the command; a package has the name of its folder."""
    named = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != "__main__.py" and not any(parent.is_symlink() for parent in path.parents):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                named[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return named


@cache
def imports(path: Path, *, top_level: bool = False) -> frozenset[str]:
    """Names of imported modules, anywhere in the file (or at its top level only), but for those under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    unseen = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if id(node) not in unseen and isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif id(node) not in unseen and isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def arrows(known: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which modules each module imports, faces left out on both sides."""
    faces = {name for name, path in known.items() if path.name == "__init__.py"}
    return {
        name: {target for target in imports(path) if target in known and target not in faces | {name}}
        for name, path in known.items()
        if name not in faces
    }


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach one another (strongly connected components of two nodes or more; Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            groups.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return [group for group in groups if len(group) > 1]


def own_faces(known: Mapping[str, Path]) -> list[str]:
    """Modules that import the face of a package they stand in, where the module itself is meant."""
    faces = {name for name, path in known.items() if path.name == "__init__.py" and name != "devmon"}
    return [
        f"{name} imports {target}"
        for name, path in known.items()
        if name not in faces
        for target in sorted(imports(path) & faces)
        if name.startswith(target + ".") and not _for_a_module(path, target, known)
    ]


def _for_a_module(path: Path, package: str, known: Mapping[str, Path]) -> bool:
    """Whether all that a file takes `from package import` are modules: it imports these, and not a face."""
    taken = [
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == package
        for alias in node.names
    ]
    return bool(taken) and all(f"{package}.{name}" in known for name in taken)


def room(module: str) -> str:
    """The room a module stands in; each part of the analysis is one, and each file at a top is one of its own."""
    parts = module.removeprefix("devmon.").split(".")
    return ".".join(parts[:2]) if parts[0] == "analysis" else parts[0]


def rooms(known: Mapping[str, Path]) -> dict[str, set[str]]:
    """The arrows between rooms. The face of devmon itself, which all may name, is none of them, and that of the
    analysis, whose names resolve when they are used, is only an arrow's end."""
    between: dict[str, set[str]] = {room(name): set() for name in known if name not in ("devmon", "devmon.analysis")}
    for name, path in known.items():
        if room(name) in between:
            targets = {target for target in imports(path) if target in known and target != "devmon"}
            between[room(name)] |= {room(target) for target in targets} & set(between) - {room(name)}
    return between


def floors(between: Mapping[str, set[str]]) -> list[list[str]]:
    """The rooms from the top down, each above all that it imports from and as low as that allows."""
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 1 + max((height(target) for target in between[name]), default=-1)
        return heights[name]

    top = max(map(height, between))
    return [sorted(name for name in between if heights[name] == level) for level in range(top, -1, -1)]


def back_arrows(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports of a module of the analysis from a part that stands right of its own; files at the top stand left."""

    def place(module: str) -> int:
        part = module.removeprefix("devmon.analysis.").split(".")[0]
        return ANALYSIS.index(part) if part in ANALYSIS else -1

    inside = [name for name in graph if name.startswith("devmon.analysis.")]
    return [
        f"{name} imports {target}"
        for name in inside
        for target in sorted(graph[name] & set(inside))
        if place(target) > place(name)
    ]


def lengths() -> dict[str, int]:
    """Lines of every Python file, tests too, by its path."""
    return {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}


def python_files() -> Iterator[Path]:
    """Every Python file of the project, tests and benchmarks too."""
    for folder in (*FOLDERS.values(), "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != "__main__.py" and not any(parent.is_symlink() for parent in path.parents):
                yield path


def comments() -> dict[str, float]:
    """Share of lines that are a comment alone, in each of the NUMERIC rooms."""
    shares = {}
    for name in NUMERIC:
        folder = ROOT / name if name.startswith("analysis") else ROOT / "devmon" / name
        lines = [line.strip() for path in folder.rglob("*.py") for line in path.read_text().splitlines()]
        shares[name] = sum(line.startswith("#") for line in lines) / len(lines)
    return shares


def main() -> None:
    known = modules()
    graph = arrows(known)
    between = rooms(known)
    for name in sorted(between):
        print(f"{name:24} {', '.join(sorted(between[name])) or '–'}")
    levels = [] if circles(between) else floors(between)
    for level in levels:
        print(" ", "   ".join(level))
    print(f"{len(between)} rooms, {len(levels)} floors, {sum(map(len, between.values()))} arrows")
    for group in circles(between):
        print("circle of rooms:", ", ".join(group))
    for group in circles(graph):
        print("circle of files:", ", ".join(group))
    for line in [*back_arrows(graph), *own_faces(known)]:
        print("back arrow:", line)
    sizes = {name: n for name, n in lengths().items() if not name.startswith(("tests", "benchmarks"))}
    longest = max(sizes, key=lambda name: sizes[name])
    print(f"longest file {longest} ({sizes[longest]} lines), median {median(n for n in sizes.values() if n > 1):.0f}")
    print("own-line comments:", ", ".join(f"{name} {share:.1%}" for name, share in comments().items()))


if __name__ == "__main__":
    main()
