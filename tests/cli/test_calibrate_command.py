"""`devmon calibrate`, in process on a linear regression: what it prints, draws, stores and refuses; its plot and section."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import Result
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from typer.testing import CliRunner

from devmon import DataError, DevmonError, IdentityError, InstrumentError, Trajectory
from devmon.analysis import plots
from devmon.analysis import report as write_report
from devmon.analysis.derive.llc import llc
from devmon.cli.root import app
from devmon.instruments import LLC
from devmon.monitoring.fingerprint import identity
from devmon.offline.source import load_source, with_weights
from devmon.sampling import Calibration, Settings, regression_loss
from devmon.snapshot import Snapshot, weights_digest
from tests.support.synthetic import Run

SCRIPT = """
import lightning as L
import torch

from devmon.instruments import LLC
from devmon.sampling import regression_loss


class Regression(L.LightningModule):
    def __init__(self, inputs=4):
        super().__init__()
        self.net = torch.nn.Linear(inputs, 1, bias=False)


def data():
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    return x, x @ torch.arange(4.0)[:, None]


def instrument(**more):
    given = dict(nbeta=100, chains=2, draws=60, burn_in=20, batch_size=64, sampler="baoab") | more
    return LLC(data(), regression_loss, **given)


def made():
    return Regression(), instrument()


def bare():
    return torch.nn.Linear(4, 1, bias=False), instrument()


def wider():
    return Regression(5), instrument()


def deeper():
    return torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False), torch.nn.Linear(1, 1)), instrument()


def kernel():
    from devmon.sampling import SGLD

    return Regression(), instrument(sampler=SGLD(1e-3, 100, 1.0))


def restricted():
    return Regression(), instrument(mask={"weight": torch.tensor([[True, True, False, False]])}, nbeta=None)


def reversed_pair():
    return instrument(), Regression()


def needy(inputs):
    return Regression(inputs), instrument()


if __name__ == "__main__":
    raise SystemExit("it trained")
"""
WEIGHTS = {0: [9.0, 9, 9, 9], 10: [0.1, 1, 2, 3], 20: [0.0, 1.01, 2, 3], 30: [0.0, 1, 2.01, 3], 40: [0.0, 1, 2, 3]}


class Module(L.LightningModule):
    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1, bias=False)
        self.net.weight.data = torch.tensor([weights])


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])


def calibrate(*args: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, args)])


def fail(*args: object) -> str:
    result = calibrate(*args)
    assert isinstance(result.exception, DevmonError), (result.exception, result.output)
    return str(result.exception)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script, a run and its checkpoints as Lightning writes them; step 0 is far from the minimum."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "script.py").write_text(SCRIPT)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    for step, weights in WEIGHTS.items():
        trainer.strategy.connect(Module(weights))
        trainer.save_checkpoint(folder / "run" / "checkpoints" / f"step-{step:08d}.ckpt")
    Trajectory(folder / "run" / "trajectory.zarr", title="T")
    return folder


@pytest.fixture(scope="module")
def done(study: Path) -> Result:
    out = study / "pictures" / "calibration.png"
    return calibrate(f"{study / 'script.py'}:made", study / "run", "--tolerance", 0.05, "-o", out)


@pytest.fixture
def copy(study: Path, done: Result, tmp_path: Path) -> Path:
    """A study of one's own, calibrated already."""
    return Path(shutil.copytree(study, tmp_path / "study"))


def stored(folder: Path) -> dict[str, Any]:
    text = (folder / "run" / "trajectory.zarr" / "zarr.json").read_text()

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return json.loads(text, parse_constant=refuse)["attributes"]["calibration"]


