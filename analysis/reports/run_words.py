"""What a monitor noted while the run went on, in words: steps left out, alarms, points added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def skipped(attrs: Mapping[str, Any]) -> str:
    """What a monitor left out to keep its share of the time, in one line; empty where it left out nothing.

    >>> skipped({"skipped": {"llc": [50, 75, 100], "lens": [75], "loss": []}})
    'llc at 3 steps (50 to 100), lens at 1 step (75)'
    """
    return steps_of(attrs.get("skipped"))


def steps_of(by_watch: Any) -> str:
    """How many steps each watch has, and from where to where; empty where there are none."""
    found = {name: steps for name, steps in by_watch.items() if steps} if isinstance(by_watch, Mapping) else {}
    return ", ".join(
        f"{name} at {len(steps)} step{'s' * (len(steps) > 1)} ({min(steps)}{f' to {max(steps)}' * (len(steps) > 1)})"
        for name, steps in found.items()
    )


def alarms(attrs: Mapping[str, Any]) -> list[str]:
    """What the alarms during training were, a line each, and where they added points.

    >>> alarms({"alarms": [{"series": "a/b", "kind": "jump", "step": 99.6, "low": 90, "high": 110.2, "p_value": 0.0004,
    ...                     "raised_at": 120, "status": "settled", "ended_at": 230}], "densified": {"a": [126, 133]}})
    ['alarm at step 120 of a jump of a/b near step 100 (90 to 110), p = 0.0004: settled at step 230', 'measured only because an alarm was up: a at 2 steps (126 to 133)']
    """
    told = []
    for one in attrs.get("alarms") or ():
        ended = "" if one["ended_at"] is None else f" at step {one['ended_at']}"
        told.append(f"alarm at step {one['raised_at']} of a {one['kind']} of {one['series']} near step {one['step']:.0f} "
                    f"({one['low']:.0f} to {one['high']:.0f}), p = {one['p_value']:.2g}: {one['status']}{ended}")  # fmt: skip
    if densified := steps_of(attrs.get("densified")):
        told.append(f"measured only because an alarm was up: {densified}")
    return told
