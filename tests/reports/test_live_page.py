"""`Monitor(live=...)`: the page beside the training, and that training knows nothing of it."""

from __future__ import annotations

import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest

from devmon import DevmonError, Trajectory, Watch, every
from devmon.callbacks import Monitor
from devmon.live import background as live_module
from devmon.live.background import LivePage
from devmon.live.page import live_page
from tests.support.lightning_toys import Norm, train
from tests.support.loops import LOOPS, fit, same

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


@pytest.mark.parametrize("loop", LOOPS)
def test_the_page_is_there_when_training_ends_and_training_is_untouched(tmp_path: Path, loop: str) -> None:
    page = tmp_path / "pages" / "report.html"
    watched = fit(loop, tmp_path / "run.zarr", [Watch("norm", Norm(), every(2))], live=page)
    assert same(watched, fit(loop, None, []))
    text = (tmp_path / "pages" / "report.html").read_text(encoding="utf-8")
    assert "7 checkpoints from step 0 to 12" in text  # the last page holds the last step
    assert "Provisional: the run may still be written" in text
    assert '<meta http-equiv="refresh"' not in text
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["report.html"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Started:
    """Stands for the process that makes a page."""

    all: list[Started] = []  # noqa: RUF012

    def __init__(self, command: list[str], stderr: Any, **_: Any) -> None:
        self.command, self.stderr, self.returncode = command, stderr, None
        self.all.append(self)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if timeout is not None and self.returncode is None:
            raise subprocess.TimeoutExpired("page", timeout)
        return 0

    def kill(self) -> None:
        self.returncode = -9


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LivePage, Clock, list[Started]]:
    monkeypatch.setattr(Started, "all", [])
    monkeypatch.setattr(live_module.subprocess, "Popen", Started)
    clock = Clock()
    return LivePage(tmp_path / "r.html", clock), clock, Started.all


def test_one_page_at_a_time_and_a_twentieth_of_the_time(beside: Any) -> None:
    page, clock, started = beside
    page.update("run.zarr")
    page.update("run.zarr")
    assert len(started) == 1  # the first is still being made
    assert started[0].command[-3:] == ["run.zarr", page.page, "5"]
    clock.now = 4.0
    started[0].returncode = 0
    page.update("run.zarr")
    for now, pages in ((4 + 4 * 19 - 0.1, 1), (4 + 4 * 19, 2)):
        clock.now = now
        page.update("run.zarr")
        assert len(started) == pages, now
    with pytest.warns(UserWarning, match="ended with code -9"):
        page.close("run.zarr")  # a page that never ends is stopped, and the last one made, which loads itself no more
    assert started[1].returncode == -9
    assert started[2].command[-2:] == ["run.zarr", page.page]


def test_what_fails_is_warned_of_once(beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page, clock, started = beside
    page.update("run.zarr")
    started[0].returncode = 1
    started[0].stderr.write(b"Traceback\nStoreError: the run is gone\n")
    with pytest.warns(UserWarning, match=r"r\.html was not made \(StoreError: the run is gone\); training goes on"):
        page.update("run.zarr")
    clock.now = 100.0

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(live_module.subprocess, "Popen", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page.update("run.zarr")
        page.close("run.zarr")


def test_a_run_that_cannot_be_read_fails_no_training(tmp_path: Path) -> None:
    page = LivePage(tmp_path / "r.html")
    with pytest.warns(UserWarning, match=r"there is no trajectory at"):
        page.close(tmp_path / "nothing.zarr")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("name", ["report.md", "report"])
def test_another_ending_is_refused_before_training(name: str) -> None:
    with pytest.raises(DevmonError, match=rf"live is the \.html file to write, got '{name}'"):
        Monitor("run.zarr", [], live=name)


def test_alarms_are_told_as_provisional(tmp_path: Path) -> None:
    train([Monitor(tmp_path / "run.zarr", [Watch("norm", Norm(), every(2))])])
    alarm = {"series": "norm/norm", "kind": "jump", "step": 6, "low": 5, "high": 7, "raised_at": 10, "status": "up"}
    Trajectory(tmp_path / "run.zarr").record(
        alarms=[alarm, alarm | {"step": 2, "low": 1, "high": 3, "status": "withdrawn"}]
    )
    text = live_page(str(tmp_path / "run.zarr"), 5, nulls=19)
    rows = [row for row in text.split("<tr")[1:] if "6 [5, 7]" in row or "2 [1, 3]" in row]
    assert len(rows) == 2
    assert "<td>provisional</td>" in rows[0]
    assert rows[1].startswith(' class="weak"')
    assert "<td>withdrawn</td>" in rows[1]
    assert '<meta http-equiv="refresh" content="5">' in text
    assert "alarms</th>" not in text  # not a second time, as an attribute of the run
