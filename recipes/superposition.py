"""A toy model of superposition climbs down its exact staircase, many seeds at once, watched by devmon.

What it shows: six sparse features are squeezed through two dimensions and back (Elhage et al. 2022, arXiv:2209.10652).
Training starts near the square and rests at critical points whose losses are known exactly (Chen et al. 2023,
arXiv:2310.06301): k features at the corners of a k-gon, the others dead, with a + for each dead feature that predicts
its mean. Every plateau of every seed is named from its level, lengths, angles and biases
(`devmon.testing.superposition`); paths are 4+ → 5 and 4++ → 5+, each step of type A: the loss falls, λ rises.

Numbers to expect, 24 seeds and 20 000 steps: levels .10417 (4+), .09722 (4++), .06874 (5), .06180 (5+), met within
.0015 (the noise of SGD and of 1000 examples). Nine of 24 seeds reach a pentagon: each has its own examples, and where
these favour the dead features the square is left soon. λ at the critical points themselves, of 5, 5+ and 6: 7, 8.5,
8.5, met within 3%. On the way λ̂ is measured at nbeta n / log n = 145 and gamma 10, where even the exact quadratic law
gives less than λ: 5.4 for 5 (measured 5.3), 6.6 for 5+ (6.4), after 3.9 at 4+ and 4.8 at 4++. Also printed: the n from
which a Bayesian prefers one polygon to another.

Cost: about ten minutes on one core, most of it λ̂; no use for a GPU. `--fast`: one seed in twenty seconds, checked.
Writes OUT/seed-NN/trajectory.zarr for each seed, OUT/seed-NN/report.html for the first seed that moves, OUT/seeds.png,
OUT/results.json. The same command goes on with an interrupted run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
import typer
import xarray as xr
from rich.console import Console
from torch import Tensor, nn

from devmon import Snapshot, Trajectory, Watch, every, log_spaced
from devmon.analysis import plots, report, series_of
from devmon.callbacks import Monitor
from devmon.data.rows import Rows
from devmon.instruments import LLC, Polysemanticity, Superposition
from devmon.recipes.common import Check, batches, conclude, one_line_errors, table, train
from devmon.recipes.superposition_plateaus import (
    FEATURES,
    GAMMA,
    NBETA,
    Toy,
    exact_point_llc,
    named,
    path_of,
    predicted_crossings,
    rows_of_plateaus,
    transitions_of,
)
from devmon.snapshot import derive_seed
from devmon.testing.superposition import plateau, plateau_at, plateaus, population_loss

EXAMPLES, BATCH, LEARNING_RATE = 1000, 20, 0.05
WEIGHT_NOISE, BIAS_NOISE = 0.1, 0.02  # around the square


# -- the model, and many of them at once -----------------------------------------------------------------------------


def squared_error(model: nn.Module, x: Tensor) -> Tensor:
    return (x - model(x)).square().sum(-1)


def examples(seed: int) -> Tensor:
    """One active feature each, of a size from 0 to 1, (EXAMPLES, FEATURES).

    Which features a sample this small holds more of decides whether the square is left soon: on the population it is
    not, within these steps.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "examples"))
    active = torch.randint(FEATURES, (EXAMPLES,), generator=generator)
    return nn.functional.one_hot(active, FEATURES) * torch.rand(EXAMPLES, 1, generator=generator)


