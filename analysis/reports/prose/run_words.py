"""What a monitor noted while the run went on, in words: steps left out, alarms, points added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from devmon.analysis.wording import NAMED, some


def skipped(attrs: Mapping[str, Any]) -> str:
    """What a monitor left out to keep its share of the time, in one line; empty where it left out nothing.

    >>> skipped({"skipped": {"llc": [50, 75, 100], "lens": [75], "loss": []}})
    'llc at 3 steps (50 to 100), lens at 1 step (75)'
    """
    return steps_of(attrs.get("skipped"))


def steps_of(by_watch: Any) -> str:
    """How many steps each watch has, and from where to where; empty where there are none."""
    held = {name: steps for name, steps in by_watch.items() if steps} if isinstance(by_watch, Mapping) else {}
    return ", ".join(
        f"{name} at {len(steps)} step{'s' * (len(steps) > 1)} ({min(steps)}{f' to {max(steps)}' * (len(steps) > 1)})"
        for name, steps in held.items()
    )


def one_set_of_weights(groups: Sequence[Sequence[int]]) -> str:
    """What is to be said of steps that share their weights (`devmon.analysis.run.same_weights`); empty where none do.

    >>> one_set_of_weights([[0, 1], [512, 1000, 2000, 3000, 4000]])
    'steps 0 and 1 have one set of weights, and so do steps 512, 1000, 2000 and 2 more'
    >>> one_set_of_weights([])
    ''
    """
    words = [f"steps {some([str(step) for step in group])}" for group in groups]
    if not words:
        return ""
    more = f"; and so do {len(words) - NAMED} more groups of steps" if len(words) > NAMED else ""
    return f"{words[0]} have one set of weights" + "".join(f", and so do {w}" for w in words[1:NAMED]) + more


def weights_within(groups: Sequence[Sequence[int]], start: float, end: float, measured: Sequence[int]) -> str:
    """What is to be said of a change between `start` and `end` that may be of the files alone: the groups that reach
    into it, or stand at the measured steps beside it; empty where none do."""
    low = max((step for step in measured if step <= start), default=start)
    high = min((step for step in measured if step >= end), default=end)
    touched = [group for group in groups if any(low <= step <= high for step in group)]
    return one_set_of_weights(touched)


def alarms(attrs: Mapping[str, Any]) -> list[str]:
    """What the alarms during training were, a line each, and where they added points.

    >>> alarm = {"series": "a/b", "kind": "jump", "step": 99.6, "low": 90, "high": 110.2, "p_value": 0.0004,
    ...          "raised_at": 120, "status": "settled", "ended_at": 230}
    >>> for line in alarms({"alarms": [alarm], "densified": {"a": [126, 133]}}):
    ...     print(line)
    alarm at step 120 of a jump of a/b near step 100 (90 to 110), p = 0.0004: settled at step 230
    measured only because an alarm was up: a at 2 steps (126 to 133)
    """
    lines = []
    for alarm in attrs.get("alarms") or ():
        what = f"alarm at step {alarm['raised_at']} of a {alarm['kind']} of {alarm['series']}"
        where = f"near step {alarm['step']:.0f} ({alarm['low']:.0f} to {alarm['high']:.0f})"
        ended = "" if alarm["ended_at"] is None else f" at step {alarm['ended_at']}"
        lines.append(f"{what} {where}, p = {alarm['p_value']:.2g}: {alarm['status']}{ended}")
    for found in attrs.get("precursors") or ():
        where = (
            f"precursor of a loss spike at step {found['step']}: the gradient of {found['part']} is {found['rms']:.1f}"
        )
        lines.append(f"{where} times the root of its second moments (above {found['limit']:.1f})")
    if densified := steps_of(attrs.get("densified")):
        lines.append(f"measured only because an alarm was up: {densified}")
    return lines
