"""A transformer learns linear regression in its context, stage by stage, watched by devmon.

What it shows: sequences x₁, y₁, …, x₈, y₈ with y = w·x + noise and a new w ~ N(0, 1)⁴ in each; a two-layer transformer
predicts every y from what came before it (Garg et al. 2022, arXiv:2208.01066; Hoogland et al. 2024, arXiv:2402.02364,
whose stages LR1 to LR5 these are). First it learns the prior of the task, that is nothing: it predicts 0 and its mean
squared error is E y² = 4.125 (LR1). Then it learns to use the context (LR2) and comes near ridge regression, the best
that any predictor can do, whose error is computed here exactly up to its quadrature (1.658). The λ̂ rises with it.

Numbers to expect: published, with the schedule of 500 000 steps: error 4.45, 4.13 (step 1k), 1.90 (40k), 1.75 (500k),
λ̂ -0.7, 20.7, 169 (169 to 171 over five seeds at 40k), 116 (116 to 141). Default here, 8000 steps of the same shape of
schedule: error 4.41, 4.15 where it has learnt the prior (step 142, λ̂ 18 to 21), 1.90 (step 6900, λ̂ 162 ± 1.5), 1.87;
with seed 2 4.29, 4.13, 1.90 (λ̂ 162.6), 1.83. The detector finds LR1, in which it has the prior and nothing more, as a
plateau of the error at step 113 [88, 136], and LR2 as its jump at step 321 [311, 329]. Where notes on the study say K =
16, eight pairs make up the 16 tokens: 16 pairs would let ridge regression reach .93, eight let it reach 1.658.

Cost: 8 to 14 minutes on one core (stages LR1 and LR2), λ̂ by a kernel with momentum. `--full`: 500 000 steps and the
published λ̂ (10 chains of 6000 draws of batch 1024, at about 50 steps), for a GPU; not run yet. `--fast`: 30 seconds,
checked.
Writes OUT/trajectory.zarr, OUT/report.html, OUT/figures/, OUT/results.json. The same command goes on with an
interrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
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
from devmon.analysis import detect, phase_types, report, series_of
from devmon.data import ByContent
from devmon.data.rows import Rows
from devmon.instruments import LLC, RegressionReferences, WeightStatistics
from devmon.recipes.common import Check, batches, conclude, fit, one_line_errors, table
from devmon.recipes.models.linear_regression import DIMS, NOISE, PAIRS, ZERO, Regressor, ridge, ridge_errors, sequences
from devmon.sampling import BAOAB
from devmon.snapshot import derive_seed

BATCH, HIGHEST_RATE = 256, 3e-3
NBETA, GAMMA, RATE = 66.7, 13.3, 3e-4  # published, for the mean squared error


# -- the training ----------------------------------------------------------------------------------------------------


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over the pairs, (batch,): not halved, as published."""
    tokens, y = batch
    return (model(tokens) - y).square().mean(1)


class Training(L.LightningModule):
    def __init__(self, seed: int, steps: int) -> None:
        super().__init__()
        self.seed, self.steps = seed, steps
        torch.manual_seed(seed)
        self.net = Regressor()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return squared_error(self.net, batch).mean()

    def configure_optimizers(self) -> Any:
        """Adam; the rate rises for half of the steps from 0 to its highest and falls to 0 again."""
        optimizer = torch.optim.Adam(self.parameters(), lr=HIGHEST_RATE)
        half = self.steps / 2
        triangle = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - abs((step + 1) / half - 1), 1e-3))
        return [optimizer], [{"scheduler": triangle, "interval": "step"}]

    def train_dataloader(self) -> Any:
        return batches(self, lambda step: sequences(BATCH, _generator(self.seed, "batch", step)))


def _generator(seed: int, *what: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, *what))


