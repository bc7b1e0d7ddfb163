"""Which steps of a series: `all`, `log:40`, `every:100`, `0,10,20`, `100-500`, and several of these with commas."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from devmon.errors import DataError

EXPECTED = "expected all, log:40, every:100, single steps, ranges such as 100-500 or 100-, or several with commas"


def select(steps: Sequence[int], text: str = "all") -> list[int]:
    """The steps that `text` chooses from `steps` (ascending), in order.

    `log:n` is the first step, the last, and those nearest to n steps spaced evenly in log(step); `every:n` the
    multiples of n; of a range both ends are included. Raises DataError for a text of another form, a single step that
    is not there, and a part that chooses none.

    >>> held = [0, 1, 2, 4, 8, 16, 100, 200, 300]
    >>> select(held, "log:3"), select(held, "every:100"), select(held, "1,4-16,300")
    ([0, 1, 16, 300], [0, 100, 200, 300], [1, 4, 8, 16, 300])
    """
    chosen: set[int] = set()
    for part in text.split(","):
        of_part = _part(steps, part.strip())
        if not of_part:
            raise DataError(f"the steps {part.strip()!r} choose none of {_shown(steps)}")
        chosen |= of_part
    return sorted(chosen)


def _part(steps: Sequence[int], part: str) -> set[int]:
    if part == "all":
        return set(steps)
    if (match := re.fullmatch(r"(log|every):(\d+)", part)) and int(match[2]) > 0:
        return _log(steps, int(match[2])) if match[1] == "log" else {s for s in steps if s % int(match[2]) == 0}
    if match := re.fullmatch(r"(\d+)-(\d*)", part):
        return {s for s in steps if int(match[1]) <= s <= (int(match[2]) if match[2] else steps[-1])}
    if not part.isdecimal():
        raise DataError(f"the steps {part!r} cannot be read: {EXPECTED}")
    if int(part) not in steps:
        raise DataError(f"there is no checkpoint of step {part}: the series has {_shown(steps)}")
    return {int(part)}


def _log(steps: Sequence[int], count: int) -> set[int]:
    positive = [step for step in steps if step > 0]
    chosen = {steps[0]} if steps else set()
    if positive:
        first, last = math.log(positive[0]), math.log(positive[-1])
        for i in range(count):
            target = last if count == 1 else first + (last - first) * i / (count - 1)
            chosen.add(min(positive, key=lambda step: abs(math.log(step) - target)))
    return chosen


def _shown(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:8]))
    return shown if len(steps) <= 8 else f"{shown}, … {steps[-1]} ({len(steps)} steps)"
