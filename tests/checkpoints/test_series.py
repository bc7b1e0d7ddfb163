"""Series of checkpoints in a folder: what is listed, read ahead, and refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from devmon import DataError
from devmon.checkpoints import series as module
from devmon.checkpoints.series import Checkpoint, Series
from tests.support.checkpoints import save


def error(where: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        Series.open(where, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000100.ckpt", 100),
        ("epoch=3-step=100.ckpt", 100),
        ("epoch=3-step=100-val_loss=0.30.ckpt", 100),
        ("step100.pt", 100),
        ("model_step_7.safetensors", 7),
        ("checkpoint-123", 123),
        ("global_step1000", 1000),
        ("step1000-tokens4B", 1000),
        ("iter_20.pth", 20),
        ("last.ckpt", None),
        ("timestep100.pt", None),
        ("step100.txt", None),
    ],
)
def test_steps_are_found_in_the_usual_names_and_in_no_others(tmp_path: Path, name: str, step: int | None) -> None:
    save(tmp_path / "step-5.pt")
    if "." in name:
        save(tmp_path / name)
    else:
        (tmp_path / name).mkdir()
    assert Series.open(tmp_path).steps == sorted({5, *([] if step is None else [step])})


def test_steps_are_numbers_in_order_and_nothing_is_loaded_to_list_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1000, 0, 20, 3):
        save(tmp_path / "checkpoints" / f"step{step}.pt")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("loaded"))
    assert Series.open(tmp_path).steps == [0, 3, 20, 1000]  # the run's folder
    assert Series.open(tmp_path / "checkpoints").steps == [0, 3, 20, 1000]


def test_a_pattern_says_where_the_step_is(tmp_path: Path) -> None:
    for name in ("stage1-step5-tokens1B.pt", "stage2-step5-tokens1B.pt", "stage1-step9-tokens2B.pt"):
        save(tmp_path / name)
    assert Series.open(tmp_path).steps == [5, 9, 14]  # stage2 counts anew
    assert "two checkpoints of step 5, stage1-step5-tokens1B.pt and stage2-step5" in error(
        tmp_path, pattern=r"step(\d+)"
    )
    series = Series.open(tmp_path, pattern=r"^stage1-step(\d+)")
    assert series.steps == [5, 9]
    assert series.read(9).name == "stage1-step9-tokens2B.pt"
    assert "no regular expression" in error(tmp_path, pattern="(")
    assert "one group" in error(tmp_path, pattern=r"step\d+")


def test_what_is_no_series_is_told(tmp_path: Path) -> None:
    assert "holds a step (it has nothing)" in error(tmp_path)
    save(tmp_path / "a.pt")
    assert "holds a step (it has a.pt)" in error(tmp_path)
    assert "is a file" in error(tmp_path / "a.pt")
    assert "there is no folder" in error(tmp_path / "none")


def test_the_next_checkpoint_is_read_ahead_and_no_more_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(6):
        save(tmp_path / f"step{step}.pt")
    (tmp_path / "step3.pt").write_bytes(b"")
    started: list[int] = []
    threads, more = set(), threading.Semaphore(0)
    read = Series.read

    def recorded(self: Series, step: int) -> Checkpoint:
        threads.add(threading.current_thread().name)
        started.append(step)
        more.release()
        return read(self, step)

    monkeypatch.setattr(module.Series, "read", recorded)
    taken = []
    for n, (step, found) in enumerate(Series.open(tmp_path).stream(range(6))):
        for _ in range(2 if n == 0 else n < 5):
            assert more.acquire(timeout=60), f"nothing is read ahead of step {step}"
        taken.append((step, type(found).__name__))
        assert started == list(range(min(n + 2, 6))), f"at {step}"
    assert taken == [(s, "DataError" if s == 3 else "Checkpoint") for s in range(6)]
    assert all(name.startswith("prefetch") for name in threads), threads
    assert list(Series.open(tmp_path).stream([])) == []
