"""Which steps a text chooses."""

from __future__ import annotations

import pytest

from devmon import DataError
from devmon.checkpoints.selection import select

HELD = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 144_000, 1000)]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", HELD),
        ("every:50000", [0, 50_000, 100_000]),
        ("1, 0,512", [0, 1, 512]),
        ("100-1000", [128, 256, 512, 1000]),
        ("142000-", [142_000, 143_000]),
        ("0,64-128,every:143000", [0, 64, 128, 143_000]),
        ("log:2", [0, 1, 143_000]),
        ("log:4", [0, 1, 64, 3000, 143_000]),
    ],
)
def test_steps_are_chosen(text: str, chosen: list[int]) -> None:
    assert select(HELD, text) == chosen


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3", "no checkpoint of step 3"),
        ("some", "expected all, log:40"),
        ("log:0", "expected all"),
        ("129-200", "choose none of 0, 1, 2, 4, 8, 16, 32, 64, … 143000"),
        ("", "cannot be read"),
    ],
)
def test_steps_that_cannot_be_chosen_are_told(text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        select(HELD, text)
