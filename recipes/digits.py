"""Vision: a small residual network learns scikit-learn's digits, and a drop of the learning rate is no phase transition.

What it shows: 1297 images of 8 × 8 pixels; labels of every batch are redrawn at random with probability 0.25, so that the
noise of the gradient, and not the task, sets the loss at the end. Small initial weights put the network on a plateau. Two
things then change the held-out loss abruptly: the network leaves the plateau, by itself; and the learning rate falls to a
tenth. The detector finds both. `schedule_check` says of the second that the schedule may be its cause, and not of the
first; a control trained with a constant rate has the first alone. Linear probes by layer, the drift of every layer
(debiased CKA) and the local learning coefficient are followed beside.

Cost: `--fast` 15 s on one core; by default (longer, more estimates) about two minutes. Not worth a GPU.

Expect: held-out accuracy above .9 (a linear model has .93 to .95, a support vector machine .99); the change at the drop
named by schedule_check, with the probability that an event so wide meets the drop by chance; no event there in the control.
Figure to expect: OUT/drop/report.html, Overview: the loss steps down at the drop, and "What argues against it" says why.

Data: scikit-learn's copy of the UCI set Optical Recognition of Handwritten Digits (Alpaydin & Kaynak 1998), no download.
Writes OUT/drop/, OUT/constant/ (trajectory.zarr, checkpoints/, report.html, figures/), OUT/results.json.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
import typer
import xarray as xr
from rich.console import Console
from sklearn.datasets import load_digits

from devmon import Snapshot, Trajectory, Watch, every, log_spaced, presets
from devmon.analysis import Detection, detect, drift, llc, report, schedule_check, series_of
from devmon.analysis.stages import run_level
from devmon.instruments import LLC
from devmon.recipes.common import Check, conclude, crossing, fit, told_in_one_line
from devmon.sampling import classification_loss
from devmon.snapshot import derive_seed

HELD_OUT, BATCH, NOISE, RATE = 500, 4, 0.25, 0.04


@dataclass(frozen=True)
class Form:
    """A size of the study: the learning rate falls to a tenth after `drop` of `steps`."""

    steps: int = 6000
    drop: int = 4000
    draws: int = 60
    estimates: int = 24


FULL = Form()
FAST = Form(steps=2400, drop=1600, draws=20, estimates=6)


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, width, row, column)
        return x + self.two(self.one(x.relu()).relu())


class Network(torch.nn.Module):
    """Images (batch, 1, 8, 8) to logits (batch, 10); `scale` shrinks the initial weights."""

    def __init__(self, width: int = 12, blocks: int = 2, scale: float = 0.8) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(1, width, 3, padding=1)
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = torch.nn.Linear(width * 4, 10)
        with torch.no_grad():
            for weight in self.parameters():
                weight.mul_(scale)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(F.avg_pool2d(x.relu(), 4).flatten(1))


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(images, labels) to train on and held out, in a fixed random order; pixels from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed(0, "digits")))
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order], torch.tensor(labels)[order]
    return (x[HELD_OUT:], y[HELD_OUT:]), (x[:HELD_OUT], y[:HELD_OUT])


@dataclass(frozen=True)
class HeldOut:
    """Loss in nats and accuracy on images and labels that are not trained on, with standard errors over images."""

    images: torch.Tensor
    labels: torch.Tensor

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        with torch.no_grad():
            logits = snapshot.model(self.images.to(snapshot.device)).double().cpu()
        nats = F.cross_entropy(logits, self.labels, reduction="none").numpy()
        right = (logits.argmax(1) == self.labels).double().numpy()
        found = xr.Dataset(attrs={"headline": ["loss", "accuracy"]})
        for name, values, units in (("loss", nats, "nats"), ("accuracy", right, "share")):
            found[name] = ((), values.mean(), {"long_name": f"held-out {name}", "units": units})
            found[f"{name}_se"] = ((), values.std(ddof=1) / np.sqrt(len(values)), {"units": units})
        found["accuracy"].attrs["continuous_twin"] = "loss"
        found["loss"].attrs["smallest_change"] = 0.02
        return found


def expected_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """What training minimises, (batch,): the loss of a label that is redrawn with probability NOISE, averaged over that."""
    images, labels = batch
    nats = -model(images).log_softmax(1)
    return (1 - NOISE) * nats.gather(1, labels[:, None])[:, 0] + NOISE * nats.mean(1)


class Training(L.LightningModule):
    def __init__(self, form: Form, seed: int, drops: bool) -> None:
        super().__init__()
        self.form, self.seed, self.drops = form, seed, drops
        self.net, (self.images, self.labels) = Network(), digits()[0]

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return classification_loss(self.net, batch).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)
        steps = [self.form.drop] if self.drops else []
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, steps), "interval": "step"}]

    def train_dataloader(self) -> Any:
        return Batches(self)


class Batches:
    """Batch number `step` is a function of seed and step, so that a resumed run sees what it would have seen."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def __iter__(self) -> Iterator[Any]:
        t = self.training
        for step in itertools.count(t.trainer.global_step):
            generator = torch.Generator().manual_seed(derive_seed(t.seed, "batch", step))
            rows = torch.randint(len(t.labels), (BATCH,), generator=generator)
            noisy = torch.rand(BATCH, generator=generator) < NOISE
            drawn = torch.randint(10, (BATCH,), generator=generator)
            yield t.images[rows].to(t.device), torch.where(noisy, drawn, t.labels[rows]).to(t.device)


