"""What happened in a run, in plain sentences made from the numbers, and what argues against them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from devmon.analysis.detection.events import Event
from devmon.analysis.detection.results import Detection
from devmon.analysis.series import Series, run_level
from devmon.analysis.transitions.order import lags, main_event
from devmon.analysis.transitions.stages import Transition, transitions
from devmon.analysis.wording import NAMED, count, listed, number, probability, some, step

REMEDIES = {  # where every estimate is rejected, by the commonest reason
    "negative": "At these weights the loss still falls: measure later checkpoints, or raise gamma (devmon calibrate).",
    "diverged": "The chains run away: lower lr or raise gamma (devmon calibrate finds both).",
    "non-finite": "The chains meet NaN or infinity: lower lr (devmon calibrate finds it).",
    "not mixed": "The chains disagree: take more draws and chains, or another lr (devmon calibrate finds it).",
}


@dataclass(frozen=True)
class Story:
    """`outcome` EVENTS, NO EVENT, UNRESOLVED or SAMPLER REJECTED; sentences; and what argues against them."""

    outcome: str
    happened: list[str]
    against: list[str]


def tell(
    series: Sequence[Series],
    detection: Detection,
    verdicts: Mapping[str, np.ndarray],
    *,
    control: bool,
    beside: Sequence[Sequence[str]] = (),
) -> Story:
    """The story of a run. `verdicts` holds, for each LLC watch, the verdict at every step; `beside`, for each
    transition in order, further sentences about it."""
    found = transitions(detection.events)
    outcome = detection.outcome
    happened = ["This run is marked as a control, in which no transition is expected."] if control else []
    if found:
        happened += _what_happened(series, detection, found, beside)
    elif outcome == "EVENTS":
        sure = sorted((e for e in detection.events if e.sure), key=lambda e: (not run_level(e.series), e.step))
        happened.append(
            f"No transition of the run, but {count(len(sure), 'event')}: {some(list(map(Event.in_words, sure)))}."
        )
    elif outcome == "NO EVENT":
        fits = [fit for fit in detection.fits.values() if fit.outcome in ("EVENTS", "NO EVENT")]
        left = (
            f" ({len(detection.fits) - len(fits)} more could not be searched)"
            if len(fits) < len(detection.fits)
            else ""
        )
        searched = f"{count(len(fits), 'series', 'series')}{left} and {detection.family} tests"
        happened.append(
            f"NO EVENT: in {searched} nothing stands out from smooth drift with correlated noise "
            "(q ≤ 0.05). This is a result: what changed, changed smoothly."
        )
    elif outcome == "SAMPLER REJECTED":
        happened.append(
            "SAMPLER REJECTED: no LLC estimate passed its health check, so nothing can be said of transitions."
        )
    else:
        happened.append("UNRESOLVED: no series has enough checkpoints to tell a transition from noise.")
    happened += [_rejected_in_words(name, v) for name, v in verdicts.items() if len(v) and not (v == "ok").any()]
    return Story(outcome, happened, _against(series, detection, verdicts))


def _what_happened(
    series: Sequence[Series], detection: Detection, found: Sequence[Transition], beside: Sequence[Sequence[str]]
) -> list[str]:
    last = max(int(one.steps[-1]) for one in series if len(one.steps))
    first = min(int(one.steps[0]) for one in series if len(one.steps))
    where = f", at about steps {', '.join(step(one.step) for one in found)}" if len(found) > 1 else ""
    told = [f"Between steps {first} and {last} the run went through {count(len(found), 'transition')}{where}."]
    for i, one in enumerate(found, 1):
        order = sorted(one.events, key=lambda event: (event.p_value, event.q_value or 0, -_relative(event, series)))
        more = len(order) - NAMED
        rest = f"; {more} more series jump with {'it' if len(found) == 1 else 'them'}" if more > 0 else ""
        which = "It" if len(found) == 1 else f"Transition {i}"
        wide = sum(event.wide for event in one.events)
        but = f" but for {count(wide, 'wide one')}" if 0 < wide < len(one.events) else ""
        told.append(
            f"{which} happened at about step {step(one.step)} (90% intervals of its jumps{but} "
            f"within {step(one.interval[0])}–{step(one.interval[1])}; 10% to 90% of the change within "
            f"{step(one.span[0])}–{step(one.span[1])}): {listed(map(Event.in_words, order[:NAMED]), last=not rest)}{rest}."
        )
        told[-1] = " ".join([told[-1], *(beside[i - 1] if i <= len(beside) else ())])
    turns = [e for e in detection.events if e.kind != "jump" and e.sure and run_level(e.series)]
    if turns:
        others = f" and {len(turns) - 2 * NAMED} more in the table" if len(turns) > 2 * NAMED else ""
        told.append(
            f"Beside the jumps, {listed(list(map(Event.in_words, turns[: 2 * NAMED])), last=not others)}{others}."
        )
    return told + _order(detection)


def _order(detection: Detection) -> list[str]:
    main = main_event(detection.events)
    rows = [row for row in lags(detection) if run_level(row.event.series)]
    if main is None or not rows:
        return []
    told = [f"Against the jump of {main.series}:"]
    settled = [row for row in rows if row.settled]
    for row in sorted(settled, key=lambda row: -abs(row.steps))[: 2 * NAMED]:
        low, high = sorted((abs(row.interval[0]), abs(row.interval[1])))
        way, p = ("before", row.first) if row.steps < 0 else ("after", 1 - row.first)
        told.append(
            f"the {row.event.kind} of {row.event.series} came {step(abs(row.steps))} steps {way} it "
            f"[{step(low)}, {step(high)}] (probability {probability(p)});"
        )
    if len(settled) > 2 * NAMED:
        told.append(f"{len(settled) - 2 * NAMED} more are in the table;")
    open_ = [f"{row.event.series} ({row.event.kind})" for row in rows if not row.settled]
    if open_:
        told.append(
            f"the order is not settled for {listed(open_[: 2 * NAMED])}{' and others' * (len(open_) > 2 * NAMED)};"
        )
    return [" ".join(told)[:-1] + "."]


def _against(series: Sequence[Series], detection: Detection, verdicts: Mapping[str, np.ndarray]) -> list[str]:
    said = []
    weak = [event for event in detection.events if not event.sure]
    if weak:
        said.append(
            f"{count(len(weak), 'event')} found in a single series {'does' if len(weak) == 1 else 'do'} not stand "
            f"among {detection.family} series (q > 0.05): {some(list(map(Event.in_words, weak)))}."
        )
    sure = [event for event in detection.events if event.sure]
    unresolved = [event for event in sure if not event.resolved]
    if unresolved:
        notes = [f"{event.series} ({event.note or 'too few checkpoints'})" for event in unresolved]
        said.append(f"{len(unresolved)} of {count(len(sure), 'event')} not resolved in time: {some(notes)}.")
    wide = [e for e in sure if run_level(e.series) and e.wide]
    if wide:
        said.append(
            f"{count(len(wide), 'event')} with a wide interval (a factor above 2): {some(list(map(Event.in_words, wide)))}."
        )
    said += [_rejected_in_words(name, verdict) for name, verdict in verdicts.items() if len(set(verdict == "ok")) == 2]
    for one in series:
        if one.rejected is not None and one.name.rpartition("/")[0] not in verdicts and np.any(one.rejected):
            said.append(
                f"{one.name}: {int(np.sum(one.rejected))} of {len(one.steps)} values are infinite and not used."
            )
    level = {name: fit for name, fit in detection.fits.items() if run_level(name)}
    stands = {event.series for event in sure}
    silent = [name for name in level if name not in stands]
    if silent and sure:
        said.append(f"{len(silent)} of {len(level)} run-level series show no event that stands: {some(silent)}.")
    few = [name for name, fit in level.items() if fit.outcome == "UNRESOLVED"]
    if few:
        said.append(f"Too few checkpoints to say anything of {some(few)}.")
    if (nulls := int(detection.settings.get("n_null", 0))) and detection.family:
        said.append(
            f"p-values below {number(1 / (1 + nulls))} are extrapolated from the largest of {nulls} simulated nulls; "
            "intervals and p-values are about noise within this one run and say nothing of other seeds."
        )
    return said


def _rejected_in_words(name: str, verdicts: np.ndarray) -> str:
    bad = verdicts[verdicts != "ok"]
    kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(bad.tolist()).most_common())
    share = f"{len(bad)} of {len(verdicts)}" if len(bad) < len(verdicts) else f"all {len(verdicts)}"
    remedy = (
        f" {REMEDIES[worst]}"
        if len(bad) == len(verdicts) and (worst := Counter(bad.tolist()).most_common(1)[0][0]) in REMEDIES
        else ""
    )
    return f"{name}: {share} LLC estimates are rejected ({kinds}) and not used.{remedy}"


def _relative(event: Event, series: Sequence[Series]) -> float:
    """The size of an event as a share of the range of its series."""
    one = next((one for one in series if one.name == event.series), None)
    spread = float(np.ptp(one.values[np.isfinite(one.values)])) if one is not None and len(one.values) else 0.0
    return abs(event.size) / spread if spread else 0.0