def trials(rows: list[dict[str, Any]] | None = None, lr: float = 1e-3, gamma: float = 10.0) -> xr.Dataset:
    """Made-up trials: an lr sweep at gamma 10 and a gamma sweep at lr 1e-3, for two checkpoints."""
    if rows is None:
        rows = [
            {"model": m, "lr": rate, "gamma": 10.0, "llc": 2.0 + m + 100 * rate}
            for m in (0, 1)
            for rate in (1e-2, 3e-3, 1e-3)
        ]
        rows += [{"model": m, "lr": 1e-3, "gamma": g, "llc": 2.1 + m} for m in (0, 1) for g in (100.0, 1.0)]
    full = [{"se": 0.1, "ess": 50.0, "rhat": 1.0, "temperature": 1.0, "verdict": "ok"} | row for row in rows]
    columns = {name: ("trial", np.array([row[name] for row in full])) for name in full[0]}
    return xr.Dataset(columns, attrs={"lr": lr, "gamma": gamma, "nbeta": 100.0, "reasons": "because"})


def answer(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[Any]:
    """Let the calibration answer at once, and keep what it was asked."""
    asked: list[Any] = []

    def found(models: Any, loss: Any, data: Any, start: Settings, **options: Any) -> Calibration:
        asked.append((models, loss, data, start, options))
        chosen = {"lr": 1e-3, "gamma": 10.0, "nbeta": start.nbeta or 66.7512345, "steps_per_draw": 3} | changes
        of_models = trials()
        of_models["llc"][0] = math.nan
        of_models = of_models.isel(trial=of_models["model"].values < len(models))
        return Calibration(replace(start, **chosen), of_models, "because", True, 0.01)

    monkeypatch.setattr("devmon.offline.calibrate.calibrate", found)
    return asked


# ---- the whole of it ----


def test_the_choice_is_printed_drawn_and_stored(study: Path, done: Result) -> None:
    assert done.exception is None, done.output
    kept = stored(study)
    assert kept["steps"] == {"late": 40, "middle": 20}  # of 10, 20, 30, 40: step 0 does not count
    assert (kept["tolerance"], kept["max_steps"], kept["source"]) == (0.05, 3000, "script.py:made")
    assert str(study) not in json.dumps(kept)
    assert set(kept["trials"]["model"]) == {0, 1}
    assert len({len(column) for column in kept["trials"].values()}) == 1
    assert kept["reasons"] in done.stdout.replace("\n", " ")
    for words in ("late 40", "middle 20", "verdict"):
        assert words in done.stdout
    assert "late checkpoint: step 40, middle checkpoint: step 20 (5 in the series)" in done.stderr
    assert (study / "pictures" / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_the_line_and_the_stored_settings_are_one_instrument_that_finds_lambda(study: Path, done: Result) -> None:
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("LLC("))
    model, start = load_source(f"{study / 'script.py'}:made")
    pasted = eval(line, {"LLC": LLC, "data": start.data, "loss": regression_loss})
    instrument = LLC(start.data, regression_loss, **stored(study)["settings"])
    assert identity(pasted) == identity(instrument)
    kept = ("nbeta", "chains", "draws", "burn_in", "batch_size", "sampler", "mask")
    assert [getattr(instrument, name) for name in kept] == [getattr(start, name) for name in kept]
    late = with_weights(model, study / "run" / "checkpoints" / "step-00000040.ckpt")
    found = llc(instrument(Snapshot(40, late)))
    x = start.data[0].double()
    stiff = 100 * torch.linalg.eigvalsh(x.T @ x / len(x))
    exact = float((stiff / (stiff + instrument.gamma)).sum() / 2)
    value, se = found["llc"].item(), found["se"].item()
    assert found["verdict"].item() == "ok"
    assert abs(value - exact) < 3 * se + 0.05 * exact, (value, se, exact)


def test_the_weights_are_those_of_the_steps_late_first(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch)
    source = f"{copy / 'script.py'}:made"
    for options, steps in (
        ((), [40, 20]),
        (("--late", 30), [30, 20]),
        (("--late", 20), [20, 10]),
        (("--middle", 0), [40, 0]),
    ):
        assert calibrate(source, copy / "run" / "checkpoints", "--force", *options).exception is None
        models, loss, _, start, limits = asked.pop()
        assert [model.weight.flatten().tolist() for model in models] == [pytest.approx(WEIGHTS[step]) for step in steps]
        assert not models[0].training
        assert loss is regression_loss
        assert callable(limits.pop("progress"))
        assert (start.sampler, start.batch_size, start.chains, limits) == ("baoab", 64, 2, {"tolerance": 0.02, "max_steps": 3000})  # fmt: skip
        assert list(stored(copy)["steps"].values()) == steps
        assert stored(copy)["weights"] == [weights_digest(model) for model in models]


def test_a_single_checkpoint_past_step_0_serves_alone(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch)
    for step in (10, 20, 30):
        (copy / "run" / "checkpoints" / f"step-{step:08d}.ckpt").unlink()
    assert calibrate(f"{copy / 'script.py'}:made", copy / "run", "--force").exception is None
    assert len(asked[0][0]) == 1
    assert stored(copy)["steps"] == {"late": 40}


def test_without_a_run_it_prints_and_says_that_nothing_is_stored(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch)
    shutil.move(copy / "run" / "trajectory.zarr", copy / "elsewhere.zarr")
    source = f"{copy / 'script.py'}:restricted"
    result = calibrate(source, copy / "run")
    assert result.exception is None
    assert "nothing is stored" in result.stderr
    assert "nbeta=66.75, gamma=10.0, lr=0.001, control_variate=False, steps_per_draw=3" in result.stdout
    assert "mask=mask" in result.stdout
    assert not (copy / "run" / "trajectory.zarr").exists()
    assert calibrate(source, copy / "run", "--into", copy / "elsewhere.zarr", "--force").exception is None
    settings = Trajectory(copy / "elsewhere.zarr", "r").attrs["calibration"]["settings"]
    assert "mask" not in settings
    assert "there is no trajectory" in fail(source, copy / "run", "--into", copy / "none.zarr")


def test_a_module_on_the_path_is_a_source_too(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch)
    monkeypatch.chdir(copy)
    (copy / "my_study.py").write_text(SCRIPT)
    assert calibrate("my_study:bare", "run", "--force").exception is None
    assert asked[0][0][0].weight.flatten().tolist() == WEIGHTS[40]
    del sys.modules["my_study"]


# ---- what it refuses ----


def test_another_question_is_refused_before_anything_is_computed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch)
    before = stored(copy)
    source = f"{copy / 'script.py'}:made"
    said = fail(source, copy / "run", "--tolerance", 0.1, "--middle", 10)
    assert "tolerance: stored 0.05, now 0.1" in said
    assert "steps: stored {'late': 40, 'middle': 20}, now {'late': 40, 'middle': 10}" in said
    assert "--force" in said
    script = (copy / "script.py").read_text()
    (copy / "script.py").write_text(script.replace("batch_size=64", "batch_size=32"))
    assert "batch_size: stored 64, now 32" in fail(source, copy / "run", "--tolerance", 0.05)
    (copy / "script.py").write_text(script.replace("arange(4.0)", "arange(1.0, 5)"))
    assert "data: stored" in fail(source, copy / "run", "--tolerance", 0.05)
    assert asked == []
    assert stored(copy) == before


