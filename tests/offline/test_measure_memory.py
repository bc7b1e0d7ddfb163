"""How much is in memory at once, what a dry run says of it, and instruments that get along with less."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr

from devmon import Snapshot, Trajectory, Watch, every, observe
from devmon.checkpoints.series import Series
from devmon.instruments import LLC, ProbeLoss
from devmon.monitoring.fingerprint import identity
from devmon.offline import forecast
from devmon.offline.in_parts import in_parts
from devmon.offline.plan import Plan
from devmon.offline.study import Progress, Study
from devmon.sampling import regression_loss
from tests.anatomy.test_anatomy_sites import VOCAB, family
from tests.support.lightning_toys import Norm
from tests.support.offline_toys import (
    measure,
    with_watches,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


def test_while_one_is_measured_only_the_next_is_in_memory(
    trained: Path, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the model, whose weights the one that is measured has become."""
    alive: list[weakref.ref[Any]] = []
    counted: list[int] = []
    read, observed = Series.read, Study._observe

    def reading(self: Series, step: int) -> Any:
        found = read(self, step)
        alive.append(weakref.ref(found))
        return found

    def counting(self: Study, step: int, *args: Any) -> None:
        until = time.monotonic() + 60
        while len(alive) < min(self.steps.index(step) + 2, len(self.steps)) and time.monotonic() < until:
            time.sleep(0.001)
        counted.append(sum(one() is not None for one in alive))
        observed(self, step, *args)

    monkeypatch.setattr(Series, "read", reading)
    monkeypatch.setattr(Study, "_observe", counting)
    Study(Plan(str(trained / "saved"), str(tmp_path / "a.zarr"), f"{trained / 'script.py'}:study")).measure()
    assert counted == [1, 1, 1, 1, 1, 1, 0]
    alive.clear()
    pretrained = Plan(
        str(language / "hf"), str(tmp_path / "b.zarr"), preset="economy", tokens=str(language / "tokens.pt")
    )
    Study(pretrained).measure()
    assert counted[7:] == [1, 1, 0]


def test_a_dry_run_tells_memory_and_time(
    language: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series, tokens = language / "hf", language / "tokens.pt"
    llc = ("nbeta=30", "gamma=300", "chains=2", "draws=3", "burn_in=0", "batch_size=4")
    preset = ("--preset", "economy", "--tokens", tokens, *(word for setting in llc for word in ("--llc", setting)))
    command = (series, "--into", tmp_path / "run.zarr", *preset)
    numbers = sum(p.numel() for p in family("gpt_neox").parameters())
    told = measure(*command, "--dry-run", "--workers", 2).output
    assert f"a copy of the weights is {numbers * 4 / 1e6:.3g} MB ({numbers:,} parameters, float32)" in told, told
    assert f"at most {numbers * 3 * 4 / 1e6:.3g} MB for a chain of an LLC (3 copies in float32)" in told, told
    assert "time: about " in told
    assert " with 2 at once, checkpoints' reading apart, from a forward pass on this machine's cpu (" in told
    half = measure(*command, "--dry-run", "--dtype", "bfloat16").output
    assert f"a copy of the weights is {numbers * 2 / 1e6:.3g} MB ({numbers:,} parameters, bfloat16)" in half
    assert not (tmp_path / "run.zarr").exists()
    assert measure(*command, "--steps", "0,100").exit_code == 0
    run = Trajectory(tmp_path / "run.zarr")
    taken = {name: float(run[name]["seconds"].mean()) for name in run}
    of_two = ("loss", "weights")
    work = Study(Plan(str(series), str(tmp_path / "run.zarr"), preset="economy", tokens=str(tokens), watch=of_two))
    monkeypatch.setattr(forecast, "_time", lambda seconds: f"{seconds:.9g} seconds")
    line = forecast.seconds(work, work.missing(), [])
    total = f"{taken['loss'] + taken['weights']:.9g} seconds"
    assert line == f"time: about {total}, checkpoints' reading apart, from the 4 rows that the run holds"
    other = measure(
        trained / "saved", "--into", tmp_path / "o.zarr", "--source", f"{trained / 'script.py'}:study", "--dry-run"
    )
    assert "time: unknown until a checkpoint is measured: --steps 12 first" in other.output


class Full:
    """A model's hook that cannot hold more than `limit` examples at once."""

    def __init__(self, limit: int) -> None:
        self.limit, self.seen = limit, []  # type: ignore[var-annotated]

    def __call__(self, model: Any, args: Any, kwargs: Any) -> None:
        batch = (args or (kwargs["input_ids"],))[0]
        self.seen.append(len(batch))
        if len(batch) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


@dataclass(frozen=True, eq=False)
class Squeezed(ProbeLoss):
    limit: int = 10**6

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        snapshot.model.register_forward_pre_hook(Full(self.limit), with_kwargs=True)
        return super().__call__(snapshot)


@pytest.mark.parametrize(
    ("limit", "kinds"),
    [
        (8, ["measured"]),
        (4, ["retried", "measured"]),
        (2, ["retried", "retried", "measured"]),
        (1, ["retried", "retried", "failed"]),
    ],
)
def test_out_of_memory_is_tried_again_in_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, kinds: list[str]
) -> None:
    tokens = torch.randint(VOCAB, (8, 9), generator=torch.Generator().manual_seed(0))
    model = family("gpt2")
    model.save_pretrained(tmp_path / "saved" / "step3")
    probe = Squeezed(tokens, batch_size=8, limit=limit)
    with_watches(monkeypatch, None, [Watch("loss", probe, every(1)), Watch("norm", Norm(), every(1))])
    heard: list[Progress] = []
    Study(Plan(str(tmp_path / "saved"), str(tmp_path / "run.zarr"), "x.py:y")).measure(tell=heard.append)
    assert [news.kind for news in heard if news.watch == "loss"] == kinds
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("norm") == [3]
    if kinds[-1] == "measured":
        alone = Trajectory(tmp_path / "alone.zarr")
        observe(3, model, [Watch("loss", ProbeLoss(tokens, batch_size=8), every(1))], alone)
        for name in ("loss", "loss_se"):
            if name in alone["loss"]:
                torch.testing.assert_close(float(store["loss"][name][0]), float(alone["loss"][name][0]))
        assert store.failures("loss") == {}
    else:
        assert "OutOfMemoryError" in store.failures("loss")[3]


def test_chains_run_one_after_another_are_the_same_llc() -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    llc = LLC(
        (x, x @ torch.arange(4.0)[:, None]),
        regression_loss,
        nbeta=50,
        gamma=300,
        chains=4,
        draws=4,
        burn_in=1,
        batch_size=8,
    )
    model = torch.nn.Linear(4, 1, bias=False)
    for parts in (2, 4):
        smaller = in_parts(llc, parts)
        assert smaller is not None
        assert identity(smaller) == identity(llc)
        assert smaller.of.batch_size == 8
        xr.testing.assert_allclose(smaller(Snapshot(0, model)), llc(Snapshot(0, model)), rtol=1e-6)
    assert in_parts(Norm(), 2) is None