# -- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InContextError(ByContent):
    """Squared error on fixed sequences, by how many examples came before, beside the best and the emptiest predictor.

    - `loss`, squared error: mean over pairs; `loss_se` over sequences, as all that follow.
    - `above_ridge`, squared error: the mean squared distance from ridge regression's predictions on the same sequences,
      which is the error that could be avoided.
    - `from_zero`, squared error: mean squared prediction, 0 for what has learnt only the prior.
    - `icl_score`, squared error: error at the last pair minus at the first.
    - `error_by_pair` (pair), squared error: by how many pairs came before, without standard errors.
    """

    tokens: Tensor
    y: Tensor
    best: Tensor  # what `ridge` predicts

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        with torch.no_grad():
            predicted = snapshot.model(self.tokens.to(snapshot.device)).double().cpu()
        errors = (predicted - self.y).square()
        by_sequence = {
            "loss": (errors.mean(1), "mean squared error"),
            "above_ridge": ((predicted - self.best).square().mean(1), "squared distance from ridge regression"),
            "from_zero": (predicted.square().mean(1), "mean squared prediction"),
            "icl_score": (errors[:, -1] - errors[:, 0], "error at the last pair minus at the first"),
        }
        rows, units = Rows(headline=list(by_sequence)), "squared error"
        for name, (values, long_name) in by_sequence.items():
            se = float(values.std()) / len(values) ** 0.5
            rows.put(name, (), float(values.mean()), se, long_name, units=units)
        by_pair = errors.mean(0).numpy()
        rows.put("error_by_pair", "pair", by_pair, None, "squared error by pairs seen before", units=units)
        return rows.dataset(pair=np.arange(len(by_pair)))


