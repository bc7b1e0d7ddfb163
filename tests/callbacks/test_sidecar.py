"""`Sidecar`: two ranks that shard a model are measured by a process beside them, and train as without it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from devmon import DevmonError, InstrumentError, LoopMonitor, Trajectory, Watch, every
from devmon.analysis.run import same_weights
from devmon.callbacks import Sidecar
from devmon.callbacks.sidecar import full_state
from devmon.cli.root import app
from devmon.instruments import WeightStatistics
from tests.support.two_ranks import spawn_two

SCRIPT = """
import torch
from devmon import Watch, every
from devmon.instruments import WeightStatistics


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


def study():
    return net(), [Watch("weights", WeightStatistics(), every(7))]


def broken():
    return torch.nn.Linear(2, 2), [Watch("weights", WeightStatistics(), every(7))]
"""
STEPS = 9


class InThisProcess:
    """`devmon measure` as the sidecar starts it, done at once."""

    def __init__(self, command: list[str], *, stdout: Any, stderr: Any, env: dict[str, str]) -> None:
        assert command[1:3] == ["-m", "devmon.cli"]
        result = CliRunner().invoke(app, command[3:])
        stdout.write(result.output.encode())
        self.code = result.exit_code

    def poll(self) -> int:
        return self.code

    wait = poll


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devmon.callbacks.sidecar.Popen", InThisProcess)


def net() -> nn.Module:
    names: dict[str, Any] = {}
    exec(SCRIPT, names)
    return names["net"]()


def train(rank: int, sidecar: Sidecar | None) -> dict[str, torch.Tensor]:
    """A few steps of `fully_shard`, each rank on its own data; the whole weights at the end, on rank 0."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):  # type: ignore[index]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    torch.manual_seed(10 + rank)
    if sidecar is not None:
        sidecar.step(0, model)
    for step in range(1, STEPS + 1):
        x = torch.randn(8, 6)
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if sidecar is not None:
            sidecar.step(step, model)
    return full_state(model)


def both_ways(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    alone = train(rank, None)
    with Sidecar(folder / "run", f"{folder / 'script.py'}:study", every(4)) as sidecar:
        watched = train(rank, sidecar)
    if rank == 0:
        assert alone.keys() == watched.keys() == net().state_dict().keys()
        assert all(torch.equal(alone[name], watched[name]) for name in alone)
        torch.save(watched, folder / "end.pt")
    else:
        assert alone == watched == {}


def test_two_ranks_of_fully_shard_are_measured_beside_and_train_the_same(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    spawn_two(both_ways, tmp_path)
    run = Trajectory(tmp_path / "run" / "trajectory.zarr", "r")
    assert run.steps("weights") == [0, 4, 8]  # those that were due, not those of the source
    assert list(same_weights(run)) == []
    norms = run["weights"]["model_l2"].values
    first = sum(float(p.detach().double().square().sum()) for p in net().parameters()) ** 0.5
    assert norms[0] == pytest.approx(first, rel=1e-6)
    last = torch.load(tmp_path / "run" / "checkpoints" / "step-00000008.pt")
    assert norms[2] == pytest.approx(sum(float(p.double().square().sum()) for p in last.values()) ** 0.5, rel=1e-6)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        f"step-{step:08d}.pt" for step in (0, 4, 8)
    ]
    costs = run.attrs["sidecar"]
    assert sorted(costs) == ["0", "4", "8"]
    assert all(cost["gather_seconds"] >= 0 and cost["bytes"] > 600 for cost in costs.values())


def test_what_cannot_be_measured_is_told_at_the_end_and_training_goes_on(tmp_path: Path, quick: None) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    sidecar = Sidecar(tmp_path / "run", f"{tmp_path / 'script.py'}:broken", every(1))
    sidecar.step(0, net())
    sidecar.step(0, net())  # seen already
    with pytest.warns(UserWarning, match=r"not all checkpoints of .* were measured: .*1 checkpoints skipped"):
        sidecar.close()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.filterwarnings("ignore")
def test_it_is_a_callback_of_lightning(tmp_path: Path, quick: None) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    sidecar = Sidecar(tmp_path / "run", f"{tmp_path / 'script.py'}:study", every(3))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 6)), batch_size=8)
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    L.Trainer(max_steps=3, callbacks=[sidecar], **options).fit(Module(), data)
    assert Trajectory(tmp_path / "run" / "trajectory.zarr", "r").steps("weights") == [0, 3]
    with pytest.raises(DevmonError, match="fast_dev_run"), warnings.catch_warnings():
        L.Trainer(fast_dev_run=True, callbacks=[sidecar], **options).fit(Module(), data)


class Engine(nn.Module):
    """What `deepspeed.initialize` returns with ZeRO 3, as far as it is asked: parameters are empty, with `ds_id` and
    `ds_numel`; all ranks have to call what gathers them, and rank 0 alone gets them, in half precision (0.17.5,
    runtime/engine.py, runtime/zero/partition_parameters.py)."""

    def __init__(self, module: nn.Module, rank: int = 0) -> None:
        super().__init__()
        self.module, self.rank, self.gathered = module, rank, 0
        self.whole = {name: each.detach().clone() for name, each in module.state_dict().items()}
        for number, parameter in enumerate(module.parameters()):
            vars(parameter).update(ds_id=number, ds_numel=parameter.numel())
            parameter.data = parameter.data.new_empty(0)

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, torch.Tensor] | None:
        self.gathered += 1
        return {name: each.bfloat16() for name, each in self.whole.items()} if self.rank == 0 else None


def test_parts_of_zero_3_are_gathered_by_its_engine(tmp_path: Path, quick: None) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    engine = Engine(net())
    with Sidecar(tmp_path / "run", f"{tmp_path / 'script.py'}:study", every(1)) as sidecar:
        sidecar.step(0, engine)
    run = Trajectory(tmp_path / "run" / "trajectory.zarr", "r")
    norm = sum(float(p.detach().bfloat16().double().square().sum()) for p in net().parameters()) ** 0.5
    assert run["weights"]["model_l2"].values == pytest.approx([norm], rel=1e-6)
    other = Engine(net(), rank=1)
    assert (full_state(other), other.gathered) == ({}, 1)


def test_parts_of_zero_3_without_their_engine_are_refused(tmp_path: Path) -> None:
    engine = Engine(net())
    with pytest.raises(DevmonError, match=r"holds Sequential in parts.*what deepspeed.initialize returned"):
        full_state(engine.module)
    with pytest.raises(
        InstrumentError, match=r"ZeRO 3 holds (module.)?0.weight in parts\): use devmon.callbacks.Sidecar"
    ):
        LoopMonitor(tmp_path / "run.zarr", [Watch("weights", WeightStatistics(), every(1))]).step(0, engine)
