"""A transformer learns a grammar whose law of the next token is known, watched by its exact distance from that law.

What it shows: sentences of a level grammar (three levels, three terminals, 8.318 nats and 17.5 tokens a sentence; after
cfg3 of Allen-Zhu & Li 2023, arXiv:2305.13673), packed into rows of 64, and a model of two layers that learns them. The
exact law comes from a filter over the stacks that may still be to derive, so the excess of the loss over the entropy is
known to the last digit, and so is the probability that the model gives to tokens that cannot come. Linear probes tell
the ancestors of each token, where a span ends and elsewhere, and whether one ends: trained minus untrained, as tokens
alone give .4 to .8. Heads are read for attention between the ends of spans, beside shuffled spans, and for how often
they point at what a token depends on, beside the best offset; each token has a step at which it was learned.

Cost: default 1000 steps, about a minute on one core; `--fast`, 320 steps of a smaller model, 20 s. Not worth a GPU.

Expect: excess from .87 (uniform .92) to .11 at step 500 and .02 at 1000; impossible mass from .55 to .01; half of the
tokens that are learned at all by step 255.

Writes OUT/trajectory.zarr, OUT/report.html, OUT/figures/, OUT/results.json. The same command goes on with an
interrupted run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from devmon import Trajectory, Watch, every, log_spaced
from devmon.analysis import detect, series_of, token_learning
from devmon.data.grammars import IGNORED, SMALL, Sentences, trees
from devmon.instruments import (
    AttachmentHeads,
    BoundaryAttention,
    GrammarExcess,
    LinearProbe,
    PreviousTokenHeads,
    TokenLoss,
)
from devmon.recipes.common import Check, conclude, crossing, fit, one_line_errors, table, write_report
from devmon.recipes.models.sequence_model import Schedule, Shape, Training, numbered

PROBE = 128


@dataclass(frozen=True)
class Form:
    """Steps, tokens of a row, width and heads of the model, and how many observations there are, often and seldom."""

    steps: int
    length: int
    width: int
    heads: int
    often: int
    seldom: int

    @property
    def shape(self) -> Shape:
        return Shape(SMALL.vocab_size, self.length, self.width, self.heads)

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        return SMALL.draw(count, self.length, generator).tokens


DEFAULT, FAST = Form(1000, 64, 64, 4, 40, 8), Form(320, 40, 48, 3, 8, 2)


def probe_labels(sentences: Sentences, level: int, at_ends: bool) -> Tensor:
    """The ancestors at a level below the root where its spans end, or at the other tokens, as labels of a probe."""
    wanted = sentences.ends[level] == int(at_ends)
    return sentences.ancestors[level].masked_fill(~wanted, IGNORED)


def watches(form: Form) -> list[Watch]:
    steps = form.steps
    probe = SMALL.draw(PROBE, form.length, numbered(0, "probe"))
    known = trees(probe)
    often = log_spaced(form.often, steps) | every(max(1, steps // form.often), stop=steps)
    seldom = log_spaced(form.seldom, steps, first=steps // 10) | every(steps, stop=steps)
    attachment = AttachmentHeads(probe.tokens, known.head, known.relation, known.sentence)
    listed = [
        Watch("grammar", GrammarExcess(probe.tokens, SMALL), often),
        Watch("tokens", TokenLoss(probe.tokens, most=1024), often),
        Watch("previous_token", PreviousTokenHeads(tokens=probe.tokens), often),
        Watch("boundary", BoundaryAttention(probe.tokens, probe.ends), seldom),
        Watch("attachment", attachment, seldom),
    ]
    for level in range(len(probe.ends)):
        name = f"level_{level + 1}"
        for where, at_ends in (("ends", True), ("elsewhere", False)):
            instrument = LinearProbe(probe.tokens, probe_labels(probe, level, at_ends))
            listed.append(Watch(f"{name}_{where}", instrument, seldom))
        listed.append(Watch(f"{name}_boundary", LinearProbe(probe.tokens, probe.ends[level]), seldom))
    return listed


def main(out: Path, seed: int, form: Form, console: Console) -> None:
    schedule = Schedule(form.steps, batch=32, rate=3e-3, warm_up=50, cosine=True)
    run = fit(
        out,
        lambda: Training(form.shape, schedule, form.batch, seed),
        watches(form),
        steps=form.steps,
        saved=every(max(1, form.steps // 5)),
        seed=seed,
        console=console,
        title="A grammar with a known law",
        settings={"grammar": SMALL.levels, **vars(schedule), **vars(form.shape)},
        data="sentences of a level grammar, new in every batch",
    )
    detection = detect([curve for curve in series_of(run) if curve.name in ("grammar/excess", "grammar/impossible")])
    write_report(run, out, detection)
    facts = results(run)
    rows = [(name, *pair) for name, pair in facts["probes"].items()]
    console.print(table("probes, last layer", ["labels", "untrained", "trained"], rows))
    rows = [(name, *facts[name]) for name in ("boundary", "shuffled", "attachment", "offset")]
    console.print(table("heads", ["", "untrained", "trained"], rows))
    conclude(out, checks(facts, form), console, facts)


def results(run: Trajectory) -> dict[str, Any]:
    """Curves of the excess; untrained and trained the accuracy of each probe in the last layer, the largest attention
    between ends and the attachment; when tokens were learned."""
    rows = run["grammar"]
    probes = {}
    for name in sorted(name for name in run.names() if name.startswith("level_")):
        accuracy = run[name]["accuracy"].isel(layer=-1)
        probes[name] = (float(accuracy[0]), float(accuracy[-1]))
    boundary, attachment = run["boundary"], run["attachment"]
    learned = token_learning(run["tokens"])
    return {
        "boundary": [float(boundary["boundary"].isel(step=i).max()) for i in (0, -1)],
        "shuffled": [float(boundary["boundary_shuffled"].isel(step=i).max()) for i in (0, -1)],
        "attachment": [float(attachment["attachment"][i]) for i in (0, -1)],
        "offset": [float(attachment["offset"][i]) for i in (0, -1)],
        "when_learned": learned["when"].values.tolist(),
        "learned": float((learned["kind"] == "learned").mean()),
        "unlearned": float((learned["kind"] == "unlearned").mean()),
        "steps": rows["step"].values.tolist(),
        **{name: rows[name].values.tolist() for name in ("excess", "impossible", "loss")},
        **{name: float(rows[name][0]) for name in ("entropy", "excess_reference", "impossible_reference")},
        "probes": probes,
    }


def checks(facts: dict[str, Any], form: Form) -> list[Check]:
    excess, impossible, probes = facts["excess"], facts["impossible"], facts["probes"]
    short = form is FAST
    half = crossing(facts["steps"], excess, 0.4)
    return [
        Check("entropy of the law, nats a token", facts["entropy"], 0.44, 0.48, "exact on these rows: .463"),
        Check("excess at the start, against uniform", excess[0] - facts["excess_reference"], -0.1, 0.1, "0"),
        Check("impossible mass at the start", impossible[0] - facts["impossible_reference"], -0.05, 0.05, "0"),
        Check("excess at the end", excess[-1], 0, 0.4 if short else 0.03, ".008 at step 1000"),
        Check("impossible mass at the end", impossible[-1], 0, 0.25 if short else 0.02),
        Check("step at which the excess passes .4", half, 20, 400),
        Check("level 2 at ends, trained", probes["level_2_ends"][1], 0.85 if short else 0.95, 1, ".998"),
        Check("level 2 at ends, gain", probes["level_2_ends"][1] - probes["level_2_ends"][0], 0.1, 1, ".28"),
        Check("tokens learned less unlearned", facts["learned"] - facts["unlearned"], 0.15, 1),
        Check("attachment by attention less the best offset", facts["attachment"][1] - facts["offset"][1], -0.2, 1),
        Check("ends above elsewhere, level 2", probes["level_2_ends"][1] - probes["level_2_elsewhere"][1], 0.05, 1),
    ]


app = typer.Typer(add_completion=False)


@app.command(help="Train a transformer on a grammar and watch its exact distance from the language.")
def run(
    out: Annotated[Path, typer.Option(help="Folder for the run, the report and results.json.")] = Path("runs/grammar"),
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the measurements.")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="320 steps of a smaller model on shorter rows.")] = False,
) -> None:
    console = Console(stderr=True)
    with one_line_errors(console):
        main(out, seed, FAST if fast else DEFAULT, console)


if __name__ == "__main__":
    app()
