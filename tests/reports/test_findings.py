"""Findings are made once: each watch is read once, its λ̂ derived once, its events gathered once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr

from devmon.analysis.derive import llc as derived
from devmon.analysis.derive import watch_series
from devmon.analysis.derive.watch_series import series_of
from devmon.analysis.reports import findings as findings_module
from devmon.analysis.reports.findings import examine
from devmon.analysis.reports.report import content_of
from devmon.analysis.transitions import clusters, order, phases, stages
from tests.support.reports import TEN, detection, jump, small_run
from tests.support.synthetic import Run, watch


class Counting(Run):
    """A run that counts how often each watch is read."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.data, run.attrs)
        self.reads: Counter[str] = Counter()

    def __getitem__(self, name: str) -> xr.Dataset:
        self.reads[name] += 1
        return super().__getitem__(name)


def counted(calls: Counter[str], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return call


def test_a_report_reads_and_derives_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = Counting(small_run()), Counter[str]()
    events = jump("loss/loss", 640, size=-0.25), jump("llc/llc", 610, span=100)
    searched = detection(*events, outcomes={"induction/prefix_matching max": "NO EVENT"})
    for function in (derived.llc, clusters.transitions, stages.stages_between, order.reference_event, order.lags):
        for module in (derived, watch_series, findings_module, clusters, stages, phases, order):
            if getattr(module, function.__name__, None) is function:
                monkeypatch.setattr(module, function.__name__, counted(calls, function))
    said = content_of(examine(run, detection=searched))
    assert {"llc", "order", "stages"} <= {section.key for section in said.sections}
    assert run.reads == dict.fromkeys(run.data, 1)
    assert calls == {"llc": 1, "transitions": 1, "stages_between": 1, "reference_event": 1, "lags": 1}


def test_findings_hold_the_series_of_the_run_and_its_events_in_order() -> None:
    run = small_run(flat=True)
    named = ["induction/prefix_matching[layer=1, head=0]", "loss/loss", "llc/llc"]
    known = examine(run, detection=detection(*(jump(name, 600 - i) for i, name in enumerate(named))))
    assert [event.series for event in known.events] == ["llc/llc", "loss/loss", named[0]]  # the run's own first
    assert known.control
    for own, expected in zip(known.series, series_of(run), strict=True):
        assert own.name == expected.name
        np.testing.assert_array_equal(own.values, expected.values)
    assert known.verdicts["llc"].shape == (run["llc"].sizes["step"],)


def test_without_a_search_of_its_own_the_run_is_searched() -> None:
    known = examine(Run({"w": watch(TEN, {"x": np.ones(10)}, None, "Mine")}))
    assert {name: fit.outcome for name, fit in known.detection.fits.items()} == {"w/x": "NO EVENT"}
    assert (known.main, known.reference, known.lags, known.transitions, known.evidence) == (None, None, [], [], [])
