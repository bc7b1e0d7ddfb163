"""An instrument of your own, in twenty lines: measured while training, and again from the checkpoints.

What it shows: `DeadUnits` below is all that an instrument is, a frozen dataclass that is called with a `Snapshot` and
returns an `xarray.Dataset`. There is nothing to register. A network of two hidden layers learns scikit-learn's digits
with a learning rate so high that units die (negative on every image, so that no gradient reaches them again). A
`Monitor` counts them online. Then a `Study` measures the saved checkpoints, with the function `study` below, as does

    devmon measure OUT/checkpoints --into OUT/offline.zarr --source recipes/own_instrument.py:study --seed 0

on the command line, and both trajectories hold the same numbers, bit for bit. Copy this file to start your own.

Cost: ten seconds on one core, `--fast` or not; GPU of no use.

Expect: no dead unit at step 0 and some at the end; the largest difference between online and offline is 0. The last row
is counted once more by hand from the last checkpoint. No published number: Lu et al. 2019 (arXiv:1903.06733) on why
units die.

Writes OUT/trajectory.zarr, OUT/checkpoints/, OUT/offline.zarr, OUT/report.html, OUT/results.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
import typer
import xarray as xr
from rich.console import Console
from sklearn.datasets import load_digits

from devmon import Snapshot, Watch, every, log_spaced
from devmon.analysis import detect
from devmon.callbacks import latest
from devmon.offline.plan import Plan
from devmon.offline.source import with_weights
from devmon.offline.study import Study
from devmon.recipes.common import Check, conclude, fit, one_line_errors, write_report

STEPS, RATE = 400, 0.2


@dataclass(frozen=True)
class DeadUnits:
    """Share of the units of every ReLU layer that are 0 on all inputs (batch, …).

    - `dead` (layer), share: units that are never positive.
    - `active` (layer), share: pairs of a unit and an input on which the unit is positive.
    """

    inputs: torch.Tensor

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        positive: list[torch.Tensor] = []
        layers = [m for m in snapshot.model.modules() if isinstance(m, torch.nn.ReLU)]
        hooks = [m.register_forward_hook(lambda _, __, out: positive.append(out > 0)) for m in layers]
        with torch.no_grad():
            snapshot.model(self.inputs.to(snapshot.device))
        for hook in hooks:
            hook.remove()
        dead = np.array([float((~units.any(0)).double().mean()) for units in positive])
        active = np.array([float(units.double().mean()) for units in positive])
        return xr.Dataset(
            {
                "dead": ("layer", dead, {"long_name": "units that are never positive", "units": "share"}),
                "active": ("layer", active, {"long_name": "units that are positive on an image", "units": "share"}),
            },
            coords={"layer": np.arange(len(dead))},
            attrs={"headline": ["dead"]},
        )


# -- a training to watch ---------------------------------------------------------------------------------------------


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


class Training(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = (
            torch.nn.Linear(64, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 10),
        )
        self.net = torch.nn.Sequential(*layers)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)

    def train_dataloader(self) -> torch.utils.data.DataLoader[tuple[torch.Tensor, ...]]:
        data = torch.utils.data.TensorDataset(*digits())
        return torch.utils.data.DataLoader(
            data, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(0)
        )


def watches() -> list[Watch]:
    return [Watch("dead_units", DeadUnits(digits()[0]), log_spaced(20, STEPS) | every(STEPS // 20))]


def study() -> tuple[torch.nn.Module, list[Watch]]:
    """The untrained model and the watches, for `devmon measure --source recipes/own_instrument.py:study`."""
    return Training().net, watches()


def main(out: Path, seed: int, console: Console) -> None:
    # while training
    online = fit(
        out,
        Training,
        watches(),
        steps=STEPS,
        saved=log_spaced(20, STEPS) | every(STEPS // 20),
        seed=seed,
        console=console,
        title="Dead units of a network for digits",
        data="scikit-learn's digits",
        settings={"rate": RATE, "steps": STEPS},
    )
    write_report(online, out, detect(online))

    # the same watches once more, from the saved checkpoints alone, and the last row by hand
    plan = Plan(str(out / "checkpoints"), str(out / "offline.zarr"), source=f"{__file__}:study", seed=seed)
    offline = Study(plan)
    offline.measure()
    path = latest(out / "checkpoints")
    assert path is not None
    hidden = with_weights(study()[0], path)[:2](digits()[0])  # type: ignore[index]
    by_hand = float((hidden.amax(0) <= 0).double().mean())

    # the same rows, bit for bit
    first, second = online["dead_units"], offline.trajectory["dead_units"]
    rows, difference = second.sizes["step"], abs(first - second).to_dataarray()
    start, end = (float(first["dead"][step, 0]) for step in (0, -1))
    checks = [
        Check("rows measured online and offline", first.sizes["step"], rows, rows),
        Check("largest difference between them", float(difference.max()), 0, 0, "0 (exact)"),
        Check("dead units of the first layer at step 0", start, 0, 0.05),
        Check("at the end", end, 0.05, 0.95, "units die at high rates"),
        Check("the same, counted from the last checkpoint", by_hand, end, end),
    ]
    conclude(out, checks, console)


app = typer.Typer(add_completion=False)


@app.command(
    help="An instrument of your own, online by a Monitor and offline from the checkpoints, with the same numbers."
)
def run(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/own"),
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="The same: it is short.")] = False,
) -> None:
    console = Console(stderr=True)
    with one_line_errors(console):
        main(out, seed, console)
        console.print(f"written to {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
