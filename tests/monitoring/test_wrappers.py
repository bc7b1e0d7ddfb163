"""Whatever training put around a model, what is measured is its plain float32 forward: online is offline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xarray as xr
from torch import Tensor, nn

from devmon import InstrumentError, Snapshot, Trajectory, Watch, every, observe, presets
from devmon.checkpoints.weights import fitting, read_state
from devmon.instruments import LLC, Curvature
from devmon.monitoring.isolation import private_copy
from devmon.sampling import regression_loss
from tests.support.loops import trainer

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(64, 5, generator=torch.Generator().manual_seed(3))
DATA = (X, X[:, :1].sin())


class Net(nn.Module):
    """Its loss stands where transformers' Trainer looks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        self.kept: list[Any] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = self.net(x)
        return out if labels is None else {"loss": (out[:, 0] - labels).square().mean(), "logits": out}


class Decorated(Net):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(x, labels)


@dataclass(frozen=True)
class Outputs:
    """The first output and the norm of its gradient, in the precision of the forward pass."""

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        out = snapshot.model(X)
        gradient = torch.autograd.grad(out[0].sum(), [*snapshot.model.parameters()])
        norm = sum(float((part.double() ** 2).sum()) for part in gradient)
        return xr.Dataset({"out": ((), float(out[0, 0])), "norm": ((), norm)})


WATCHES = [
    Watch("outputs", Outputs(), every(4)),
    Watch("curvature", Curvature(DATA, loss=regression_loss, top=2, probes=2), every(4)),
    Watch("llc", LLC(DATA, regression_loss, nbeta=10.0, gamma=1.0, lr=1e-3, chains=2, draws=4), every(4)),
]


@contextmanager
def process_group() -> Iterator[None]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        yield
    finally:
        dist.destroy_process_group()


def accelerated() -> nn.Module:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="bf16", cpu=True).prepare(Net())


def under_autocast(compiled: bool = False) -> nn.Module:
    net = Net()
    net.forward = torch.autocast("cpu", dtype=torch.bfloat16)(net.forward)
    return torch.compile(net, backend="eager") if compiled else net


def compiled_forward() -> nn.Module:
    net = Net()
    net.net.forward = torch.compile(net.net.forward, backend="eager")
    net(X)
    return net


def checkpointed() -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

    net = Net()
    net.net[2], net.net[4] = checkpoint_wrapper(net.net[2]), offload_wrapper(net.net[4])
    return net


def fabric() -> nn.Module:
    import lightning as L

    return L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").setup_module(Net())


def fsdp(own_names: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    cpu = {"device_id": torch.device("cpu"), "use_orig_params": own_names}
    net, half = Net(), MixedPrecision(param_dtype=torch.bfloat16)
    net.net[2] = FullyShardedDataParallel(net.net[2], **cpu)
    return FullyShardedDataParallel(net, mixed_precision=half, **cpu)


def fsdp2() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    net, mesh = Net(), init_device_mesh("cpu", (1,))
    fully_shard(net.net[2], mesh=mesh)
    fully_shard(net, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return net


def hooked() -> nn.Module:
    net = Net()
    net.net[0].register_forward_hook(lambda module, inputs, out: out.bfloat16().float())
    return net


def keeps_graphs() -> nn.Module:
    net = Net()
    net.kept.append(net(X).sum())
    net.kept.append({"a": (net(X),)})
    net.last = net.kept[0] * 2  # and as an attribute
    return net


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "Accelerate": accelerated,
    "autocast of the method": under_autocast,
    "autocast of the class": Decorated,
    "autocast, compiled": lambda: under_autocast(compiled=True),
    "Accelerate, compiled": lambda: torch.compile(accelerated(), backend="eager"),
    "compiled": lambda: torch.compile(Net(), backend="eager"),
    "compiled forward": compiled_forward,
    "checkpointed": checkpointed,
    "DDP": lambda: nn.parallel.DistributedDataParallel(Net()),
    "DDP, Accelerate": lambda: nn.parallel.DistributedDataParallel(accelerated()),
    "DataParallel": lambda: nn.DataParallel(Net()),
    "Fabric": fabric,
    "FSDP": lambda: fsdp(False),
    "FSDP, own names": lambda: fsdp(True),
    "FSDP 2": fsdp2,
    "hooks": hooked,
    "graphs": keeps_graphs,
}


def rows(path: Path, step: int, model: nn.Module) -> dict[str, xr.Dataset]:
    store = Trajectory(path)
    assert observe(step, model, WATCHES, store) == ["outputs", "curvature", "llc"]
    return {name: store[name].drop_vars(["weights", "seconds"]) for name in store}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, xr.Dataset]:
    return rows(tmp_path_factory.mktemp("plain") / "run.zarr", 0, Net())


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_model_is_measured_as_the_plain_one(tmp_path: Path, name: str, plain: dict[str, xr.Dataset]) -> None:
    with process_group():
        model = WRAPPED[name]()
        found = rows(tmp_path / "run.zarr", 0, model)
        twin = private_copy(model)
        assert list(twin.state_dict()) == list(Net().state_dict())
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
            assert not twin(X).any(), "the copy runs the weights of the original"
            assert any(tensor.any() for tensor in model.state_dict().values())
    for watch, dataset in plain.items():
        xr.testing.assert_identical(found[watch], dataset)


