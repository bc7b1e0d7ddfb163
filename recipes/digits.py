"""Vision: a small residual network learns digits, and a drop of the learning rate is no phase transition.

What it shows: in the run `plateau` small initial weights put the network on a plateau, which it leaves by itself: the
detector finds the fall, and `schedule_check` does not lay it to the schedule. In the run `drop` the learning rate falls
to a twentieth half-way; its `control` is the same run, the same weights and batches, with the rate kept. The two are
equal to the last bit up to the drop, so what is different after it is the schedule's work: its size comes with a
standard error, and every event of the run that meets the drop is named as the schedule's. Linear probes by layer, the
drift of every layer (debiased CKA) and the local learning coefficient of what is trained are followed beside.

Labels of every batch are redrawn at random with probability 0.1; loss is the average over that, so that its least value
is known: 0.50 nats, the entropy of a redrawn label.

Cost: `--fast` 35 s on one core; by default, with twice the steps, about a minute. Not worth a GPU.

Expect: held-out accuracy at the end of `plateau` above .85 (a linear model has .93 to .95, a support vector machine
.99); no event of `plateau` laid to a drop that it does not have; drop and control equal before the drop, and after it a
lower loss by more than three standard errors. The detector alone does not see a change this small against the noise
before it: the control is needed. Figure to expect: OUT/plateau/report.html, Overview: one fall of the held-out loss.

Data: scikit-learn's copy of the UCI set Optical Recognition of Handwritten Digits (Alpaydin & Kaynak 1998), no
download.
Writes OUT/plateau/, OUT/drop/, OUT/control/ (trajectory.zarr, checkpoints/, report.html, figures/), OUT/results.json.
"""

from __future__ import annotations

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
from devmon.analysis import Detection, detect, drift, llc, schedule_check, series_of
from devmon.analysis.detection.events import meet
from devmon.analysis.series import run_level
from devmon.data.rows import Rows
from devmon.instruments import LLC
from devmon.recipes.common import Check, batches, conclude, crossing, fit, one_line_errors, write_report
from devmon.sampling import classification_loss
from devmon.snapshot import derive_seed

HELD_OUT, BATCH, NOISE, SMALL, LARGE = 500, 8, 0.1, 0.02, 0.1


@dataclass(frozen=True)
class Form:
    """A size of the study: the large learning rate falls to a twentieth after `drop` of `steps`."""

    steps: int = 3000
    drop: int = 1500
    draws: int = 60
    estimates: int = 24


FULL = Form()
FAST = Form(steps=1200, drop=750, draws=20, estimates=6)


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, width, row, column)
        return x + self.two(self.one(x.tanh()).tanh())


class Network(torch.nn.Module):
    """Images (batch, 1, 8, 8) to logits (batch, 10); `scale` shrinks the initial weights."""

    def __init__(self, width: int = 8, blocks: int = 2, scale: float = 0.7) -> None:
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
        return self.head(F.avg_pool2d(x.tanh(), 4).flatten(1))


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(images, labels) to train on and held out, in a fixed random order; pixels from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed(0, "digits")))
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order], torch.tensor(labels)[order]
    return (x[HELD_OUT:], y[HELD_OUT:]), (x[:HELD_OUT], y[:HELD_OUT])


