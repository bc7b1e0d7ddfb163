"""What happened in a run, in plain sentences made from the numbers, and what argues against them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from devmon.analysis.derive.verdicts import FINITE_TIME, accepted
from devmon.analysis.detection.events import Event
from devmon.analysis.reports.findings import Findings
from devmon.analysis.reports.run_words import one_set_of_weights, weights_within
from devmon.analysis.run import same_weights
from devmon.analysis.series import run_level
from devmon.analysis.transitions.clusters import Transition, headline, main_first
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


def tell(findings: Findings) -> Story:
    """The story of a run."""
    outcome = findings.detection.outcome
    happened = ["This run is marked as a control, in which no transition is expected."] if findings.control else []
    if findings.transitions:
        happened += _transitions(findings) + _others(findings) + _order(findings)
    elif outcome == "EVENTS":
        happened.append(_events_alone(findings))
    elif outcome == "NO EVENT":
        happened.append(_nothing(findings))
    elif outcome == "SAMPLER REJECTED":
        happened.append(
            "SAMPLER REJECTED: no LLC estimate passed its health check, so nothing can be said of transitions."
        )
    else:
        happened.append("UNRESOLVED: no series has enough checkpoints to tell a transition from noise.")
    happened += [_rejected(name, v) for name, v in findings.verdicts.items() if len(v) and not accepted(v).any()]
    return Story(outcome, happened, _against(findings))


def _transitions(findings: Findings) -> list[str]:
    """The main transition and the minor events, and when; then a sentence on each with the evidence on it."""
    changes = findings.transitions
    last = max(int(series.steps[-1]) for series in findings.series if len(series.steps))
    first = min(int(series.steps[0]) for series in findings.series if len(series.steps))
    sentences = [f"Between steps {first} and {last} the run went through {headline(changes)}."]
    for change in main_first(changes):
        i = next(i for i, each in enumerate(changes) if each is change)
        rank = "the main one" if change.main else "a minor event"
        which = "It" if len(changes) == 1 else f"Transition {i + 1}, {rank},"
        sentences.append(" ".join([_transition(findings, change, which), *findings.evidence[i].sentences]))
        if words := shared_weights(findings, change):
            sentences[-1] += f" But {words}: this change may be of the files and not of the training."
    return sentences


def shared_weights(findings: Findings, change: Transition) -> str:
    """What is to be said of steps of a transition that have one set of weights."""
    start, end = min(change.interval[0], change.span[0]), max(change.interval[1], change.span[1])
    measured = sorted({int(step) for series in findings.series for step in series.steps})
    return weights_within(same_weights(findings.run), start, end, measured)


def _transition(findings: Findings, change: Transition, which: str) -> str:
    """When a transition happened, which watches it is made of, and its surest events."""
    order = sorted(change.events, key=lambda event: (event.p_value, event.q_value or 0, -_share(findings, event)))
    more = len(order) - NAMED
    rest = f"; {more} more series {'changes' if more == 1 else 'change'} with them" if more > 0 else ""
    wide = sum(event.wide for event in change.events)
    but = f" but for {count(wide, 'wide one')}" if 0 < wide < len(change.events) else ""
    watches = f"{count(len(change.watches), 'watch', 'watches')} ({listed(list(change.watches))})"
    return (
        f"{which} happened at about step {step(change.step)} (90% intervals of its jumps{but} "
        f"within {step(change.interval[0])}–{step(change.interval[1])}; 10% to 90% of the change within "
        f"{step(change.span[0])}–{step(change.span[1])}) in {watches}, with a score of {number(change.score, 2)}: "
        f"{listed(map(Event.in_words, order[:NAMED]), last=not rest)}{rest}."
    )


def _share(findings: Findings, event: Event) -> float:
    """The size of an event as a share of the range of its series."""
    values = next((series.values for series in findings.series if series.name == event.series), np.zeros(0))
    spread = float(np.ptp(values[np.isfinite(values)])) if len(values) else 0.0
    return abs(event.size) / spread if spread else 0.0


def _others(findings: Findings) -> list[str]:
    """The sure events that belong to no transition."""
    told = {id(event) for change in findings.transitions for event in change.events}
    others = [e for e in findings.detection.events if id(e) not in told and e.sure and run_level(e.series)]
    if not others:
        return []
    more = f" and {len(others) - 2 * NAMED} more in the table" if len(others) > 2 * NAMED else ""
    return [f"Beside them, {listed(map(Event.in_words, others[: 2 * NAMED]), last=not more)}{more}."]


def _order(findings: Findings) -> list[str]:
    """What came before the reference and what after it, where that is settled."""
    rows = [lag for lag in findings.lags if run_level(lag.event.series)]
    if findings.reference is None or not rows:
        return []
    clauses = [f"Against the jump of {findings.reference.series}:"]
    settled = [lag for lag in rows if lag.settled]
    for lag in sorted(settled, key=lambda lag: -abs(lag.steps))[: 2 * NAMED]:
        low, high = sorted((abs(lag.interval[0]), abs(lag.interval[1])))
        way, p = ("before", lag.first) if lag.steps < 0 else ("after", 1 - lag.first)
        clauses.append(
            f"the {lag.event.word} of {lag.event.series} came {step(abs(lag.steps))} steps {way} it "
            f"[{step(low)}, {step(high)}] (probability {probability(p)});"
        )
    if len(settled) > 2 * NAMED:
        clauses.append(f"{len(settled) - 2 * NAMED} more are in the table;")
    if unsettled := [f"{lag.event.series} ({lag.event.word})" for lag in rows if not lag.settled]:
        others = " and others" * (len(unsettled) > 2 * NAMED)
        clauses.append(f"the order is not settled for {listed(unsettled[: 2 * NAMED])}{others};")
    return [" ".join(clauses)[:-1] + "."]


def _events_alone(findings: Findings) -> str:
    """Of a run with sure events, none of which is a transition of the run."""
    sure = [event for event in findings.events if event.sure]
    return f"No main transition of the run, but {count(len(sure), 'event')}: {some(list(map(Event.in_words, sure)))}."


def _nothing(findings: Findings) -> str:
    fits = findings.detection.fits.values()
    searched = sum(fit.outcome in ("EVENTS", "NO EVENT") for fit in fits)
    left = f" ({len(fits) - searched} more could not be searched)" if searched < len(fits) else ""
    tests = f"{count(searched, 'series', 'series')}{left} and {findings.detection.family} tests"
    return (
        f"NO EVENT: in {tests} nothing stands out from smooth drift with correlated noise "
        "(q ≤ 0.05). This is a result: what changed, changed smoothly."
    )


def _against(findings: Findings) -> list[str]:
    """What weakens the story: events that do not stand, or stand blurred, values not used, series without events."""
    detection, verdicts = findings.detection, findings.verdicts
    said = []
    # events that do not stand, are not resolved, or are badly placed
    if weak := [event for event in detection.events if not event.sure]:
        said.append(
            f"{count(len(weak), 'event')} found in a single series {'does' if len(weak) == 1 else 'do'} not stand "
            f"among {detection.family} series (q > 0.05): {some(list(map(Event.in_words, weak)))}."
        )
    sure = [event for event in detection.events if event.sure]
    if unresolved := [event for event in sure if not event.resolved]:
        notes = [f"{event.series} ({event.note or 'too few checkpoints'})" for event in unresolved]
        said.append(f"{len(unresolved)} of {count(len(sure), 'event')} not resolved in time: {some(notes)}.")
    if wide := [event for event in sure if run_level(event.series) and event.wide]:
        words = some(list(map(Event.in_words, wide)))
        said.append(f"{count(len(wide), 'event')} with a wide interval (a factor above 2): {words}.")
    # values that were not used
    said += [_rejected(name, verdict) for name, verdict in verdicts.items() if len(set(accepted(verdict))) == 2]
    for name, verdict in verdicts.items():
        if finite := int((verdict == FINITE_TIME).sum()):
            said.append(
                f"{name}: {finite} of {len(verdict)} are finite-time λ̂ of their settings, never a level: the chains "
                "have not come to rest, and only changes between checkpoints of equal settings mean something."
            )
    for series in findings.series:
        refused = 0 if series.rejected is None else int(np.sum(series.rejected))
        if refused and series.name.rpartition("/")[0] not in verdicts:
            said.append(f"{series.name}: {refused} of {len(series.steps)} values are infinite and not used.")
    if words := one_set_of_weights(same_weights(findings.run)):
        said.append(f"{words[0].upper()}{words[1:]}: one of them may be another step's file, or nothing was learned.")
    # series that show nothing, and what p-values of simulated nulls can say at most
    level = {name: fit for name, fit in detection.fits.items() if run_level(name)}
    silent = [name for name in level if name not in {event.series for event in sure}]
    if silent and sure:
        said.append(f"{len(silent)} of {len(level)} run-level series show no event that stands: {some(silent)}.")
    if few := [name for name, fit in level.items() if fit.outcome == "UNRESOLVED"]:
        said.append(f"Too few checkpoints to say anything of {some(few)}.")
    if (nulls := int(detection.settings.get("n_null", 0))) and detection.family:
        said.append(
            f"p-values below {number(1 / (1 + nulls))} are extrapolated from the largest of {nulls} simulated nulls; "
            "intervals and p-values are about noise within this one run and say nothing of other seeds."
        )
    return said


def _rejected(name: str, verdicts: np.ndarray) -> str:
    """How many estimates of an LLC watch are rejected and why; what to change where all are."""
    bad = verdicts[~accepted(verdicts)]
    reasons = Counter(bad.tolist()).most_common()
    kinds = ", ".join(f"{kind} {n}" for kind, n in reasons)
    every = len(bad) == len(verdicts)
    share = f"all {len(verdicts)}" if every else f"{len(bad)} of {len(verdicts)}"
    remedy = f" {REMEDIES[reasons[0][0]]}" if every and reasons[0][0] in REMEDIES else ""
    return f"{name}: {share} LLC estimates are rejected ({kinds}) and not used.{remedy}"
