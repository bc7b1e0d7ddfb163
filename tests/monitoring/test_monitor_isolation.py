"""Training with the monitor is training without it, bit by bit, whatever the training uses and the instruments do."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.utilities.compile import from_compiled

from devmon import InstrumentError, Snapshot, Trajectory, Watch, every, observe
from devmon.callbacks import Monitor
from devmon.monitoring.isolation import EVERYWHERE, HOOKS, isolated, private_copy
from devmon.testing.contract import randomness, state
from tests.support.lightning_toys import Careless, Net, Norm, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


@dataclass(frozen=True)
class Hooked:
    """Counts the linear layers that run when the model does: compiled code would run none of the hooks."""

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        ran: list[int] = []
        for module in snapshot.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda *_: ran.append(1))
        with torch.no_grad():
            out = snapshot.model(torch.ones(4, 5))
        return xr.Dataset({"ran": ((), float(len(ran))), "out": ((), float(out.sum()))})


WATCHES = [
    Watch("careless", Careless(), every(1)),
    Watch("norm", Norm(), every(1)),
    Watch("hooked", Hooked(), every(2)),
]


def switches() -> dict[str, object]:
    """All process-wide settings that `Careless` changes, and the hooks on all modules."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic, warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "matmul precision": torch.get_float32_matmul_precision(),
        "anomaly": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "numpy errors": np.geterr(),
        "matplotlib backend": matplotlib.get_backend(),
        "global hooks": [len(hooks) for hooks in EVERYWHERE],
    }


