"""A transformer learns a grammar whose law of the next token is known, watched by its exact distance from that law.

What it shows: sentences of a level grammar (three levels, three terminals, 8.318 nats and 17.5 tokens a sentence; after
cfg3 of Allen-Zhu & Li 2023, arXiv:2305.13673), packed into rows of 64, and a model of two layers that learns them. The
exact law comes from a filter over the stacks that may still be to derive, so the excess of the loss over the entropy is
known to the last digit, and so is the probability that the model gives to tokens that cannot come. Linear probes tell
the ancestors of each token, where a span ends and elsewhere, and whether one ends: trained minus untrained, as tokens
alone give .4 to .8.

Cost: default 1000 steps, about a minute on one core; `--fast`, 450 steps, 30 s. Not worth a GPU.

Expect: excess from .87 (uniform .92) to .06 at step 500 and under .02 at 1000; impossible mass from .55 to under .01.

Writes OUT/trajectory.zarr, OUT/report.html, OUT/figures/, OUT/results.json. The same command goes on with an
interrupted run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from devmon import Trajectory, Watch, every, log_spaced
from devmon.analysis import detect, series_of
from devmon.data.grammars import IGNORED, SMALL, Sentences
from devmon.instruments import GrammarExcess, LinearProbe, PreviousTokenHeads
from devmon.recipes.common import Check, conclude, crossing, fit, one_line_errors, table, write_report
from devmon.recipes.models.sequence_model import Schedule, Shape, Training, numbered

LENGTH, PROBE = 64, 128
STEPS, FAST = 1000, 450
SHAPE = Shape(SMALL.vocab_size, LENGTH)


def batch(count: int, generator: torch.Generator) -> Tensor:
    return SMALL.draw(count, LENGTH, generator).tokens


def probe_labels(sentences: Sentences, level: int, at_ends: bool) -> Tensor:
    """The ancestors at a level below the root where its spans end, or at the other tokens, as labels of a probe."""
    wanted = sentences.ends[level] == int(at_ends)
    return sentences.ancestors[level].masked_fill(~wanted, IGNORED)


def watches(steps: int) -> list[Watch]:
    probe = SMALL.draw(PROBE, LENGTH, numbered(0, "probe"))
    often = log_spaced(40, steps) | every(max(1, steps // 40), stop=steps)
    seldom = log_spaced(8, steps, first=steps // 10)
    listed = [
        Watch("grammar", GrammarExcess(probe.tokens, SMALL), often),
        Watch("previous_token", PreviousTokenHeads(tokens=probe.tokens), often),
    ]
    for level in range(len(probe.ends)):
        name = f"level_{level + 1}"
        for where, at_ends in (("ends", True), ("elsewhere", False)):
            instrument = LinearProbe(probe.tokens, probe_labels(probe, level, at_ends))
            listed.append(Watch(f"{name}_{where}", instrument, seldom))
        listed.append(Watch(f"{name}_boundary", LinearProbe(probe.tokens, probe.ends[level]), seldom))
    return listed


def main(out: Path, seed: int, steps: int, console: Console) -> None:
    schedule = Schedule(steps, batch=32, rate=3e-3, warm_up=50, cosine=True)
    run = fit(
        out,
        lambda: Training(SHAPE, schedule, batch, seed),
        watches(steps),
        steps=steps,
        saved=every(max(1, steps // 5)),
        seed=seed,
        console=console,
        title="A grammar with a known law",
        settings={"grammar": SMALL.levels, **vars(schedule), **vars(SHAPE)},
        data="sentences of a level grammar, new in every batch",
    )
    detection = detect([curve for curve in series_of(run) if curve.name in ("grammar/excess", "grammar/impossible")])
    write_report(run, out, detection)
    facts = results(run)
    rows = [(name, *pair) for name, pair in facts["probes"].items()]
    console.print(table("probes, last layer", ["labels", "untrained", "trained"], rows))
    conclude(out, checks(facts, steps), console, facts)


def results(run: Trajectory) -> dict[str, Any]:
    """Curves of the excess, and the accuracy of each probe in the last layer, untrained and trained."""
    rows = run["grammar"]
    probes = {}
    for name in sorted(name for name in run.names() if name.startswith("level_")):
        accuracy = run[name]["accuracy"].isel(layer=-1)
        probes[name] = (float(accuracy[0]), float(accuracy[-1]))
    return {
        "steps": rows["step"].values.tolist(),
        **{name: rows[name].values.tolist() for name in ("excess", "impossible", "loss")},
        **{name: float(rows[name][0]) for name in ("entropy", "excess_reference", "impossible_reference")},
        "probes": probes,
    }


def checks(facts: dict[str, Any], steps: int) -> list[Check]:
    excess, impossible, probes = facts["excess"], facts["impossible"], facts["probes"]
    short = steps < STEPS
    half = crossing(facts["steps"], excess, 0.3)
    return [
        Check("entropy of the law, nats a token", facts["entropy"], 0.44, 0.48, "exact on these rows: .463"),
        Check("excess at the start, against uniform", excess[0] - facts["excess_reference"], -0.1, 0.1, "0"),
        Check("impossible mass at the start", impossible[0] - facts["impossible_reference"], -0.05, 0.05, "0"),
        Check("excess at the end", excess[-1], 0, 0.2 if short else 0.03, ".008 at step 1000"),
        Check("impossible mass at the end", impossible[-1], 0, 0.15 if short else 0.02),
        Check("step at which the excess passes .3", half, 20, 400),
        Check("level 2 at ends, trained", probes["level_2_ends"][1], 0.85 if short else 0.95, 1, ".998"),
        Check("level 2 at ends, gain", probes["level_2_ends"][1] - probes["level_2_ends"][0], 0.1, 1, ".28"),
        Check("ends above elsewhere, level 2", probes["level_2_ends"][1] - probes["level_2_elsewhere"][1], 0.05, 1),
    ]


app = typer.Typer(add_completion=False)


@app.command(help="Train a transformer on a grammar and watch its exact distance from the language.")
def run(
    out: Annotated[Path, typer.Option(help="Folder for the run, the report and results.json.")] = Path("runs/grammar"),
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the measurements.")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="450 steps instead of 1000.")] = False,
) -> None:
    console = Console(stderr=True)
    with one_line_errors(console):
        main(out, seed, FAST if fast else STEPS, console)


if __name__ == "__main__":
    app()
