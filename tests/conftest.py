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


LONG = (  # files of minutes or half a minute come first: one that is begun last leaves the other cores idle
    "recipes/test_recipes_b.py",
    "offline/test_engines.py",
    "instruments/test_susceptibilities.py",
    "docs/test_site.py",
    "recipes/test_recipes_a.py",
    "recipes/test_recipes_c.py",
    "recipes/test_demo.py",
    "test_readme.py",
    "sampling/test_calibrate.py",
    "offline/test_pythia.py",
    "sampling/test_components.py",
    "sampling/test_verdicts.py",
    "callbacks/test_sidecar.py",
    "recipes/test_features.py",
    "recipes/test_fine_tuning.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    settle(items)
    place = {str(Path(__file__).parent / name): k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))