def test_another_answer_is_shown_and_refused_unless_forced(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, lr=0.00212345)
    before = stored(copy)
    args = (f"{copy / 'script.py'}:made", copy / "run", "--tolerance", 0.05)
    result = calibrate(*args)
    assert isinstance(result.exception, IdentityError)
    assert "now 0.002123" in str(result.exception)
    assert "lr=0.002123" in result.stdout  # what was computed is not lost
    assert stored(copy) == before
    assert calibrate(*args, "--force").exception is None
    assert stored(copy)["settings"]["lr"] == 0.002123
    assert stored(copy)["trials"]["llc"][:2] == [None, 2.3]
    assert calibrate(*args).exception is None  # the same once more
    assert stored(copy)["reasons"] == "because"


@pytest.mark.parametrize(("name", "said"), [
    ("script.py", "expected path/to/script.py:name"),
    ("none.py:made", "there is no script at"),
    ("script.py:absent", "has no function 'absent'; it has data, instrument, made"),
    ("script.py:needy", "give its arguments defaults"),
    ("script.py:data", "must return (model, LLC(data, loss, ...)), a torch module first; got (Tensor, Tensor)"),
    ("script.py:reversed_pair", "got (LLC, Regression)"),
    ("script.py:kernel", "name the kernel"),
    ("script.py:wider", "net.weight has shape (1, 4) in step-00000040.ckpt, (1, 5) in Linear"),
    ("script.py:deeper", "its prefixes are 'net.', none fits"),
])  # fmt: skip
def test_a_source_that_does_not_fit_is_told_in_one_line(study: Path, name: str, said: str) -> None:
    assert said in fail(study / name, study / "run")


