"""The hook of `mkdocs build`: pages that are made of docstrings, benchmarks and files of the project's root.

Pages of `docs/` may hold two marks, each a line of its own: `<!-- made: glossary -->` (or `benchmarks`), and
`<!-- README: Title -->`, in whose place stands that section of the README.
"""

# ruff: noqa: E402 (what is imported lies beside this file)

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]  # the files beside this one, and devmon as it lies here

import gallery
import instruments
import notebooks
import reference
import results
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from words import escaped

from devmon.analysis.reports.glossary import GLOSSARY

OUTSIDE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "recipes.md": "recipes/README.md"}
MARK = re.compile(r"^<!-- (made|README): (.+) -->$", re.MULTILINE)


def within(text: str) -> str:
    """Text of the root with its links as they are from `docs/`."""
    for page, path in OUTSIDE.items():
        text = text.replace(f"]({path})", f"]({page})")
    return text.replace("](docs/", "](")


def section(title: str) -> str:
    """A section of the README without its heading. Raises KeyError where there is none of this title."""
    level, body = "", []
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        heading = re.match(r"(#+) (.+)$", line)
        if level and heading and len(heading[1]) <= len(level):
            break
        if level:
            body.append(line)
        elif heading and heading[2] == title:
            level = heading[1]
    if not level:
        raise KeyError(f"README.md has no section {title!r}")
    return within("\n".join(body)).strip()


def glossary() -> str:
    return "\n\n".join(f"**{escaped(term)}**\n:   {escaped(meaning)}" for term, meaning in GLOSSARY)


MADE = {"glossary": glossary, "benchmarks": results.results}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The pages of instruments take their place among the others, in their groups."""
    parts: list[Any] = ["instruments/index.md"]
    for title, names in instruments.groups().items():
        parts.append({title[0].upper() + title[1:]: [f"instruments/{name}.md" for name in names]})
    for item in config.nav or []:
        if "Instruments" in item:
            item["Instruments"] = parts
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is made. Every instrument is measured here, which takes most of the time."""
    made = {page: within((ROOT / path).read_text(encoding="utf-8")) for page, path in OUTSIDE.items()}
    made |= dict(instruments.files(gallery.gallery()))
    made |= dict(reference.files())
    made |= dict(notebooks.files())
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return MARK.sub(lambda mark: MADE[mark[2]]() if mark[1] == "made" else section(mark[2]), markdown)
