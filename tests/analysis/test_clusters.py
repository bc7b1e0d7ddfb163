"""Which transition is the main one: golden cases, and the rankings that would be wrong."""

from __future__ import annotations

import pytest

from devmon.analysis.transitions.clusters import headline, main_first, transitions, watch_of
from tests.support.reports import detection, jump, told

# watches of the demo in which something happens at about step 760, each by nearly the whole of its range
INDUCTION = ("in_context/icl_score", "induction/prefix_matching max", "previous_token/previous_token max",
             "repeats/gain")  # fmt: skip
QUIET = {f"{name}/x": "NO EVENT" for name in ("loss", "llc", "probe")}


def unresolved(series: str, step: float, **more: object) -> object:
    return jump(series, step, resolved=False, note="abruptness unresolved", **more)


def test_the_demo_has_one_main_transition_and_the_single_unresolved_steps_are_minor() -> None:
    steps = unresolved("probe/accuracy", 41), unresolved("probe/accuracy", 133)
    large = [jump(name, 758 + 3 * i, span=100) for i, name in enumerate(INDUCTION)]
    searched = detection(*steps, *large, outcomes=dict.fromkeys(("loss/loss", "llc/llc"), "NO EVENT"))
    found = main_first(transitions(searched))
    assert [(round(change.step), change.main) for change in found] == [(762, True), (41, False), (133, False)]
    assert found[0].watches == pytest.approx(
        dict.fromkeys(("in_context", "induction", "previous_token", "repeats"), 1.0)
    )
    assert headline(found) == "one main transition, at about step 762, and 2 minor events, at about steps 41, 133"
    # the story says so first
    _, happened, _ = told(*steps, *large)
    assert happened.startswith("At step 762 [")
    assert happened.index("At step 762 [") < happened.index("At step 41 [") < happened.index("At step 133 [")


def test_a_control_in_which_a_few_things_are_learned_early_has_none() -> None:
    early = [jump("previous_token/previous_token max", 37, half=2, span=13), jump("probe/accuracy max", 42, span=30)]
    early.append(unresolved("llc/llc", 68, half=2, span=30))
    flat = {f"{name}/x": "NO EVENT" for name in ("induction", "repeats", "in_context", "loss")}
    found = transitions(detection(*early, outcomes=flat))
    assert found
    assert not any(change.main for change in found)
    assert headline(found).startswith("no main transition, but ")
    assert told(*early, outcomes=flat)[1].startswith("No transition of the whole run, but its largest minor event")


def test_of_two_transitions_the_one_of_more_watches_is_the_main_one() -> None:
    first = [jump("a/x", 100, span=10), jump("b/x", 101, span=10)]
    second = [jump(f"{name}/x", 800 + i, span=20) for i, name in enumerate("abc")]
    found = transitions(detection(*first, *second))
    assert [(round(change.step), change.score, change.main) for change in found] == [(100, 2, False), (801, 3, True)]


def test_one_watch_alone_needs_a_resolved_jump_of_half_its_range() -> None:
    def is_main(*events: object, of: float = 1.0) -> bool:
        (change,) = transitions(detection(*events, ranges={"loss/loss": of}))
        return change.main

    assert is_main(jump("loss/loss", 100))
    assert not is_main(unresolved("loss/loss", 100))
    assert not is_main(jump("loss/loss", 100), of=3.0)
    # the share that surely changes counts: 1 in 1.8 [0.9, 1.1] comes to half, [0.2, 1.8] does not
    assert is_main(jump("loss/loss", 100), of=1.8)
    assert not is_main(jump("loss/loss", 100, size_interval=(0.2, 1.8)), of=1.8)


def test_variables_heads_and_layers_of_a_watch_count_once() -> None:
    """Counted each, the many heads of one watch would outrank the three watches that change together."""
    heads = [jump(f"heads/score[layer={i}, head={j}]", 100 + i, span=10) for i in range(2) for j in range(4)]
    one = [*(jump(f"heads/{name}", 100, span=10) for name in ("score max", "mean", "share", "rank")), *heads]
    three = [jump(f"{name}/x", 800, span=20) for name in "abc"]
    early, late = transitions(detection(*one, *three))
    assert early.watches == {"heads": 1.0}
    assert (early.main, late.main) == (False, True)
    assert len(early.events) == 4  # heads are not listed


def test_each_weakness_counts_less() -> None:
    whole = jump("a/x", 500, span=100)
    slow = jump("b/x", 500, abrupt=False)
    both = jump("c/x", 500, abrupt=False, resolved=False)
    (found,) = transitions(detection(whole, slow, both, outcomes=QUIET))
    assert found.watches == pytest.approx({"a": 1.0, "b": 0.4, "c": 0.16})
    assert {event.series for event in found.events} == {"a/x", "b/x", "c/x"}
    assert found.step == 500  # slow rises belong to it, and do not place it


def test_what_was_not_searched_is_not_counted() -> None:
    pair = [jump("a/x", 500), jump("b/x", 500)]
    refused = {f"{name}/x": "SAMPLER REJECTED" for name in "cdefg"}
    for outcomes, main in ((refused, True), (dict.fromkeys(refused, "NO EVENT"), False)):
        (found,) = transitions(detection(*pair, outcomes=outcomes))
        assert found.main == main


def test_the_watch_of_a_series() -> None:
    for name in ("w/x", "w/x max", "w/x[parameter=a/b]"):
        assert watch_of(name) == "w"
    assert watch_of("a/b/x[layer=1]") == "a/b"
    assert watch_of("loss") == "loss"


def test_what_lies_within_two_transitions_belongs_to_the_larger() -> None:
    """A broad bump of λ̂ may meet them both: counted twice it would make one change out of two."""
    small = [jump("probe/x", 700, half=2, span=3)]
    large = [jump(f"{name}/x", 760 + i, span=30) for i, name in enumerate("abc")]
    bump = jump("llc/llc", 760, half=100, span=150, kind="bump", abrupt=False)
    found = transitions(detection(*small, *large, bump))
    assert ["llc/llc" in [event.series for event in change.events] for change in found] == [False, True]
