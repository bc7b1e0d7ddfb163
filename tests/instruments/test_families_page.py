"""docs/families.md says what happens: every family and instrument is on it, and what it says is so."""

from __future__ import annotations

import pytest

from tests.anatomy.families import CONFIGS, OTHERS
from tests.anatomy.families_page import GROUPS, PAGE, RAW, REFUSES, outcome
from tests.instruments.test_instruments_families import INSTRUMENTS

NAMES = list(dict.fromkeys(case.name for case in INSTRUMENTS))
QUICK = ("ProbeLoss", "PreviousTokenHeads", "Composition", "HeadSpectra", "WeightStatistics", "Sketch")


def rows() -> dict[str, set[str]]:
    """By family, the instruments that the page says run on it."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
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
