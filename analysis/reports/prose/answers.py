"""The questions of a reader's first minute, answered from the findings: how sure, what with it, what next."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from devmon.analysis.derive.verdicts import accepted
from devmon.analysis.detection.events import Event
from devmon.analysis.reports.findings import Findings
from devmon.analysis.reports.prose.evidence import Evidence, type_in_words
from devmon.analysis.reports.prose.words import (
    amount,
    called,
    chance,
    clause,
    error_of,
    naming,
    placed,
    sentence,
    share,
)
from devmon.analysis.series import Series, run_level
from devmon.analysis.transitions.clusters import Transition, watch_of
from devmon.analysis.transitions.stages import change_across
from devmon.analysis.wording import count, listed, measured, number, probability, some, step

TOGETHER = 4  # changes that are named
HEADS = 3  # elements that are named
SHOWN = 3  # series of the first figure
MEASURE = re.compile(r"measure steps? ([\d, ]+)")


@dataclass(frozen=True)
class Answer:
    question: str
    text: str


def answers(findings: Findings) -> list[Answer]:
    """What a reader asks of the foremost transition; of a run without one what there is to say."""
    change = findings.foremost
    if change is None:
        asked = [("How sure", _sure_of_none(findings)), ("λ̂", _llc_alone(findings)), ("Next", _next(findings, ()))]
    else:
        known = findings.evidence[next(i for i, each in enumerate(findings.transitions) if each is change)]
        asked = [
            ("How sure", _sure(findings, change)),
            ("When", _when(change)),
            ("Together", _together(findings, change)),
            ("Which part", _which(findings, change)),
            ("In the loss", _in_the_loss(findings, change)),
            ("λ̂", _llc(findings, known)),
            ("What came first", _first(findings, change, known)),
            ("The schedule", _schedule(known)),
            ("One seed only", "Yes, this is one run: its errors say nothing of other seeds (devmon compare does)."),
            ("Next", _next(findings, change.events)),
        ]
    return [Answer(question, text) for question, text in asked if text]


def changed(findings: Findings, change: Transition) -> list[Event]:
    """What changes in a transition, one event a watch before the others, the largest share of its range first."""
    series = {each.name: each for each in findings.series}
    jumps = [event for event in change.events if event.kind == "jump"] or list(change.events)
    ranked = sorted(jumps, key=lambda event: (not event.abrupt, -min(share(event, series), 1.0), event.p_value))
    seen: set[str] = set()
    first = [event for event in ranked if not (watch_of(event.series) in seen or seen.add(watch_of(event.series)))]  # type: ignore[func-returns-value]
    return first + [event for event in ranked if event not in first]


def _ends(findings: Findings, change: Transition) -> tuple[float, float]:
    """The checkpoints before and after a transition, as in the table of stages."""
    own = next((part for part in findings.stages if part.transition is change), None)
    return change.span if own is None else (own.start, own.end)


def _sure(findings: Findings, change: Transition) -> str:
    """How many watches agree, the smallest q, and whether the checkpoints resolve it."""
    searched = {
        watch_of(name) for name, fit in findings.detection.fits.items() if fit.outcome in ("EVENTS", "NO EVENT")
    }
    best = min(event.p_value if event.q_value is None else event.q_value for event in change.events)
    sharp = sum(event.resolved for event in change.events)
    word = "Very" if len(change.watches) >= 3 and best < 0.001 else "Sure" if change.main else "Not very"
    agree = f"{len(change.watches)} of {count(len(searched), 'watch', 'watches')} change together"
    if len(change.watches) == 1:
        agree = f"one of {count(len(searched), 'watch', 'watches')} shows it"
    resolved = f"{sharp} of {count(len(change.events), 'change')} resolved between checkpoints"
    return f"{word}: {agree}, false-discovery rate q {chance(best)}, {resolved}."


def _sure_of_none(findings: Findings) -> str:
    outcome = findings.detection.outcome
    if outcome == "NO EVENT":
        tests = f"{count(findings.detection.family, 'test')} at a false-discovery rate of 5%"
        return f"{tests}. It is a result: what changed, changed smoothly."
    if outcome == "EVENTS":
        sure = [event for event in findings.detection.events if event.sure]
        best = min(event.p_value if event.q_value is None else event.q_value for event in sure)
        return f"The surest has q {chance(best)} among {findings.detection.family} series; no abrupt change is shared."
    return ""


def _when(change: Transition) -> str:
    """From 10% to 90% of the change."""
    low, high = map(step, change.interval)
    takes = f"the change goes on from step {step(change.span[0])} to {step(change.span[1])} (10% to 90%)"
    return f"Step {step(change.step)}, 90% interval {low} to {high}; {takes}."


def _together(findings: Findings, change: Transition) -> str:
    """The changes of the transition with their signs."""
    told = changed(findings, change)
    words = []
    for event in told[:TOGETHER]:
        sign = ("+" if event.size > 0 else "−") if event.kind == "jump" else f"{event.word} of "
        words.append(f"{called(findings.labels, event.series)} {sign}{amount(event, findings.labels)}")
    rest = [called(findings.labels, event.series) for event in told[TOGETHER:]]
    more = f"; also {some(list(dict.fromkeys(rest)))}" if rest else ""
    return f"{', '.join(words)}{more}."


def _which(findings: Findings, change: Transition) -> str:
    """The elements (heads, layers) that carry the change of the arrays followed."""
    by_name = {each.name: each for each in findings.series}
    told, named = [], naming(change.events, findings.labels)[0]
    for event in sorted(changed(findings, change), key=lambda event: event is not named):
        if not event.series.endswith(" max") or event.kind != "jump":
            continue
        prefix = event.series.removesuffix(" max") + "["
        moved: list[tuple[float, str]] = []
        for name, each in by_name.items():
            if name.startswith(prefix) and (over := change_across(each, *_ends(findings, change))) is not None:
                moved.append((over.value, name))
        moved.sort(key=lambda row: -row[0] * np.sign(event.size))
        least = 0.5 * abs(moved[0][0]) if moved else 0.0  # those that change by half as much as the first
        best = [(value, name) for value, name in moved[:HEADS] if value * np.sign(event.size) >= least > 0]
        if best:
            own = called(findings.labels, event.series).partition(" (")[0]
            parts = [
                f"{_element(findings, name)} ({measured(v, error_of(event), error=False, sign=True)})"
                for v, name in best
            ]
            told.append(f"{own}: {listed(parts)}")
    return f"{'; '.join(told[:2])}." if told else ""


def _element(findings: Findings, name: str) -> str:
    short = called(findings.labels, name)
    return short[short.find("(") + 1 : short.rfind(")")] if "(" in short else short


def _in_the_loss(findings: Findings, change: Transition) -> str:
    """Whether a loss that is followed shows it."""
    losses = [
        each for each in findings.series if run_level(each.name) and each.name.rpartition("/")[2].endswith("loss")
    ]
    if not losses:
        return "No loss was followed."
    seen, not_seen = [], []
    for each in losses:
        own = [event for event in change.events if event.series == each.name and event.kind == "jump"]
        over = change_across(each, *_ends(findings, change))
        name = called(findings.labels, each.name)
        if own:
            seen.append(clause(own[0], findings.labels))
        elif over is not None:
            way = "falls" if over.value < 0 else "rises"
            flat = over.se is not None and abs(over.value) < 2 * over.se
            moved = f"does not change ({measured(over.value, over.se)})" if flat else f"{way} smoothly"
            not_seen.append(f"{name} {moved}")
        else:
            not_seen.append(f"{name} has no values on both sides")
    if not seen:
        return f"No: {some(not_seen)}."
    return f"Yes: {'; '.join([listed(seen), *not_seen[:2]])}."


def _llc(findings: Findings, known: Evidence) -> str:
    """What λ̂ does in it: its peaks within, and the type by the change across it."""
    if not findings.estimates:
        return "Not measured."
    peaks = "; ".join(placed(event, findings.labels) for event in known.passing)
    peak = sentence(peaks) if peaks else ""
    return " ".join(words for words in (peak, "" if known.phase is None else type_in_words(known.phase)) if words)


def _llc_alone(findings: Findings) -> str:
    """How many estimates were accepted and over what they range, of a run without a transition."""
    told = []
    for name, data in findings.estimates.items():
        good = accepted(findings.verdicts[name])
        values = np.asarray(data["llc"].values, dtype=float)[good]
        ends = f", from {number(values[0])} to {number(values[-1])}" if len(values) else ""
        told.append(f"{int(good.sum())} of {len(good)} estimates of {name} accepted{ends}")
    return f"{'; '.join(told)}." if told else ""


def _first(findings: Findings, change: Transition, known: Evidence) -> str:
    """Which series led, where the order within the transition is settled."""
    if known.first is None or known.second is None or known.lag is None:
        return ""
    first, second = (called(findings.labels, event.series) for event in (known.first, known.second))
    if known.led:
        sure = probability(known.lag.first)
        return f"{first}, by its {known.first.word}, {step(known.lag.lag)} steps before {second} (probability {sure})."
    inside = {id(event) for event in change.events}
    settled = [lag for lag in findings.lags if id(lag.event) in inside and lag.settled]
    told = ""
    if findings.reference is not None and settled:
        far = settled[0]
        way = "before" if far.steps < 0 else "after"
        other, reference = (called(findings.labels, name) for name in (far.event.series, findings.reference.series))
        told = " " + sentence(f"{other} came {step(abs(far.steps))} steps {way} {reference}")
    return f"Not settled: the earliest, {first} and {second}, cannot be told apart.{told}"


def _schedule(known: Evidence) -> str:
    if known.kinks is None:
        return "Not known: the run holds no learning rate (a series lr, or settings warm_up and kinks)."
    if not known.kinks:
        return "No: no kink of the learning rate lies within it."
    place = min(known.kinks, key=lambda row: row.chance)
    kink = place.kinks[0]
    by_chance = f"an event so wide meets one with probability {place.chance:.2f}"
    return f"It could be: {kink.kind} at step {step(kink.step)} ({by_chance})."


def _next(findings: Findings, events: tuple[Event, ...]) -> str:
    """The steps that would resolve what is not, else another seed."""
    wanted: dict[str, list[int]] = {}
    for event in events or tuple(event for event in findings.detection.events if event.sure):
        if not event.resolved and (found := MEASURE.search(event.note)):
            steps = [int(text) for text in found.group(1).replace(",", " ").split()]
            wanted.setdefault(called(findings.labels, event.series), []).extend(steps)
    if wanted:
        parts = [
            f"{name} at steps {listed([str(s) for s in sorted(set(steps))])}"
            for name, steps in list(wanted.items())[:2]
        ]
        return f"Measure {'; '.join(parts)} (not resolved in time); then another seed."
    if findings.detection.outcome in ("SAMPLER REJECTED",):
        return "Calibrate the sampler (devmon calibrate)."
    if findings.detection.outcome == "UNRESOLVED":
        return "Measure more checkpoints (densify, or devmon measure)."
    return "Another seed, and a control in which it cannot happen (devmon compare)."


def main_series(findings: Findings) -> list[Series]:
    """The loss, λ̂ and the series that names the foremost transition: what one figure can tell."""
    held = [each for each in findings.series if len(each.steps)]
    level = [each for each in held if run_level(each.name)] or held
    chosen: list[Series] = []
    for wanted in ("loss", "llc"):
        chosen += [each for each in level if each.name.rpartition("/")[2] == wanted][:1]
    change = findings.foremost
    told = [] if change is None else changed(findings, change)
    named = None if change is None else naming(change.events, findings.labels)[0]
    for name in [*([named.series] if named else []), *(event.series for event in told), *(each.name for each in level)]:
        if len(chosen) < SHOWN:
            chosen += [each for each in level if each.name == name and each not in chosen]
    return chosen