class Compared(L.Callback):
    """Around the monitor in the list of callbacks: what it finds before and after each of the monitor's turns."""

    def __init__(self) -> None:
        self.results: list[dict[str, object]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rng = dict(zip(("torch", "numpy", "python"), randomness(), strict=True))
        self.results.append(state(pl_module) | switches() | rng)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.on_train_start(trainer, pl_module)


class NoisyAdamW(torch.optim.AdamW):
    """Gradient noise from torch's generator and Python's, in the optimizer itself."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3 * random.random())
        return loss


class Noisy(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return NoisyAdamW(self.parameters(), lr=0.02)


CALLS: list[str] = []


def with_hooks() -> Net:
    """The user's own hooks, which draw random numbers and keep count: those of the copy must not run."""

    def noise(module: torch.nn.Module, _: Any, out: torch.Tensor) -> torch.Tensor:
        CALLS.append("forward")
        return out + 1e-3 * torch.randn_like(out)

    net = Net()
    net.net[0].register_forward_hook(noise)
    net.net[4].register_full_backward_hook(lambda *_: CALLS.append("backward"))
    return net


def compiled_child(backend: str = "eager") -> Net:
    net = Net()
    net.net = torch.compile(net.net, backend=backend)
    return net


def compiled_in_place() -> Net:
    net = Net()
    net.compile(backend="eager")
    return net


class Quiet(Net):
    def noise(self) -> float:  # the compiler cannot trace Python's generator
        return 0.0


def compiled_whole() -> Any:
    return torch.compile(Quiet(), backend="eager")


MAKE: dict[str, Callable[[], Any]] = {
    "plain": Net,
    "noisy optimizer": Noisy,
    "hooks": with_hooks,
    "compiled child": compiled_child,
    "compiled child, aot": functools.partial(compiled_child, "aot_eager"),
    "compiled in place": compiled_in_place,
    "compiled whole": compiled_whole,
}
AVERAGING: dict[str, Callable[[], list[L.Callback]]] = {
    "none": list,
    "EMA": lambda: [EMAWeightAveraging(decay=0.9)],
    "SWA": lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
}


def weights(module: Any) -> list[torch.Tensor]:
    return list(module.state_dict().values())


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Swapping scheduler.*", "ignore:.*anomaly.*")
@pytest.mark.parametrize(
    ("make", "averaging", "accumulate", "precision"),
    [
        *((make, "none", accumulate, "32-true") for make in MAKE for accumulate in (1, 4)),
        *(("plain", averaging, accumulate, "32-true") for averaging in ("EMA", "SWA") for accumulate in (1, 4)),
        *((make, "none", accumulate, "bf16-mixed") for make in ("plain", "compiled child") for accumulate in (1, 4)),
        ("noisy optimizer", "EMA", 4, "bf16-mixed"),
    ],
)
def test_training_is_bit_identical_and_nothing_around_it_is_changed(
    tmp_path: Path, make: str, averaging: str, accumulate: int, precision: str
) -> None:
    results, compiled = {}, {}
    before, after = Compared(), Compared()
    for name, callbacks in {
        "alone": [],
        "watched": [before, Monitor(tmp_path / "run.zarr", WATCHES), after],
    }.items():
        torch._dynamo.reset()
        start = compilations()
        CALLS.clear()
        options = {"accumulate": accumulate, "precision": precision, "gradient_clip_val": 0.5, "make": MAKE[make]}
        if averaging == "SWA":
            options |= {"max_epochs": 4, "steps": -1, "limit_train_batches": 8}
        module = train([*AVERAGING[averaging](), *callbacks], **options)
        compiled[name] = compilations() - start
        results[name] = [*weights(module), torch.rand(1)], random.random(), np.random.rand(), len(CALLS)  # noqa: NPY002
    (alone, *rest), (watched, *same) = results["alone"], results["watched"]
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert rest == same
    for turn, (one, two) in enumerate(zip(before.results, after.results, strict=True)):
        changed = [key for key in one.keys() | two.keys() if one.get(key) != two.get(key)]
        assert not changed, f"the monitor's turn {turn} changed {sorted(changed)}"
    assert compiled["watched"] == compiled["alone"], f"graphs: {compiled}"
    assert (compiled["alone"] > 0) == make.startswith("compiled"), f"graphs: {compiled}"
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert not [name for name in store.names() if store.failures(name)]
    hooked = store["hooked"]
    assert hooked["ran"].values.tolist() == [2.0] * hooked.sizes["step"], "hooks did not fire once a linear layer"
    assert len(set(hooked["out"].values.tolist())) == hooked.sizes["step"], "the same weights were measured twice"


def test_the_comparison_sees_what_careless_does() -> None:
    """Without isolation every switch, and the random states, differ: so the test above can fail."""
    before, rng = switches(), randomness()
    with isolated():
        Careless()(Snapshot(0, Net()))
        inside = switches()
        assert randomness() != rng
    unmoved = [key for key in before if before[key] == inside[key]]
    assert unmoved == ["autocast dtype"]
    assert switches() == before
    assert randomness() == rng


@pytest.mark.parametrize("name", ["compiled child", "compiled in place", "compiled whole", "compiled in a trainer"])
def test_a_copy_of_a_compiled_model_is_plain_and_is_not_the_original(name: str) -> None:
    """A LightningModule that is compiled whole used to be measured, and disturbed, itself."""
    torch._dynamo.reset()
    model = from_compiled(compiled_whole()) if name == "compiled in a trainer" else MAKE[name]()
    model(torch.ones(4, 5))
    before, graphs = state(getattr(model, "_orig_mod", model)), compilations()
    twin = private_copy(model)
    assert not [m for m in twin.modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(twin.train()(torch.randn(4, 5)), torch.zeros(4, 3))
    assert state(getattr(model, "_orig_mod", model)) == before
    assert compilations() == graphs


def keeps_the_original(net: Net, how: str) -> Net:
    forward = net.net.forward
    if how == "closure":
        net.net.forward = lambda x: forward(x)
    elif how == "nested":
        inner = lambda x: forward(x)  # noqa: E731
        net.net.forward = lambda x: inner(x)
    elif how == "attribute":
        net.helper = lambda x: net.net(x)
    return net


@pytest.mark.parametrize(
    ("how", "where"), [("closure", "net.forward"), ("nested", "net.forward"), ("attribute", "helper")]
)
def test_a_copy_that_would_run_the_original_is_refused(how: str, where: str) -> None:
    with pytest.raises(
        InstrumentError, match=f"Net cannot be copied: {where} is a function that keeps a module.*model='net'"
    ):
        private_copy(keeps_the_original(Net(), how))
    harmless = Net()
    harmless.helper = lambda x: x + 1
    harmless.net.forward = functools.partial(type(harmless.net).forward, harmless.net)
    copied = private_copy(harmless)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(copied(torch.ones(2, 5)), torch.zeros(2, 3))


@dataclass(frozen=True)
class Reaches:
    """Holds the trained module itself and does to it what `how` says."""

    how: str
    module: Any = field(repr=False, compare=False)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        first = self.module.net[0].weight
        if self.how == "statistics":
            self.module.train()(torch.ones(4, 5))
        elif self.how == "modes":
            self.module.eval()
        elif self.how == "weights":
            with torch.no_grad():
                first.mul_(1.0)
        elif self.how == "grads":
            self.module.eval()
            self.module.train()
            torch.nn.Sequential(*list(self.module.net)[::4])(torch.ones(4, 5)).sum().backward()
        elif self.how == "requires_grad":
            first.requires_grad_(False)
        elif self.how == "fails":
            self.module.eval()
            raise RuntimeError("halfway")
        return xr.Dataset({"x": ((), float(first.sum()))})


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("statistics", "net.1.num_batches_tracked"),
        ("modes", ".training, net.training"),
        ("weights", "net.0.weight"),
        ("grads", "net.0.weight.grad"),
        ("requires_grad", "net.0.weight"),
        ("fails", ".training"),
    ],
)
def test_an_instrument_that_reaches_the_trained_model_is_refused_with_what_it_changed(
    tmp_path: Path, how: str, named: str
) -> None:
    model, store = Net().train(), Trajectory(tmp_path / "run.zarr")
    with pytest.raises(InstrumentError, match=rf"changed the model that trains \({named}"):
        observe(0, model, [Watch("x", Reaches(how, model), every(1))], store, strict=False)
    assert store.steps("x") == []
    assert observe(0, Net().train(), [Watch("y", Reaches("looks", model), every(1))], store) == ["y"]


def test_settings_made_for_each_backend_do_not_stop_a_measurement() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # then there is no one matmul precision to read
        with isolated():
            pass
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_the_list_of_kinds_of_hooks_is_torch_s_own() -> None:
    kinds = {name for name in vars(torch.nn.Module()) if name.endswith("_hooks") and "state_dict" not in name}
    assert set(HOOKS) == kinds