def watches(steps: int, llc: LLC, estimates: Container[int], *, probe: int) -> list[Watch]:
    often = log_spaced(30, steps) | every(max(1, steps // 40), stop=steps)
    tokens, y = sequences(probe, _generator(0, "probe"))
    return [
        Watch("regression", InContextError(tokens, y, ridge(tokens)), often),
        Watch("references", RegressionReferences(tokens, tokens[:, ::2, 1:], y, NOISE), often),
        Watch("weights", WeightStatistics(), often),
        Watch("llc", llc, estimates),
    ]


def published_llc() -> LLC:
    """Ten chains of 6000 draws each, of batches of 1024."""
    return _llc(2**20, chains=10, draws=5000, burn_in=1000, batch_size=1024)


def short_llc(*, chains: int, draws: int, burn_in: int, batch_size: int) -> LLC:
    """The same law in far fewer steps: momentum crosses flat directions, for which SGD takes 2 / (lr gamma) = 500."""
    kernel = BAOAB(RATE, NBETA, GAMMA, momentum=0.8)
    return _llc(8192, chains=chains, draws=draws, burn_in=burn_in, batch_size=batch_size, sampler=kernel)


def early_llc() -> LLC:
    """For the first steps, where the basin is narrow: at the published gamma the chains leave it (the loss grows .2 of
    a quadratic one; .94 here)."""
    return _llc(8192, chains=2, draws=60, burn_in=60, batch_size=64, sampler=BAOAB(1e-4, NBETA, 300.0))


def _llc(examples: int, **settings: Any) -> LLC:
    return LLC(sequences(examples, _generator(0, "llc")), squared_error, nbeta=NBETA, gamma=GAMMA, lr=RATE, **settings)


# -- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A size of the study: steps, sequences of the probe, steps and settings of λ̂."""

    name: str
    steps: int
    probe: int
    llc: Callable[[], LLC]
    estimates: Container[int]
    accelerator: str = "cpu"


FORMS = {
    "fast": Form("fast", 160, 1024, early_llc, (40, 160)),
    "cpu": Form(
        "cpu",
        8000,
        4096,
        partial(short_llc, chains=3, draws=100, burn_in=80, batch_size=256),
        log_spaced(16, 8000, first=40) | every(1000, stop=8000),
    ),
    "full": Form(
        "full",
        500_000,
        16_384,
        published_llc,
        log_spaced(30, 500_000, first=100) | every(20_000, stop=500_000),
        "auto",
    ),
}

app = typer.Typer(add_completion=False)


@app.command(help="Train a transformer to do linear regression in its context and watch its stages.")
def run(
    out: Annotated[Path, typer.Option(help="Folder for the run, the report and results.json.")] = Path(
        "runs/in_context_regression"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the measurements.")] = 1,
    full: Annotated[bool, typer.Option("--full", help="The published length and λ̂, for a GPU.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="A few hundred steps, and a check of the numbers.")] = False,
) -> None:
    console, form = Console(stderr=True), FORMS["fast" if fast else "full" if full else "cpu"]
    with one_line_errors(console):
        results = main(out, seed, form, console)
        conclude(out, checks(results, form.name), console, results)


def main(out: Path, seed: int, form: Form, console: Console) -> dict[str, Any]:
    """Train, measure, find, write; returns what results.json holds beside its checks."""
    asked = watches(form.steps, form.llc(), form.estimates, probe=form.probe)
    trajectory = fit(
        out,
        lambda: Training(seed, form.steps),
        asked,
        steps=form.steps,
        saved=every(form.steps // 20),
        seed=seed,
        console=console,
        accelerator=form.accelerator,
        units="squared error",
        title="In-context linear regression",
        settings={
            "steps": form.steps,
            "batch": BATCH,
            "highest_rate": HIGHEST_RATE,
            "pairs": PAIRS,
            "dims": DIMS,
            "noise": NOISE,
        },
        data="sequences of x, w·x + noise, new in every batch",
    )
    results = _results(trajectory)
    results["zero"] = float(asked[0].instrument.y.square().mean())  # type: ignore[attr-defined]
    _print(results, console)
    page = report(trajectory, out / "report.html", figures=out / "figures")
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return results


def _results(trajectory: Trajectory) -> dict[str, Any]:
    """Curves, estimates by step as (λ̂, standard error, rejected), events, and the types of transitions."""
    rows, distance = trajectory["regression"], trajectory["references"]["distance"]
    curves = [curve for curve in series_of(trajectory) if curve.name in ("regression/loss", "llc/llc")]
    (llc,) = (curve for curve in curves if curve.name == "llc/llc")
    estimates = zip(llc.steps, llc.values, np.asarray(llc.se), np.asarray(llc.rejected), strict=True)
    detection = detect(curves)
    return {
        "steps": rows["step"].values.tolist(),
        **{name: rows[name].values.tolist() for name in ("loss", "above_ridge", "from_zero")},
        "distance": {name: distance.sel(solution=name).values.tolist() for name in ("ridge", "zero")},
        "last_by_pair": rows["error_by_pair"][-1].values.tolist(),
        "ridge_by_pair": list(ridge_errors()),
        "llc": {int(step): (float(value), float(se), bool(rejected)) for step, value, se, rejected in estimates},
        "events": [event.to_dict() for event in detection.events],
        "types": [(phase.start, phase.end, phase.kind, phase.note) for phase in phase_types(curves, detection)],
    }


def _print(results: Mapping[str, Any], console: Console) -> None:
    pairs = zip(range(PAIRS), results["last_by_pair"], results["ridge_by_pair"], strict=True)
    console.print(table("error at the end", ["pairs before", "model", "ridge"], list(pairs)))
    last, ridge_error = results["loss"][-1], np.mean(results["ridge_by_pair"])
    console.print(f"mean: {last:.3f}; ridge {ridge_error:.3f}; predicting 0: {ZERO:.3f}")
    losses = np.interp(list(results["llc"]), results["steps"], results["loss"]).tolist()
    rows = [(step, loss, *row) for loss, (step, row) in zip(losses, results["llc"].items(), strict=True)]
    console.print(table("λ̂ at nbeta 66.7", ["step", "loss", "λ̂", "se", "rejected"], rows))
    events = [
        (e["series"], e["kind"], f"{e['step']:.0f}", "{:.0f}-{:.0f}".format(*e["interval"]), e["size"])
        for e in results["events"]
    ]
    console.print(table("events", ["series", "kind", "step", "interval", "size"], events))
    console.print(table("transitions", ["start", "end", "type", "note"], results["types"]))


def checks(results: Mapping[str, Any], form: str) -> list[Check]:
    """What is exact in every form; that of a form's length; published numbers for the full one."""
    loss, steps, zero = results["loss"], results["steps"], results["zero"]
    prior = int(np.argmin(results["from_zero"]))
    accepted = [(value, se) for value, se, rejected in results["llc"].values() if not rejected]
    (first, first_se), (last, last_se) = accepted[0], accepted[-1]
    best = float(np.mean(results["ridge_by_pair"]))
    above = min(m - r for m, r in zip(results["last_by_pair"], results["ridge_by_pair"], strict=True))
    emptiest = f"mean squared prediction at step {steps[prior]}, where it predicts 0"
    ridge_far = results["distance"]["ridge"]
    # exact, or known at any length of training
    listed = [
        Check("error at the start", loss[0], 4.1, 4.7, "4.45"),
        Check(emptiest, results["from_zero"][prior], 0, 0.05, "0"),
        Check("error there, above that of 0 on the same sequences", loss[prior] - zero, -0.05, 0.05, "4.13 - 4.125"),
        Check("distance to ridge regression at the start, a dim", ridge_far[0], 0.6, 0.8, "exact of zero: .617"),
        Check("least distance to it", min(ridge_far), 0, 0.6 if form == "fast" else 0.1, "0, where it is learnt"),
        Check("error of ridge regression", best, 1.652, 1.664, "exact: 1.658"),
        Check("least distance above ridge regression at the end, of the pairs", above, -ABOVE[form]),
        Check("λ̂ at the end above λ̂ at the start, in errors", (last - first) / float(np.hypot(first_se, last_se)), 3),
    ]
    # what a training of this length reaches
    if form == "fast":
        listed.append(Check("error at the end", loss[-1], best, zero - 0.6))
    elif form == "cpu":
        jumps = [e for e in results["events"] if (e["series"], e["kind"]) == ("regression/loss", "jump")]
        fall = next((event["step"] for event in jumps if event["size"] < 0), -1)
        listed += [
            Check("error at the end", loss[-1], best, 2.1, "1.90 at step 40 000 of 500 000"),
            Check("first fall of the error, where it learns to use the context", fall, 200, 800),
            Check("λ̂ where the error is 1.90", _where(results, 1.90), 150, 185, "169 to 171, at that error"),
        ]
    else:
        early, late = (loss[int(np.abs(np.array(steps) - step).argmin())] for step in (40_000, 500_000))
        listed += [
            Check("error at 40 000", early, 1.8, 2.0, "1.90"),
            Check("error at the end", late, 1.66, 1.8, "1.75"),
            Check("λ̂ at 40 000", _near(results["llc"], 40_000), 160, 180, "169 to 171 over five seeds"),
            Check("λ̂ at the end", _near(results["llc"], 500_000), 105, 150, "116 to 141 over five seeds"),
        ]
    return listed


ABOVE = {"fast": 0.5, "cpu": 0.25, "full": 0.12}  # four standard errors of the error at one pair, on so many sequences


def _near(estimates: Mapping[int, tuple[float, float, bool]], step: int) -> float:
    return estimates[min(estimates, key=lambda other: abs(other - step))][0]


def _where(results: Mapping[str, Any], error: float) -> float:
    """λ̂ between the two estimates around the last step at which the error was as large; NaN where it never fell so."""
    kept = [(step, value) for step, (value, _, rejected) in results["llc"].items() if not rejected]
    above = [step for step, loss in zip(results["steps"], results["loss"], strict=True) if loss >= error]
    steps, values = np.array(kept, dtype=float).T
    return float(np.interp(above[-1], steps, values)) if results["loss"][-1] < error else float("nan")


if __name__ == "__main__":
    app()
