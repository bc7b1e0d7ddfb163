"""What is measured while a model trains is what its weights give alone: each loop, precision, and wrapper."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import xarray as xr
from torch import Tensor, nn

from devmon import LoopMonitor, Snapshot, Trajectory, Watch, every
from devmon.callbacks import FabricMonitor, Monitor, TrainerMonitor
from devmon.instruments import InductionHeads, ProbeLoss
from devmon.monitoring.isolation import private_copy
from tests.anatomy.proposing.client_models import VOCAB, MinGPT

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 2
PRECISIONS = ("fp32", "bf16 autocast", "bf16 weights")
WRAPPERS = ("none", "compile", "ddp", "adapter")
TOKENS = torch.randint(VOCAB, (6, 12), generator=torch.Generator().manual_seed(0))
WATCHES = [
    Watch("loss", ProbeLoss(TOKENS), every(1)),
    Watch("induction", InductionHeads(VOCAB, length=12), every(1)),
]


class Adapter(nn.Module):
    """A frozen map and a trained one of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.in_features = base.requires_grad_(False), base.in_features
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Net(MinGPT):
    """Its loss stands where transformers' Trainer looks; dropout and running numbers of training do not count."""

    def forward(self, idx: Tensor, labels: Tensor | None = None, **_: Any) -> Any:  # type: ignore[override]
        logits, _ = super().forward(idx)
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())}


def net(wrapper: str) -> Net:
    torch.manual_seed(0)
    model = Net()
    if wrapper == "adapter":
        for block in model.blocks:
            block.attn.query = Adapter(block.attn.query)  # type: ignore[union-attr, arg-type, assignment]
    return model


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """The process group of one rank that DDP needs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(model: nn.Module, wrapper: str) -> Any:
    if wrapper == "compile":
        return torch.compile(model, backend="eager")
    return nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else model


class Keep:
    """The weights at each step, before the monitor sees the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.states = model, dict[int, dict[str, Tensor]]()

    def __call__(self, step: int) -> None:
        self.states.setdefault(step, {name: t.detach().clone() for name, t in self.model.state_dict().items()})


def plain(run: Path, model: Net, precision: str, wrapper: str, keep: Keep) -> None:
    net, optimizer = wrapped(model, wrapper), torch.optim.AdamW(model.parameters(), lr=0.01)
    with LoopMonitor(run, WATCHES, strict=True) as monitor:
        for step in range(STEPS + 1):
            around = torch.autocast("cpu", torch.bfloat16) if precision == "bf16 autocast" else nullcontext()
            with around:
                if step:
                    net(TOKENS, labels=TOKENS)["loss"].backward()
                    optimizer.step()
                    optimizer.zero_grad()
                keep(step)
                monitor.step(step, net)


def fabric(run: Path, model: Net, precision: str, wrapper: str, keep: Keep) -> None:
    told = {"fp32": "32-true", "bf16 autocast": "bf16-mixed", "bf16 weights": "bf16-true"}[precision]
    made = L.Fabric(accelerator="cpu", devices=1, precision=told)  # type: ignore[arg-type]
    net, optimizer = made.setup(wrapped(model, wrapper), torch.optim.AdamW(model.parameters(), lr=0.01))
    with FabricMonitor(made, run, WATCHES, strict=True) as monitor:
        for step in range(STEPS + 1):
            if step:
                made.backward(net(TOKENS, labels=TOKENS)["loss"])
                optimizer.step()
                optimizer.zero_grad()
            keep(step)
            monitor.step(step, net)


def lightning(run: Path, model: Net, precision: str, wrapper: str, keep: Keep) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = wrapped(model, wrapper)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.net(batch, labels=batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(model.parameters(), lr=0.01)

    class First(L.Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            keep(trainer.global_step)

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            keep(trainer.global_step)

    told: Any = {"fp32": "32-true", "bf16 autocast": "bf16-mixed", "bf16 weights": "bf16-true"}[precision]
    data: Any = [TOKENS] * STEPS
    L.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, precision=told, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[First(), Monitor(run, WATCHES, strict=True)],
    ).fit(Module(), torch.utils.data.DataLoader(data, batch_size=None))  # fmt: skip


def trainer(run: Path, model: Net, precision: str, wrapper: str, keep: Keep) -> None:
    import transformers

    class First(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            keep(state.global_step)

        on_step_end = on_train_begin

    args = transformers.TrainingArguments(
        str(run.parent), max_steps=STEPS, per_device_train_batch_size=6, bf16=precision == "bf16 autocast",
        learning_rate=0.01, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    data = [{"idx": row, "labels": row} for row in TOKENS.repeat(STEPS, 1)]
    transformers.Trainer(
        wrapped(model, wrapper),
        args,
        train_dataset=data,
        callbacks=[First(), TrainerMonitor(run, WATCHES, strict=True)],
    ).train()


LOOPS: dict[str, Callable[[Path, Net, str, str, Keep], None]] = {
    "plain": plain, "fabric": fabric, "lightning": lightning, "trainer": trainer,
}  # fmt: skip


# Every third combination: all pairs of a loop, a precision and a wrapper are among them.
CASES = [
    (loop, precision, wrapper)
    for (i, loop), (j, precision), (k, wrapper) in itertools.product(*map(enumerate, (LOOPS, PRECISIONS, WRAPPERS)))
    if (i + j + k) % 3 == 0
]


@pytest.mark.parametrize(("loop", "precision", "wrapper"), CASES)
def test_the_rows_of_training_are_those_of_the_weights(
    loop: str, precision: str, wrapper: str, group: None, tmp_path: Path
) -> None:
    model = net(wrapper)
    if precision == "bf16 weights":
        model = model.bfloat16()
    keep = Keep(model)
    LOOPS[loop](tmp_path / "run.zarr", model, precision, wrapper, keep)
    run = Trajectory(tmp_path / "run.zarr", "r")
    assert list(keep.states) == list(range(STEPS + 1))
    for watch in WATCHES:
        online = run[watch.name]
        assert online["step"].values.tolist() == list(keep.states)
        for step, state in keep.states.items():
            fresh = net(wrapper)
            fresh = fresh.bfloat16() if precision == "bf16 weights" else fresh
            fresh.load_state_dict(state)
            offline = watch.instrument(Snapshot(step, private_copy(fresh), 0))
            row = online.sel(step=step).drop_vars(["step", "weights", "seconds"])
            xr.testing.assert_equal(
                row[sorted(map(str, offline.data_vars))], offline[sorted(map(str, offline.data_vars))]
            )
    losses = run["loss"]["loss"].values
    assert losses[0] != losses[-1]
