"""The fixtures of the tests of checkpoints."""

from __future__ import annotations

from tests.support.hub import serve

__all__ = ["serve"]