def test_a_missing_module_is_told_and_what_a_module_lacks_is_not_hidden(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no module 'no_such'" in fail("no_such.thing:made", study / "run")
    (study / "broken_study.py").write_text("import no_such_dependency")
    monkeypatch.chdir(study)
    assert isinstance(calibrate("broken_study:made", study / "run").exception, ModuleNotFoundError)


def test_steps_and_folders_that_are_not_there(study: Path, tmp_path: Path) -> None:
    source = f"{study / 'script.py'}:made"
    assert (
        fail(source, study / "run", "--late", 41) == "there is no checkpoint of --late 41; there are 0, 10, 20, 30, 40"
    )
    assert "there is no checkpoint of --middle 5" in fail(source, study / "run", "--middle", 5)
    assert "comes after the late checkpoint" in fail(source, study / "run", "--late", 20, "--middle", 30)
    assert "give the folder of a CheckpointSeries" in fail(source, tmp_path)
    shutil.copy(study / "run" / "checkpoints" / "step-00000000.ckpt", tmp_path)
    assert "no checkpoint past step 0" in fail(source, tmp_path)
    assert "-o takes a .png" in fail(source, study / "run", "-o", "picture.txt")


def test_a_calibration_that_fails_names_the_steps_and_how_to_take_others(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise InstrumentError("no step size ran healthily")

    monkeypatch.setattr("devmon.offline.calibrate.calibrate", fails)
    said = fail(f"{copy / 'script.py'}:made", copy / "run", "--middle", 0, "--force")
    assert said.startswith(
        "no step size ran healthily (late checkpoint: step 40, middle checkpoint: step 0; --late and"
    )


SAVE: dict[str, tuple[Callable[[], Any], str]] = {
    "two copies": (lambda: {f"{p}.weight": torch.zeros(1, 4) for p in ("net", "ema.net")}, "--prefix net."),
    "another layer": (lambda: {"net.weight": torch.zeros(1, 4), "net.bias": torch.zeros(1)}, "the model lacks 'bias'"),
    "other names": (
        lambda: {"a.w": torch.zeros(1, 4), "b.w": torch.zeros(2)},
        "its prefixes are 'a.', 'b.', none fits",
    ),
}


@pytest.mark.parametrize("case", SAVE)
def test_keys_fit_after_one_prefix_or_not_at_all(case: str, tmp_path: Path) -> None:
    make, said = SAVE[case]
    torch.save({"state_dict": make()}, tmp_path / "c.ckpt")
    with pytest.raises(DataError) as caught:
        with_weights(torch.nn.Linear(4, 1, bias=False), tmp_path / "c.ckpt")
    assert said in str(caught.value), str(caught.value)


def test_a_part_of_the_keys_says_which_are_missing_under_which_prefix(tmp_path: Path) -> None:
    state = {"net.weight": torch.zeros(1, 4), "net.bias": torch.zeros(1), "old.weight": torch.zeros(1, 4)}
    torch.save({"state_dict": {key: state[key] for key in ("net.weight", "old.weight")}}, tmp_path / "c.ckpt")
    with pytest.raises(DataError, match=r"'net.' 'bias' are missing.*'net.' \(1 of 2 keys\), 'old.' \(1 of 2 keys\)"):
        with_weights(torch.nn.Linear(4, 1), tmp_path / "c.ckpt")
    torch.save(
        {"state_dict": state | {"ema.net.weight": torch.ones(1, 4), "ema.net.bias": torch.ones(1)}}, tmp_path / "d.ckpt"
    )
    model = with_weights(torch.nn.Linear(4, 1), tmp_path / "d.ckpt", "ema.net.")
    assert model.weight.tolist() == [[1.0] * 4]
    with pytest.raises(DataError, match="under the prefix 'net' "):
        with_weights(torch.nn.Linear(4, 1), tmp_path / "d.ckpt", "net")


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    model, path = torch.nn.Linear(4, 1), tmp_path / "c.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": Run({})}, path)
    with pytest.raises(DataError, match="add_safe_globals"):
        with_weights(model, path)
    torch.save(model.state_dict(), path)
    with pytest.raises(DataError, match="no 'state_dict'"):
        with_weights(model, path)
    for content in (b"", b"PK\x03\x04 half a file"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            with_weights(model, path)


# ---- the plot ----


def joined(ax: Axes) -> list[Line2D]:
    """The lines of accepted trials (caps of error bars are lines, too)."""
    return [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) > 1]


