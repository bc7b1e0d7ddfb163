"""Every command that the pages print is one of `devmon`, with options that it has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from devmon.cli import app
from devmon.recipes.language_model import app as demo

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def printed(page: Path) -> list[str]:
    """Lines of blocks without a language, and `code` in a line, that call devmon; comments and line ends left out."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(devmon [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    called = [re.sub(r"\s#.*|;.*", "", line).strip() for line in [*lines, *inline]]
    return [" ".join(line.split()) for line in called if line.startswith("devmon ")]


def options(command: Any) -> set[str]:
    return {name for given in command.params for name in (*given.opts, *given.secondary_opts)}


CALLS = [(page.name, call) for page in PAGES for call in printed(page)]


def test_there_are_calls_to_check() -> None:
    assert len(CALLS) > 40


@pytest.mark.parametrize("page, call", CALLS)
def test_a_printed_call_is_of_a_command_that_takes_it(page: str, call: str) -> None:
    group: Any = typer.main.get_command(app)
    _, *words = shlex.split(call.replace("…", ""))
    if words[0] in ("COMMAND", "--help"):
        return
    assert words[0] in group.commands, f"{page}: no command {words[0]}"
    known = options(typer.main.get_command(demo) if words[0] == "demo" else group.commands[words[0]]) | {"--help"}
    asked = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
    assert asked <= known, f"{page}: {call}"
