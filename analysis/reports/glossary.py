"""The fixed words of a report: what its terms mean, and how its numbers were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devmon.analysis.detection.results import Detection

GLOSSARY = (
    ("jump", "A rise or fall that smooth drift with correlated noise does not explain. Its step is the middle of the "
     "change; its width is the time from 10% to 90% of the change, in decades (factors of ten) of the step."),
    ("turn", "A maximum or minimum: the smoothed curve certainly rises before it and falls after it, or the reverse. "
     "Its size is the prominence (+ maximum, − minimum)."),
    ("plateau", "A time in which a series that moves before and after stays level, or moves far more slowly."),
    ("bump", "A passing rise (or dip) that comes back: it leaves the level before it much as it found it. Its size is "
     "its height."),
    ("transition", "Abrupt jumps that go on at the same time, and what else changes in other series then, as one "
     "change of the run. Those whose interval is wider than a factor of 2 do not place it, unless all are."),
    ("main transition", "The one with the highest score, if half of the watches (or three) change in it; others are "
     "minor events. No main transition is a result, too."),
    ("score", "Of a transition: for each watch the share of a series' range that surely changes, less (by a factor of "
     "0.4 each) where it is not resolved, not abrupt or badly placed; summed over watches. Variables, heads and layers "
     "of a watch count once, so that 3 means as much as three watches that change wholly."),
    ("Type A or B", "Of a transition with a loss and an LLC: in Type A the loss falls and λ̂ rises (fit is bought with "
     "complexity), in Type B λ̂ falls while the loss falls or stays (Hoogland et al. 2024). Both changes are from the "
     "last accepted λ̂ before it to the first after it; the loss is that of the LLC's own data. In brackets: the "
     "probability."),
    ("90% interval", "Given the model of the curve and of its noise, the step (or size) lies within it with "
     "probability 0.9. Bands around a curve are ±1.64 standard errors of each value."),
    ("p", "The share of simulated series without the event (same steps and kind of noise) that show one as prominent, "
     "corrected for the kinds of event sought in the series."),
    ("q", "p after correction for the number of series in this report (Benjamini–Hochberg): among all events with "
     "q ≤ 0.05 about 5% or fewer are expected to be false."),
    ("resolved", "At least three checkpoints lie within the jump (or within the interval of a turn). Otherwise it may "
     "be more abrupt than it looks, and the note names steps to measure."),
    ("max", "The largest element of an array at each step, with that element's standard error. The largest of many "
     "noisy values lies above the true largest one."),
    ("NO EVENT", "A result: the series was searched and nothing stands out."),
    ("UNRESOLVED", "Too few checkpoints to tell a transition from noise."),
    ("SAMPLER REJECTED", "No estimate of the series passed its own health check."),
    ("verdict", "The health of one LLC estimate. ok: accepted. not mixed: the chains disagree or hold too few "
     "independent draws. negative: the point is no minimum, so λ̂ is no learning coefficient (usual early in "
     "training). diverged: chains ran away. non-finite: NaN or "
     "infinity was met. finite-time: the chains have not come to rest (configurational temperature not 1); such λ̂ is a "
     "number of its settings, never a level, comparable between checkpoints of equal settings."),
)  # fmt: skip

TOPICS = (  # sections of a report: key, title, and the instruments whose watches belong to it
    (
        "representation",
        "Representations",
        ("Sketch", "LayerRoles", "IntrinsicDimension", "Superposition", "Polysemanticity"),
    ),
    ("lenses", "Lenses and probes", ("LogitLens", "TunedLens", "LinearProbe", "MDLProbe")),
    (
        "features",
        "Features and directions",
        (
            "SparseAutoencoder",
            "DictionaryQuality",
            "FeatureLens",
            "FeatureCircuit",
            "Transcoder",
            "Steering",
            "ConceptDirection",
        ),
    ),
    ("components", "λ̂ of components", ("RestrictedLLC",)),
    ("circuits", "Circuits and composition", ("Circuit", "Composition", "ActivationPatching", "ResidualAttribution")),
)


def methods(watches: Mapping[str, Mapping[str, Any]], detection: Detection) -> list[tuple[str, str]]:
    """How each watch measured (the first paragraph of its instrument) and how events were found."""
    terms = [(name, str(attrs["doc"])) for name, attrs in watches.items() if attrs.get("doc")]
    for name, attrs in watches.items():
        if attrs.get("kind") == "llc":
            keys = ("nbeta", "gamma", "lr", "batch_size", "n", "burn_in", "steps_per_draw", "kernel")
            used = ", ".join(f"{key} {attrs[key]}" for key in keys if key in attrs)
            terms.append((
                f"{name}: estimate",
                "λ̂ = nβ (E[L(w)] − L(w*)), with L the mean loss and w drawn from exp(−nβ L(w) − (γ/2)‖w − w*‖²); each "
                f"draw and w* are scored on the same examples. {used}.",
            ))  # fmt: skip
    settings = detection.settings
    terms.append((
        "events",
        "Each series is a curve over log step and noise, measured by replicates or estimated beside the curve. Slopes, "
        "and changes of slope, on windows of all sizes are compared at once with their largest value in "
        f"{settings.get('n_null', '?')} simulated series of noise: a window that surely rises and a later one that "
        "surely falls hold a maximum; a slope that surely grows and then falls is the steepest place of a rise; the "
        "reverse its flattest, a plateau. p is that of the event being there. A rise is a jump where it is abrupt too: "
        "larger, against changes over as many checkpoints elsewhere in the curve, than random walks and correlated "
        "noise show. Intervals are at level "
        f"{settings.get('level', 0.9)}; q-values are over {detection.family} series.",
    ))  # fmt: skip
    return terms
