"""A deep linear network learns one rank at a time: a staircase whose every step has a known λ, watched by devmon.

What it shows: the product of three matrices, 8 → 4 → 4 → 8, learns a linear map with singular values 3, 1.5, .75 from a
very small start. It rests at saddle after saddle, and leaves each by learning one more singular direction (Saxe et al.
2014, arXiv:1312.6120; Jacot et al. 2021, arXiv:2106.15933). After k steps the loss is ½ Σ_{i>k} s² exactly, the product
has rank k, and the learning coefficient of the function it computes is known: Aoyagi's formula (2024), for these widths
8, 12, 16, 20. A saddle is no minimum of the training loss, so λ̂ is that of the loss of copying the network as it is
then, ½E‖f_w(x) − f_w*(x)‖²: whether the data are of rank 3 or the truth is of rank k makes no difference to it.

Numbers to expect: levels 5.906, 1.406, .281, 0; λ̂ of 7.5, 11.8, 15.9, 20.0 (errors .15 to .2) at nbeta 1e5, gamma 10.
What lacks at low ranks is no error: the loss is of higher order in the weights there than quadratic, and its λ is
approached slowly in nbeta, from below; at rank 0 the law itself, by importance sampling, gives 7.68
(`law_at_rank_zero`). The detector finds one jump of the loss a stair, with the step at which the loss is halfway
between its two levels inside the event's extent, and one of each singular value, with the step at which that is half
grown inside.

Cost: about five minutes on one core, most of it λ̂; no use for a GPU. `--fast`: twenty seconds, checked.
Writes OUT/trajectory.zarr, OUT/report.html, OUT/figures/, OUT/results.json. The same command goes on with an
interrupted run.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
import typer
import xarray as xr
from rich.console import Console
from torch import Tensor

from devmon import Snapshot, Trajectory, Watch, every, log_spaced
from devmon.analysis import detect, report, series_of
from devmon.data.rows import Rows
from devmon.recipes.common import Check, batches, conclude, fit, one_line_errors, table
from devmon.recipes.models.deep_linear_network import TARGET, WIDTHS, Deep, copying_loss, law_at_rank_zero, level, task
from devmon.sampling import BAOAB, Settings, regression_loss, sample
from devmon.snapshot import derive_seed
from devmon.testing.exact import deep_linear

SCALE, LEARNING_RATE = 0.05, 0.04  # of the start: layers of spectral norm about SCALE
NBETA, GAMMA = 1e5, 10.0


# -- the training ----------------------------------------------------------------------------------------------------


class Training(L.LightningModule):
    """Gradient descent on the whole data, whose inputs are white: the loss is ½ ‖product − task‖²."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(derive_seed(seed, "start"))
        self.net = Deep(WIDTHS)
        for weight in self.net.parameters():
            weight.data = SCALE * torch.randn(weight.shape, generator=generator) / max(weight.shape) ** 0.5
        inputs = torch.linalg.qr(torch.randn(8 * WIDTHS[0], WIDTHS[0], generator=generator))[0] * (8 * WIDTHS[0]) ** 0.5
        self.data = inputs, inputs @ task(seed).T

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return regression_loss(self.net, batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)

    def train_dataloader(self) -> Any:
        return batches(self, lambda step: self.data)


# -- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stairs:
    """How much of a linear map a deep linear network has learnt, direction by direction.

    - `loss`, squared error: ½ ‖product − target‖².
    - `singular_value` (mode), 1: of the product, descending, as many as the target has.
    - `rank`, 1: how many of them are above half of the target's.
    """

    target: Tensor

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        model: Any = snapshot.model
        product = model.product().detach().double().cpu()
        target = self.target.double()
        aims = torch.linalg.svdvals(target)
        aims = aims[aims > 1e-6 * aims[0]]
        values = torch.linalg.svdvals(product)[: len(aims)]
        loss = 0.5 * float((product - target).square().sum())
        rows = Rows(headline=["loss", "singular_value"])
        rows.put("loss", (), loss, None, "½ ‖product − target‖²", units="squared error")
        rows.put("singular_value", "mode", values.numpy(), None, "singular value of the product", units="1")
        rows.put("rank", (), int((values > aims / 2).sum()), None, "modes more than half learnt", units="1")
        return rows.dataset(mode=np.arange(len(aims)))


