"""The fixtures of the offline tests."""

from __future__ import annotations

from tests.support.hub import serve
from tests.support.offline_toys import language, own_path, plain, tokenizer, trained

__all__ = ["language", "own_path", "plain", "serve", "tokenizer", "trained"]
