"""`LivePage`: the report of a run that is training, made again now and then by a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from devmon.errors import DevmonError

# Chosen so that training does not feel it. A page that takes 10 s is made every 10 / SHARE = 200 s.
SHARE = 0.05  # of one core that making pages may take; twice as much, and pages come twice as often
PAUSE = 5.0  # seconds between two pages at least; the browser loads the page again as often
LAST_PAGE_TIMEOUT = 60.0  # seconds that the end of training waits for the page being made, and again for the last one


class LivePage:
    """Keeps `page`, an .html file, near what the trajectory holds. Nothing here raises: what fails is warned of once.

    A page is made by another process at the lowest priority, never two at a time; after a page that took t seconds the
    next starts t / `SHARE` later at the earliest. So training waits for the start of a process, some milliseconds, and
    its random numbers, settings and memory are not touched. The file is replaced whole.
    """

    def __init__(self, page: str | os.PathLike[str], clock: Callable[[], float] = time.monotonic) -> None:
        if Path(page).suffix not in (".html", ".htm"):
            raise DevmonError(f"live is the .html file to write, got {os.fspath(page)!r}")
        self.page = os.path.abspath(page)
        self.clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._started = 0.0
        self._next = float("-inf")
        self._warned = False

    def update(self, run: Any) -> None:
        """Start a new page of the run (a path or URL) unless a page is being made, or was just made."""
        try:
            if self._finished() and self.clock() >= self._next:
                self._start(run, refresh=PAUSE)
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")

    def close(self, run: Any) -> None:
        """Make the last page, which does not load itself again, and wait for it."""
        try:
            self._wait()
            self._start(run, refresh=None)
            self._wait()
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")

    def _start(self, run: Any, refresh: float | None) -> None:
        # The same devmon as here, in one thread, and out of reach of the accelerator.
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        environment = {**os.environ, **threads, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", "-m", "devmon.live", os.fspath(run), self.page]
        command += [] if refresh is None else [str(round(refresh))]
        # A session of its own: an interrupt typed for the training does not end the page.
        self._started = self.clock()
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the process has ended)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                env=environment,
            )
        except OSError:
            errors.close()
            raise
        self._errors = errors

    def _finished(self) -> bool:
        """Whether no page is being made; says what went wrong with the last one."""
        if self._process is None:
            return True
        if self._process.poll() is None:
            return False
        took = self.clock() - self._started
        self._next = self.clock() + max(PAUSE, took * (1 / SHARE - 1))
        assert self._errors is not None
        with self._errors as errors:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
        if self._process.returncode:
            self._warn(lines[-1] if lines else f"it was ended with code {self._process.returncode}")
        self._process = self._errors = None
        return True

    def _wait(self) -> None:
        if self._process is not None:
            try:
                self._process.wait(LAST_PAGE_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._finished()

    def _warn(self, reason: str) -> None:
        if not self._warned:
            warnings.warn(f"the live page {self.page} was not made ({reason}); training goes on", stacklevel=3)
        self._warned = True
