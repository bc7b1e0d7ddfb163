"""What a `Monitor` refuses before training: another configuration and another run, and nothing is set aside for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from devmon import IdentityError, Watch, every
from devmon.callbacks import CheckpointSeries, Monitor, latest
from tests.support.lightning_toys import Norm, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"watches": [Watch("other", Norm(), {9}), Watch("norm", Norm(2.0), {9})]}, "scale: stored 1.0, now 2.0"),
        ({"seed": 8}, "holds 'norm' at step 0 for weights"),
    ],
    ids=["another configuration, due later", "another run"],
)
def test_what_does_not_belong_to_the_store_is_refused_before_anything_is_set_aside(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "run.zarr"
    train([Monitor(path, [Watch("norm", Norm(), every(1))])], steps=6)
    before = contents(path)
    watches = change.get("watches", [Watch("norm", Norm(), every(1))])
    with pytest.raises(IdentityError, match=message):
        train([Monitor(path, watches)], steps=6, seed=change.get("seed", 7))
    assert contents(path) == before


def test_another_configuration_is_refused_at_a_resumption_before_rows_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    train([Monitor(path, [Watch("norm", Norm(), every(1))]), CheckpointSeries(tmp_path / "saved", {4})], steps=6)
    before = contents(path)
    with pytest.raises(IdentityError, match="scale: stored 1.0, now 2.0"):
        train([Monitor(path, [Watch("norm", Norm(2.0), {8})])], steps=9, resume=latest(tmp_path / "saved"))
    assert contents(path) == before