@dataclass(frozen=True)
class HeldOut:
    """Loss and accuracy on images and labels that are not trained on.

    - `loss`, nats: mean of `expected_loss`.
    - `loss_se`, nats: its standard error over images.
    - `accuracy`, share: images whose label gets the highest logit.
    - `accuracy_se`, share: its standard error over images.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        with torch.no_grad():
            batch = self.images.to(snapshot.device), self.labels.to(snapshot.device)
            nats = expected_loss(snapshot.model, batch).double().cpu().numpy()
            right = (snapshot.model(batch[0]).argmax(1) == batch[1]).double().cpu().numpy()
        rows = Rows(headline=["loss", "accuracy"], error="standard error over images")
        for name, values, units, change in (("loss", nats, "nats", 0.02), ("accuracy", right, "share", None)):
            se = values.std(ddof=1) / np.sqrt(len(values))
            rows.put(name, (), values.mean(), se, f"held-out {name}", units=units, smallest_change=change)
        dataset = rows.dataset()
        dataset["accuracy"].attrs["continuous_twin"] = "loss"
        return dataset


def expected_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """What training minimises, (batch,): the loss, averaged over labels that are redrawn with probability NOISE."""
    images, labels = batch
    nats = -model(images).log_softmax(1)
    return (1 - NOISE) * nats.gather(1, labels[:, None])[:, 0] + NOISE * nats.mean(1)


class Training(L.LightningModule):
    def __init__(self, form: Form, seed: int, kind: str) -> None:
        super().__init__()
        self.form, self.seed, self.kind = form, seed, kind
        self.net = Network(scale=0.3 if kind == "plateau" else 0.7)
        self.images, self.labels = digits()[0]

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return classification_loss(self.net, batch).mean()

    def configure_optimizers(self) -> Any:
        rate = SMALL if self.kind == "plateau" else LARGE
        optimizer = torch.optim.SGD(self.parameters(), lr=rate, momentum=0.9)
        steps = [self.form.drop] if self.kind == "drop" else []
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=0.05)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> Any:
        return batches(self, self._draw)

    def _draw(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "batch", step))
        rows = torch.randint(len(self.labels), (BATCH,), generator=generator)
        noisy = torch.rand(BATCH, generator=generator) < NOISE
        drawn = torch.randint(10, (BATCH,), generator=generator)
        return self.images[rows], torch.where(noisy, drawn, self.labels[rows])


def watches(form: Form, kind: str) -> list[Watch]:
    train, held_out = digits()
    often = log_spaced(40, form.steps) | every(form.steps // 100)
    chains: dict[str, Any] = {"chains": 3, "draws": form.draws, "burn_in": form.draws // 2, "batch_size": 64}
    sampled = LLC(train, expected_loss, nbeta=180.0, gamma=100.0, lr=3e-4, **chains)
    inside = presets.vision(*held_out, last=form.steps, count=30)
    loss = Watch("held_out", HeldOut(*held_out), often)
    if kind != "plateau":
        return [loss]
    estimated = log_spaced(form.estimates, form.steps, first=form.steps // 20) | every(form.steps // 4)
    return [loss, *inside, Watch("llc", sampled, estimated)]


def one_run(out: Path, form: Form, seed: int, kind: str, console: Console) -> tuple[Trajectory, Detection]:
    console.print(f"run {kind}")
    run = fit(
        out / kind,
        lambda: Training(form, seed, kind),
        watches(form, kind),
        steps=form.steps,
        saved=every(form.steps // 10),
        seed=seed,
        console=console,
        title=f"Digits: {kind}",
        data="scikit-learn's digits",
        settings={"kind": kind, "label_noise": NOISE, "kinks": [form.drop] if kind == "drop" else [], **vars(form)},
    )
    detection = detect([curve for curve in series_of(run) if run_level(curve.name)])
    write_report(run, out / kind, detection)
    return run, detection


def main(out: Path, form: Form, seed: int, console: Console) -> None:
    runs = {kind: one_run(out, form, seed, kind, console) for kind in ("plateau", "drop", "control")}
    plateau, drop, control = (runs[kind][0] for kind in ("plateau", "drop", "control"))

    # the same question of each run: does a fall of the loss meet the step of the drop?
    falls = {}
    for kind, (_, detection) in runs.items():
        jumps = [e for e in detection.events if e.series == "held_out/loss" and e.kind == "jump" and e.size < 0]
        falls[kind] = schedule_check(jumps, [form.drop], 1, form.steps).rows
    blamed = {kind: sum(bool(row.kinks) for row in rows) for kind, rows in falls.items()}

    # the plateau is left by itself: a fall where the loss is half-way, not laid to the schedule
    loss = plateau["held_out"]["loss"]
    left = crossing(loss["step"], loss, float(loss[0] + loss[-1]) / 2)
    by_itself = [row for row in falls["plateau"] if not row.kinks and meet(row.event.extent, (left, left))]

    # nats that the drop takes off; neighbouring steps are alike, so the error is that of five means
    gained = control["held_out"]["loss"] - drop["held_out"]["loss"]
    before = float(abs(gained.sel(step=slice(0, form.drop))).max())
    later = gained.sel(step=slice(form.drop + form.steps // 20, None)).values
    blocks = np.array([part.mean() for part in np.array_split(later, 5)])
    gain, error = float(later.mean()), blocks.std(ddof=1) / np.sqrt(len(blocks))

    estimates = llc(plateau["llc"])
    probes, moved = plateau["probe"]["accuracy"], drift(plateau["sketch"])["drift"]
    accuracy, grown = float(plateau["held_out"]["accuracy"][-1]), float(probes[-1, -1] - probes[-1, 0])
    listed = {kind: [{**row.event.to_dict(), "schedule": row.note} for row in rows] for kind, rows in falls.items()}
    facts = {
        "left_the_plateau": left,
        "falls": listed,
        "probe_accuracy": {"first": probes[0].values.tolist(), "last": probes[-1].values.tolist()},
        "drift_from_the_start": moved[0].values.tolist(),
        "gained": [gain, float(error)],
        "llc": {name: estimates[name].values.tolist() for name in ("llc", "se", "verdict", "step")},
    }
    checks = [
        Check("plateau: held-out accuracy at the end", accuracy, 0.85, 1, "linear .93–.95, SVM .99"),
        Check("plateau: half-way step of its fall", left, 20, form.drop / 1.2),
        Check("plateau: falls there, not laid to the schedule", len(by_itself), 1),
        Check("plateau: falls laid to the drop that it does not have", blamed["plateau"], 0, 0, "none"),
        Check("drop and control before the drop: largest difference", before, 0, 0, "0 (exact)"),
        Check("what the drop takes off the loss, nats", gain, 0.01),
        Check("the same in its standard errors", float(later.mean() / error), 3),
        Check("control: falls laid to the drop that it does not have", blamed["control"], 0, 0, "none"),
        Check("plateau: probe accuracy at the end, last layer minus input", grown, 0.05),
        Check("plateau: drift of the last layer from the start (1 − CKA)", float(moved[0, -1]), 0.2),
    ]
    conclude(out, checks, console, facts)


app = typer.Typer(add_completion=False)


@app.command(
    help="Train a small network on scikit-learn's digits; tell a drop of the learning rate from a phase transition."
)
def run(
    out: Annotated[Path, typer.Option(help="Folder of the two runs.")] = Path("runs/digits"),
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the measurements.")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="A third of the steps.")] = False,
) -> None:
    console = Console(stderr=True)
    with one_line_errors(console):
        main(out, FAST if fast else FULL, seed, console)
        console.print(f"written to {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