class Training(L.LightningModule):
    """All seeds side by side: parameters (seed, 2, feature) and (seed, feature), examples and batches of their own."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self.seeds, self.data = seeds, torch.stack([examples(seed) for seed in seeds])
        self.block = -1, torch.empty(0)  # of a thousand steps: number, chosen examples (step, seed, batch)
        weight, bias = plateau(4, 0, FEATURES).point(dead=0.0)
        start = [torch.Generator().manual_seed(derive_seed(seed, "start")) for seed in seeds]
        noise = torch.stack([torch.randn(3, FEATURES, generator=generator) for generator in start])
        self.weight = nn.Parameter(weight.float() + WEIGHT_NOISE * noise[:, :2])
        self.bias = nn.Parameter(bias.float() + BIAS_NOISE * noise[:, 2])

    def model_of(self, index: int) -> Toy:
        return Toy(self.weight[index], self.bias[index])

    def training_step(self, chosen: Tensor, _: int) -> Tensor:  # (seed, batch)
        x = self.data[torch.arange(len(chosen))[:, None], chosen]
        y = torch.relu(x @ self.weight.mT @ self.weight + self.bias[:, None])
        return (x - y).square().sum(-1).mean(1).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)

    def train_dataloader(self) -> Any:
        return batches(self, self._draw)

    def _draw(self, step: int) -> Tensor:  # (seed, batch)
        number, within = divmod(step, 1000)
        if number != self.block[0]:
            own = [torch.Generator().manual_seed(derive_seed(seed, "batches", number)) for seed in self.seeds]
            drawn = [torch.randint(EXAMPLES, (1000, BATCH), generator=generator) for generator in own]
            self.block = number, torch.stack(drawn, 1)
        return self.block[1][within]


# -- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Polygon:
    """The exact population loss of a toy model, and the polygon that its features make.

    - `loss`, squared error: E‖x − f(x)‖² over x = u eᵢ, u ~ U[0, 1].
    - `sides`, 1: sides of the polygon, 0 between plateaus.
    - `positive`, 1: dead features that are on, 0 between plateaus.
    - `weight` (dimension, feature), 1: the weights.
    - `bias` (feature), 1: the biases.
    """

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        model: Any = snapshot.model
        weight, bias = model.hidden.weight.detach().double().cpu(), model.bias.detach().double().cpu()
        corner = plateau_at(weight, bias)
        rows = Rows(headline=["loss"])
        rows.put("loss", (), float(population_loss(weight, bias)), None, "population loss", units="squared error")
        rows.put("sides", (), corner.sides if corner else 0, None, "sides of the polygon", units="1")
        rows.put("positive", (), corner.positive if corner else 0, None, "dead features on", units="1")
        rows.put("weight", ("dimension", "feature"), weight.numpy(), None, "weights", units="1")
        rows.put("bias", "feature", bias.numpy(), None, "biases", units="1")
        return rows.dataset(feature=np.arange(len(bias)), dimension=np.arange(2))


def watches(data: Tensor, steps: int, *, estimates: int) -> list[Watch]:
    late = every(max(1, steps // estimates), start=max(1, steps // estimates), stop=steps)
    often = log_spaced(20, max(2, steps // estimates)) | late
    chains: dict[str, Any] = {"chains": 4, "draws": 120, "burn_in": 40, "batch_size": len(data), "steps_per_draw": 2}
    llc = LLC(data, squared_error, nbeta=NBETA, gamma=GAMMA, lr=5e-3, sampler="baoab", **chains)
    return [
        Watch("loss", Polygon(), often),
        Watch("superposition", Superposition("hidden.weight", columns=True), often),
        Watch("polysemanticity", Polysemanticity(data, data.argmax(1), module="hidden", top=50), often),
        Watch("llc", llc, late),
    ]


# -- the run ---------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command(help="Train toy models of superposition, many seeds at once, and name every plateau.")
def run(
    out: Annotated[Path, typer.Option(help="Folder for the runs, the report, the figure and results.json.")] = Path(
        "runs/superposition"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 24,
    first: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    steps: Annotated[int, typer.Option(min=100, help="Optimizer steps.")] = 20_000,
    fast: Annotated[bool, typer.Option("--fast", help="One seed, fewer steps, and a check of the numbers.")] = False,
) -> None:
    console = Console(stderr=True)
    with one_line_errors(console):
        form = FAST if fast else {"seeds": range(first, first + seeds), "steps": steps}
        results = main(out, console=console, **form)
        conclude(out, checks(results, fast=fast), console, results)


FAST: dict[str, Any] = {"seeds": (15,), "steps": 5000, "estimates": 20, "points": ("5", "5+")}


def main(
    out: Path,
    seeds: Sequence[int],
    steps: int,
    *,
    console: Console,
    estimates: int = 40,
    points: Sequence[str] = ("5", "5+", "6"),
) -> dict[str, Any]:
    """Train, measure, find, write; returns what results.json holds beside its checks."""
    # one run a seed, all trained at once, each watched by a monitor of its own
    torch.set_num_threads(1)
    runs = {
        f"seed-{seed:02d}": Trajectory(
            out / f"seed-{seed:02d}" / "trajectory.zarr",
            seed=seed,
            title=f"Toy model of superposition, seed {seed}",
            settings={"steps": steps, "seeds": list(seeds), "learning_rate": LEARNING_RATE, "batch": BATCH},
            data=f"{EXAMPLES} examples of {FEATURES} features, one active in each",
        )
        for seed in seeds
    }
    training = Training(seeds)
    monitors = []
    for index, (trajectory, data) in enumerate(zip(runs.values(), training.data, strict=True)):
        asked = watches(data, steps, estimates=estimates)
        monitors.append(Monitor(trajectory, asked, strict=True, model=partial(Training.model_of, index=index)))
    saved = every(max(1, steps // 10))
    train(out, training, monitors, steps=steps, saved=saved, console=console, units="squared error, all seeds")
    results: dict[str, Any] = {
        "paths": {name: path_of(run) for name, run in runs.items()},
        "plateaus": rows_of_plateaus(runs),
        "points": {name: _estimate(exact_point_llc(name)) for name in points},
        "transitions": {name: transitions_of(run) for name, run in runs.items()},
        "crossings": predicted_crossings(),
    }
    # figures, the report of the first seed that moves, tables
    _draw_losses(runs, out / "seeds.png")
    moved = [name for name, path in results["paths"].items() if len(path) > 1]
    for name in moved[:1]:
        report(runs[name], out / name / "report.html", figures=out / name / "figures")
        console.print(f"report: {out / name / 'report.html'}", highlight=False, soft_wrap=True)
    _print(results, console)
    return results


def _draw_losses(runs: Mapping[str, Trajectory], file: Path) -> None:
    """The losses of all seeds, with the exact levels as dotted lines."""
    losses = {name: [s for s in series_of(run) if s.name == "loss/loss"] for name, run in runs.items()}
    figure, axes = plots.plot_runs(losses)
    for corner in plateaus(FEATURES):
        axes[0].axhline(corner.level, linewidth=0.5, linestyle=":", color="0.5")
        axes[0].annotate(corner.name, (1.0, corner.level), xycoords=("axes fraction", "data"), fontsize=8)
    figure.set_size_inches(9, 8)
    figure.savefig(file, dpi=150)


def _estimate(result: xr.Dataset) -> dict[str, Any]:
    return {name: result[name].item() for name in ("llc", "se", "low", "high", "verdict")}


def _print(results: Mapping[str, Any], console: Console) -> None:
    paths = [" → ".join(path) for path in results["paths"].values()]
    console.print(table("paths", ["path", "seeds"], [(p, paths.count(p)) for p in sorted(set(paths))]))
    rows = [(name, *row.values()) for name, row in results["plateaus"].items()]
    columns = ["plateau", "seeds", "level", "measured", "λ", "λ̂ on the way", "sd over seeds", "quadratic law"]
    console.print(table(f"plateaus, λ̂ at nbeta {NBETA:g}, gamma {GAMMA:g}", columns, rows))
    known = [(name, named(name).llc, point["llc"], point["se"]) for name, point in results["points"].items()]
    console.print(table("λ at the critical points", ["point", "exact", "λ̂", "se"], known))
    listed = [(name, transition) for name, several in results["transitions"].items() for transition in several]
    rows = [(name, t["from"], t["to"], f"{t['start']:.0f}-{t['end']:.0f}", t["type"]) for name, t in listed]
    console.print(table("transitions", ["run", "from", "to", "steps", "type"], rows))
    console.print(table("preferred from n", ["pair", "n"], list(results["crossings"].items())))


def checks(results: Mapping[str, Any], *, fast: bool) -> list[Check]:
    """The numbers that are known; of `--fast` the one seed's path and transition too."""
    listed = []
    for name, row in results["plateaus"].items():
        level, law = row["level"], row["law"]
        listed.append(Check(f"level of {name}", row["measured"], level - 0.0005, level + 0.0015, f"exact: {level:.5f}"))
        if name in ("5", "5+"):
            estimate, published = row["λ̂ on the way"], f"quadratic law: {law:.3g}"
            listed.append(Check(f"λ̂ on the way at {name}", estimate, 0.85 * law, 1.15 * law, published))
    for name, point in results["points"].items():
        exact, error = named(name).llc, 2 * point["se"]
        low, high = 0.97 * exact - error, 1.03 * exact + error
        listed.append(Check(f"λ̂ at the point {name}", point["llc"], low, high, f"exact: {exact:g}"))
    transitions = [transition for several in results["transitions"].values() for transition in several]
    types = [t["type"] for t in transitions if t["to"].startswith("5") and t["type"] in ("A", "B")]
    if fast or types:
        share = types.count("A") / len(types) if types else float("nan")
        listed.append(Check("transitions into a pentagon of type A, of those with a type", share, 0.9, 1, "A"))
    if fast:
        listed.append(Check("seed 15 goes from 4++ to 5+", float(results["paths"]["seed-15"] == ["4++", "5+"]), 1, 1))
    return listed


if __name__ == "__main__":
    app()
