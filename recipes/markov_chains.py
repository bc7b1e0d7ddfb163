"""A transformer learns to predict Markov chains from their own past, watched by its distance to every known predictor.

What it shows: each sequence is 64 tokens of a chain of its own, three states, rows from Dirichlet(1) (Edelman et al.
2024, arXiv:2402.11004). The best predictor counts what followed the present token, the bigram; one that counts tokens
alone is the unigram. A model of two layers is first near the unigram, then stands on a third plateau that is near to
neither, then falls to the bigram, together with previous-token attention below and attention to what followed equal
tokens above: a statistical induction head. λ̂ is estimated along the way, and the detector finds the falls.
`--mixture`: sequences of 16 fixed chains of four states instead (Park et al. 2024, arXiv:2412.01003). The model comes
to tell which chain it sees (retrieval) where it could go on counting (inference), and on chains that it has never seen
it gets worse again while the training loss falls: a mild transience.

Cost: default 1900 steps, a minute and a half on one core; `--mixture` 3000 steps, 5 minutes; `--fast`, attention alone
with relative positions, 200 steps, 17 s. Not worth a GPU.

Expect: distance to the unigram .012 at step 100 and .12 at the end; to the bigram .10, .05 at 400 and .005 at the end.

Writes OUT/trajectory.zarr, OUT/report.html, OUT/figures/, OUT/results.json. The same command goes on with an
interrupted run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import xarray as xr
from rich.console import Console
from torch import Tensor

from devmon import Snapshot, Trajectory, Watch, every, log_spaced
from devmon.analysis import detect, series_of
from devmon.anatomy import layer_patterns, stack_heads
from devmon.data import ByContent, clustered_mean
from devmon.data.markov import chains, transition_matrices
from devmon.data.rows import Rows
from devmon.instruments import LLC, MarkovReferences, PreviousTokenHeads
from devmon.recipes.common import Check, conclude, fit, one_line_errors, table, write_report
from devmon.recipes.models.sequence_model import Schedule, Shape, Training, numbered

LENGTH, STATES = 64, 3
FIXED, FIXED_STATES = 16, 4  # chains of the mixture, and their states
PROBE, FIRST = 512, 16  # test sequences; the first place scored in the mixture


@dataclass(frozen=True, eq=False)
class MatchAttention(ByContent):
    """Attention to the places right after an earlier token equal to the present one, of every head.

    - `match` (layer, head), attention: total weight on the places j with x_{j - 1} = x_i, j <= i, mean over places.
    - `match_se` (layer, head), attention: its standard error over sequences.
    - `uniform`, attention: the same of attention spread evenly over the past.
    """

    tokens: Tensor

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        tokens, length = self.tokens, self.tokens.shape[1]
        same = (tokens[:, :, None] == tokens.roll(1, 1)[:, None]) & torch.ones(length, length).tril().bool()
        same[:, :, 0] = False  # nothing is before the first
        patterns = layer_patterns(snapshot.model, tokens, "MatchAttention")
        layers = [(pattern.cpu().double() * same[:, None]).sum(-1).sum(-1).numpy() for pattern in patterns.values()]
        mean, se = (stack_heads(parts) for parts in zip(*(self._mean(sums) for sums in layers), strict=True))
        rows = Rows(headline=["match"])
        rows.put("match", ("layer", "head"), mean, se, "attention after equal tokens", units="attention")
        even = float((same.double().sum(-1) / torch.arange(1, length + 1)).mean())
        rows.put("uniform", (), even, None, "the same of uniform attention", units="attention")
        return rows.dataset(layer=np.array(list(patterns)), head=np.arange(mean.shape[1]))

    def _mean(self, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return clustered_mean(sums, np.full(len(sums), self.tokens.shape[1]))


@dataclass(frozen=True)
class Form:
    """A size of the study: the model, its training, and what sequences are drawn."""

    name: str
    shape: Shape
    schedule: Schedule
    draw: Callable[[int, torch.Generator], Tensor]
    watches: Callable[[int], list[Watch]]


def new_chains(count: int, generator: torch.Generator, states: int = STATES) -> Tensor:
    return chains(transition_matrices(count, states, generator), LENGTH, generator)


def fixed() -> Tensor:
    return transition_matrices(FIXED, FIXED_STATES, numbered(0, "fixed chains"))


def of_fixed(count: int, generator: torch.Generator) -> Tensor:
    return chains(fixed()[torch.randint(FIXED, (count,), generator=generator)], LENGTH, generator)


def chain_watches(steps: int, estimates: int = 10, draws: int = 40) -> list[Watch]:
    tokens = new_chains(PROBE, numbered(0, "probe"))
    often = every(10, stop=min(steps, 300)) | every(max(10, steps // 40), stop=steps)
    examples, seldom = new_chains(2048, numbered(0, "llc")), log_spaced(estimates, steps, first=steps // 10)
    chain: dict[str, Any] = {"chains": 2, "draws": draws, "burn_in": 30 * draws // 40, "batch_size": 32}
    return [
        Watch("references", MarkovReferences(tokens, STATES), often),
        Watch("previous_token", PreviousTokenHeads(tokens=tokens[:128]), often),
        Watch("match", MatchAttention(tokens[:128]), often),
        Watch("llc", LLC(examples, nbeta=300, gamma=1000, lr=1e-4, **chain), seldom),
    ]


def mixture_watches(steps: int) -> list[Watch]:
    often = log_spaced(30, steps) | every(max(1, steps // 30), stop=steps)
    return [
        Watch(name, MarkovReferences(tokens, FIXED_STATES, (1, 2), fixed(), FIRST), often)
        for name, tokens in (
            ("references", of_fixed(PROBE, numbered(0, "probe"))),
            ("new_chains", new_chains(PROBE, numbered(0, "new"), FIXED_STATES)),
        )
    ]


FORMS = {
    "fast": Form(
        "fast",
        Shape(STATES, LENGTH, width=32, heads=1, mlp=False),
        Schedule(200, batch=64, rate=3e-3),
        new_chains,
        partial(chain_watches, estimates=2, draws=8),
    ),
    "default": Form(
        "default",
        Shape(STATES, LENGTH, width=32, heads=2, relative=False),
        Schedule(1900, batch=64, rate=3e-3),
        new_chains,
        chain_watches,
    ),
    "mixture": Form(
        "mixture",
        Shape(FIXED_STATES, LENGTH, width=64, heads=2),
        Schedule(3000, batch=64, rate=2e-3),
        of_fixed,
        mixture_watches,
    ),
}


def main(out: Path, seed: int, form: Form, console: Console) -> None:
    steps = form.schedule.steps
    run = fit(
        out,
        lambda: Training(form.shape, form.schedule, form.draw, seed),
        form.watches(steps),
        steps=steps,
        saved=every(max(1, steps // 10)),
        seed=seed,
        console=console,
        title="Markov chains in a context",
        settings={"form": form.name, **vars(form.schedule), **vars(form.shape)},
        data="Markov chains, new sequences in every batch",
    )
    detection = detect(series_of(run))
    write_report(run, out, detection)
    facts = results(run) | {"events": [event.to_dict() for event in detection.events]}
    names = list(facts["distance"])
    shown = range(0, len(facts["steps"]), max(1, len(facts["steps"]) // 12))
    rows = [(facts["steps"][i], facts["loss"][i], *(facts["distance"][name][i] for name in names)) for i in shown]
    console.print(table("distance to each solution", ["step", "loss", *names], rows))
    conclude(out, (mixture_checks if form.name == "mixture" else chain_checks)(facts, form), console, facts)


def results(run: Trajectory) -> dict[str, Any]:
    """Loss, distances by solution (on new chains too), and the best head of each kind, by step."""
    rows = run["references"]

    def distances(name: str) -> dict[str, list[float]]:
        distance = run[name]["distance"]
        return {str(one): distance.sel(solution=one).values.tolist() for one in distance["solution"].values}

    facts: dict[str, Any] = {
        "steps": rows["step"].values.tolist(),
        "loss": rows["loss"].values.tolist(),
        "distance": distances("references"),
    }
    if "new_chains" in run.names():
        facts |= {"new": distances("new_chains"), "new_loss": run["new_chains"]["loss"].values.tolist()}
        return facts
    best = {"previous_token": ("previous_token", 0), "match": ("match", 1)}
    for name, (variable, layer) in best.items():
        facts[name] = run[name][variable].isel(layer=layer).max("head").values.tolist()
    return facts


def at(facts: dict[str, Any], step: int) -> int:
    return int(np.abs(np.array(facts["steps"]) - step).argmin())


def chain_checks(facts: dict[str, Any], form: Form) -> list[Check]:
    unigram, bigram, loss = facts["distance"]["unigram"], facts["distance"]["bigram"], facts["loss"]
    short = form.name == "fast"
    falls = [e for e in facts["events"] if e["series"].startswith("references") and e["size"] < 0]
    listed = [
        Check("loss at the start", loss[0], 1.08, 1.13, "ln 3 = 1.099"),
        Check("least distance to the unigram", min(unigram), 0, 0.04, ".012 at step 100"),
        Check("distance to the unigram at the end", unigram[-1], 0.08, 0.16, ".118"),
        Check("distance to the bigram at the start", bigram[0], 0.16, 0.24, ".197"),
        Check(
            "distance to the bigram at the end", bigram[-1], 0, 0.05 if short else 0.012, ".024" if short else ".005"
        ),
        Check("loss at the end", loss[-1], 0.88, 0.96 if short else 0.92, ".907; bigram .905"),
        Check("attention after equal tokens at the end", facts["match"][-1], 0.6, 1, ".86"),
        Check("falls that the detector finds in the distances", len(falls), 1),
    ]
    if not short:
        plateau = min(unigram[at(facts, 375)], bigram[at(facts, 375)])
        listed += [
            Check("distance of the third plateau to both, step 375", plateau, 0.025, published=".05"),
            Check("previous-token attention at the end", facts["previous_token"][-1], 0.6, 1, ".91"),
        ]
    return listed


def mixture_checks(facts: dict[str, Any], form: Form) -> list[Check]:
    known, new, loss = facts["distance"], facts["new"]["bigram"], facts["new_loss"]
    return [
        Check("distance to retrieval at the end", known["bigram retrieval"][-1], 0, 0.05, ".022"),
        Check("distance to inference at the end", known["bigram"][-1], 0.05, 0.12, ".087"),
        Check(
            "retrieval above inference at step 450", known["bigram retrieval"][at(facts, 450)], 0.07, published=".111"
        ),
        Check("distance to inference on new chains, least", min(new), 0.1, 0.16, ".140 at 1650"),
        Check("step of it", facts["steps"][int(np.argmin(new))], 500, 2500, "1650"),
        Check("rise of it to the end", new[-1] - min(new), 0.003, 0.08, ".016"),
        Check("rise of the loss on new chains", loss[-1] - min(loss), 0.0, 0.08, ".010"),
    ]


app = typer.Typer(add_completion=False)


@app.command(help="Train a transformer on Markov chains and watch its distance to every known predictor.")
def run(
    out: Annotated[Path, typer.Option(help="Folder for the run, the report and results.json.")] = Path(
        "runs/markov_chains"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the measurements.")] = 0,
    mixture: Annotated[bool, typer.Option("--mixture", help="Sequences of 16 fixed chains.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="200 steps of a model of attention alone.")] = False,
) -> None:
    console, form = Console(stderr=True), FORMS["fast" if fast else "mixture" if mixture else "default"]
    with one_line_errors(console):
        main(out, seed, form, console)


if __name__ == "__main__":
    app()
