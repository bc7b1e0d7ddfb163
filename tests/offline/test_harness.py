"""Results of lm-evaluation-harness become series: names of steps, errors, stages, several files, other tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from devmon import DataError, IdentityError, Trajectory
from devmon.analysis import series_of
from devmon.cli.root import app
from devmon.offline.harness import read_results

Tasks = dict[str, dict[str, Any]]


def write(file: Path, revision: str | None, tasks: Tasks, model: str = "lab/model", **more: Any) -> Path:
    arguments = f"pretrained={model}" + (f",revision={revision},dtype=float32" if revision else "")
    content: dict[str, Any] = {
        "results": {task: {"alias": task, **metrics} for task, metrics in tasks.items()},
        "versions": dict.fromkeys(tasks, 1.0), "n-shot": dict.fromkeys(tasks, 0),
        "config": {"model": "hf", "model_args": arguments, "limit": None}, "date": 1.0,
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content | more))
    return file


def arc(value: float, error: float | str = 0.01) -> Tasks:
    return {"arc_easy": {"acc,none": value, "acc_stderr,none": error, "acc_norm,none": value / 2,
                         "acc_norm_stderr,none": error}}  # fmt: skip


def test_metrics_become_series_with_their_errors(tmp_path: Path) -> None:
    for n, step in enumerate((0, 512, 143_000)):
        more = {"gsm8k": {"exact_match,strict-match": n / 10, "exact_match_stderr,strict-match": 0.02}} if n else {}
        write(tmp_path / f"lab__model/results_{n}.json", f"step{step}", arc(0.25 + n / 4) | more)
    run = tmp_path / "run.zarr"
    result = CliRunner().invoke(app, ["evaluations", str(tmp_path / "lab__model"), "--into", str(run)])
    assert result.exit_code == 0, result.output
    assert "5 rows read, 0 held before" in result.output
    held = {series.name: series for series in series_of(Trajectory(run, "r"))}
    assert sorted(held) == ["eval.arc_easy/acc", "eval.arc_easy/acc_norm", "eval.gsm8k/exact_match_strict_match"]
    series = held["eval.arc_easy/acc"]
    assert (series.steps.tolist(), series.values.tolist()) == ([0, 512, 143_000], [0.25, 0.5, 0.75])
    assert series.se is not None
    assert series.se.tolist() == [0.01] * 3
    assert held["eval.gsm8k/exact_match_strict_match"].steps.tolist() == [512, 143_000]
    again = CliRunner().invoke(app, ["evaluations", str(tmp_path / "lab__model"), "--into", str(run)])
    assert "0 rows read, 5 held before" in again.output


def test_old_files_missing_errors_and_the_last_of_several(tmp_path: Path) -> None:
    old = {"lambada": {"acc": 0.5, "acc_stderr": 0.1, "ppl": 20.0}}
    write(tmp_path / "step100" / "results.json", None, old, model="lab")  # the folder tells the step
    write(tmp_path / "step200" / "results_a.json", None, {"lambada": {"acc": 0.4, "acc_stderr": "N/A"}}, model="lab")
    write(tmp_path / "step200" / "results_b.json", None, {"lambada": {"acc": 0.6}}, model="lab", date=2.0)
    run = Trajectory(tmp_path / "run.zarr")
    read = read_results([tmp_path], run)
    assert (read.rows, read.held) == (2, 0)
    assert "results_b.json in place of" in read.said[-1]
    data = run["eval.lambada"]
    assert data["acc"].values.tolist() == [0.5, 0.6]
    assert data["ppl"].values[0] == 20
    assert all(
        math.isnan(value) for value in (data["ppl"].values[1], data["acc_se"].values[1], data["ppl_se"].values[0])
    )


def test_stages_begin_where_the_run_has_them(tmp_path: Path) -> None:
    name = "allenai/OLMo-2-1124-7B"
    for n, revision in enumerate(["stage1-step1000-tokens5B", "stage2-ingredient1-step1000-tokens5B", "main"]):
        write(tmp_path / f"results_{n}.json", revision, arc(0.3), model=name)
    run = Trajectory(tmp_path / "run.zarr")
    run.record(series={"offsets": {"stage1": 0, "stage2": 928_646}})
    read = read_results([tmp_path], run, branch="ingredient1")
    assert run.steps("eval.arc_easy") == [1000, 929_646]
    assert any("main" in line for line in read.said)
    alone = Trajectory(tmp_path / "alone.zarr")
    read_results([tmp_path], alone)
    assert alone.steps("eval.arc_easy") == [1000]


def test_what_is_no_one_series_is_refused(tmp_path: Path) -> None:
    run = Trajectory(tmp_path / "run.zarr")
    write(tmp_path / "a" / "results_1.json", "step1", arc(0.3))
    read_results([tmp_path / "a"], run)
    file = write(tmp_path / "b" / "results_2.json", "step2", arc(0.3), **{"n-shot": {"arc_easy": 5}})
    with pytest.raises(IdentityError, match="shots: stored '0', now '5'"):
        read_results([file], run)
    write(tmp_path / "b" / "results_3.json", "step3", arc(0.3), model="lab/other")
    with pytest.raises(DataError, match=r"several models \(lab/model, lab/other\)"):
        read_results([tmp_path / "b"], run)
    (tmp_path / "results_bad.json").write_text('{"results": 3}')
    with pytest.raises(DataError, match="no result of lm-evaluation-harness"):
        read_results([tmp_path / "results_bad.json"], run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected files results"):
        read_results([tmp_path / "empty"], run)
    with pytest.raises(DataError, match="no file or folder"):
        read_results([tmp_path / "none"], run)
