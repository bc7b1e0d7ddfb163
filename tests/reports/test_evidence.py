"""What speaks for and against a transition: which led, its type, the schedule, thresholded scores; whom to cite."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xarray as xr

from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.llc_loss import loss_of_llc
from devmon.analysis.detection.results import Detection
from devmon.analysis.reports.bibtex import bibtex
from devmon.analysis.reports.findings import examine
from devmon.analysis.reports.prose.evidence import Evidence, type_in_short, type_in_words
from devmon.analysis.reports.prose.story import tell
from devmon.analysis.reports.references import CITED, references
from devmon.analysis.reports.writers import as_html
from devmon.analysis.series import Series
from devmon.analysis.transitions.mirage import MIRAGE, SURVIVES
from devmon.analysis.transitions.phases import types_between
from devmon.analysis.transitions.schedule import schedule_of
from tests.support.reports import TEN, content, detection, findings, jump, sketches
from tests.support.synthetic import Run, traces, watch


def evidence(measured: list[Series], searched: Detection, run: Run | None = None) -> Sequence[Evidence]:
    return findings(measured, searched, run).evidence


def series(name: str, before: float, after: float, se: float | None) -> Series:
    steps = np.arange(0, 1001, 50)
    return Series(name, steps, np.where(steps < 600, before, after), None if se is None else np.full(21, se))


@pytest.mark.parametrize(
    ("lam", "loss", "kind"),
    [((20, 60), (3.0, 2.5), "Type A"), ((60, 20), (3.0, 2.5), "Type B"), ((20, 60), (2.5, 3.0), "Neither")],
)
def test_the_type_is_told_with_both_changes(lam: Any, loss: Any, kind: str) -> None:
    one, other = series("loss/loss", *loss, 0.01), series("llc/llc", *lam, 1.0)
    found = detection(jump("loss/loss", 600, span=100), jump("llc/llc", 600, span=100))
    (row,) = evidence([one, other], found)
    assert row.phase is not None
    told = type_in_words(row.phase)
    assert f"{kind} " in told
    assert "probability > 0.99" in told
    assert f"the loss {'falls' if loss[1] < loss[0] else 'rises'} by 0.500 ± 0.014" in told
    assert f"λ̂ {'rises' if lam[1] > lam[0] else 'falls'} by 40.0 ± 1.4" in told
    assert ("lower free energy" in told) == (kind == "Type A")
    (rejected,) = types_between(
        one, Series("l", other.steps, other.values, other.se, "", np.ones(21, bool)), [(500, 700)]
    )
    assert "cannot be told: λ lacks two accepted values" in type_in_words(rejected)


def test_a_type_that_cannot_be_told_is_none_in_the_table() -> None:
    """The cell and the sentence on one transition say the same."""
    one, other = series("loss/loss", 3.0, 2.5, 0.01), series("llc/llc", 20, 60, 1.0)
    (kind,) = types_between(one, other, [(500, 700)])
    assert type_in_short(kind) == "A (> 0.99)"
    shared = replace(kind, start=600.0, end=600.0)
    assert "cannot be told" in type_in_words(shared)
    assert type_in_short(shared) == "–"


def test_a_peak_of_the_llc_is_told_beside_the_change_across_it() -> None:
    loss, llc = series("loss/loss", 3.0, 2.5, 0.01), series("llc/llc", 60, 50, 1.0)
    peak = jump("llc/llc", 610, kind="bump", size=40.0, abrupt=False)
    elsewhere = jump("llc/llc", 100, kind="bump", size=40.0, abrupt=False)
    (row,) = evidence([loss, llc], detection(jump("loss/loss", 600, span=100), peak, elsewhere))
    assert row.phase is not None
    told = type_in_words(row.phase)
    assert told.startswith("Type B (probability > 0.99)")
    assert "λ̂ falls by 10.0 ± 1.4 over steps 500–700" in told
    assert row.passing == (peak,)


def test_the_loss_is_that_of_the_data_that_the_llc_is_of() -> None:
    """A loss on other data that rises says nothing of the type: λ̂ belongs to the loss that its chains sample."""
    steps = np.arange(0, 1001, 50)
    data = traces(steps, np.where(steps < 600, 60.0, 20.0), np.random.default_rng(0))
    falls = xr.where(data["step"] < 600, 1.0, 0.0)
    data["loss"], data["baseline"] = data["loss"] + falls, data["baseline"] + falls
    run = Run({"llc": data, "loss": watch(steps, {"loss": np.where(steps < 600, 2.0, 2.5)}, None, "ProbeLoss")})
    (row,) = examine(
        run, detection=detection(jump("llc/llc", 600, span=100), outcomes={"loss/loss": "NO EVENT"})
    ).evidence
    assert row.phase is not None
    assert row.phase.loss is not None
    assert row.phase.kind == "B"
    assert row.phase.loss.value == pytest.approx(-1, abs=0.05)
    own = loss_of_llc("llc", data, llc(data))
    assert own is not None
    assert own.values == pytest.approx(data["baseline"].values[:, :, 20:].mean((1, 2)))
    assert own.replicates is not None
    assert own.replicates.mean(0) == pytest.approx(own.values)
    assert loss_of_llc("llc", data.drop_vars("baseline"), llc(data)) is None


def test_without_an_llc_no_type_is_told() -> None:
    (row,) = evidence([series("loss/loss", 3, 2, None)], detection(jump("loss/loss", 600)))
    assert row.phase is None


def test_which_led_within_a_transition_and_when_none_did() -> None:
    early, late = jump("a/x", 600, span=100), jump("b/x", 640, span=100)
    (row,) = evidence([], detection(late, early))
    assert row.led
    assert row.lag is not None
    assert (row.first, row.second, round(row.lag.lag)) == (early, late, 40)
    blurred = jump("c/x", 500, span=150, resolved=False)
    (row,) = evidence([], detection(blurred, early))
    assert (row.led, row.first) == (False, blurred)
    (row,) = evidence([], detection(jump("b/x", 601), early))
    assert (row.led, row.first) == (False, early)


def test_schedule_mirage_and_resolution_argue_against() -> None:
    data = watch(TEN, {"accuracy": np.ones(10), "nll": np.ones(10)}, ["accuracy", "nll"], "Mine")
    data["accuracy"].attrs["continuous_twin"] = "nll"
    run = Run({"w": data}, {"settings": {"warm_up": 600}})
    steps = np.arange(0, 5001, 50)
    every = [Series("w/accuracy", steps, steps * 1.0)]
    thresholded = jump("w/accuracy", 610, resolved=False, note="abruptness unresolved: measure step 605")
    story = tell(findings(every, detection(thresholded, outcomes={"w/nll": "NO EVENT"}), run))
    text = " ".join([*story.against, *(answer.text for answer in story.answers)])
    assert "learning-rate schedule: kink at step 600" in text
    assert "jumps only as a thresholded score: w/nll has no jump there" in text
    assert "at steps 605" in text
    (clean,) = evidence(every, detection(jump("w/accuracy", 610), jump("w/nll", 612)), Run({"w": data}))
    two = detection(jump("w/accuracy", 610), jump("w/accuracy", 3000), jump("w/nll", 612))
    first, second = evidence(every, two, Run({"w": data}))
    assert [s.verdict for s in (*first.survivals, *second.survivals)] == [SURVIVES, MIRAGE]
    assert [s.verdict for s in clean.survivals] == [SURVIVES]
    assert clean.kinks is None  # no schedule is known


def test_kinks_that_the_settings_tell_are_those_of_the_schedule() -> None:
    for settings, expected in (
        ({"kinks": [500, 900]}, [500.0, 900.0]),
        ({"warm_up": 20, "kinks": [500]}, [20.0, 500.0]),
        ({"kinks": []}, None),
        ({"warm_up": 0, "kinks": "no"}, None),
        ({}, None),
    ):
        assert schedule_of(Run({}, {"settings": settings}), []) == expected


def test_what_argues_against_a_transition_stands_with_it() -> None:
    steps = np.arange(0, 3000, 100)
    run = Run({"a": watch(steps, {"x": steps * 1.0}, None, "Mine")}, {"settings": {"warm_up": 2000}})
    found = detection(jump("a/x", 100, span=10), jump("b/x", 2000, span=10, resolved=False))
    story = tell(findings([Series("a/x", steps, steps * 1.0)], found, run))
    assert story.lead.startswith("At step 100 ")
    assert len(story.minor) == 1
    assert story.minor[0].startswith("At step 2000 ")
    assert "kink at step 2000" in story.minor[0]
    assert not any("kink" in words for words in story.against)


def test_every_reference_is_a_bibtex_entry_with_its_own_key() -> None:
    cited = references(CITED)
    text = bibtex(cited)
    keys = re.findall(r"^@\w+\{(\w+),$", text, re.M)
    assert len(keys) == len(set(keys)) == len(cited)
    assert text.count("{") == text.count("}")
    numbers = [one.rpartition("arXiv:")[2] for one in cited if "arXiv:" in one]
    assert re.findall(r"eprint = \{(.*)\}", text) == numbers
    assert "author = {Olsson and others}" in text
    assert "author = {Hewitt and Liang}" in text
    assert re.search(r"@article\{vehtari.*?volume = \{16\},\n  number = \{2\}", text, re.S)


def test_the_report_cites_only_what_was_used() -> None:
    html = as_html(content(Run({"sketch": sketches()})))
    assert "eprint = {1905.00414}" in html
    assert "2209.11895" not in html