@dataclass(frozen=True)
class OwnLLC:
    """The learning coefficient of the function that the network computes: traces as of `LLC`, for the loss of copying.

    In float64, by underdamped Langevin dynamics of long memory: stiff and flat directions differ ten thousandfold.
    """

    nbeta: float = NBETA
    gamma: float = GAMMA
    momentum: float = 0.99
    chains: int = 16
    draws: int = 100
    burn_in: int = 50
    steps_per_draw: int = 40

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        model: Any = snapshot.model
        product = model.product().detach()[None]
        lr = 0.1 / self.nbeta  # the largest curvature of the loss is about 13
        kernel = BAOAB(lr, self.nbeta, self.gamma, momentum=self.momentum)
        settings = Settings(
            nbeta=self.nbeta,
            gamma=self.gamma,
            lr=lr,
            chains=self.chains,
            draws=self.draws,
            burn_in=self.burn_in,
            batch_size=1,
            steps_per_draw=self.steps_per_draw,
            sampler=kernel,
            float64=True,
        )
        return sample(snapshot.model, copying_loss, product, settings, seed=snapshot.seed)


def watches(target: Tensor, steps: int, llc: OwnLLC, estimates: Container[int]) -> list[Watch]:
    often = log_spaced(20, steps) | every(max(1, steps // 60), stop=steps)  # more make the search of events slow
    return [Watch("stairs", Stairs(target), often), Watch("llc", llc, estimates)]


# -- what is found -----------------------------------------------------------------------------------------------------


def changes_of(run: Mapping[str, xr.Dataset]) -> dict[str, list[float]]:
    """For each stair the step at which the loss has fallen halfway to the next level, and that at which the singular
    value is half of its target's (later: half the fall is made at 1 − 1/√2 = .29 of the singular value)."""
    rows = run["stairs"]
    values, middle = rows["singular_value"].transpose("step", "mode").values, []
    for mode in range(len(TARGET)):
        middle.append(_first(rows["step"].values, -rows["loss"].values, -(level(mode) + level(mode + 1)) / 2))
    grown = [_first(rows["step"].values, values[:, mode], aim / 2) for mode, aim in enumerate(TARGET)]
    return {"half fallen": middle, "half grown": grown}


def _first(steps: np.ndarray, values: np.ndarray, aim: float) -> float:
    """The step at which rising values first pass `aim`, between checkpoints in proportion; NaN where they do not."""
    at = int(np.argmax(values > aim))
    return float(np.interp(aim, values[at - 1 : at + 1], steps[at - 1 : at + 1])) if at else float("nan")


def rows_of_ranks(run: Trajectory) -> list[dict[str, Any]]:
    """For each rank: the exact loss and λ, and what was measured halfway through its plateau, in log step."""
    changes = changes_of(run)["half grown"]
    ends = [changes[0] / 8, *changes, float(run["stairs"]["step"][-1])]
    (llc,) = (curve for curve in series_of(run) if curve.name == "llc/llc")
    rows = []
    for rank in range(len(TARGET) + 1):
        middle = float(np.sqrt(ends[rank] * ends[rank + 1]))
        at = int(np.abs(llc.steps - middle).argmin())
        loss = float(run["stairs"]["loss"].sel(step=int(llc.steps[at]), method="nearest"))
        rows.append(
            {
                "rank": rank,
                "step": int(llc.steps[at]),
                "level": level(rank),
                "loss": loss,
                "λ": float(deep_linear(WIDTHS, rank)[0]),
                "λ̂": float(llc.values[at]),
                "se": float(np.asarray(llc.se)[at]),
                "rejected": bool(np.asarray(llc.rejected)[at]),
            }
        )
    return rows


def jumps_of(run: Trajectory) -> list[dict[str, Any]]:
    """The jumps that the detector finds in the loss and in each singular value.

    Each with the stairs whose change (half fallen, half grown) lies in its extent: the 90% interval of the middle
    together with the span from 10% to 90%.
    """
    followed = ("stairs/loss", "stairs/singular_value[")
    curves = [curve for curve in series_of(run) if curve.name.startswith(followed)]
    changes, jumps = changes_of(run), []
    for event in detect(curves).events:
        if event.kind != "jump":
            continue
        low, high = event.extent
        steps = changes["half fallen" if event.series == "stairs/loss" else "half grown"]
        inside = [mode for mode, step in enumerate(steps) if low <= step <= high]
        jump = {"series": event.series, "step": event.step, "extent": (low, high), "size": event.size}
        jumps.append(jump | {"stairs": inside, "q": event.q_value})
    return jumps


# -- the run ---------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)
FAST: dict[str, Any] = {
    "estimates": (100, 325, 800, 2000),  # one in each plateau of seed 3
    "llc": OwnLLC(nbeta=1e4, momentum=0.98, chains=8, draws=100, burn_in=40, steps_per_draw=15),
}


@app.command(help="Train a deep linear network through its staircase and compare λ̂ at each step with the exact λ.")
def run(
    out: Annotated[Path, typer.Option(help="Folder for the run, the report and results.json.")] = Path(
        "runs/deep_linear"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the task, the start and the measurements.")] = 3,
    steps: Annotated[int, typer.Option(min=500, help="Optimizer steps.")] = 2000,
    fast: Annotated[
        bool, typer.Option("--fast", help="Fewer draws and estimates, and a check of the numbers.")
    ] = False,
) -> None:
    console = Console(stderr=True)
    with one_line_errors(console):
        results = main(out, console=console, **(FAST if fast else {"seed": seed, "steps": steps}))
        conclude(out, checks(results), console, results)


def main(
    out: Path,
    seed: int = 3,
    steps: int = 2000,
    *,
    console: Console,
    estimates: Container[int] | None = None,
    llc: OwnLLC | None = None,
) -> dict[str, Any]:
    """Train, measure, find, write; returns what results.json holds beside its checks."""
    # train, watched; what is there already is not done again
    asked = watches(task(seed), steps, llc or OwnLLC(), estimates or log_spaced(20, steps, first=12))
    run = fit(
        out,
        lambda: Training(seed),
        asked,
        steps=steps,
        saved=every(max(1, steps // 10)),
        seed=seed,
        console=console,
        units="squared error",
        title="Deep linear network: one rank at a time",
        settings={"widths": WIDTHS, "target": TARGET, "scale": SCALE, "learning_rate": LEARNING_RATE, "steps": steps},
        data=f"{8 * WIDTHS[0]} white inputs, targets without noise",
    )
    # what is known about every rank, stair and jump, as tables
    ranks, changes, jumps = rows_of_ranks(run), changes_of(run), jumps_of(run)
    console.print(table("plateaus", list(ranks[0]), [list(row.values()) for row in ranks]))
    console.print(table("changes at steps", list(changes), zip(*changes.values(), strict=True)))
    rows = [
        (j["series"], f"{j['step']:.0f}", "{:.0f}-{:.0f}".format(*j["extent"]), j["size"], j["stairs"]) for j in jumps
    ]
    console.print(table("jumps", ["series", "step", "extent", "size", "stairs inside"], rows))
    page = report(run, out / "report.html", figures=out / "figures")
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    # at rank 0 the law is known at this very nbeta
    nbeta = float(run["llc"].attrs["nbeta"])
    return {"ranks": ranks, "changes": changes, "jumps": jumps, "law": law_at_rank_zero(nbeta, GAMMA)}


def checks(results: Mapping[str, Any]) -> list[Check]:
    """Levels, λ̂ and steps that are known. At rank 0 the law at this nbeta is, too, below λ; at others it lacks less."""
    listed, lacks = [], 8 - results["law"]
    for row in results["ranks"]:
        rank, level, exact, error = row["rank"], row["level"], row["λ"], 3 * row["se"]
        listed.append(Check(f"loss at rank {rank}", row["loss"], level - 0.02, level + 0.02, f"exact: {level:.4g}"))
        estimate = float("nan") if row["rejected"] else row["λ̂"]
        low, high = exact - lacks - error, (exact if rank else results["law"]) + error
        listed.append(Check(f"λ̂ at rank {rank}", estimate, low, high, f"exact: {exact:g}"))
    for mode, aim in enumerate(TARGET):
        falls = [
            j for j in results["jumps"] if j["series"] == "stairs/loss" and j["stairs"] == [mode] and j["size"] < 0
        ]
        name = f"stairs/singular_value[mode={mode}]"
        rises = [j for j in results["jumps"] if j["series"] == name and mode in j["stairs"] and j["size"] > aim / 2]
        for what, jumps, of in (("half fallen", falls, "the loss"), ("half grown", rises, f"singular value {mode}")):
            inside = f"with step {results['changes'][what][mode]:.0f} inside, where stair {mode} is {what}"
            listed.append(Check(f"jumps of {of} {inside}", len(jumps), 1, 1, "exact: 1"))
    return listed


if __name__ == "__main__":
    app()
