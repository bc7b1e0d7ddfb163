"""What happened in a run, in the sentences of a talk made from the numbers, and what argues against them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from devmon.analysis.derive.verdicts import FINITE_TIME, accepted
from devmon.analysis.detection.events import Event
from devmon.analysis.reports.findings import Findings
from devmon.analysis.reports.prose.answers import Answer, answers, changed
from devmon.analysis.reports.prose.run_words import one_set_of_weights, weights_within
from devmon.analysis.reports.prose.words import called, clause, joined, naming, placed, sentence
from devmon.analysis.run import same_weights
from devmon.analysis.series import run_level
from devmon.analysis.transitions.clusters import Transition
from devmon.analysis.transitions.mirage import MIRAGE
from devmon.analysis.wording import count, number, some, step

CLAUSES = 3  # changes told in the first sentence
REMEDIES = {  # where every estimate is rejected, by the commonest reason
    "negative": "At these weights the loss still falls: measure later checkpoints, or raise gamma (devmon calibrate).",
    "diverged": "The chains run away: lower lr or raise gamma (devmon calibrate finds both).",
    "non-finite": "The chains meet NaN or infinity: lower lr (devmon calibrate finds it).",
    "not mixed": "The chains disagree: take more draws and chains, or another lr (devmon calibrate finds it).",
}


@dataclass(frozen=True)
class Story:
    """`outcome` EVENTS, NO EVENT, UNRESOLVED or SAMPLER REJECTED.

    `lead` is what happened, in one sentence; `answers` what a reader asks next; `minor` a sentence on each smaller
    event; `against` what weakens all this.
    """

    outcome: str
    lead: str
    answers: list[Answer]
    minor: list[str]
    against: list[str]


def tell(findings: Findings) -> Story:
    """The story of a run."""
    foremost = findings.foremost
    minor = [_one(findings, change) for change in findings.transitions if change is not foremost]
    return Story(
        findings.detection.outcome, _lead(findings), answers(findings), minor + _alone(findings), _against(findings)
    )


def _lead(findings: Findings) -> str:
    """What happened, as one would say it in a talk."""
    outcome, foremost = findings.detection.outcome, findings.foremost
    marked = "in this control, in which no transition is expected, " if findings.control else ""
    if findings.main is not None:
        words = f"{_at(findings.main)} {_what(findings, findings.main)}"
    elif foremost is not None:
        which = "its largest minor event" if len(findings.transitions) > 1 else "one minor event"
        words = f"no transition of the whole run, but {which}: {_at(foremost)} {_what(findings, foremost)}"
    elif outcome == "EVENTS":
        sure = [event for event in findings.events if event.sure]
        told = "; ".join(placed(event, findings.labels) for event in sure[:CLAUSES])
        rest = f"; {len(sure) - CLAUSES} more" if len(sure) > CLAUSES else ""
        words = f"no transition of the whole run, but {count(len(sure), 'event')}: {told}{rest}"
    elif outcome == "NO EVENT":
        words = f"nothing happens: {_searched(findings)} and no change stands out from smooth drift and noise"
    elif outcome == "SAMPLER REJECTED":
        words = "nothing can be said: no estimate of λ̂ passed its health check, and nothing else could be searched"
    else:
        words = "nothing can be said yet: no series has enough checkpoints to tell a transition from noise"
    return sentence(marked + words)


def _at(change: Transition) -> str:
    return f"at step {step(change.step)} [{step(change.interval[0])}, {step(change.interval[1])}]"


def _what(findings: Findings, change: Transition) -> str:
    """What the model does in a transition: by its name where it has one, then the changes that tell it."""
    named, words = naming(change.events, findings.labels)
    told = changed(findings, change)[:CLAUSES]
    if named is not None:
        told = [named, *(event for event in told if event is not named)][:CLAUSES]
        told = [told[0], *sorted(told[1:], key=lambda event: (event.size > 0) != (told[0].size > 0))]
    what = joined(told, findings.labels)
    return f"the model {words}: {what}" if words else what


def _searched(findings: Findings) -> str:
    """How many series were searched, and how many could not be."""
    fits = findings.detection.fits.values()
    searched = sum(fit.outcome in ("EVENTS", "NO EVENT") for fit in fits)
    left = f" ({len(fits) - searched} more could not be searched)" if searched < len(fits) else ""
    return f"{count(searched, 'series', 'series')} {'was' if searched == 1 else 'were'} searched{left}"


def _one(findings: Findings, change: Transition) -> str:
    """A minor event in a sentence, with what argues against it."""
    return " ".join([sentence(f"{_at(change)} {_what(findings, change)}"), *doubts_of(findings, change)])


def _alone(findings: Findings) -> list[str]:
    """The sure events of the run's own series that belong to no transition."""
    told = {id(event) for change in findings.transitions for event in change.events}
    told |= {id(event) for known in findings.evidence for event in known.passing}
    others = [e for e in findings.detection.events if id(e) not in told and e.sure and run_level(e.series)]
    if not findings.transitions:
        others = others[CLAUSES:]
    return [sentence(placed(event, findings.labels)) for event in sorted(others, key=lambda event: event.step)]