def test_lines_join_one_checkpoint_and_one_gamma() -> None:
    fig, (by_lr, by_gamma) = plots.plot_calibration(trials())
    assert [list(line.get_xdata()) for line in joined(by_lr)] == [[1e-3, 3e-3, 1e-2]] * 2
    assert list(joined(by_lr)[1].get_ydata()) == pytest.approx([3.1, 3.3, 4.0])
    assert [list(line.get_xdata()) for line in joined(by_gamma)] == [[1.0, 10.0, 100.0]] * 2  # the lr sweep was at 10
    upright = [
        [line.get_xdata()[0] for line in ax.lines if list(line.get_ydata()) == [0, 1]] for ax in (by_lr, by_gamma)
    ]
    assert upright == [[1e-3], [10.0]]
    assert (by_lr.get_xscale(), by_gamma.get_xscale()) == ("log", "log")
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    assert words == ["late checkpoint", "middle checkpoint", "chosen"]


def test_of_settings_tried_twice_the_later_trial_is_on_the_line() -> None:
    rows = [
        {"model": 0, "lr": rate, "gamma": 10.0, "llc": value} for rate, value in ((1e-3, 9.0), (1e-2, 2.0), (1e-3, 3.0))
    ]
    _, (by_lr, _) = plots.plot_calibration(trials(rows))
    (line,) = joined(by_lr)
    assert list(line.get_ydata()) == [3.0, 2.0]
    faint = [one for one in by_lr.lines if one.get_marker() == "o" and one.get_alpha() is not None]
    assert [list(one.get_ydata()) for one in faint] == [[9.0]]


def test_bars_are_1_645_standard_errors() -> None:
    _, (by_lr, _) = plots.plot_calibration(trials())
    bars = [segment for bars in by_lr.collections for segment in bars.get_segments()]
    assert bars[0][:, 1] == pytest.approx([2.1 - 0.1645, 2.1 + 0.1645])


def test_rejected_trials_are_hollow_off_the_line_and_off_the_scale() -> None:
    rows = [{"model": 0, "lr": 10.0**-k, "gamma": 10.0, "llc": value, "verdict": verdict}
            for k, value, verdict in ((1, math.nan, "non-finite"), (2, 1e6, "diverged"), (3, 2.0, "ok"), (4, 2.2, "ok"))]  # fmt: skip
    fig, (by_lr, by_gamma) = plots.plot_calibration(trials(rows))
    hollow = {line.get_xdata()[0]: line for line in by_lr.lines if line.get_markerfacecolor() == "white"}
    assert sorted(hollow) == [1e-2, 1e-1]
    low, high = by_lr.get_ylim()
    assert (hollow[1e-2].get_ydata()[0], high) == (high, pytest.approx(2.4, abs=0.1))
    assert low <= hollow[1e-1].get_ydata()[0] <= high
    (line,) = joined(by_lr)
    assert list(line.get_xdata()) == [1e-4, 1e-3]
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    assert {"rejected, diverged", "rejected, non-finite"} <= set(words)
    assert joined(by_gamma) == []


