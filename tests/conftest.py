"""Shared by all tests: one thread (bitwise comparisons), no colour or width from the terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
# of what tests start too, and of BLAS: workers fill the cores already, and threads that wait for theirs spin
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import pytest
import torch

from tests.support.browser import settle

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # its scripts import each other by their bare names


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    settle(items)
