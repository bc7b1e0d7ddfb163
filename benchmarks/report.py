"""What a reader waits for: the commands, the making of a report with and without its search, the page in a browser.

    python benchmarks/report.py [--json benchmarks/report.json] [--run RUN…]

Commands are started ROUNDS times beside a bare `python -c "import numpy"`: the smallest CPU seconds (user and system)
and wall seconds of each, and their ratio to the bare one. Reports are of made-up runs, in CPU and wall seconds of this
process, one thread. The page is opened in headless Chromium (Debian: chromium, chromium-driver): milliseconds until it
is loaded, and until the frame after a hover and after all panels have turned to linear steps. `--run` adds the report
of a real run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from devmon.analysis.derive.watch_series import series_of
from devmon.analysis.detection.events import Fit
from devmon.analysis.detection.results import Detection
from devmon.analysis.reports.findings import examine
from devmon.analysis.reports.report import content_of
from devmon.analysis.reports.writers import as_html
from devmon.analysis.run import RunData
from devmon.store.trajectory import Trajectory
from tests.support.browser import Browser, programs
from tests.support.synthetic import STEPS, Run, induction_run, watch

ROUNDS = 5
FRAME = """const done = arguments[0]; const t = performance.now(); {act};
requestAnimationFrame(() => setTimeout(() => done(performance.now() - t)));"""
HOVER = """const svg = document.querySelector('figure[data-name=overview] svg'), at = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent('pointermove', { clientX: at.left + at.width / 2, clientY: at.top + 80 }))"""
TURN = "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'l' }))"


def made_up(count: int, steps: int) -> Run:
    """Random walks with standard errors, 20 to a watch."""
    rng = np.random.default_rng(0)
    grid = np.unique(np.r_[0, np.geomspace(1, 1e6, 3 * steps).astype(int)])
    grid = grid[np.linspace(0, len(grid) - 1, steps).astype(int)]
    run = Run({}, {"title": f"{count} series of {steps} steps"})
    for start in range(0, count, 20):
        names = [f"v{k}" for k in range(min(20, count - start))]
        values = {name: rng.standard_normal(steps).cumsum() for name in names}
        run.data[f"w{start // 20}"] = watch(
            grid, values | {f"{n}_se": np.full(steps, 0.5) for n in names}, names, "Mine"
        )
    return run


def stored(path: Path, watches: int = 25, count: int = 40) -> Trajectory:
    """A store of this many watches, one of them an LLC."""
    memory = induction_run()
    trajectory = Trajectory(path, seed=0, title="25 watches")
    sources = {"llc": memory["llc"]} | {
        f"w{i}": memory["loss"].drop_vars("loss_by_position") for i in range(watches - 1)
    }
    for name, data in sources.items():
        trajectory.declare(name, {k: data.attrs[k] for k in ("instrument", "fields", "fingerprint", "doc")})
        for i in range(0, len(STEPS), -(-len(STEPS) // count)):
            row = data.isel(step=i, drop=True).drop_vars(["weights", "seconds"], errors="ignore")
            trajectory.append(name, int(STEPS[i]), row, weights=f"{i:016x}", seconds=0.1)
    trajectory.fold()
    return trajectory


def command(arguments: Sequence[str]) -> dict[str, float]:
    """The smallest CPU and wall seconds of ROUNDS starts."""
    found = []
    for _ in range(ROUNDS):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall))
    return {"cpu": round(min(cpu for cpu, _ in found), 3), "wall": round(min(wall for _, wall in found), 3)}


def making(run: RunData, page: Path) -> dict[str, float]:
    """Write the page of a run in which nothing was searched, to `page`."""
    fits = {one.name: Fit("NO EVENT", series=one.name) for one in series_of(run)}
    cpu, wall = time.process_time(), time.perf_counter()
    findings = examine(run, detection=Detection(fits, (), len(fits), {"n_null": 199}))
    page.write_text(as_html(content_of(findings)), encoding="utf-8")
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu": round(cpu, 2), "wall": round(wall, 2), "megabytes": round(page.stat().st_size / 1e6, 2)}


def searched(run: RunData, page: Path) -> dict[str, float]:
    """Search all series of a run and write its page, in CPU seconds; windows and nulls are not made before."""
    start = time.process_time()
    findings = examine(run)
    found = time.process_time()
    page.write_text(as_html(content_of(findings)), encoding="utf-8")
    written = time.process_time()
    return {"cpu": round(written - start, 2), "search": round(found - start, 2), "page": round(written - found, 2)}


def opening(page: Path, profile: Path) -> dict[str, Any]:
    browser = Browser(profile)
    try:
        found: dict[str, list[float]] = {"loaded": [], "hover": [], "linear": []}
        for _ in range(ROUNDS):
            browser.open(page)
            timing = "const t = performance.getEntriesByType('navigation')[0]; return t.loadEventEnd"
            found["loaded"].append(browser.run(timing))
            for name, act in (("hover", HOVER), ("linear", TURN)):
                found[name].append(browser.driver.execute_async_script(FRAME.replace("{act}", act)))
        return {f"{name}_ms": round(float(np.median(values)), 1) for name, values in found.items()}
    finally:
        browser.driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    results: dict[str, Any] = {
        "machine": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "rounds": ROUNDS,
    }

    def tell(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        results[name] = measure()
        print(f"{name}: {results[name]}", flush=True)
        return results[name]

    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        store = str(stored(folder / "run.zarr").path)
        bare = tell("import numpy", lambda: command(["-c", "import numpy"]))
        for name, arguments in {"devmon --help": ["--help"], "devmon show, 25 watches": ["show", store]}.items():
            found = tell(name, lambda arguments=arguments: command(["-m", "devmon.cli", *arguments]))
            found["ratio"] = round(found["cpu"] / bare["cpu"], 1)
        small = str(stored(folder / "small.zarr", watches=2, count=20).path)
        for name, arguments in {
            "devmon report, 2 watches of 20 steps": ["report", small, "-o", str(folder / "small.html")],
            "devmon detect, 2 watches of 20 steps": ["detect", small],
        }.items():
            found = tell(name, lambda arguments=arguments: command(["-m", "devmon.cli", *arguments]))
            found["ratio"] = round(found["cpu"] / bare["cpu"], 1)
        page = folder / "searched.html"
        searched(made_up(1, 50), page)  # fonts and templates are loaded once: the commands above have them
        for count, steps in ((20, 60), (144, 150), (200, 1000), (1000, 200)):
            name = f"report with its search, {count} series of {steps} steps"
            tell(name, lambda count=count, steps=steps: searched(made_up(count, steps), page))
        for count, steps in ((1, 100), (200, 1000), (500, 2000)):
            name, page = f"{count} series of {steps} steps", folder / f"{count}.html"
            tell(f"report, {name}", lambda count=count, steps=steps, page=page: making(made_up(count, steps), page))
            if programs() is not None:
                tell(f"page, {name}", lambda page=page, count=count: opening(page, folder / f"profile{count}"))
        for path in given.run:
            tell(f"report, {path.name}", lambda path=path: making(Trajectory(path, "r"), folder / "real.html"))
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