def doubts_of(findings: Findings, change: Transition) -> list[str]:
    """What argues against one transition: the schedule, one set of weights, thresholded scores, too few checkpoints."""
    which = next(i for i, each in enumerate(findings.transitions) if each is change)
    known, said = findings.evidence[which], []
    if known.kinks:
        place = min(known.kinks, key=lambda row: row.chance)
        said.append(
            f"It may come from the learning-rate schedule: {place.kinks[0].kind} at step {step(place.kinks[0].step)} "
            f"(met by chance with probability {place.chance:.2f})."
        )
    if words := shared_weights(findings, change):
        said.append(f"But {words}: this change may be of the files and not of the training.")
    for survival in known.survivals:
        if survival.verdict == MIRAGE:
            name = called(findings.labels, survival.event.series)
            said.append(f"{name} jumps only as a thresholded score: {survival.note}.")
    return said


def shared_weights(findings: Findings, change: Transition) -> str:
    """What is to be said of steps of a transition that have one set of weights."""
    start, end = min(change.interval[0], change.span[0]), max(change.interval[1], change.span[1])
    measured = sorted({int(step) for series in findings.series for step in series.steps})
    return weights_within(same_weights(findings.run), start, end, measured)


def _against(findings: Findings) -> list[str]:
    """What weakens the story: events that do not stand, or stand blurred, values not used, series without events."""
    detection, verdicts, labels = findings.detection, findings.verdicts, findings.labels
    said = [] if findings.foremost is None else doubts_of(findings, findings.foremost)
    sure = [event for event in detection.events if event.sure]
    # events that do not stand, are not resolved, or are badly placed
    if weak := [event for event in detection.events if not event.sure]:
        does = "does" if len(weak) == 1 else "do"
        said.append(
            f"{count(len(weak), 'event')} of a single series {does} not stand among {detection.family} (q > 0.05): "
            f"{_some(weak, findings)}."
        )
    if unresolved := [event for event in sure if not event.resolved]:
        named = some(list(dict.fromkeys(called(labels, event.series) for event in unresolved)))
        said.append(
            f"{len(unresolved)} of {count(len(sure), 'event')} not resolved in time, for lack of checkpoints: {named}."
        )
    if wide := [event for event in sure if run_level(event.series) and event.wide]:
        said.append(f"{count(len(wide), 'event')} badly placed, by more than a factor of two: {_some(wide, findings)}.")
    # values that were not used
    said += [
        _rejected(name, verdict) for name, verdict in verdicts.items() if len(verdict) and not accepted(verdict).all()
    ]
    for name, verdict in verdicts.items():
        if finite := int((verdict == FINITE_TIME).sum()):
            said.append(
                f"{name}: {finite} of {len(verdict)} are finite-time λ̂ of their settings, never a level: the chains "
                "have not come to rest, and only changes between checkpoints of equal settings mean something."
            )
    for series in findings.series:
        refused = 0 if series.rejected is None else int(np.sum(series.rejected))
        if refused and series.name.rpartition("/")[0] not in verdicts:
            name = called(labels, series.name)
            said.append(f"{name}: {refused} of {len(series.steps)} values are infinite and not used.")
    if words := one_set_of_weights(same_weights(findings.run)):
        said.append(sentence(f"{words}: one of them may be another step's file, or nothing was learned"))
    # series that show nothing, and what p-values of simulated nulls can say at most
    level = {name: fit for name, fit in detection.fits.items() if run_level(name)}
    silent = [called(labels, name) for name in level if name not in {event.series for event in sure}]
    if silent and sure:
        said.append(f"No event that stands in {len(silent)} of {len(level)} series: {some(silent)}.")
    if few := [called(labels, name) for name, fit in level.items() if fit.outcome == "UNRESOLVED"]:
        said.append(f"Too few checkpoints to say anything of {some(few)}.")
    if (nulls := int(detection.settings.get("n_null", 0))) and detection.family:
        said.append(f"p-values below {number(1 / (1 + nulls), 1)} are extrapolated from {nulls} simulated nulls.")
    return said


def _some(events: Sequence[Event], findings: Findings) -> str:
    return some([f"{clause(event, findings.labels)} at step {step(event.step)}" for event in events])


def _rejected(name: str, verdicts: np.ndarray) -> str:
    """How many estimates of an LLC watch are rejected and why; what to change where all are."""
    bad = verdicts[~accepted(verdicts)]
    reasons = Counter(bad.tolist()).most_common()
    kinds = ", ".join(f"{kind} {n}" for kind, n in reasons)
    every = len(bad) == len(verdicts)
    share = f"all {len(verdicts)}" if every else f"{len(bad)} of {len(verdicts)}"
    remedy = f" {REMEDIES[reasons[0][0]]}" if every and reasons[0][0] in REMEDIES else ""
    return f"{name}: {share} estimates of λ̂ are rejected ({kinds}) and not used.{remedy}"