def watches(form: Form) -> list[Watch]:
    train, held_out = digits()
    often = log_spaced(40, form.steps) | every(form.steps // 100)
    sampled = LLC(train, expected_loss, nbeta=180.0, gamma=100.0, lr=3e-4, chains=3, draws=form.draws,
                  burn_in=form.draws // 2, batch_size=64)  # fmt: skip
    inside = presets.vision(*held_out, last=form.steps, count=30)
    return [
        Watch("held_out", HeldOut(*held_out), often),
        *inside,
        Watch("llc", sampled, log_spaced(form.estimates, form.steps, first=form.steps // 20) | every(form.steps // 4)),
    ]


def one_run(out: Path, form: Form, seed: int, drops: bool, console: Console) -> tuple[Trajectory, Detection]:
    run = fit(
        out, lambda: Training(form, seed, drops), watches(form), steps=form.steps, saved=every(form.steps // 10), seed=seed,
        console=console, title=f"Digits, learning rate {'falls to a tenth' if drops else 'constant'}",
        data="scikit-learn's digits", control=False,
        settings={"rate": RATE, "label_noise": NOISE, "kinks": [form.drop] if drops else [], **vars(form)},
    )  # fmt: skip
    report(run, out / "report.html", figures=out / "figures")
    return run, detect([one for one in series_of(run) if run_level(one.name)])


def main(out: Path, form: Form, seed: int, console: Console) -> None:
    run, found = one_run(out / "drop", form, seed, True, console)
    other, control = one_run(out / "constant", form, seed, False, console)
    falls = {name: [e for e in d.events if e.series == "held_out/loss" and e.size < 0 and e.kind == "jump"]
             for name, d in (("drop", found), ("constant", control))}  # fmt: skip
    checked = {name: schedule_check(events, [form.drop], 1, form.steps).rows for name, events in falls.items()}
    loss, constant = (one["held_out"]["loss"] for one in (run, other))
    settled = loss.sel(step=slice(form.drop * 3 // 4, form.drop)).mean()
    left = crossing(loss["step"], loss, float(loss[0] + settled) / 2)
    after = slice(form.drop + form.steps // 10, None)
    gain = float(constant.sel(step=after).mean() - loss.sel(step=after).mean())
    estimates = {name: llc(one["llc"]) for name, one in (("drop", run), ("constant", other))}
    probes, moved = run["probe"]["accuracy"], drift(run["sketch"])["drift"]
    before = moved.sel(step=form.drop, method="nearest")
    facts = {
        "left_the_plateau": left,
        "events": {name: [{**row.event.to_dict(), "schedule": row.note} for row in rows] for name, rows in checked.items()},
        "probe_accuracy": {"first": probes[0].values.tolist(), "last": probes[-1].values.tolist()},
        "drift": {"first": moved[0].values.tolist(), "at_the_drop": before.values.tolist()},
        "llc": {name: {"step": one["step"].values.tolist(), "llc": one["llc"].values.round(2).tolist(),
                       "se": one["se"].values.round(2).tolist(), "verdict": one["verdict"].values.tolist()}
                for name, one in estimates.items()},
    }  # fmt: skip
    by_itself = [
        row
        for row in checked["drop"]
        if not row.kinks and row.event.interval[0] / 1.5 <= left <= row.event.interval[1] * 1.5
    ]
    by_schedule = [row for row in checked["drop"] if row.kinks]
    conclude(out, [
        Check("held-out accuracy at the end", float(run["held_out"]["accuracy"][-1]), 0.9, 1, "linear .93–.95, SVM .99"),
        Check("step at which the plateau is left (half-way)", left, 10, form.drop / 1.5),
        Check("events there, not laid to the schedule", len(by_itself), 1),
        Check("events laid to the schedule", len(by_schedule), 1),
        Check("chance of that, were it anywhere", min((row.chance for row in by_schedule), default=1.0), 0, 0.35),
        Check("control: falls of the loss at the same steps", sum(bool(row.kinks) for row in checked["constant"]), 0, 0, "none"),
        Check("what the drop takes off the held-out loss, nats", gain, 0.02),
        Check("probe accuracy at the end, last layer minus input", float(probes[-1, -1] - probes[-1, 0]), 0.05),
        Check("drift of the last layer from the start (1 − CKA)", float(moved[0, -1]), 0.3),
        Check("drift of the last layer from the drop on", float(before[-1]), high=0.3),
    ], console, facts)  # fmt: skip


app = typer.Typer(add_completion=False)


@app.command(
    help="Train a small residual network on scikit-learn's digits; tell a drop of the learning rate from a phase transition."
)
def run(
    out: Annotated[Path, typer.Option(help="Folder of the two runs.")] = Path("runs/digits"),
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the measurements.")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="A third of the steps.")] = False,
) -> None:
    console = Console(stderr=True)
    with told_in_one_line(console):
        main(out, FAST if fast else FULL, seed, console)
        console.print(f"written to {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
