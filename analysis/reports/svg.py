"""SVG as matplotlib writes it, made small enough that a page can hold many: the same picture in half the bytes."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

KEPT_IDS = re.compile(
    r"axes_\d+|layer-\d+(-band|-control)?|run-\d+-\d+|at-step-\d+"
)  # ids that a page's script asks for


def compact(svg: str, prefix: str) -> str:
    """One line, without prologue and time of drawing; numbers to a hundredth of a point, ids short and with a prefix.

    Ids that nothing refers to go, except those of `KEPT_IDS`; a tick of the axis of steps becomes `class="xtick"`.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<=data:image/png;base64,)[^"]*', lambda match: _palette(match[0]), svg)
    svg = re.sub(r'\bd="[^"]*"', lambda match: _path(match[0]), svg)
    svg = re.sub(r'\b(x|y)="(-?\d+\.\d\d)\d+"', r'\1="\2"', svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", svg)
    svg = re.sub(r">\s+<", "><", svg)
    used = dict.fromkeys(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    short = {name: f"{prefix}{i:x}" for i, name in enumerate(a or b for a, b in used)}

    def renamed(match: re.Match[str]) -> str:
        name = match[1]
        if name in short:
            return f' id="{short[name]}"'
        if name.startswith("xtick_"):
            return ' class="xtick"'
        return f' id="{prefix}-{name}"' if KEPT_IDS.fullmatch(name) else ""

    svg = re.sub(r'\sid="([^"]*)"', renamed, svg)
    svg = re.sub(r'href="#([^"]+)"', lambda match: f'href="#{short[match[1]]}"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", lambda match: f"url(#{short[match[1]]})", svg)
    head, rest = svg.split(">", 1)
    return re.sub(r'\s(width|height)="[^"]*"', "", head) + ">" + rest


def share_styles(drawings: Sequence[str]) -> tuple[list[str], str]:
    """The drawings with every style that occurs twice or more as a class, and the style sheet of these classes."""
    style = re.compile(r'\sstyle="([^"]*)"')
    counts = Counter(look for svg in drawings for look in style.findall(svg))
    names = {look: f"s{i:x}" for i, (look, n) in enumerate(counts.most_common()) if n > 1 and "url(" not in look}

    def classed(match: re.Match[str]) -> str:
        return f' class="{names[match[1]]}"' if match[1] in names else match[0]

    rules = "\n".join(f".{name} {{ {look} }}" for look, name in names.items())
    return [style.sub(classed, svg) for svg in drawings], rules


def _palette(text: str) -> str:
    """The same picture, a PNG in base64, with a palette if it has at most 256 colours and is the shorter for it."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(np.int32)
    colours, where = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1], np.int32), return_inverse=True)
    if len(colours) > 256:
        return text
    image = Image.fromarray(where.reshape(pixels.shape[:2]).astype(np.uint8))
    image.putpalette(np.column_stack([colours >> 16, colours >> 8 & 255, colours & 255]).astype(np.uint8).tobytes())
    written = io.BytesIO()
    image.save(written, "png", optimize=True)
    return min(base64.b64encode(written.getvalue()).decode(), text, key=len)


def _path(text: str) -> str:
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)
    text = re.sub(r"\s+", " ", text)
    return re.sub(r' ?([MLCQZz"]) ?', r"\1", text)
