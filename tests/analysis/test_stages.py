"""Transitions of several series, the stages between them, and the event that others are compared with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from devmon.analysis.series import Series
from devmon.analysis.transitions.clusters import transitions
from devmon.analysis.transitions.order import reference_event
from devmon.analysis.transitions.stages import stages
from tests.support.reports import TEN, detection, jump, told


def test_jumps_that_go_on_together_are_one_transition_and_a_wide_one_is_its_own() -> None:
    sharp, near = jump("a/x", 640), jump("b/x", 600)
    wide = jump("c/x", 160, half=20, span=150)  # reaches 310, where none of the others is
    (early, late) = transitions(detection(sharp, wide, near))
    assert [event.series for event in early.events] == ["c/x"]
    assert {event.series for event in late.events} == {"a/x", "b/x"}
    assert (late.step, late.interval, late.span) == (620, (595, 645), (550, 690))


def test_a_wide_jump_does_not_chain_two_sharp_ones() -> None:
    ends = [jump("a/x", 200, span=10), jump("b/x", 800, span=10)]
    bridge = jump("c/x", 500, half=30, span=400)
    assert len(transitions(detection(*ends, bridge))) == 3


def test_a_badly_placed_jump_does_not_place_a_transition() -> None:
    vague = jump("c/x", 640, half=300)  # 340 to 940, more than a factor of 2
    for events, expected in (([jump("a/x", 620), vague], (620, (615, 625))), ([vague], (640, (340, 940)))):
        (one,) = transitions(detection(*events))
        assert len(one.events) == len(events)
        assert (one.step, one.interval) == expected
    _, happened, _ = told(jump("a/x", 620), vague)
    assert happened.startswith("At step 620 [615, 625] ")
    assert "[340, 940]" in told(vague)[1]


def test_no_transition_from_a_weak_jump_a_turn_a_single_head_or_a_slow_rise() -> None:
    events = [jump("a/x", 640, q=0.06), replace(jump("b/x", 640), kind="turn"), jump("c/x[layer=0]", 640),
              jump("d/x", 640, abrupt=False)]  # fmt: skip
    assert transitions(detection(*events)) == []


def test_changes_of_the_stages_add_up() -> None:
    steps = np.arange(0, 1001, 50)
    one = Series("a/x", steps, steps * 2.0, np.full(21, 0.3))
    refused = Series("llc/llc", steps, np.where(steps < 100, -400.0, 5.0), None, "", steps < 100)
    parts = stages([one, refused], detection(jump("a/x", 510, span=35)))
    assert [(part.kind, part.start, part.end) for part in parts] == [
        ("stage", 0, 450), ("transition", 450, 550), ("stage", 550, 1000)]  # fmt: skip
    changes = [part.changes["a/x"] for part in parts]
    assert sum(change.value for change in changes) == 2000
    assert changes[0].se == pytest.approx(0.3 * 2**0.5)
    first = parts[0].changes["llc/llc"]
    assert (first.value, first.steps) == (0, (100, 450))  # the rejected −400 is not used


def test_transitions_that_overlap_meet_and_stages_stay_in_order() -> None:
    steps = np.arange(0, 1001, 10)
    parts = stages(
        [Series("a/x", steps, steps * 1.0)], detection(jump("a/x", 400, span=100), jump("b/x", 520, span=100))
    )
    ends = [(part.start, part.end) for part in parts]
    assert [part.kind for part in parts] == ["stage", "transition", "transition", "stage"]
    assert all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))
    assert sum(part.changes["a/x"].value for part in parts) == 1000


def test_no_event_is_one_stage() -> None:
    (only,) = stages([Series("a/x", TEN, TEN * 1.0)], detection())
    assert (only.kind, only.start, only.end) == ("stage", 0, 90)


def test_the_event_that_others_are_compared_with_is_prefix_matching_else_the_clearest() -> None:
    clear, vague = jump("a/x", 100), replace(jump("b/x", 50), size_interval=(0.1, 1.9))
    induction = replace(jump("induction/prefix_matching max", 640), p_value=0.02)
    assert reference_event([vague, clear]) is clear
    assert reference_event([vague, clear, induction]) is induction
    assert reference_event([replace(clear, q_value=0.2)]) is None
