"""The fixed words of a report: what its terms mean, how its numbers were made, and whom to cite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devmon.analysis.detection.results import Detection

GLOSSARY = (
    ("jump", "A rise or fall that smooth drift with correlated noise does not explain. Its step is the middle of the "
     "change; its width is the time from 10% to 90% of the change, in decades (factors of ten) of the step."),
    ("turn", "A maximum or minimum: the smoothed curve certainly rises before it and falls after it, or the reverse. "
     "Its size is the prominence (+ maximum, − minimum)."),
    ("plateau", "A time in which a series that moves before and after stays level, or moves far more slowly."),
    ("bump", "A passing rise (or dip) that comes back: it leaves the level before it much as it found it. Its size is its height."),
    ("transition", "Jumps of several series that go on at the same time, taken as one change of the run. Those whose interval is wider "
     "than a factor of 2 do not place it, unless all are."),
    ("Type A or B", "Of a transition with a loss and an LLC: in Type A the loss falls and λ̂ rises (fit is bought with "
     "complexity), in Type B λ̂ falls while the loss falls or stays (Hoogland et al. 2024). In brackets: the probability."),
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
     "independent draws. downhill: the point is no minimum, so λ̂ is no learning coefficient (usual early in training). "
     "diverged: chains ran away. non-finite: NaN or infinity was met."),
)  # fmt: skip

TOPICS = (  # sections of a report: key, title, and the instruments whose watches belong to it
    (
        "representation",
        "Representations",
        ("Sketch", "LayerRoles", "IntrinsicDimension", "Superposition", "Polysemanticity"),
    ),
    ("lenses", "Lenses and probes", ("LogitLens", "TunedLens", "LinearProbe", "MDLProbe")),
    ("circuits", "Circuits and composition", ("Circuit", "Composition", "ActivationPatching", "ResidualAttribution")),
)

_LLC = "Lau et al. (2023), The local learning coefficient: a singularity-aware complexity measure. arXiv:2308.12108"
_OLSSON = "Olsson et al. (2022), In-context learning and induction heads. arXiv:2209.11895"
_HOOGLAND = "Hoogland et al. (2024), The developmental landscape of in-context learning. arXiv:2402.02364"
_ELHAGE = "Elhage et al. (2021), A mathematical framework for transformer circuits. Transformer Circuits Thread"
_WANG = (
    "Wang et al. (2022), Interpretability in the wild: indirect object identification in GPT-2 small. arXiv:2211.00593"
)
_TOY = "Elhage et al. (2022), Toy models of superposition. arXiv:2209.10652"
_HEWITT = "Hewitt & Liang (2019), Designing and interpreting probes with control tasks. arXiv:1909.03368"
_NANDA = "Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability. arXiv:2301.05217"
_CKA = "Kornblith et al. (2019), Similarity of neural network representations revisited. arXiv:1905.00414"
_CITED = {
    "LLC": (
        _LLC,
        "Watanabe (2009), Algebraic geometry and statistical learning theory. Cambridge University Press",
        _HOOGLAND,
        "Vehtari et al. (2021), Rank-normalization, folding, and localization: an improved R̂. Bayesian Analysis 16(2)",
    ),
    "InductionHeads": (_OLSSON,),
    "PreviousTokenHeads": (_OLSSON,),
    "RepeatGain": (_OLSSON,),
    "ProbeLoss": (_OLSSON,),
    "InContextLearning": (_OLSSON,),
    "FewShot": ("Brown et al. (2020), Language models are few-shot learners. arXiv:2005.14165",),
    "NgramStages": (_HOOGLAND,),
    "FuzzyInduction": (_OLSSON,),
    "AbstractInduction": (_OLSSON,),
    "HierarchicalInduction": (_OLSSON,),
    "CopyingHeads": (_OLSSON,),
    "Composition": (_ELHAGE,),
    "HeadSpectra": (_ELHAGE,),
    "ResidualAttribution": (_ELHAGE, _WANG),
    "HeadAblation": (_WANG,),
    "ActivationPatching": (
        _WANG,
        "Zhang & Nanda (2023), Towards best practices of activation patching in language models. arXiv:2309.16042",
        "Heimersheim & Nanda (2024), How to use and interpret activation patching. arXiv:2404.15255",
    ),
    "Circuit": (
        "Hanna et al. (2024), Have faith in faithfulness: going beyond circuit overlap. arXiv:2403.17806",
        "Tigges et al. (2024), LLM circuit analyses are consistent across training and scale. arXiv:2407.10827",
    ),
    "FunctionVectorHeads": ("Todd et al. (2023), Function vectors in large language models. arXiv:2310.15213",),
    "LogitLens": ("nostalgebraist (2020), Interpreting GPT: the logit lens. LessWrong",),
    "TunedLens": ("Belrose et al. (2023), Eliciting latent predictions with the tuned lens. arXiv:2303.08112",),
    "LayerRoles": (_CKA,),
    "LinearProbe": (_HEWITT,),
    "MDLProbe": (
        _HEWITT,
        "Voita & Titov (2020), Information-theoretic probing with minimum description length. arXiv:2003.12298",
    ),
    "IntrinsicDimension": (
        "Facco et al. (2017), Estimating the intrinsic dimension of datasets by a minimal neighborhood information. "
        "Scientific Reports 7",
    ),
    "Sketch": (_CKA, _HOOGLAND),
    "Superposition": (_TOY,),
    "Polysemanticity": (_TOY,),
    "Curvature": (
        "Ghorbani et al. (2019), An investigation into neural net optimization via Hessian eigenvalue density. "
        "arXiv:1901.10159",
        "Meyer et al. (2021), Hutch++: optimal stochastic trace estimation. arXiv:2010.09649",
    ),
    "WeightStatistics": ("Hu et al. (2023), Latent state models of training dynamics. arXiv:2308.09543",),
    "RestrictedLoss": (_NANDA,),
    "FourierSpectrum": (
        _NANDA,
        "Hurley & Rickard (2009), Comparing measures of sparsity. IEEE Transactions on Information Theory 55(10)",
    ),
}
_DETECTION = (
    "Benjamini & Hochberg (1995), Controlling the false discovery rate. J. R. Stat. Soc. B 57(1)",
    "Besag & Clifford (1991), Sequential Monte Carlo p-values. Biometrika 78(2)",
)


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


def methods(watches: Mapping[str, Mapping[str, Any]], detection: Detection) -> list[tuple[str, str]]:
    """How each watch measured (the first paragraph of its instrument) and how events were found."""
    told = [(name, str(attrs["doc"])) for name, attrs in watches.items() if attrs.get("doc")]
    for name, attrs in watches.items():
        if attrs.get("kind") == "llc":
            keys = ("nbeta", "gamma", "lr", "batch_size", "n", "burn_in", "steps_per_draw", "kernel")
            used = ", ".join(f"{key} {attrs[key]}" for key in keys if key in attrs)
            told.append((
                f"{name}: estimate",
                "λ̂ = nβ (E[L(w)] − L(w*)), with L the mean loss and w drawn from exp(−nβ L(w) − (γ/2)‖w − w*‖²); each "
                f"draw and w* are scored on the same examples. {used}.",
            ))  # fmt: skip
    settings = detection.settings
    told.append((
        "events",
        "Each series is y = drift + smooth process + correlated and white noise over log step. A jump adds "
        "A · logistic((log step − c)/w), a bump its slope; their statistic is the gain in likelihood, largest over all "
        "places and widths. A turn is a change of sign of the slope of the smoothed curve, a plateau a pair of turns of "
        f"the tilted curve; their statistic is the prominence. Each is compared with that of {settings.get('n_null', '?')} "
        "simulated series without one, and p-values are corrected for the kinds sought. Intervals are at level "
        f"{settings.get('level', 0.9)}; q-values are over {detection.family} series.",
    ))  # fmt: skip
    return told


def references(instruments: Iterable[str]) -> list[str]:
    """Whom to cite for these instrument classes and for the detection of events."""
    found = [one for name in instruments for one in _CITED.get(name.rpartition(".")[2], ())]
    return sorted({*found, *_DETECTION})
