"""The sentences of a comparison: shared, not shared, in an order that holds over runs."""

from __future__ import annotations

from typing import Any

from devmon.analysis.detection.events import Event
from devmon.analysis.detection.results import Detection
from devmon.analysis.labels import Label
from devmon.analysis.reports.comparison import summary
from devmon.analysis.reports.prose.seeds import together
from devmon.analysis.runs.compare import compare_runs
from tests.support.reports import detection, jump

LABELS = {
    "induction/prefix_matching max": Label("induction (best head)", "", "of its attention", rises="learns induction"),
    "loss/loss": Label("loss", "", "nats per token"),
}


def runs(*lags: float, at: float = 40.0) -> dict[str, object]:
    """A run a lag: induction, and the loss so many steps after it."""
    return {
        f"seed {i}": detection(
            jump("induction/prefix_matching max", at + i, half=1, span=8),
            jump("loss/loss", at + i + lag, half=1, span=8),
            ranges={"induction/prefix_matching max": 1, "loss/loss": 1},
        )
        for i, lag in enumerate(lags)
    }


def of_loss(*events: Event, **more: Any) -> Detection:
    return detection(*events, ranges={"loss/loss": 1}, **more)


def test_what_all_share_is_told_with_its_steps_and_the_naming_series_first() -> None:
    lead = together(compare_runs(runs(-2, -2, -2)), LABELS)[0]
    assert lead == (
        "In 3 of 3 runs the model learns induction, in the median at step 40, from 39 to 41: induction (best head) "
        "rises by 1 of its attention and loss rises by 1 nats per token."
    )


def test_an_order_needs_six_runs_that_agree() -> None:
    few = together(compare_runs(runs(2, 2, 2)), LABELS)[-1]
    assert few == "What comes first cannot be told from 3 runs: 6 that agree are the fewest."
    many = together(compare_runs(runs(*[2] * 7)), LABELS)[-1]
    assert many == "What comes first: induction (best head) before loss (7 of 7, by 2 steps)."
    mixed = together(compare_runs(runs(2, -2, 2, -2, 2, -2, 2)), LABELS)[-1]
    assert mixed == "No order of its changes holds over runs."


def test_runs_that_share_no_transition_are_told_so() -> None:
    apart = {"a": of_loss(jump("loss/loss", 10, half=1, span=2)), "b": of_loss(jump("loss/loss", 80, half=1, span=2))}
    text = summary(compare_runs(apart), LABELS)
    assert "2 different events in 2 runs; 0 of them in two or more" in text
    alone = {"a": of_loss(jump("loss/loss", 10)), "b": of_loss(outcomes={"loss/loss": "NO EVENT"})}
    assert together(compare_runs(alone), LABELS)[0] == ("No two of the 2 runs have a transition of the whole run.")
