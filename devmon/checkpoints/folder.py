"""The checkpoints in a folder, by step: what `devmon.callbacks.CheckpointSeries` saves. Needs no Lightning."""

from __future__ import annotations

import os
import re
from pathlib import Path

FILE = re.compile(r"step-(\d+)\.ckpt")


def checkpoints(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """The series in a folder: step to file, in order of steps."""
    found = {int(m[1]): p for p in Path(folder).glob("step-*.ckpt") if (m := FILE.fullmatch(p.name))}
    return dict(sorted(found.items()))


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the last step, or None."""
    return next(reversed(checkpoints(folder).values()), None)