def test_autocast_is_seen_by_these_instruments(tmp_path: Path, plain: dict[str, xr.Dataset]) -> None:
    """So that the test above can fail."""

    class Inside(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):  # of the model's own: it stays
                return super().forward(x, labels).float()

    found = rows(tmp_path / "run.zarr", 0, Inside())
    assert found["outputs"]["out"] != plain["outputs"]["out"]
    assert found["curvature"]["trace"] != plain["curvature"]["trace"]
    assert not found["llc"].identical(plain["llc"])


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"bf16": True, "torch_compile": True, "torch_compile_backend": "eager"}], ids=str
)
def test_a_trainer_measures_online_what_its_checkpoints_give_offline(tmp_path: Path, options: dict[str, Any]) -> None:
    from devmon.callbacks import TrainerMonitor

    training = trainer(tmp_path, [TrainerMonitor(tmp_path / "run.zarr", WATCHES)], save_strategy="steps", save_steps=4,
                       **options)  # fmt: skip
    training.model = training.model_wrapped = Net()
    training.train_dataset = [{"x": row, "labels": float(row[0])} for row in X]
    training.train()
    online = Trajectory(tmp_path / "run.zarr", "r")
    assert not [name for name in online if online.failures(name)]
    model = Net()
    for step in (4, 8):
        model.load_state_dict(fitting(model, read_state(tmp_path / f"checkpoint-{step}"), "c"))
        for name, dataset in rows(tmp_path / f"{step}.zarr", step, model).items():
            xr.testing.assert_equal(online[name].drop_vars(["weights", "seconds"]).sel(step=[step]), dataset)


def test_the_standard_watches_of_a_language_model_under_bf16_and_gradient_checkpointing(tmp_path: Path) -> None:
    import transformers

    from devmon.callbacks import TrainerMonitor

    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"vocab_size": 48, "n_positions": 96, "n_embd": 16, "n_layer": 2, "n_head": 2}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    tokens = torch.randint(1, 48, (16, 24), generator=torch.Generator().manual_seed(0))
    watches = [replace(watch, steps={2}) for watch in presets.standard(tokens, vocab_size=48, last=4)]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="steps", save_steps=2, logging_strategy="no", dataloader_pin_memory=False, bf16=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens]
    callbacks = [TrainerMonitor(tmp_path / "run.zarr", watches)]
    transformers.Trainer(make(), args, train_dataset=data, callbacks=callbacks).train()
    online, offline = Trajectory(tmp_path / "run.zarr", "r"), Trajectory(tmp_path / "offline.zarr")
    model = make()
    model.load_state_dict(fitting(model, read_state(tmp_path / "checkpoint-2"), "c"))
    assert observe(2, model, watches, offline) == [watch.name for watch in watches]
    for name, dataset in offline.items():
        dropped = ["weights", "seconds"]
        xr.testing.assert_equal(online[name].drop_vars(dropped), dataset.drop_vars(dropped))
        assert online.weights(name) == offline.weights(name)


def test_weights_that_are_not_here_are_refused_in_one_line(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(InstrumentError, match=r"net\.0\.weight lies on the meta device.*load the weights"):
        observe(0, model, WATCHES, Trajectory(tmp_path / "run.zarr"), strict=False)
