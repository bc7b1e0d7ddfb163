"""`devmon serve`, `show --follow` and `compare`: what they serve and say, and what they refuse."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from devmon import Trajectory
from devmon.analysis import plots
from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event, Trend
from devmon.analysis.detection.results import Detection
from devmon.analysis.reports.comparison import differences, matched_table, order_table, runs_content, summary
from devmon.analysis.runs.compare import RunsComparison, compare_runs
from devmon.cli.root import app
from devmon.live.page import live_report
from devmon.live.server import Live, server, waiting
from tests.support.reports import detection, jump
from tests.support.synthetic import STEPS, Run, induction_run, watch

RUNNER = CliRunner(env={"COLUMNS": "200"})


def store(path: Path, seed: int, until: int = 2000, lr: float = 0.1) -> Trajectory:
    memory = induction_run(seed)["loss"].drop_vars(["loss_by_position", "icl_score", "icl_score_se"])
    trajectory = Trajectory(path, seed=seed, title="T", settings={"lr": lr, "width": 8})
    trajectory.declare("loss", {key: memory.attrs[key] for key in ("instrument", "fields", "fingerprint", "doc")})
    held = trajectory.steps("loss")
    for i, step in enumerate(STEPS):
        if step <= until and step not in held:
            row = memory.isel(step=i, drop=True).drop_vars(["weights", "seconds"], errors="ignore")
            trajectory.append("loss", int(step), row, weights=f"{step:016x}", seconds=0.25)
    return trajectory


# ---- serving ----


@pytest.fixture
def served() -> Iterator[tuple[Live, int]]:
    live = Live(lambda: 1, lambda: "<p>page</p>")
    serving = server(live)
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield live, serving.server_port
    serving.shutdown()
    serving.server_close()
    thread.join()


def ask(port: int, path: str = "/", method: str = "GET", host: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def test_only_the_page_is_served(served: tuple[Live, int]) -> None:
    live, port = served
    live.update()
    status, body, headers = ask(port)
    assert (status, body) == (200, b"<p>page</p>")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert ask(port, method="HEAD")[:2] == (200, b"")
    for path in (
        "/..",
        "/../etc/passwd",
        "/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/pyproject.toml",
        "/?x",
        "/index.html",
    ):
        assert ask(port, path)[0] == 404, path
    for method in ("POST", "PUT", "DELETE"):
        assert ask(port, method=method)[0] == 501


def test_it_listens_on_this_machine_alone_and_refuses_other_names(served: tuple[Live, int]) -> None:
    live, port = served
    serving = server(live)
    assert serving.server_address[0] == "127.0.0.1"
    serving.server_close()
    assert ask(port, host=f"localhost:{port}")[0] == 200
    assert ask(port, host="localhost")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "0.0.0.0"):
        assert ask(port, host=host)[0] == 403, host


def test_the_page_is_made_again_only_on_news_and_stays_where_making_fails() -> None:
    state, made = {"now": 1}, []

    def make() -> str:
        if state["now"] == 2:
            raise ValueError("<b>half a row")
        made.append(state["now"])
        return f"page {state['now']}"

    live = Live(lambda: state["now"], make)
    assert "reading the run" in live.page
    assert [live.update(), live.update()] == [True, False]
    state["now"] = 2
    assert not live.update()
    assert (live.page, live.error) == ("page 1", "ValueError: <b>half a row")
    state["now"] = 3
    assert live.update()
    assert (live.page, live.error, made) == ("page 3", "", [1, 3])
    assert "&lt;b&gt;" in waiting("<b>", 1)


def test_a_run_that_grows_gets_a_new_page_that_says_it_is_provisional(tmp_path: Path) -> None:
    live = live_report(str(tmp_path / "run.zarr"), 2, nulls=19)
    assert not live.update()
    assert "run.zarr" in live.page  # no run yet: said, and not the end
    store(tmp_path / "run.zarr", 0, until=50)
    assert live.update()
    assert f"from step 0 to {max(s for s in STEPS if s <= 50)};" in live.page
    assert "Provisional: the run may still be written" in live.page
    assert '<meta http-equiv="refresh" content="2">' in live.page
    assert not live.update()
    store(tmp_path / "run.zarr", 0, until=400)
    assert live.update()
    assert f"from step 0 to {max(s for s in STEPS if s <= 400)};" in live.page


def test_the_page_is_served_by_serve_and_by_its_earlier_name_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path / "run" / "trajectory.zarr", 0, until=10)
    asked: list[tuple[str, int]] = []

    def busy(live: Live, port: int) -> None:
        assert live.state() is not None  # the run is found in its folder
        asked.append(("busy", port))
        raise OSError(98, "Address already in use")

    monkeypatch.setattr("devmon.live.server.server", busy)
    for name, said in (("serve", ""), ("watch", "devmon watch is now devmon serve")):
        run = RUNNER.invoke(app, [name, str(tmp_path / "run"), "--port", "8123"])
        assert "port 8123 cannot be opened (Address already in use)" in str(run.exception), run.output
        assert run.stderr.startswith(said)
        assert bool(run.stderr) == bool(said)
    assert asked == [("busy", 8123)] * 2
    commands = re.findall(r"^│ (\w+) ", RUNNER.invoke(app, ["--help"]).output, re.MULTILINE)
    assert ("serve" in commands, "watch" in commands) == (True, False), commands


def test_follow_shows_the_run_again_when_a_step_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, looks = tmp_path / "run.zarr", []
    store(path, 0, until=10)

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            store(path, 0, until=20)
        if len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    shown = RUNNER.invoke(app, ["show", str(path), "--follow", "--every", "0.5"])
    assert shown.exit_code == 0, shown.output
    assert looks == [0.5] * 4
    assert shown.output.count("ProbeLoss") == 2  # at the start, and after the new step; not at the other looks


# ---- comparing ----


def searched(*events: Event, outcomes: dict[str, str] | None = None) -> Detection:
    """`detection` whose fits say which steps they searched, as compare_runs asks."""
    found, steps = detection(*events, outcomes=outcomes), STEPS.astype(float)
    trend = Trend(steps, steps, steps, steps)
    return replace(found, fits={name: replace(fit, trend=trend) for name, fit in found.fits.items()})


def runs_compared() -> tuple[dict[str, Run], RunsComparison]:
    data = watch(STEPS, {"x": STEPS * 1.0, "y": STEPS * 1.0}, ["x", "y"], "Mine")
    runs = {f"r{i}": Run({"w": data}, {"seed": i, "settings": {"lr": 0.1, "width": 8 + (i == 2)}}) for i in range(8)}
    found = {name: searched(jump("w/x", 300 + i), jump("w/y", 500 - 10 * i)) for i, name in enumerate(runs)}
    found["r7"] = searched(jump("w/x", 310), outcomes={"w/y": "NO EVENT"})
    return runs, compare_runs(found)


def test_matched_events_order_and_differences_are_told() -> None:
    runs, found = runs_compared()
    assert "2 different events in 8 runs; 2 of them in two or more, 1 in all" in summary(found)
    first, second = matched_table(found).rows
    assert first.cells[:4] == ["w/x", "jump up", "8 of 8", "304"]
    assert second.cells[:3] == ["w/y", "jump up", "7 of 8"]
    (row,) = order_table(found).rows
    assert row.cells[0] == "w/x before w/y"
    assert row.cells[1] == "7 : 0"
    assert row.cells[2].startswith("167 [")  # 500 - 30 - 303
    assert row.cells[4] == "w/x first"
    rows = {row.cells[0]: row.cells[1:] for row in differences(runs).rows}
    assert set(rows) == {"seed", "settings.width"}
    assert rows["settings.width"] == ["8", "8", "9", "8", "8", "8", "8", "8"]
    sections = [section.key for section in runs_content(runs, found).sections]
    assert sections == ["story", "matched", "order", "curves", "differs"]


def test_matched_figure_has_each_run_at_its_step() -> None:
    _, found = runs_compared()
    _, ax = plots.plot_matched(found.matched)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["w/x (jump up)", "w/y (jump up)"]
    dots = sorted(float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "o")
    assert dots == sorted([300.0 + i for i in range(7)] + [310.0] + [500.0 - 10 * i for i in range(7)])
    medians = [float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "D"]
    assert medians == [303.5, 470.0]


def test_compare_prints_and_writes_one_page(tmp_path: Path) -> None:
    for seed in range(2):
        store(tmp_path / f"s{seed}.zarr", seed, lr=0.1 + seed)
    runs = [str(tmp_path / f"s{seed}.zarr") for seed in range(2)]
    out = tmp_path / "c.json"
    done = RUNNER.invoke(app, ["compare", *runs, "--nulls", "39", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "settings.lr" in done.output
    assert "settings.width" not in done.output
    data = json.loads(out.read_text())
    assert data["title"] == "2 runs compared"
    np.testing.assert_array_equal(data["series"][1]["steps"], STEPS)
    assert data["series"][1]["name"] == "s1.zarr: loss/loss"
    runs_of = {name: Trajectory(path, "r") for name, path in zip("ab", runs, strict=True)}
    found = compare_runs({name: searched(outcomes={"loss/loss": "NO EVENT"}) for name in runs_of}, Detector())
    assert "NO EVENT in any of 2 runs" in summary(found)
    assert runs_content(runs_of, found).outcome == "NO EVENT"


@pytest.mark.parametrize("args", [["a.zarr"], ["a.zarr", "a.zarr"]])
def test_one_run_is_nothing_to_compare(args: list[str]) -> None:
    done = RUNNER.invoke(app, ["compare", *args])
    assert done.exit_code == 1
    assert "two runs or more" in str(done.exception)
