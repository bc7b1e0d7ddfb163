"""`Plan`: values that do not go together, files of options with mistakes, and the options of the command."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from devmon import DataError, DevmonError
from devmon.offline.plan import Plan, pairs
from tests.support.offline_toys import (
    measure,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


REFUSED: dict[str, tuple[list[str], str]] = {
    "nothing to measure": ([], "nothing to measure: give --source"),
    "a preset alone": (["--preset", "standard"], "go together"),
    "tokens alone": (["--source", "S:study", "--tokens", "T"], "go together"),
    "no such preset": (["--preset", "huge", "--tokens", "T"], "those are economy, standard, full"),
    "no model": (["--preset", "economy", "--tokens", "T"], "bring no config.json"),
    "no watches": (["--source", "S:model"], "gives no watches"),
    "watches twice": (
        ["--source", "S:study", "--preset", "economy", "--tokens", "T"],
        "its own watches: leave --preset",
    ),
    "no study": (["--source", "S:nothing"], "a model, a list of Watch, a Monitor, or .model, watches.; got int"),
    "no vocabulary": (["--source", "S:model", "--preset", "economy", "--tokens", "T"], "--vocab-size"),
    "other tokens": (
        ["--source", "S:model", "--preset", "economy", "--tokens", "T", "--vocab-size", "5"],
        "0 to 4: give",
    ),
    "no tokens": (["--source", "S:model", "--preset", "economy", "--tokens", "none.npy"], "none.npy cannot be read"),
    "text": (["--source", "S:model", "--preset", "economy", "--tokens", "S"], "no tokenizer lies with the series"),
    "no such watch": (["--source", "S:study", "--watch", "lcc"], "no watch 'lcc': those are norm, llc"),
    "no such step": (["--source", "S:study", "--steps", "3"], "no checkpoint of step 3"),
    "no such engine": (["--source", "S:study", "--engine", "dask"], "those are processes, ray, slurm"),
    "an option of none": (["--source", "S:study", "--option", "num_gpus=1"], "of the engines ray and slurm"),
    "an option that is none": (["--source", "S:study", "--engine", "ray", "--option", "fast"], "NAME=VALUE"),
    "an LLC of none": (["--source", "S:study", "--llc", "nbeta=30"], "among the source's watches"),
    "shard": (["--source", "S:study", "--shard", "3/2"], "i from 1 to n"),
    "dtype": (
        ["--source", "S:study", "--dtype", "int8"],
        "no dtype 'int8': those are float32, float64, bfloat16, float16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_go_together_are_told_and_nothing_is_made(
    trained: Path, language: Path, tmp_path: Path, case: str
) -> None:
    args, said = REFUSED[case]
    places = {"S": str(trained / "script.py"), "T": str(language / "tokens.pt")}
    named = [places.get(arg, arg.replace("S:", places["S"] + ":")) for arg in args]
    with pytest.raises(DevmonError, match=said):
        raise measure(trained / "saved", "--into", tmp_path / "run.zarr", *named).exception  # type: ignore[misc]
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("presett = 'full'", "unknown key 'presett', perhaps 'preset'"),
        ("workers = 'two'", "workers must be an integer, got 'two'"),
        ("workers = true", "workers must be an integer, got True"),
        ("seed = 0.5", "seed must be an integer, got 0.5"),
        ("forget = 1", "forget must be true or false, got 1"),
        ("steps = [1, 2]", r"steps must be a string, got \[1, 2\]"),
        ("watch = 'loss'", "watch must be a list of strings, got 'loss'"),
        ("watch = ['loss', 3]", r"watch must be a list of strings, got \['loss', 3\]"),
        ("series = ", "cannot be read as TOML"),
        ("preset = 'full'", "no series and no into"),
    ],
)
def test_a_config_with_mistakes_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(DataError, match=said):
        Plan.read(tmp_path / "study.toml", {})


def test_settings_are_literals_or_words() -> None:
    assert pairs(["a=1", "b=1e-5", "c=word", "d={'x': 1}", "e=a=b"], "option") == {
        "a": 1, "b": 1e-5, "c": "word", "d": {"x": 1}, "e": "a=b"}  # fmt: skip
    for texts in (["a"], ["a=1", "a=2"], ["1a=2"]):
        with pytest.raises(DataError, match="NAME=VALUE"):
            pairs(texts, "option")


def test_every_field_of_the_plan_is_an_option_of_the_command_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command is given arrives as it was given, and what it is not given is left to the file."""
    read: list[dict[str, Any]] = []

    def stop(path: Path | None, given: dict[str, Any]) -> Plan:
        read.append({key: value for key, value in given.items() if value not in (None, [])})
        raise DataError("enough")

    monkeypatch.setattr(Plan, "read", stop)
    assert "enough" in str(measure("saved").exception)
    values = {"into": "run", "source": "a:b", "watch": ["x", "y"], "options": ["k=1"], "bos": 0, "shard": "1/2"}
    others = {"allow_pickle": True, "forget": True, "workers": 3, "dtype": "float64", "vocab_size": 7}
    flags = "--into run --source a:b --watch x --watch y --option k=1 --bos 0 --shard 1/2 --allow-pickle --forget"
    more = "--workers 3 --dtype float64 --vocab-size 7"
    assert "enough" in str(measure("saved", *flags.split(), *more.split()).exception)
    assert read == [{"series": "saved"}, {"series": "saved"} | values | others]
    shown = measure("--help").output
    for field in fields(Plan):
        flag = {"series": "SERIES", "options": "--option"}.get(field.name, "--" + field.name.replace("_", "-"))
        assert re.search(rf"{flag}\b", shown), flag
    assert "--no-forget" not in shown
    assert re.search(r"--workers .*default: \(1\)", shown), shown
    assert re.search(r"--tokenizer .*default: \(the series'\)", shown), shown


def test_the_least_value_of_an_option_holds_in_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("series = 's'\ninto = 'r'\nsource = 'a:b'\nlength = 1\n")
    with pytest.raises(DataError, match="length must be at least 2, got 1"):
        Plan.read(tmp_path / "study.toml", {})
    assert Plan.read(tmp_path / "study.toml", {"length": 2, "watch": []}).length == 2
    assert measure("s", "--into", "r", "--source", "a:b", "--length", 1).exit_code == 2
