"""Checkpoints as `torch.save` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

STATE = {"weight": torch.arange(4.0)[None], "bias": torch.tensor([0.5])}


def save(path: Path, content: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(STATE if content is None else content, path)
    return path
