"""A masked model of made-up protein families learns which places touch, and its attention shows it.

What it shows: six families of sequences of 24 letters, in each of which six pairs of places go together, and a small
model that fills in masked letters. As in protein language models (Rao et al. 2020, bioRxiv 2020.12.15.422761) contacts
are read from attention: a sparse regression on all heads is fitted on three families and predicts the other three,
beside contacts dealt to other pairs, single heads, and the untrained model, whose random attention already sees which
letters go together.

Cost: default 1200 steps, 45 s on one core; `--fast`, 400 steps, 15 s. Not worth a GPU.

Expect: of the six best pairs of each held-out family, attention averaged over its sequences, .06 to .3 are contacts
untrained, .4 at step 400, .94 to 1 at the end; of each sequence by itself .07, .39 and .99; chance .03.

Writes OUT/trajectory.zarr, OUT/report.html, OUT/figures/, OUT/results.json. The same command goes on with an
interrupted run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from devmon import Trajectory, Watch, every
from devmon.analysis import detect, series_of
from devmon.instruments import AttentionContacts
from devmon.recipes.common import Check, conclude, fit, one_line_errors, table, write_report
from devmon.recipes.models.proteins import NEAREST, MaskedTraining, ProteinFamilies
from devmon.recipes.models.sequence_model import numbered

FAMILIES = ProteinFamilies()
STEPS, FAST, PROBE = 1200, 400, 120


def watches(steps: int) -> list[Watch]:
    tokens, family = FAMILIES.draw(PROBE, numbered(0, "probe"))
    contacts, fitted = FAMILIES.touching(family), family < FAMILIES.families // 2
    how: dict[str, Any] = {"group": family, "top": FAMILIES.contacts, "separation": NEAREST}
    often = every(100)
    return [
        Watch("family", AttentionContacts(tokens, contacts, fitted, pool=True, **how), often),
        Watch("sequence", AttentionContacts(tokens, contacts, fitted, **how), often),
    ]


def main(out: Path, seed: int, steps: int, console: Console) -> None:
    run = fit(
        out,
        lambda: MaskedTraining(FAMILIES, batch=64, rate=2e-3, seed=seed),
        watches(steps),
        steps=steps,
        saved=every(max(1, steps // 4)),
        seed=seed,
        console=console,
        title="Contacts of made-up protein families",
        settings=vars(FAMILIES),
        data="sequences of made-up protein families, new in every batch",
    )
    write_report(run, out, detect(series_of(run)))
    facts = results(run)
    rows = list(zip(facts["steps"], facts["family"], facts["sequence"], facts["best_head"], strict=True))
    console.print(table("precision of contacts", ["step", "by family", "by sequence", "best head"], rows))
    conclude(out, checks(facts, steps), console, facts)


def results(run: Trajectory) -> dict[str, Any]:
    pooled, single = run["family"], run["sequence"]
    return {
        "steps": pooled["step"].values.tolist(),
        "family": pooled["precision"].values.tolist(),
        "sequence": single["precision"].values.tolist(),
        "sequence_se": single["precision_se"].values.tolist(),
        "shuffled": single["precision_shuffled"].values.tolist(),
        "best_head": np.nanmax(single["precision_head"].values, (1, 2)).tolist(),
        "chance": float(single["chance"][0]),
    }


def checks(facts: dict[str, Any], steps: int) -> list[Check]:
    family, sequence, short = facts["family"], facts["sequence"], steps < STEPS
    return [
        Check("chance", facts["chance"], 0.028, 0.029, "6 of 210, exact"),
        Check("untrained, by family", family[0], 0, 0.4, ".22"),
        Check("untrained, by sequence", sequence[0], 0, 0.2),
        Check("at the end, by family", family[-1], 0.2 if short else 0.85, 1, ".89 at 600, 1.0 at 1200"),
        Check("at the end, by sequence", sequence[-1], 0.25 if short else 0.65, 1),
        Check("above the best head alone", sequence[-1] - facts["best_head"][-1], -0.02 if short else 0, 0.5),
        Check("fitted to contacts of other pairs, mean", float(np.mean(facts["shuffled"])), 0, 0.3),
    ]


app = typer.Typer(add_completion=False)


@app.command(help="Train a masked model on made-up protein families and read contacts from its attention.")
def run(
    out: Annotated[Path, typer.Option(help="Folder for the run, the report and results.json.")] = Path("runs/contacts"),
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the measurements.")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="400 steps instead of 1200.")] = False,
) -> None:
    console = Console(stderr=True)
    with one_line_errors(console):
        main(out, seed, FAST if fast else STEPS, console)


if __name__ == "__main__":
    app()