def test_trials_of_several_gammas_are_several_lines_and_a_single_trial_is_shown() -> None:
    rows = [{"model": 0, "lr": rate, "gamma": g, "llc": g} for g in (1.0, 2.0) for rate in (1e-3, 1e-2)]
    rows.append({"model": 1, "lr": 0.5, "gamma": 7.0, "llc": 1.0})
    fig, (by_lr, _) = plots.plot_calibration(trials(rows))
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    assert {"late checkpoint, gamma 1", "late checkpoint, gamma 2", "middle checkpoint, gamma 7"} <= set(words)
    assert len({line.get_linestyle() for line in joined(by_lr)}) == 2
    assert 0.5 in [line.get_xdata()[0] for line in by_lr.lines]


def test_axes_that_are_given_are_drawn_on_and_no_setting_changes() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    fig = Figure()
    axes = list(fig.subplots(1, 2))
    assert plots.plot_calibration(trials(), ax=axes) == (fig, axes)
    assert all(ax.has_data() for ax in axes)
    nothing = trials([{"model": 0, "lr": 1.0, "gamma": 1.0, "llc": math.nan, "se": math.inf, "verdict": "non-finite"}])
    assert plots.plot_calibration(nothing)[1][0].has_data()
    assert dict(matplotlib.rcParams) == before


# ---- the report ----


def test_the_report_has_reasons_figure_and_numbers(copy: Path, tmp_path: Path) -> None:
    run = Trajectory(copy / "run" / "trajectory.zarr", "r")
    text = write_report(run, tmp_path / "r.html", figures=tmp_path / "figures").read_text(encoding="utf-8")
    section = text[text.index('<section id="calibration">') : text.index('<section id="watches">')]
    assert run.attrs["calibration"]["reasons"].replace("'", "&#39;") in section
    assert "step 40 (late) and 20 (middle)" in section
    assert '<figure id="figure-calibration">' in section
    assert section.count("<tr") == 1 + len(run.attrs["calibration"]["trials"]["lr"])
    assert '<a href="#calibration">' in text
    assert (tmp_path / "figures" / "calibration.png").is_file()
    assert text.count(run.attrs["calibration"]["weights"][0]) == 0  # not once more among the provenance


def test_missing_numbers_and_foreign_words_are_shown_as_they_are(tmp_path: Path) -> None:
    table = {name: column.values.tolist() for name, column in trials().items()}
    table["llc"][0], table["verdict"][0] = None, "<b>"
    kept = {
        "reasons": "<script>",
        "settings": {"lr": 1e-3, "gamma": 10.0},
        "steps": {"late": 4, "middle": 2},
        "trials": table,
    }
    text = write_report(Run({}, {"calibration": kept}), tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.count("<script") == 2  # the page's own
    assert "&lt;script&gt;" in text
    assert "<td>&lt;b&gt;</td>" in text
    assert text.count('<tr class="weak">') == 1
    other = write_report(Run({}, {"calibration": "by hand"}), tmp_path / "s.html").read_text(encoding="utf-8")
    assert "by hand" in other
    assert 'id="calibration"' not in other


# ---- the demo ----


def test_the_demo_offers_its_own_model_and_llc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from devmon.data.text import read_text
    from devmon.recipes import language_model

    (tmp_path / "own.txt").write_text("".join(f"line {i}: {i * i} quick foxes\n" for i in range(2000)))
    text = read_text(tmp_path / "own.txt")
    monkeypatch.setattr(language_model, "read_text", lambda: text)
    model, instrument = load_source("devmon.recipes.language_model:model_and_llc")
    (watch,) = (watch for watch in language_model.watches(text, 100) if watch.name == "llc")
    assert identity(instrument) == identity(watch.instrument)
    assert instrument.loss(model, instrument.data[:2]).shape == (2,)
