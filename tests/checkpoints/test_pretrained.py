"""Models that a config.json does not make on its own: refused in one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from devmon import DataError
from devmon.checkpoints.pretrained import causal_lm
from devmon.checkpoints.series import Checkpoint


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("T5", r"an encoder-decoder \(t5\)"),
        ("Marian", r"an encoder-decoder \(marian\)"),
        ("Whisper", r"an encoder-decoder \(whisper\)"),
        ("CLIP", r"no causal language model \(clip\)"),
        ("ViT", r"no causal language model \(vit\)"),
    ],
)
def test_other_models_than_causal_ones_are_refused_by_what_they_are(tmp_path: Path, kind: str, said: str) -> None:
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(DataError, match=f"step1 is {said}.*--source script.py:name") as caught:
        causal_lm(Checkpoint(1, "step1", {}, tmp_path), own)
    assert "\n" not in str(caught.value)
