"""Whole stories, reviewed as text in stories.txt: what a run tells a person who did not write devmon.

`python -m tests.reports.test_golden_stories` writes the file anew; read it before it is committed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from devmon import Trajectory
from devmon.analysis.reports.comparison import summary
from devmon.analysis.reports.findings import examine
from devmon.analysis.reports.prose.seeds import labels_together
from devmon.analysis.reports.prose.story import tell
from devmon.analysis.run import RunData
from devmon.analysis.runs.compare import compare_runs
from tests.support.reports import small_run
from tests.support.synthetic import STEPS, Run, induction_run, rise, traces, watch

STORIES = Path(__file__).with_name("stories.txt")
DEMO = Path(__file__).parents[1] / "stored" / "demo.zarr"  # `devmon demo --seed 1`, five of its watches


def scheduled() -> Run:
    """The demo's watches, with the settings of a run that tells its warm-up."""
    run = induction_run()
    return Run(run.data, run.attrs | {"settings": {"warm_up": 100}})


def two_transitions() -> Run:
    rng = np.random.default_rng(0)

    def noisy(mean: np.ndarray, sd: float) -> np.ndarray:
        return mean + sd * rng.standard_normal(len(STEPS))

    up, later = rise(STEPS, at=60, width=0.05), rise(STEPS, at=800)
    return Run({
        "previous_token": watch(STEPS, {"previous_token": noisy(0.05 + 0.7 * up, 0.004)}, None, "PreviousTokenHeads"),
        "ngrams": watch(STEPS, {"kl": noisy(2 - 1.5 * up, 0.01)}, ["kl"], "NgramStages"),
        "induction": watch(STEPS, {"prefix_matching": noisy(0.03 + 0.8 * later, 0.004)}, None, "InductionHeads"),
        "repeats": watch(STEPS, {"gain": noisy(0.1 + 3 * later, 0.03)}, None, "RepeatGain"),
        "loss": watch(STEPS, {"loss": noisy(4 - 0.8 * up - 0.5 * later, 0.006)}, ["loss"], "ProbeLoss"),
    })  # fmt: skip


def vision() -> Run:
    rng, up = np.random.default_rng(0), rise(STEPS, at=300, width=0.06)
    accuracy = 0.1 + 0.8 * up[:, None] * np.array([0.3, 0.7, 1.0]) + 0.004 * rng.standard_normal((len(STEPS), 3))
    return Run({
        "probe": watch(STEPS, {"accuracy": (("step", "layer"), accuracy)}, ["accuracy"], "LinearProbe"),
        "dimension": watch(STEPS, {"two_nn": 9 - 4 * up + 0.05 * rng.standard_normal(len(STEPS))}, None,
                           "IntrinsicDimension"),
        "loss": watch(STEPS, {"loss": 2.3 - 1.9 * up + 0.006 * rng.standard_normal(len(STEPS))}, ["loss"], "ProbeLoss"),
    })  # fmt: skip


def own_series() -> Run:
    rng = np.random.default_rng(0)
    values = 0.9 - 0.6 * rise(STEPS, at=400) + 0.01 * rng.standard_normal(len(STEPS))
    data = watch(STEPS, {"dead_share": values}, None, "Mine")
    data["dead_share"].attrs |= {"long_name": "share of dead neurons", "units": "share"}
    return Run({"neurons": data})


def drift() -> Run:
    values = np.log1p(STEPS) + 0.05 * np.random.default_rng(0).standard_normal(len(STEPS))
    return Run({"norms": watch(STEPS, {"model_l2": values}, None, "WeightStatistics")})


def failed() -> Run:
    return Run({"llc": traces(STEPS[:20], np.full(20, -300.0), np.random.default_rng(0))})


CASES: dict[str, Callable[[], RunData]] = {
    "demo": scheduled,
    "the demo itself": lambda: Trajectory(DEMO, "r"),
    "control": lambda: small_run(flat=True),
    "no transition": drift,
    "sampler failed": failed,
    "two transitions": two_transitions,
    "vision": vision,
    "own series": own_series,
}


def story(run: RunData) -> str:
    told = tell(examine(run))
    answers = [f"{answer.question}: {answer.text}" for answer in told.answers]
    parts = [told.lead, *answers, *(f"- {words}" for words in told.minor), *(f"! {words}" for words in told.against)]
    return "\n".join([told.outcome, *parts])


def three_seeds() -> str:
    runs = {f"seed {seed}": small_run(seed=seed) for seed in range(3)}
    return summary(compare_runs(runs), labels_together(runs))


def golden() -> dict[str, str]:
    return dict(re.findall(r"^== (.*?) ==\n(.*?)\n(?=\n==|\Z)", STORIES.read_text("utf-8"), re.M | re.S))


@pytest.mark.parametrize("name", [*CASES, "three seeds"])
def test_the_story_is_the_reviewed_one(name: str) -> None:
    assert (three_seeds() if name == "three seeds" else story(CASES[name]())) == golden()[name]


QUESTIONS = {
    "which step": r"At step 641 \[",
    "how sure": r"How sure: Very: 5 of 6 watches change together",
    "did λ̂ change": r"λ̂ has a bump of",
    "which head": r"head 1\.2 \(\+0\.7",
    "is it in the loss": r"In the loss: Yes: loss falls by",
    "Type A or B": r"Type [AB]",
    "what came first": r"What came first: previous-token attention",
    "could it be the schedule": r"The schedule: No: no kink",
    "is it one seed only": r"One seed only: Yes",
    "what to measure next": r"Next: ",
}


ITSELF = QUESTIONS | {  # of the demo's run, as it was trained
    "which step": r"At step 771 \[",
    "how sure": r"How sure: Very: 4 of 5 watches change together",
    "which head": r"head 1\.1 \(\+0\.69",
    "is it in the loss": r"In the loss: No: loss rises smoothly",
    "Type A or B": r"Type A \(probability > 0\.99\)",
    "what came first": r"What came first: Not settled",
    "what to measure next": r"Next: Measure λ̂ at steps",
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_first_section_answers(question: str) -> None:
    assert re.search(QUESTIONS[question], golden()["demo"])
    assert re.search(ITSELF[question], golden()["the demo itself"])


def test_the_stories_speak_in_no_keys_and_hold_few_numbers_in_brackets() -> None:
    for text in golden().values():
        assert not re.search(r"\w+/\w+", text), text
        for sentence in re.split(r"(?<=[.;:])\s", text):
            inside = [n for part in re.findall(r"\[([^\]]*)\]", sentence) for n in part.split(",")]
            assert len(inside) <= 2, sentence


if __name__ == "__main__":
    told = {name: story(make()) for name, make in CASES.items()} | {"three seeds": three_seeds()}
    STORIES.write_text("\n".join(f"== {name} ==\n{text}\n" for name, text in told.items()), "utf-8")
