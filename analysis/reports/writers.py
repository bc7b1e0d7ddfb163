"""Writes a report's content as HTML, Markdown or JSON. Everything from a run is escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from devmon.analysis.plots.style import EVENT_COLOURS, thin
from devmon.analysis.reports.content import (
    Block,
    Code,
    Columns,
    Content,
    Figure,
    Fold,
    Heading,
    Items,
    Paragraph,
    Prose,
    Terms,
)
from devmon.analysis.reports.svg import share_styles
from devmon.analysis.table import Row, Table

# Values and errors of all series that a page carries: 4 to 8 bytes each, so that with its drawings a page is below
# 5 MB. Of what is more, each series keeps as many steps, evenly spaced; report.json has all of them.
PAGE_NUMBERS = 400_000

OWN = ("page.css",), ("page_steps.js", "page_any.js", "page_arrange.js", "page.js")  # style and script of the page


def as_html(content: Content, *, figures: str | None = None, refresh: int | None = None) -> str:
    """One page with style, script, figures and numbers inside; it loads nothing, and works without the script."""
    environment = Environment(
        loader=PackageLoader("devmon.analysis.reports", "web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    drawn = [figure for section in content.sections for figure in _figures(section.blocks)]
    drawings, rules = share_styles([figure.svg for figure in drawn])
    svgs = {figure.name: svg for figure, svg in zip(drawn, drawings, strict=True)}
    css, js = (
        Markup("".join((files("devmon.analysis.reports") / "web" / name).read_text("utf-8") for name in names))
        for names in OWN
    )
    return environment.get_template("page.html.j2").render(
        content=content,
        numbers=_script_json(_numbers(content)),
        svg=lambda figure: _labelled(svgs[figure.name], figure.caption),
        rules=Markup("\n".join([rules, *(f".{k} {{ fill: {c}; stroke: {c} }}" for k, c in EVENT_COLOURS.items())])),
        refresh=refresh,
        css=css,
        js=js,
    )


def as_markdown(content: Content, *, figures: str | None = None, refresh: int | None = None) -> str:
    """The same words and tables as CommonMark with pipe tables; `figures` is the folder of PNG files to show."""
    lines = [f"# {_md(content.title)}", _md(content.subtitle)]
    for section in content.sections:
        lines.append(f"## {_md(section.title)}")
        for block in section.blocks:
            lines += _block_md(block, figures)
    return "\n\n".join(line for line in lines if line) + "\n"


def as_json(content: Content, *, figures: str | None = None, refresh: int | None = None) -> str:
    """Title, outcome, events and series as numbers, and the sections with each block's kind; without drawings."""
    sections = [
        {"key": section.key, "title": section.title, "blocks": [_block_json(block) for block in section.blocks]}
        for section in content.sections
    ]
    body = {
        "devmon": version("devmon"),
        "title": content.title,
        "subtitle": content.subtitle,
        "outcome": content.outcome,
        "events": content.events,
        "series": content.series,
        "sections": sections,
    }
    return json.dumps(_finite(body), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


WRITERS: dict[str, Callable[..., str]] = {".html": as_html, ".htm": as_html, ".md": as_markdown, ".json": as_json}


def _numbers(content: Content) -> dict[str, Any]:
    """What the page's script needs: every series, the steps they share, events, and where each figure shows what."""
    drawn = {
        figure.name: {"panels": [asdict(panel) for panel in figure.panels], "parts": figure.parts}
        for section in content.sections
        for figure in _figures(section.blocks)
        if figure.panels
    }
    grids: dict[tuple[int, ...], int] = {}
    most = steps_each(content.series)
    kept = [_thinned(each, most) for each in content.series]
    series = [each | {"steps": grids.setdefault(tuple(each["steps"]), len(grids))} for each in kept]
    longest = max((len(each["steps"]) for each in content.series), default=0)
    note = f"Of series of more than {most} steps this page holds {most}, evenly spaced; report.json has all of them."
    events = [
        {
            "series": f"{event['run']}: {event['series']}" if "run" in event else event["series"],
            "kind": event["kind"],
            "step": event["step"],
            "q": event["q_value"],
        }
        | dict(zip(("low", "high"), event["interval"], strict=True))
        for event in content.events
    ]
    numbers = {"grids": list(map(list, grids)), "series": series, "events": events, "figures": drawn}
    return numbers | ({"note": note} if longest > most else {})


def steps_each(series: Sequence[Mapping[str, Any]]) -> int:
    """The most steps of a series that a page holds, so that all together are PAGE_NUMBERS at most.

    >>> steps_each([{"steps": range(2000), "se": None}] * 500)
    800
    """
    wanted = [(len(each["steps"]), 1 if each["se"] is None else 2) for each in series]
    low, high = 2, max((steps for steps, _ in wanted), default=2)
    while low < high:  # the largest number that fits
        middle = (low + high + 1) // 2
        fits = sum(min(steps, middle) * each for steps, each in wanted) <= PAGE_NUMBERS
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _thinned(each: dict[str, Any], most: int) -> dict[str, Any]:
    if len(each["steps"]) <= most:
        return each
    at = thin(len(each["steps"]), most).tolist()
    rejected = set(each["rejected"])
    columns = {key: [each[key][i] for i in at] for key in ("steps", "values", "se") if each[key] is not None}
    return each | columns | {"rejected": [place for place, i in enumerate(at) if i in rejected]}


def _figures(blocks: list[Any]) -> list[Figure]:
    """All figures, in the order of the page."""
    found: list[Figure] = []
    for block in blocks:
        if isinstance(block, Figure):
            found.append(block)
        elif isinstance(block, Fold):
            found += _figures(block.inside)
        elif isinstance(block, Columns):
            found += _figures([*block.left, *block.right])
    return found


def _script_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    form: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    try:
        text = json.dumps(value, **form)
    except ValueError:  # NaN or infinity somewhere: to look for them takes longer than all else
        text = json.dumps(_finite(value), **form)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _labelled(svg: str, caption: str) -> Markup:
    """A drawing with its caption as the label; names within it were escaped when it was drawn."""
    head, rest = svg.split(">", 1)
    return Markup(f'{head} role="img" aria-label="{escape(caption)}">{rest}')


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, lists for tuples."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value


def _block_json(block: Any) -> Any:
    if isinstance(block, Fold):
        return {"block": "fold", "title": block.title, "inside": [_block_json(inner) for inner in block.inside]}
    if isinstance(block, Columns):
        columns = {side: list(map(_block_json, getattr(block, side))) for side in ("left", "right")}
        return {"block": "columns"} | columns
    fields: dict[str, Any] = {"block": block.block} | asdict(block)
    for drawing in ("svg", "panels", "parts", "opened"):
        fields.pop(drawing, None)
    return fields


def _block_md(block: Block, figures: str | None) -> list[str]:
    match block:
        case Paragraph(text, look):
            return [f"**{_md(text)}**" if look == "outcome" else _md(text)]
        case Prose(sentences):
            return [_md(sentence) for sentence in sentences]
        case Heading(text):
            return [f"### {_md(text)}"]
        case Items(items):
            return ["\n".join(f"- {_md(item)}" for item in items)]
        case Terms(pairs, _):
            return ["\n".join(f"- **{_md(term)}**: {_md(meaning)}" for term, meaning in pairs)]
        case Code(text, _):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return [f"{fence}\n{text}\n{fence}"]
        case Table():
            return _table_md(block)
        case Figure():
            image = f"![{_md(block.name)}]({figures}/{block.name}.png)" if figures else ""
            return [image, f"*{_md(block.caption)}*", *(_table_md(block.data) if block.data and not image else [])]
        case Columns(left, right):
            return [line for block in [*left, *right] for line in _block_md(block, figures)]
        case Fold(title, inside):
            return [f"**{_md(title)}**", *(line for block in inside for line in _block_md(block, figures))]


def _table_md(table: Table) -> list[str]:
    if not table.rows:
        return [_md(table.note)]
    rows = [
        list(map(_cell, table.columns)),
        ["---"] * len(table.columns),
        *map(_cells, table.rows),
    ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return ["\n".join(lines), _md(table.note)]


def _cells(row: Row) -> list[str]:
    """The cells of a row; the first of a weak row says that it is weak."""
    first, *rest = map(_cell, row.cells)
    return [first + " (weak)" * row.weak, *rest]


def _cell(text: str) -> str:
    return _md(text).replace("|", "\\|")


def _md(text: str) -> str:
    """Text on one line in which no character is markup. Only what could be markup where it stands is escaped, for some
    readers show the backslash of any other, and people read the file as it is."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"([\\`*])", r"\\\1", text)
    if re.search(r"\][(\[:]|\[[\^ xX]", text):  # a link, a footnote, a task
        text = re.sub(r"([\[\]])", r"\\\1", text)
    for pair in "$~":  # a formula, struck text
        text = text.replace(pair, f"\\{pair}") if text.count(pair) > 1 else text
    text = re.sub(r"&(?=#|\w+;)", "&amp;", text)
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    text = re.sub(r"(?<=\w)(://|@)", "\\1\u200b", text)  # no link of its own making
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)  # no list; before a digit a backslash would be shown
    return re.sub(r"^([#+>\-])", r"\\\1", text)
