"""Logs as people have them: what each quirk of a CSV file gives, the same to `detect` and to `replay`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from devmon.analysis.derive.tables.from_tables import series_of_table
from devmon.analysis.derive.tables.log_files import read_table
from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.search import detect
from devmon.analysis.runs.replay import replay
from devmon.analysis.series import Series
from devmon.analysis.transitions.clusters import transitions
from devmon.cli.root import app
from devmon.errors import DataError

STEPS = np.arange(0, 400, 10)
QUICK = Detector(n_null=59, kinds=("jump",))


def rise(seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng([5, seed]).standard_normal(len(STEPS))
    return np.round(10 / (1 + (150 / np.maximum(STEPS, 0.1)) ** 14) + 0.3 * noise, 6)


CLEAN = pd.DataFrame({"step": STEPS, "value": rise()})


def write(folder: Path, table: pd.DataFrame | str, sep: str = ",", **options: Any) -> Path:
    path = folder / "log.csv"
    if isinstance(table, str):
        path.write_text(table)
    else:
        table.to_csv(path, sep=sep, index=False, **options)
    return path


def read(path: Path) -> dict[str, Series]:
    return {series.name: series for series in series_of_table(read_table(path))}


def check(path: Path, steps: Any = STEPS, values: Any = None, note: str = "") -> None:
    """Both readers find these points, and the events that the detector finds in the clean arrays."""
    values = rise() if values is None else values
    series = read(path)["value"]
    np.testing.assert_array_equal(series.steps, steps)
    np.testing.assert_array_equal(series.values, values)
    assert (note in " ".join(series.notes)) if note else not series.notes, series.notes
    expected = QUICK.fit(steps, values).events()
    assert expected
    assert [event.step for event in detect(path, QUICK).events] == [event.step for event in expected]
    replayed = replay(path, step="step", value="value", detector=QUICK)
    assert replayed.fits[""].events() == expected
    assert note in replayed.to_text()


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators(tmp_path: Path, separator: str) -> None:
    check(write(tmp_path, CLEAN, separator))
    check(write(tmp_path, CLEAN.assign(x=1.5), separator))  # another numeric column changes nothing


def test_decimal_commas_between_semicolons_and_a_mark_of_the_byte_order(tmp_path: Path) -> None:
    check(write(tmp_path, CLEAN, ";", decimal=","))
    check(write(tmp_path, CLEAN, ";", decimal=",", encoding="utf-8-sig"))
    check(write(tmp_path, CLEAN.rename(columns={"value": " value "})))


def test_rows_for_training_and_validation_at_the_same_steps(tmp_path: Path) -> None:
    """As Lightning's CSVLogger and the Trainer's history write them, blanks elsewhere."""
    train = pd.DataFrame({"epoch": STEPS // 100, "step": STEPS, "value": rise(), "val": np.nan})
    val = pd.DataFrame({"epoch": STEPS // 100, "step": STEPS, "value": np.nan, "val": rise(1)})[::4]
    path = write(tmp_path, pd.concat([train, val]).sort_values("step", kind="stable"))
    check(path)
    found = read(write(tmp_path, read_table(path).rename(columns={"value": "loss"})))
    assert list(found) == ["loss", "val"]
    np.testing.assert_array_equal(found["loss"].values, rise())
    at = ~np.isnan(found["val"].values)
    np.testing.assert_array_equal(found["val"].steps[at], STEPS[::4])
    np.testing.assert_array_equal(found["val"].values[at], rise(1)[::4])
    check(write(tmp_path, pd.concat([val, train]).sort_values("step", kind="stable")))
    check(write(tmp_path, pd.concat([train, val])))  # one block after the other


def test_of_a_resumed_run_the_last_attempt_counts_and_that_is_said(tmp_path: Path) -> None:
    first = CLEAN[:30].assign(value=lambda rows: rows["value"] + 100 * (rows["step"] > 200))
    check(write(tmp_path, pd.concat([first, CLEAN[20:]])), note="the log goes back to step 200")
    # the second attempt logs at other steps: those of the first past its start are of a model that is gone
    joined = pd.concat([CLEAN[:21], CLEAN[21:].assign(step=STEPS[21:] - 3)])
    path = write(tmp_path, pd.concat([first, joined[21:]]))
    check(
        path, joined["step"], joined["value"], note="back to step 207: the last attempt counts, 9 earlier rows do not"
    )
    twice = pd.concat([first, first[20:], CLEAN[20:]])
    check(write(tmp_path, twice), note="back to step 200, 200: the last attempt counts, 20 earlier rows do not")


@pytest.mark.parametrize("order", ["shuffled", "descending", "blocks"])
def test_rows_in_any_order(tmp_path: Path, order: str) -> None:
    rows = {
        "shuffled": CLEAN.sample(frac=1, random_state=1),
        "descending": CLEAN[::-1],
        "blocks": pd.concat([CLEAN[25:], CLEAN[:25]]),
    }[order]
    check(write(tmp_path, rows))


def test_several_seeds_are_not_taken_for_a_resumed_run(tmp_path: Path) -> None:
    path = write(tmp_path, pd.concat([CLEAN, CLEAN.assign(value=rise(1))]))
    for read_it in (lambda: detect(path, QUICK), lambda: replay(path, step="step", value="value", detector=QUICK)):
        with pytest.raises(DataError, match="more than one row for step 0: .*--seed COLUMN"):
            read_it()


@pytest.mark.parametrize("cell", ["inf", "-inf", "Infinity", "-", "–", "n/a", "oops", "#DIV/0!"])
def test_one_odd_cell_is_that_cell_alone(tmp_path: Path, cell: str) -> None:
    table, expected = CLEAN.astype(object), rise()
    table.iloc[7, 1], expected[7] = cell, np.nan
    blank = cell == "n/a"  # as pandas reads it
    path = write(tmp_path, table)
    check(path, values=expected, note="" if blank else "1 of 40 cells of 'value' are no finite numbers")
    table = CLEAN.astype(object)
    table.iloc[7, 0] = cell
    keep = np.delete(np.arange(40), 7)
    check(write(tmp_path, table), STEPS[keep], rise()[keep], note="1 of 40 rows have no step: left out")


def test_a_column_of_words_is_no_series(tmp_path: Path) -> None:
    path = write(tmp_path, CLEAN.assign(note="x", mixed=["-"] * 30 + [1] * 10))
    assert list(read(path)) == ["value"]
    with pytest.raises(DataError, match="column 'note' must hold numbers, got 'x'"):
        replay(path, step="step", value="note")


def test_seeds_with_a_blank_keep_their_names_and_numbers_are_equal_however_written(tmp_path: Path) -> None:
    rows = [CLEAN.assign(seed=seed, lr=lr) for seed in (3, 10) for lr in ("1e-3", "0.01")]
    table = pd.concat([*rows, CLEAN[:2].assign(seed=np.nan, lr="1e-3")])
    path = write(tmp_path, table)
    for lr in ("0.001", "1e-3", "1.0E-03"):
        found = replay(path, step="step", value="value", seed="seed", where={"lr": lr}, detector=QUICK)
        assert list(found.fits) == ["3", "10"]
        assert found.notes == ("2 of 82 rows have no seed: left out",)
        assert "have no seed" in found.to_text()
    with pytest.raises(DataError, match=r"no row has lr = 1; it holds"):
        replay(path, step="step", value="value", where={"lr": "1"})
    with pytest.raises(DataError, match="column 'seed' is blank"):
        replay(write(tmp_path, CLEAN.assign(seed=np.nan)), step="step", value="value", seed="seed")


def test_both_commands_read_the_same_file(tmp_path: Path) -> None:
    path = write(tmp_path, pd.concat([CLEAN[:30], CLEAN[20:]]), ";")
    found = CliRunner().invoke(app, ["detect", str(path), "--nulls", "59"])
    assert found.exit_code == 0, found.output
    assert "value" in found.output
    replayed = CliRunner().invoke(app, ["replay", str(path)])
    assert "the log goes back to step 200" in replayed.output
    assert "EVENTS" in replayed.output


@pytest.mark.parametrize("form", ["lines", "unfinished", "rows", "history"])
def test_json_lines_and_the_history_of_a_trainer(tmp_path: Path, form: str) -> None:
    rows = [{"step": int(step), "value": float(value), "epoch": step / 100, "settings": {"a": 1}}
            for step, value in zip(STEPS, rise(), strict=True)]  # fmt: skip
    machine = [{"eval_runtime": 1.0, "eval_samples_per_second": 9.0, "step": 90}, {"train_runtime": 3.0, "step": 390}]
    lines = "\n".join(map(json.dumps, rows))
    text = {
        "lines": lines,
        "unfinished": lines + '\n{"step": 400, "val',
        "rows": json.dumps(rows),
        "history": json.dumps({"best_metric": None, "log_history": [*rows[:10], machine[0], *rows[10:], machine[1]]}),
    }[form]
    check(write(tmp_path, text))
    assert list(read(tmp_path / "log.csv")) == ["value"]  # what is said of the machine is no series


@pytest.mark.parametrize("text", ["{", "[]", "[1, 2]", "3\n4", '{"step": 0}\nno json\n{"step": 2}'])
def test_json_that_holds_no_rows_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"log\.csv|column of steps"):
        series_of_table(read_table(write(tmp_path, text)))


@pytest.mark.parametrize("name", ["Step", "global_step", "trainer/global_step", "Iteration", "_step"])
def test_the_column_of_steps_has_one_of_its_usual_names(tmp_path: Path, name: str) -> None:
    table = CLEAN.rename(columns={"step": name}).assign(**{"Wall time": 1e9 + STEPS, "epoch": STEPS / 100})
    series = read(write(tmp_path, table))
    assert list(series) == ["value"]
    np.testing.assert_array_equal(series["value"].steps, STEPS)
    # the optimizer's count is taken where a logger's own stands beside it
    if name == "global_step":
        both = read(write(tmp_path, table.assign(_step=2 * STEPS)))
        np.testing.assert_array_equal(both["value"].steps, STEPS)


def test_a_table_of_the_web_and_lines_of_remarks(tmp_path: Path) -> None:
    """Weights & Biases exports the least and the largest value of each step too; some loops write settings first."""
    table = pd.DataFrame({"Step": STEPS, "run-1 - loss": rise(), "run-1 - loss__MIN": -9.0, "run-1 - loss__MAX": 9.0})
    assert list(read(write(tmp_path, table))) == ["run-1 - loss"]
    check(write(tmp_path, "# lr 0.001, seed 3\n#\n" + CLEAN.to_csv(index=False)))


def test_the_terminal_says_what_was_done_to_the_rows(tmp_path: Path) -> None:
    resumed = pd.concat([CLEAN[:30], CLEAN[20:]])
    said = CliRunner().invoke(app, ["detect", str(write(tmp_path, resumed)), "--nulls", "19"]).output
    assert "value: the log goes back to step 200: the last attempt counts, 10 earlier rows do not." in said
    many = resumed[["step"]].assign(**dict.fromkeys("abcdefg", resumed["value"]))
    said = CliRunner().invoke(app, ["detect", str(write(tmp_path, many)), "--nulls", "19"]).output
    assert "a, b, c, d and 3 more: the log goes back" in said


@pytest.mark.parametrize("column", ["lr", "train/learning_rate", "lr-SGD"])
def test_the_learning_rate_is_told_beside_the_events_and_is_none_of_them(tmp_path: Path, column: str) -> None:
    # the loss falls where the rate drops at step 500, and nowhere else
    steps = np.arange(10.0, 1001, 10)
    noise = 0.01 * np.random.default_rng(5).standard_normal(len(steps))
    table = pd.DataFrame({"step": steps, column: np.where(steps < 500, 0.1, 0.01)})
    table["loss"] = np.where(steps < 500, 1.0, 0.5) + noise
    said = CliRunner().invoke(app, ["detect", str(write(tmp_path, table)), "--nulls", "99"]).output
    assert "1 series, 1 tests" in said, said
    assert said.startswith("No main transition, but 1 minor event, at about step 495."), said
    assert "of loss at step 49" in said, said
    assert "may come from the learning-rate schedule: reset at step 500 (by chance" in said, said
    alone = CliRunner().invoke(app, ["detect", str(write(tmp_path, table[["step", column]]))])
    assert "nothing to search beside the learning rate" in str(alone.exception), alone.output
    clusters = transitions(detect(table, QUICK))
    assert [[event.series for event in cluster.events] for cluster in clusters] == [["loss"]]


@pytest.mark.parametrize("last", [3, 10])
def test_a_run_that_diverges_is_searched_up_to_there_which_is_told(tmp_path: Path, last: int) -> None:
    # a loss of 2 that falls to .2 at step 200, then grows a thousandfold a row, to infinity
    loss = np.append(2 - 0.18 * rise(), [*(0.3 * 1e3 ** np.arange(1.0, last + 1)), *[np.inf] * 4])
    steps = np.append(STEPS, STEPS[-1] + 10.0 * np.arange(1, last + 5))
    path = write(tmp_path, pd.DataFrame({"step": steps, "loss": loss}))
    fit = detect(path, QUICK).fits["loss"]
    assert [event.kind for event in fit.events()] == ["jump"]
    assert fit.events()[0].size == pytest.approx(-1.8, abs=0.2)
    said = CliRunner().invoke(app, ["detect", str(path), "--nulls", "59"]).output
    assert f"diverges from step {steps[len(STEPS)]:g} on" in said
    assert f"no finite value after step {steps[-5]:g}" in said


def test_a_large_rise_is_no_divergence(tmp_path: Path) -> None:
    rates = 10 ** (1 + 0.8 * rise())  # eight decades, to a level that lasts
    path = write(tmp_path, pd.DataFrame({"step": STEPS, "count": rates}))
    assert not [note for note in detect(path, QUICK).fits["count"].notes if "diverges" in note]
