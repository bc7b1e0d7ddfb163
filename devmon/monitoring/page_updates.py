"""`PageUpdates`: the live page of a run is made again when there are new rows."""

from __future__ import annotations

import os

from devmon.live.background import LivePage
from devmon.monitoring.companion import Companion


class PageUpdates(Companion):
    """Tells a `LivePage` of new rows, and of the end of training."""

    def __init__(self, page: str | os.PathLike[str]) -> None:
        self.page = LivePage(page)

    def after(self, step: int) -> None:
        if self.monitor.trajectory is not None:  # rank 0
            self.page.update(self.monitor.trajectory.path)

    def close(self) -> None:
        assert self.monitor.trajectory is not None
        self.page.close(self.monitor.trajectory.path)
