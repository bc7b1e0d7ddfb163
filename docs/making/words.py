"""Docstrings as Markdown: plain text in which only `code`, lists and indented blocks are marked."""

from __future__ import annotations

import re

CODE = re.compile(r"(`+[^`]*`+)")


def escaped(text: str) -> str:
    """Text outside of `code` with what Markdown would take for marks (`*`, `_`, brackets, `<`) as it stands."""
    parts = CODE.split(text)
    parts[::2] = [re.sub(r"([*_\[\]<>~|#])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def docstring(text: str) -> str:
    """Paragraphs and bullets of a docstring; indented blocks and doctests become blocks of code."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.splitlines()
        if all(line.startswith("    ") for line in lines):
            blocks.append("\n".join(["```text", *(line[4:] for line in lines), "```"]))
        elif lines[0].startswith(">>>"):
            blocks.append("\n".join(["```pycon", *lines, "```"]))
        else:
            blocks.append(bullets(lines))
    return "\n\n".join(blocks)


def bullets(lines: list[str]) -> str:
    """A paragraph with the bullets that follow it, each set apart by an empty line before the first."""
    out: list[str] = []
    inside = False
    for line in lines:
        begins = line.startswith("- ")
        if begins and not inside and out:
            out.append("")
        if inside and not begins and not line.startswith(" "):
            out.append("")
        inside = begins or (inside and line.startswith(" "))
        text = escaped(line[2:].strip() if begins else line.strip())
        out.append(f"- {text}" if begins else f"  {text}" if inside else text)
    return "\n".join(out)


def cell(text: str) -> str:
    """Text in a cell of a table; `code` with a bar in it is escaped too."""
    return " ".join(escaped(text).split()).replace("\\|", "&#124;").replace("|", "&#124;")


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are Markdown already; none where there are no rows."""
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
