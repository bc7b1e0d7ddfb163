"""Numbers, steps and lists as a reader meets them, in a table, a sentence or the axis of a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

NAMED = 3  # items named in a sentence before "and 4 more"


def number(value: float | None, digits: int = 3) -> str:
    """A number for readers: three significant digits, a true minus sign, a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def measured(value: float, se: float | None, *, error: bool = True, sign: bool = False) -> str:
    """A value to the digits that its standard error carries (two of an error that begins with 1), with the error.

    >>> measured(-1.1081, 0.0231), measured(34.2, 5.13), measured(0.8149, 0.0012, error=False), measured(2.5, None)
    ('−1.11 ± 0.02', '34 ± 5', '0.8149', '2.5')
    """
    plus = "+" if sign and value > 0 else ""
    if se is None or not math.isfinite(se) or se <= 0 or not math.isfinite(value):
        return plus + number(value)
    places = -math.floor(math.log10(se))
    places += int(f"{se:.6e}"[0] == "1")
    if abs(places) > 6:
        return plus + number(value) + (f" ± {number(se, 2)}" if error else "")
    words = [f"{round(x, places):.{max(places, 0)}f}".replace("-", "−") for x in (value, se)]
    return plus + (" ± ".join(words) if error else words[0])


def step(value: float) -> str:
    """A step for readers: no decimals, a true minus sign."""
    return f"{value:.0f}".replace("-", "−")


def interval_text(interval: tuple[float, float], words: Callable[[float], str]) -> str:
    """Both ends in brackets, each as `words` (`step` or `number`) writes it."""
    return f"[{words(interval[0])}, {words(interval[1])}]"


def probability(p: float) -> str:
    """A probability to two decimals; one above 0.99 is said to be so."""
    return "> 0.99" if p > 0.99 else f"{p:.2f}"


def count(n: int, singular: str, plural: str = "") -> str:
    """A number of things.

    >>> count(1, "event"), count(2, "event"), count(2, "series", "series")
    ('1 event', '2 events', '2 series')
    """
    return f"{n} {singular if n == 1 else plural or singular + 's'}"


def listed(items: Iterable[str], *, last: bool = True) -> str:
    """Items in a sentence, parted by semicolons where one holds a comma; with `last`, "and" stands before the last."""
    items = list(items)
    mark = "; " if any(", " in item for item in items) else ", "
    return mark.join(items) if len(items) < 2 or not last else f"{mark.join(items[:-1])} and {items[-1]}"


def some(items: Sequence[str]) -> str:
    """The first NAMED items in a sentence, and how many more there are."""
    more = len(items) - NAMED
    return listed(items) if more <= 0 else f"{listed(items[:NAMED], last=False)} and {more} more"
