"""A loop of Lightning Fabric: bit-identical with the monitor, alone and on two ranks, and the rows of a plain loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.strategies import FSDPStrategy

from devmon import DevmonError, Trajectory, Watch, every
from devmon.callbacks import FabricMonitor
from tests.monitoring.test_monitoring import WATCHES
from tests.support.lightning_toys import Careless, Norm
from tests.support.loops import after, same, seeded, train
from tests.support.offline_toys import rows
from tests.support.offline_toys import same as same_rows
from tests.support.two_ranks import Divided, spawn_two


def fit(fabric: L.Fabric, path: Path | None, watches: list[Watch], accumulate: int = 1, wrapped: bool = True) -> Any:
    """What `tests.support.loops.train` does, by Fabric."""
    net = seeded()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.02))
    monitor = None if path is None else FabricMonitor(fabric, path, watches)
    if monitor is not None:
        monitor.step(0, model)
    for step in range(1, 13):
        for part in range(accumulate):
            x = torch.randn(8, 5)
            with fabric.no_backward_sync(model, enabled=part < accumulate - 1):
                fabric.backward(model(x, (x[:, 0] > 0).long())["loss"] / accumulate)
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step(step, model if wrapped else net)
    if monitor is not None:
        monitor.close()
    return net


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"wrapped": False}, {"precision": "bf16-mixed"}], ids=str)
def test_a_loop_of_fabric_is_bit_identical_with_the_monitor(tmp_path: Path, options: dict[str, Any]) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=options.pop("precision", "32-true"))
    alone, rest = fit(fabric, None, WATCHES, **options), after()
    watched, other = fit(fabric, tmp_path / "run.zarr", WATCHES, **options), after()
    assert same(alone, watched)
    assert rest == other
    assert watched.training
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("careless") == list(range(13))
    assert store.steps("norm") == [0, 2, 4, 6, 8, 10, 12]
    assert not list((tmp_path / "run.zarr" / "_units").rglob("*.rows")), "not folded"


def test_its_rows_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    from devmon.monitoring.loop import LoopMonitor

    fit(L.Fabric(accelerator="cpu", devices=1), tmp_path / "fabric.zarr", WATCHES)
    with LoopMonitor(tmp_path / "plain.zarr", WATCHES) as monitor:
        train(monitor, seeded())
    same_rows(rows(tmp_path / "fabric.zarr"), rows(tmp_path / "plain.zarr"))


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    fabric._strategy = object.__new__(FSDPStrategy)
    with pytest.raises(DevmonError, match="FSDPStrategy shards the weights"):
        FabricMonitor(fabric, tmp_path / "run.zarr", WATCHES)


def two_processes(rank: int, folder: Path) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    watches = [Watch("careless", Careless(), every(1)), Watch("divided", Divided(Norm()), every(2))]

    def numbers(net: Any) -> list[float]:
        return [float(p.detach().double().sum()) for p in net.parameters()] + [float(torch.rand(()))]

    results = {
        "alone": numbers(fit(fabric, None, watches)),
        "watched": numbers(fit(fabric, folder / "run.zarr", watches)),
    }
    try:
        FabricMonitor(fabric, folder / f"{rank}.json", watches)  # rank 0 alone opens it
    except DevmonError as error:
        results["refused"] = str(error)  # type: ignore[assignment]
    (folder / f"results-{rank}.json").write_text(json.dumps(results))


def test_two_ranks_are_bit_identical_and_measure_together(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"{rank}.json").write_text("{}")
    spawn_two(two_processes, tmp_path)
    for rank in range(2):
        results = json.loads((tmp_path / f"results-{rank}.json").read_text())
        assert results["watched"] == results["alone"]
        assert "0.json" in results["refused"]
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("careless") == list(range(13))
    assert store.steps("divided") == [0, 2, 4, 6, 8, 10, 12]
