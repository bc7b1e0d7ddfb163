"""docs/families.md says what happens: every family and instrument is on it, and what it says is so."""

from __future__ import annotations

from pathlib import Path

import pytest

from devmon import presets
from devmon.errors import InstrumentError
from devmon.monitoring.loop import LoopMonitor
from devmon.store.trajectory import Trajectory
from tests.anatomy.families import CONFIGS, OTHERS
from tests.anatomy.families_page import GROUPS, PAGE, RAW, REFUSES, outcome
from tests.anatomy.test_anatomy_sites import VOCAB
from tests.instruments.test_instruments_families import INSTRUMENTS, TEXT, model_of, of_images

NAMES = list(dict.fromkeys(case.name for case in INSTRUMENTS))
# Of what the standard preset leaves out: nothing, with sinks too; heads in a stream that is not a sum, nearly all.
PRESET = ("gemma2", "gpt_oss", "granite", "longformer", "bart")
QUICK = ("ProbeLoss", "PreviousTokenHeads", "Composition", "HeadSpectra", "WeightStatistics", "Sketch")


def rows() -> dict[str, set[str]]:
    """By family, the instruments that the page says run on it."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| families"):
            break
        if line.startswith("| ") and not line.startswith("| family"):
            family, runs, refused = (cell.strip() for cell in line.strip("|").split("|"))
            told = {"all": set(NAMES), "none": set()}.get(runs, set(runs.split(", ")))
            rest = {"all": set(NAMES), "": set()}.get(refused, set(refused.split(", ")))
            assert told | rest == set(NAMES), f"{family}: write the page again (python -m tests.anatomy.families_page)"
            assert not told & rest
            found[family] = told
    return found


def test_every_family_and_instrument_is_on_the_page() -> None:
    assert set(rows()) == {*CONFIGS, *OTHERS} == {family for group in GROUPS.values() for family in group}
    assert RAW not in PAGE.read_text(encoding="utf-8")


def test_what_the_contract_tests_run_is_what_the_page_says_runs() -> None:
    page = rows()
    for case in INSTRUMENTS:
        for family in case.families:
            assert case.name in page[family], f"{case.name} on {family}"


@pytest.mark.parametrize("family", OTHERS)
def test_the_other_families_do_what_the_page_says(family: str) -> None:
    found = {name: outcome(name, family) for name in QUICK}
    assert RAW not in found.values()
    assert {name for name, value in found.items() if value != REFUSES} == rows()[family] & set(QUICK)


def left_out() -> dict[str, list[str]]:
    """By family, the watches of the standard preset that the page says are left out."""
    _, table = PAGE.read_text(encoding="utf-8").split("| families | left out |\n|---|---|\n")
    found = {}
    for line in table.splitlines():
        families, names = (cell.strip() for cell in line.strip("|").split("|"))
        found |= {family: [] if names == "nothing" else names.split(", ") for family in families.split("; ")}
    return found


@pytest.mark.parametrize("family", PRESET)
def test_the_standard_preset_runs_whole_or_is_refused_once_with_what_to_leave_out(family: str, tmp_path: Path) -> None:
    watches = presets.standard(TEXT, last=10, vocab_size=VOCAB)
    out = left_out()[family]
    model = model_of(family)
    if out:
        with LoopMonitor(tmp_path / "refused.zarr", watches) as monitor:
            with pytest.raises(InstrumentError, match=f"{len(out)} watches do not fit") as refused:
                monitor.step(0, model)
            assert str(refused.value).endswith(f"not in ({', '.join(map(repr, out))})]")
    rest = [watch for watch in watches if watch.name not in out]
    with LoopMonitor(tmp_path / "run.zarr", rest, strict=True) as monitor:
        monitor.step(0, model)
    run = Trajectory(tmp_path / "run.zarr", mode="r")
    assert {name for name in run if 0 in run.steps(name)} == {watch.name for watch in rest}


def test_every_family_of_text_has_a_line_of_the_standard_preset() -> None:
    assert set(left_out()) == {family for family in (*CONFIGS, *OTHERS) if not of_images(family)}
