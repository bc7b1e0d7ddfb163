"""The story in words: outcome, order, what argues against it; numbers as a reader meets them."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from devmon.analysis.transitions.order import lags
from devmon.analysis.wording import number
from tests.support.reports import detection, jump, told


def test_what_came_first_is_said_the_right_way_round() -> None:
    main = jump("induction/prefix_matching max", 640, span=150)
    early, late = jump("prev/x", 560, span=150), jump("gain/x", 700, span=150)
    head, happened, _ = told(main, early, late)
    assert head == "EVENTS"
    assert happened.startswith("At step 640 [555, 705] ")
    assert re.search(r"What came first: prev: x, by its jump, 80 steps before induction: prefix matching", happened)
    rows = {row.event.series: row for row in lags(detection(main, early, late), main)}
    assert (rows["prev/x"].steps, rows["gain/x"].steps) == pytest.approx((-80, 60))
    assert rows["prev/x"].first > 0.99
    assert rows["gain/x"].first < 0.01


def test_order_is_open_where_intervals_meet_or_an_event_is_not_resolved() -> None:
    main, same = jump("a/prefix_matching max", 640), jump("b/x", 642)
    coarse = replace(jump("c/x", 560), resolved=False, note="abruptness unresolved: measure steps 555, 560, 565")
    _, happened, against = told(main, same, coarse)
    assert "What came first: Not settled: the earliest, a: prefix matching (best element) and b: x" in happened
    assert "steps before" not in happened
    assert "not resolved in time, for lack of checkpoints: c: x" in against


def test_no_event_is_stated_as_a_result_and_weak_events_argue_nothing() -> None:
    head, happened, against = told(jump("a/x", 300, q=0.3), outcomes={"b/x": "NO EVENT"}, control=True)
    assert head == "NO EVENT"
    assert "control" in happened
    assert "2 series were searched" in happened
    assert "40 tests" in happened
    assert "1 event of a single series does not stand among 40 (q > 0.05): a: x rises by 1.00 at step 300" in against


def test_rejection_and_lack_of_data_have_their_own_names() -> None:
    verdicts = {"llc": np.array(["negative"] * 3 + ["diverged"])}
    head, _, against = told(outcomes={"llc/llc": "SAMPLER REJECTED"}, verdicts=verdicts)
    assert head == "SAMPLER REJECTED"
    assert "all 4 estimates of λ̂ are rejected (negative 3, diverged 1)" in against
    partly = {"llc": np.array(["negative", "ok", "ok", "ok"])}
    assert "1 of 4 estimates of λ̂ are rejected" in told(outcomes={"llc/llc": "NO EVENT"}, verdicts=partly)[2]
    assert told(outcomes={"a/x": "UNRESOLVED"})[0] == "UNRESOLVED"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-1234.5, "−1234"),
        (0.00012345, "0.000123"),
        (1.5e-7, "1.5e−7"),
        (None, "–"),
        (float("nan"), "–"),
        (float("-inf"), "−∞"),
        (12345678.0, "12345678"),
    ],
)
def test_numbers_for_readers(value: float | None, text: str) -> None:
    assert number(value) == text
