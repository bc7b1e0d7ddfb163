"""Whether two declarations of a watch say the same in other words: numbers, and functions that were moved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# In the text of a field: a quoted string, which stays, or a number.
NUMBER = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])")
PARTIAL = "functools.partial"  # how partial functions were described once, whatever they hold


def said_otherwise(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]] | None:
    """The fields of two identities that differ in words alone, with both texts; None where they differ in more, or
    where no field differs.

    The same number is 100 and 100.0. A function or class of the same name and the same code (`code` of both) is one,
    whatever module it lies in.
    """
    old = dict(stored.get("fields", {})) | {"instrument": stored.get("instrument")}
    new = dict(now["fields"]) | {"instrument": now["instrument"]}
    if old.keys() != new.keys():
        return None
    codes = [dict(each.get("code", {})) for each in (stored, now)]
    differ = {key: [str(old[key]), str(new[key])] for key in old if old[key] != new[key]}
    for texts in differ.values():
        plain = [_plain(text, code) for text, code in zip(texts, codes, strict=True)]
        earlier = texts[0] == PARTIAL and texts[1].startswith(f"{PARTIAL}(")
        if plain[0] != plain[1] and not earlier:
            return None
    return differ or None  # other fingerprints of the same words are of something that no field tells


def another_layout(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str | None] | None:
    """The layouts (`devmon.anatomy.Layout`) of two identities that differ in nothing else, None for the model's own;
    None where they differ in more, or not in that."""
    if stored.get("instrument") != now["instrument"]:
        return None
    old, new = dict(stored.get("fields", {})), dict(now["fields"])
    layouts = [fields.pop("layout", "None") for fields in (old, new)]
    if old != new or layouts[0] == layouts[1]:
        return None
    return [None if layout == "None" else layout for layout in layouts]


def _plain(text: str, code: Mapping[str, str]) -> str:
    """The text with functions by name and code, and whole numbers as integers.

    >>> _plain("{'n': 100.0, 'name': '1.0', 'loss': mine.losses.cross}", {"mine.losses.cross": "ab12"})
    "{'n': 100, 'name': '1.0', 'loss': cross#ab12}"
    """
    for name in sorted(code, key=len, reverse=True):
        last = name.rpartition(".")[2]
        text = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", f"{last}#{code[name]}", text)
    return NUMBER.sub(lambda match: _whole(match[0]), text)


def _whole(number: str) -> str:
    if number[0] in "'\"":
        return number
    is_float = "." in number or "e" in number
    return str(int(float(number))) if is_float and float(number).is_integer() else number
