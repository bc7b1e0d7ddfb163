"""A toy model of superposition climbs down its exact staircase, many seeds at once, watched by devmon.

What it shows: six sparse features are squeezed through two dimensions and back (Elhage et al. 2022, arXiv:2209.10652).
Training starts near the square and rests at critical points whose losses are known exactly (Chen et al. 2023,
arXiv:2310.06301): k features at the corners of a k-gon, the others dead, with a + for each dead feature that predicts
its mean. Every plateau of every seed is named from its level, lengths, angles and biases
(`devmon.testing.superposition`); paths are 4+ → 5 and 4++ → 5+, each step of type A: the loss falls, λ rises.

Numbers to expect, 24 seeds and 20 000 steps: levels .10417 (4+), .09722 (4++), .06874 (5), .06180 (5+), met within .0015
(the noise of SGD and of 1000 examples). Nine of 24 seeds reach a pentagon: each has its own examples, and where these
favour the dead features the square is left soon. λ at the critical points themselves, of 5, 5+ and 6: 7, 8.5, 8.5, met
within 3%. On the way λ̂ is measured at nbeta n / log n = 145 and gamma 10, where even the exact quadratic law gives less
than λ: 5.4 for 5 (measured 5.3), 6.6 for 5+ (6.4), after 3.9 at 4+ and 4.8 at 4++. Also printed: the n from which a
Bayesian prefers one polygon to another.

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
from devmon.analysis import Detector, detect, phase_types, plots, report, series_of
from devmon.analysis.transitions.phases import critical_n
from devmon.callbacks import Monitor
from devmon.instruments import LLC, Polysemanticity, Superposition
from devmon.recipes.common import Check, batches, conclude, table, told_in_one_line, train
from devmon.sampling import estimate_llc
from devmon.snapshot import derive_seed
from devmon.testing.exact import gibbs_quadratic
from devmon.testing.superposition import errors, plateau, plateau_at, plateaus, population_loss

FEATURES, EXAMPLES, BATCH, LEARNING_RATE = 6, 1000, 20, 0.05
WEIGHT_NOISE, BIAS_NOISE = 0.1, 0.02  # around the square
NBETA, GAMMA = 145.0, 10.0


# -- the model, and many of them at once -----------------------------------------------------------------------------


class Toy(nn.Module):
    """ReLU(Wᵀ W x + b) of x (batch, features)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.hidden = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.hidden.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.hidden(x) @ self.hidden.weight + self.bias)


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
    """All seeds side by side: one parameter (seed, 2, feature), one (seed, feature), examples and batches of their own."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self.seeds, self.data = seeds, torch.stack([examples(seed) for seed in seeds])
        self.block = -1, torch.empty(0)  # of a thousand steps: number, chosen examples (step, seed, batch)
        weight, bias = plateau(4, 0, FEATURES).point(dead=0.0)
        start = [torch.Generator().manual_seed(derive_seed(seed, "start")) for seed in seeds]
        noise = torch.stack([torch.randn(3, FEATURES, generator=generator) for generator in start])
        self.weight = nn.Parameter(weight.float() + WEIGHT_NOISE * noise[:, :2])
        self.bias = nn.Parameter(bias.float() + BIAS_NOISE * noise[:, 2])

    def one(self, index: int) -> Toy:
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
            one = [torch.Generator().manual_seed(derive_seed(seed, "batches", number)) for seed in self.seeds]
            drawn = [torch.randint(EXAMPLES, (1000, BATCH), generator=generator) for generator in one]
            self.block = number, torch.stack(drawn, 1)
        return self.block[1][within]


# -- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Polygon:
    """The exact population loss of a toy model, and its polygon: sides and dead features that are on, 0 between plateaus.

    loss: E‖x − f(x)‖² over x = u eᵢ, u ~ U[0, 1]; weight (dimension, feature) and bias (feature) are kept.
    """

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        model: Any = snapshot.model
        weight, bias = model.hidden.weight.detach().double().cpu(), model.bias.detach().double().cpu()
        found = plateau_at(weight, bias)
        units = {"units": "squared error"}
        return xr.Dataset(
            {
                "loss": ((), float(population_loss(weight, bias)), {"long_name": "population loss"} | units),
                "sides": ((), found.sides if found else 0, {"long_name": "sides of the polygon", "units": "1"}),
                "positive": ((), found.positive if found else 0, {"long_name": "dead features on", "units": "1"}),
                "weight": (("dimension", "feature"), weight.numpy(), {"long_name": "weights", "units": "1"}),
                "bias": ("feature", bias.numpy(), {"long_name": "biases", "units": "1"}),
            },
            coords={"feature": np.arange(len(bias)), "dimension": np.arange(2)},
            attrs={"headline": ["loss"]},
        )


def watches(data: Tensor, steps: int, *, estimates: int) -> list[Watch]:
    late = every(max(1, steps // estimates), start=max(1, steps // estimates), stop=steps)
    often = log_spaced(20, max(2, steps // estimates)) | late
    llc = LLC(data, squared_error, nbeta=NBETA, gamma=GAMMA, lr=5e-3, chains=4, draws=120, burn_in=40,
              batch_size=len(data), steps_per_draw=2, sampler="baoab")  # fmt: skip
    return [
        Watch("loss", Polygon(), often),
        Watch("superposition", Superposition("hidden.weight", columns=True), often),
        Watch("polysemanticity", Polysemanticity(data, data.argmax(1), module="hidden", top=50), often),
        Watch("llc", llc, late),
    ]


# -- what is found ---------------------------------------------------------------------------------------------------


def names_of(run: Mapping[str, xr.Dataset]) -> list[str]:
    """The name of the plateau at each step of the watch `loss`, "" between plateaus."""
    rows = run["loss"]
    pairs = zip(rows["sides"].values.astype(int), rows["positive"].values.astype(int), strict=True)
    return [f"{sides}{'+' * positive}" if sides else "" for sides, positive in pairs]


def path_of(run: Mapping[str, xr.Dataset]) -> list[str]:
    """The plateaus in the order of their visits, those that lasted a twentieth of the run without a gap."""
    names, steps = names_of(run), run["loss"]["step"].values
    path: list[str] = []
    start = 0
    for i, name in enumerate(names):
        if name != names[start]:
            start = i
        if name and steps[i] - steps[start] >= steps[-1] / 20 and path[-1:] != [name]:
            path.append(name)
    return path


def rows_of_plateaus(runs: Mapping[str, Mapping[str, xr.Dataset]]) -> dict[str, dict[str, Any]]:
    """For each plateau that was visited: exact and measured level, and λ̂ on the way, over seeds."""
    found: dict[str, dict[str, Any]] = {}
    for one in plateaus(FEATURES):
        levels, estimates = [], []
        for run in runs.values():
            if one.name not in path_of(run):  # passed through at most
                continue
            inside = {
                int(s) for s, name in zip(run["loss"]["step"].values, names_of(run), strict=True) if name == one.name
            }
            levels.append(float(run["loss"]["loss"].sel(step=sorted(inside)).mean()))
            (llc,) = (s for s in series_of(run) if s.name == "llc/llc")  # type: ignore[arg-type]
            good = np.isin(llc.steps, sorted(inside)) & ~np.asarray(llc.rejected)
            estimates += [float(np.mean(llc.values[good]))] if good.any() else []
        if levels:
            law = gibbs_quadratic(np.maximum(one.curvatures(), 0), NBETA, GAMMA) if one.llc == one.llc else float("nan")
            found[one.name] = {
                "seeds": len(levels), "level": one.level, "measured": float(np.mean(levels)), "λ": one.llc,
                "λ̂ on the way": float(np.mean(estimates)) if estimates else float("nan"),
                "sd over seeds": float(np.std(estimates, ddof=1)) if len(estimates) > 1 else float("nan"), "law": law,
            }  # fmt: skip
    return found


def exact_point_llc(name: str, *, draws: int = 120, seed: int = 0) -> xr.Dataset:
    """λ̂ at the critical point of that name, on the population loss: nbeta so large and gamma such that the law is
    that of λ itself, up to a percent, while the chains stay where the landscape is that of the point."""
    one = plateau(int(name[0]), name.count("+"), FEATURES)

    def loss(model: Any, active: Tensor) -> Tensor:
        return errors(model.hidden.weight, model.bias)[active[:, 0].long()]

    index = torch.arange(FEATURES)[:, None]
    return estimate_llc(Toy(*one.point()), loss, index, nbeta=1e6, gamma=1e3, lr=4e-7, chains=8, draws=draws,
                        steps_per_draw=5, batch_size=FEATURES, control_variate=False, float64=True, seed=seed)  # fmt: skip


def transitions_of(run: Trajectory) -> list[dict[str, Any]]:
    """Every transition that the detector finds in loss and λ̂, with its type and the names before and after it."""
    series = [one for one in series_of(run) if one.name in ("loss/loss", "llc/llc")]
    detection = detect(series, Detector(n_null=99))
    names = dict(zip(run["loss"]["step"].values.tolist(), names_of(run), strict=True))
    found = []
    for one in phase_types(series, detection):
        before = [name for step, name in names.items() if name and step <= one.start]
        after = [name for step, name in names.items() if name and step >= one.end]
        crossing = None if one.crossing is None else {"n": one.crossing.n, "interval": one.crossing.interval}
        found.append({
            "from": before[-1] if before else "", "to": after[0] if after else "", "start": one.start, "end": one.end,
            "type": one.kind, "probabilities": one.probabilities, "crossing": crossing, "note": one.note,
        })  # fmt: skip
    return found


def predicted_crossings() -> dict[str, float]:
    """The n from which the later polygon has the lower free energy, of pairs whose λ are known and differ."""
    known = [one for one in plateaus(FEATURES) if one.llc == one.llc]
    return {
        f"{a.name} → {b.name}": float(critical_n(b.level - a.level, b.llc - a.llc))
        for a in known for b in known if b.level < a.level and b.llc > a.llc
    }  # fmt: skip


# -- the run ---------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command(help="Train toy models of superposition, many seeds at once, and name every plateau.")
def run(
    out: Annotated[Path, typer.Option(help="Folder for the runs, the report, the figure and results.json.")] = Path("runs/superposition"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 24,
    first: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    steps: Annotated[int, typer.Option(min=100, help="Optimizer steps.")] = 20_000,
    fast: Annotated[bool, typer.Option("--fast", help="One seed, fewer steps, and a check of the numbers.")] = False,
) -> None:  # fmt: skip
    console = Console(stderr=True)
    with told_in_one_line(console):
        form = FAST if fast else {"seeds": range(first, first + seeds), "steps": steps}
        found = main(out, console=console, **form)
        conclude(out, checks(found, fast=fast), console, found)


FAST: dict[str, Any] = {"seeds": (15,), "steps": 5000, "estimates": 20, "points": ("5", "5+")}


def main(
    out: Path, seeds: Sequence[int], steps: int, *, console: Console, estimates: int = 40,
    points: Sequence[str] = ("5", "5+", "6"),
) -> dict[str, Any]:  # fmt: skip
    """Train, measure, find, write; returns what results.json holds beside its checks."""
    torch.set_num_threads(1)
    runs = {
        f"seed-{seed:02d}": Trajectory(
            out / f"seed-{seed:02d}" / "trajectory.zarr", seed=seed, title=f"Toy model of superposition, seed {seed}",
            settings={"steps": steps, "seeds": list(seeds), "learning_rate": LEARNING_RATE, "batch": BATCH},
            data=f"{EXAMPLES} examples of {FEATURES} features, one active in each",
        )
        for seed in seeds
    }  # fmt: skip
    training = Training(seeds)
    monitors = [
        Monitor(trajectory, watches(data, steps, estimates=estimates), strict=True,
                model=partial(Training.one, index=index))
        for index, (trajectory, data) in enumerate(zip(runs.values(), training.data, strict=True))
    ]  # fmt: skip
    saved = every(max(1, steps // 10))
    train(out, training, monitors, steps=steps, saved=saved, console=console, units="squared error, all seeds")
    found: dict[str, Any] = {
        "paths": {name: path_of(run) for name, run in runs.items()},
        "plateaus": rows_of_plateaus(runs),
        "points": {name: _estimate(exact_point_llc(name)) for name in points},
        "transitions": {name: transitions_of(run) for name, run in runs.items()},
        "crossings": predicted_crossings(),
    }
    figure, axes = plots.plot_runs(
        {name: [s for s in series_of(run) if s.name == "loss/loss"] for name, run in runs.items()}
    )
    for one in plateaus(FEATURES):
        axes[0].axhline(one.level, linewidth=0.5, linestyle=":", color="0.5")
        axes[0].annotate(one.name, (1.0, one.level), xycoords=("axes fraction", "data"), fontsize=8)
    figure.set_size_inches(9, 8)
    figure.savefig(out / "seeds.png", dpi=150)
    moved = [name for name, path in found["paths"].items() if len(path) > 1]
    for name in moved[:1]:
        report(runs[name], out / name / "report.html", figures=out / name / "figures")
        console.print(f"report: {out / name / 'report.html'}", highlight=False, soft_wrap=True)
    _tell(found, console)
    return found


def _estimate(result: xr.Dataset) -> dict[str, Any]:
    return {name: result[name].item() for name in ("llc", "se", "low", "high", "verdict")}


def _tell(found: Mapping[str, Any], console: Console) -> None:
    paths = [" → ".join(path) for path in found["paths"].values()]
    console.print(table("paths", ["path", "seeds"], [(p, paths.count(p)) for p in sorted(set(paths))]))
    rows = [(name, *row.values()) for name, row in found["plateaus"].items()]
    columns = ["plateau", "seeds", "level", "measured", "λ", "λ̂ on the way", "sd over seeds", "quadratic law"]
    console.print(table(f"plateaus, λ̂ at nbeta {NBETA:g}, gamma {GAMMA:g}", columns, rows))
    known = [(n, plateau(int(n[0]), n.count("+"), FEATURES).llc, p["llc"], p["se"]) for n, p in found["points"].items()]
    console.print(table("λ at the critical points", ["point", "exact", "λ̂", "se"], known))
    each = [(name, t["from"], t["to"], f"{t['start']:.0f}-{t['end']:.0f}", t["type"])
            for name, ts in found["transitions"].items() for t in ts]  # fmt: skip
    console.print(table("transitions", ["run", "from", "to", "steps", "type"], each))
    console.print(table("preferred from n", ["pair", "n"], list(found["crossings"].items())))


def checks(found: Mapping[str, Any], *, fast: bool) -> list[Check]:
    """The numbers that are known; of `--fast` the one seed's path and transition too."""
    listed = []
    for name, row in found["plateaus"].items():
        level = f"exact: {row['level']:.5f}"
        listed.append(Check(f"level of {name}", row["measured"], row["level"] - 0.0005, row["level"] + 0.0015, level))
        if name in ("5", "5+"):
            law = row["law"]
            listed.append(
                Check(
                    f"λ̂ on the way at {name}", row["λ̂ on the way"], 0.85 * law, 1.15 * law, f"quadratic law: {law:.3g}"
                )
            )
    for name, point in found["points"].items():
        exact, error = plateau(int(name[0]), name.count("+"), FEATURES).llc, 2 * point["se"]
        listed.append(
            Check(
                f"λ̂ at the point {name}", point["llc"], 0.97 * exact - error, 1.03 * exact + error, f"exact: {exact:g}"
            )
        )
    into = [one for several in found["transitions"].values() for one in several if one["to"].startswith("5")]
    typed = [one for one in into if one["type"] in ("A", "B")]
    if fast or typed:
        share = sum(one["type"] == "A" for one in typed) / len(typed) if typed else float("nan")
        listed.append(Check("transitions into a pentagon of type A, of those with a type", share, 0.9, 1, "A"))
    if fast:
        listed.append(Check("seed 15 goes from 4++ to 5+", float(found["paths"]["seed-15"] == ["4++", "5+"]), 1, 1))
    return listed


if __name__ == "__main__":
    app()
