"""The pages that the tests open in a browser: of runs of every kind, of a live run, of a comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from devmon.analysis.derive.watch_series import series_of
from devmon.analysis.reports.comparison import runs_content
from devmon.analysis.reports.findings import examine
from devmon.analysis.reports.report import content_of
from devmon.analysis.reports.writers import as_html
from tests.cli.test_live_and_compare import runs_compared
from tests.support.reports import TEN, detection, jump, small_run
from tests.support.synthetic import STEPS, Run, induction_run, traces, watch

EVIL = "<img src=x onerror=document.title='evil'><script>document.title='evil'</script>"
LARGE = np.unique(np.r_[0, np.geomspace(1, 1e6, 2900).astype(int)])[:2000]
ALARM = {"series": "loss/loss", "kind": "jump", "step": 640, "low": 600, "high": 700, "raised_at": 800, "status": "up"}


def with_events() -> tuple[Run, list[Any]]:
    run = small_run()
    found = [jump("loss/loss", 640, size=-0.25), jump("induction/prefix_matching max", 600),
             replace(jump("llc/llc", 650), kind="bump"),
             replace(jump("loss/loss", 300), kind="plateau", span=(200, 400)),
             replace(jump("llc/llc", 100), kind="turn", span=None)]  # fmt: skip
    return Run(run.data, run.attrs | {"alarms": [ALARM]}), found


def large() -> Run:
    walk = np.random.default_rng(0).standard_normal((500, len(LARGE))).cumsum(1)
    return Run({f"w{i}": watch(LARGE, {f"v{k}": walk[50 * i + k] for k in range(50)}, None, "Mine") for i in range(10)})


def evil() -> Run:
    data = watch(TEN, {f"x{EVIL}": np.sin(TEN), "y": np.where(TEN == 0, np.nan, np.cos(TEN))}, None, EVIL)
    data.attrs |= {"doc": EVIL, "fields": {EVIL: EVIL}}
    data[f"x{EVIL}"].attrs["units"] = EVIL
    return Run(
        {f"w{EVIL}": data},
        {"title": EVIL, "model": EVIL, "skipped": {EVIL: [1]}, "alarms": [ALARM | {"series": EVIL, "status": EVIL}]},
    )


CASES = {
    "events": with_events(),
    "one series": (Run({"mine": watch(STEPS, {"x": np.log1p(STEPS)}, None, "Mine")}), []),
    "no event": (Run(induction_run(flat=True).data), []),
    "rejected": (Run({"llc": traces(STEPS[:20], np.full(20, -300.0), np.random.default_rng(0))}), []),
    "markup": (evil(), [replace(jump(f"w{EVIL}/x{EVIL}", 50), note=EVIL, resolved=False)]),
    "heads": (Run({name: induction_run()[name] for name in ("loss", "induction")}), []),
    "large": (large(), [jump("w3/v30", 5000, half=500, span=2000)]),
}  # fmt: skip


def write_pages(folder: Path) -> dict[str, Path]:
    """A page for each of CASES by its name, one of a comparison and one that is live."""
    made: dict[str, Path] = {}
    for name, (run, events) in CASES.items():
        found = {event.series for event in events}
        outcome = "SAMPLER REJECTED" if name == "rejected" else "NO EVENT"
        silent = {one.name: outcome for one in series_of(run) if one.name not in found}
        said = content_of(examine(run, detection=detection(*events, outcomes=silent)))
        made[name] = folder / f"{name}.html"
        made[name].write_text(as_html(said), encoding="utf-8")
    made["compared"] = folder / "compared.html"
    made["compared"].write_text(as_html(runs_content(*runs_compared())), encoding="utf-8")
    made["live"] = folder / "live.html"
    run, events = CASES["events"]
    live = content_of(examine(run, detection=detection(*events)))
    made["live"].write_text(as_html(live, refresh=3600), encoding="utf-8")
    return made
