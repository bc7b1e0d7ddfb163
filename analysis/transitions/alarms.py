"""`provisional(run)`: alarms while a run is still measured, with a false-alarm rate for the run as a whole.

Each run-level series is looked at when its count of accepted points first reaches one of the sizes in `Looks`, a
schedule that is fixed beforehand, and each look sees exactly that many points. An event raises an alarm where its
p-value is at most

    alpha / (number of looks * number of series)

(Bonferroni over looks and series), so a run without events has an alarm with probability alpha at most as far as the
detector's p-values hold. The p-value of a jump or a bump is the larger of its two: an alarm is for what is there and
abrupt. Points that were measured because of an alarm (`attrs["densified"]`) are left out of the looks:
when a point is looked at never depends on the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from devmon.analysis.detection.constants import LEAST
from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event, meet
from devmon.analysis.detection.search import detect
from devmon.analysis.series import Series, run_level
from devmon.analysis.wording import step
from devmon.errors import DataError

LATELY = 2.0  # an event is near the end while the last step is at most this many times the end of its extent


@dataclass(frozen=True)
class Looks:
    """The counts of points at which a series is looked at: `first`, then each `growth` times the one before, `count` in
    all. There is none later: the defaults reach from 12 to 299 points.

    >>> Looks(12, 1.5, 4).sizes
    (12, 18, 27, 41)
    """

    first: int = 12
    growth: float = 1.15
    count: int = 24

    def __post_init__(self) -> None:
        if self.first < 8 or self.growth <= 1 or self.count < 1:
            raise DataError(f"looks need first >= 8, growth > 1 and count >= 1, got {self}")

    @property
    def sizes(self) -> tuple[int, ...]:
        sizes = [self.first]
        for k in range(1, self.count):
            sizes.append(max(int(np.ceil(self.first * self.growth**k)), sizes[-1] + 1))
        return tuple(sizes)


@dataclass(frozen=True)
class Alarm:
    """An event that began lately, as the last look saw it. `low` and `high` bound its extent: interval and t10-t90
    span.

    `p_value` is that of the look that raised it, at step `raised_at`. `status` is "up"; "withdrawn" where a later
    look no longer found it; "settled" once training had passed `high` by a factor LATELY. `ended_at` is the step of
    the latter two.
    """

    series: str
    kind: str
    step: float
    low: float
    high: float
    p_value: float
    raised_at: int
    status: str = "up"
    ended_at: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def in_words(self) -> str:
        """What is up, where, and since when; or how it ended.

        >>> Alarm("loss/loss", "jump", 512.0, 480.0, 540.0, 1e-4, 640).in_words()
        'loss/loss has a jump at step 512 [480, 540], raised at step 640 (provisional)'
        """
        place = f"{self.series} has a {self.kind} at step {step(self.step)} [{step(self.low)}, {step(self.high)}]"
        ended = "provisional" if self.status == "up" else f"{self.status} at step {self.ended_at}"
        return f"{place}, raised at step {self.raised_at} ({ended})"


@dataclass(frozen=True)
class Provisional:
    """What has been seen of a run: its alarms in the order they were raised, and the count of points looked at, by
    series."""

    alarms: tuple[Alarm, ...] = ()
    seen: Mapping[str, int] = field(default_factory=dict)

    @property
    def up(self) -> tuple[Alarm, ...]:
        return tuple(alarm for alarm in self.alarms if alarm.status == "up")


def provisional(run: Any, detector: Detector | None = None, looks: Looks | None = None, *, alpha: float = 0.05,
                series: Iterable[str] | None = None, before: Provisional | None = None) -> Provisional:  # fmt: skip
    """The alarms of what is measured so far of a trajectory, or of a list of Series.

    `series` names those that are followed (all run-level ones: scalars and maxima). By default jumps and bumps are
    sought; a detector of one's own may seek turns too. With `before`, the result for fewer points, only the looks since
    are made: the alarms are those of looking from the start.

    Raises DataError for an unknown series, and where alpha shared by so many looks and series is less than any p-value
    that the detector can show.
    """
    detector = Detector(kinds=("jump", "bump")) if detector is None else detector
    looks, before = looks or Looks(), before or Provisional()
    followed = _followed(run, series)
    if not followed:
        return before
    share = alpha / (looks.count * len(followed))
    if share < LEAST:
        raise DataError(
            f"alpha={alpha} over {looks.count} looks and {len(followed)} series is {share:.2g} a test, and no p-value "
            f"is below {LEAST:.2g}: follow at most {int(alpha / looks.count / LEAST)} series (series=...)"
        )
    alarms: dict[str, list[Alarm]] = {one.name: [a for a in before.alarms if a.series == one.name] for one in followed}
    seen = dict(before.seen)
    for size in looks.sizes:
        due = [one for one in followed if seen.get(one.name, 0) < size <= len(one.steps)]
        if not due:
            continue
        found = detect([one.where(np.arange(len(one.steps)) < size) for one in due], detector).events
        for one in due:
            events = [event for event in found if event.series == one.name and _chance(event) <= share]
            alarms[one.name] = _looked(_settled(alarms[one.name], one.steps[:size]), events, int(one.steps[size - 1]))
            seen[one.name] = size
    told = [alarm for one in followed for alarm in _settled(alarms[one.name], one.steps)]
    return Provisional(tuple(sorted(told, key=lambda alarm: (alarm.raised_at, alarm.series, alarm.step))), seen)


def _chance(event: Event) -> float:
    return max(event.p_value, event.p_abrupt or 0.0)


def _followed(run: Any, names: Iterable[str] | None) -> list[Series]:
    """The accepted points of each series that is followed."""
    if hasattr(run, "names"):
        from devmon.analysis.derive.watch_series import series_of

        run = series_of(run, scheduled_only=True)
    known: dict[str, Series] = {one.name: one for one in run}
    chosen = list(known) if names is None else list(names)
    if unknown := [name for name in chosen if name not in known]:
        raise DataError(f"the run has no series {unknown[0]!r}; it has {', '.join(filter(run_level, known))}")
    return [known[name].where(known[name].good) for name in chosen if names is not None or run_level(name)]


def _settled(alarms: Sequence[Alarm], steps: Any) -> list[Alarm]:
    """The alarms, those ended that training has moved past."""
    found = []
    for alarm in alarms:
        past = steps[steps > LATELY * max(alarm.high, 1.0)]
        ends = alarm.status == "up" and len(past) > 0
        found.append(replace(alarm, status="settled", ended_at=int(past[0])) if ends else alarm)
    return found


def _looked(alarms: Sequence[Alarm], events: Sequence[Event], last: int) -> list[Alarm]:
    """The alarms of a series after a look at the points up to step `last`, which found `events`."""
    found = []
    left = list(events)
    for alarm in alarms:
        if alarm.status == "up":
            same = [event for event in left if meet(event.extent, (alarm.low, alarm.high))]
            if same:
                event = min(same, key=_chance)
                low, high = event.extent
                left = [event for event in left if event not in same]
                alarm = replace(alarm, kind=event.kind, step=event.step, low=low, high=high)
            else:
                alarm = replace(alarm, status="withdrawn", ended_at=last)
        found.append(alarm)
    for event in left:
        low, high = event.extent
        known = any(alarm.status == "settled" and meet((low, high), (alarm.low, alarm.high)) for alarm in alarms)
        if last <= LATELY * max(high, 1.0) and not known:
            found.append(Alarm(event.series, event.kind, event.step, low, high, _chance(event), last))
    return found
