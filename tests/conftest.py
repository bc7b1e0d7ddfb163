"""Shared by all tests: one thread (bitwise comparisons), no colour or width from the terminal."""

from __future__ import annotations

import os

os.environ |= {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}

import pytest
import torch

from tests.support.browser import settle


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    settle(items)
