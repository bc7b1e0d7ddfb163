"""`devmon show` on a run whose chains died, and on one that left observations out."""

import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

from devmon import Trajectory, Watch, every, observe
from devmon.analysis import report
from devmon.cli.root import app
from devmon.instruments import LLC
from devmon.sampling import regression_loss


@pytest.mark.parametrize("lr, rejected", [(0.02, False), (3.0, True)])
def test_a_dead_sampler_is_told(tmp_path, lr, rejected):
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    model = torch.nn.Linear(3, 1, bias=False)
    data = (x, model(x).detach())
    llc = LLC(data, regression_loss, nbeta=40.0, gamma=5.0, lr=lr, chains=4, draws=300, burn_in=60, batch_size=60)
    observe(0, model, [Watch("llc", llc, every(10))], Trajectory(tmp_path / "run.zarr"))
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["show", str(tmp_path / "run.zarr")])
    assert shown.exit_code == 0, shown.output
    assert ("rejected" in shown.output) == rejected, shown.output


def test_what_the_overhead_budget_left_out_is_one_line(tmp_path):
    store = Trajectory(tmp_path / "run.zarr")
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["show", str(store.path)]).output
    assert "left out" not in shown
    store.record(skipped={"llc": [50, 75, 100], "lens": [75], "loss": []})
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["show", str(store.path)]).output
    lines = [line for line in shown.splitlines() if "left out" in line]
    assert lines == ["left out to keep max_overhead: llc at 3 steps (50 to 100), lens at 1 step (75)"], shown
    page = report(store, tmp_path / "report.html").read_text()
    assert "Left out to keep max_overhead: llc at 3 steps (50 to 100), lens at 1 step (75)." in page


def test_alarms_are_told_and_each_watch_is_read_once(tmp_path, monkeypatch):
    store = Trajectory(tmp_path / "run.zarr")
    alarm = {
        "series": "loss/loss",
        "kind": "jump",
        "step": 640.2,
        "low": 600,
        "high": 700,
        "p_value": 0.0004,
        "raised_at": 800,
        "status": "up",
        "ended_at": None,
    }
    store.record(alarms=[alarm, alarm | {"step": 90, "status": "withdrawn", "ended_at": 900}])
    observe(0, torch.nn.Linear(2, 2), [Watch("scores", heads, every(1))], store)
    reads = []
    read = Trajectory.__getitem__
    monkeypatch.setattr(Trajectory, "__getitem__", lambda self, name: reads.append(name) or read(self, name))
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["show", str(store.path)]).output
    lines = [line for line in shown.splitlines() if line.startswith("alarm")]
    what = "alarm at step 800 of a jump of loss/loss near step {} (600 to 700), p = 0.0004: {}"
    assert lines == [what.format(640, "up"), what.format(90, "withdrawn at step 900")], shown
    assert reads == ["scores"]
    assert "scores/score max" in shown
    assert "head=" not in shown


def heads(snapshot):
    return xr.Dataset({"score": (("layer", "head"), torch.rand(1, 3).numpy())}, attrs={"headline": ["score"]})


def test_first_and_latest_are_those_of_the_whole_run(tmp_path):
    store = Trajectory(tmp_path / "run.zarr")
    for step in (0, 1, 2, 10):
        observe(step, torch.nn.Linear(2, 2), [Watch("own", half_more, every(1))], store)
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["show", str(store.path)]).output
    (line,) = [line.split() for line in shown.splitlines() if line.strip().startswith("own/x")]
    assert line[1:] == ["▁▂▂█", "0", "15"], shown
    (line,) = [line.split() for line in shown.splitlines() if line.strip().startswith("own ")]
    assert line[2:5] == ["4", "0", "10"], shown


def half_more(snapshot):
    return xr.Dataset({"x": ((), snapshot.step * 1.5)})
