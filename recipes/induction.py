"""Induction in a small language model, in full: seeds, a control, causes, what leads, and each head's own complexity.

What it shows, with the model and text of `recipes/language_model.py` (2 layers of attention, 4 heads each, 96
characters):
- over seeds, the same order of events (Olsson et al. 2022, arXiv:2209.11895), each seed searched alone and its events
  matched with the others'; an exact sign test for what comes first;
- a control trained without repeats, in which nothing of this happens;
- a cause: without the heads that match prefixes (resample ablation) the gain on repeated text is lost, without as many
  other heads of the same layer it is not;
- the restricted local learning coefficient of each head, the weights of all others held (Wang et al. 2024,
  arXiv:2410.02984): heads are clustered by the curves of it alone, and the clusters compared with what the heads do.

Cost: `--fast`, one seed, a context of 32 characters, no control: 50 s on one core. By default six seeds and the control
take a quarter of an hour on one core. Not worth a GPU.

Expect: best prefix matching under .1 at step 100 and above .5 at the end; the group found carries more than half of the
repeat gain, matched random groups under a third of it; in the control no jump of prefix matching. Figure to expect:
OUT/compare.html, prefix matching of all seeds rising between steps 400 and 1000, that of the control flat.

Writes OUT/seed-K/ and OUT/control/ (trajectory.zarr, checkpoints/), OUT/seed-0/report.html, OUT/compare.html,
OUT/heads.png, OUT/results.json. The same command goes on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import xarray as xr
from rich.console import Console
from scipy.cluster.hierarchy import fcluster, linkage

from devmon import Trajectory, Watch, every, log_spaced
from devmon.analysis import Event, Series, compare_runs, llc, plots, series_of
from devmon.analysis.derive.verdicts import accepted
from devmon.analysis.reports.comparison import runs_content
from devmon.analysis.reports.writers import WRITERS
from devmon.analysis.runs.compare import RunsComparison, sign_test
from devmon.analysis.series import run_level
from devmon.callbacks import checkpoints
from devmon.data.text import Text, read_text
from devmon.files import write_whole
from devmon.instruments import LLC, Composition, HeadAblation
from devmon.recipes import language_model as lm
from devmon.recipes.common import Check, conclude, crossing, fit, measure_checkpoints, one_line_errors, write_report

ROLE = 0.3  # attention from which a head is called an induction or a previous-token head
ORDER = ("K-composition", "previous token", "prefix matching", "repeat gain")


@dataclass(frozen=True)
class Form:
    """A size of the study; `estimates` of the restricted LLC are made for each head of the first seed."""

    steps: int = 2000
    context: int = lm.CONTEXT
    seeds: int = 6
    control: bool = True
    draws: int = 30
    estimates: int = 12


FULL = Form()
FAST = Form(steps=900, context=32, seeds=1, control=False, draws=8, estimates=3)


def one_run(out: Path, text: Text, form: Form, seed: int, console: Console, repeats: bool = True) -> Trajectory:
    """Train one model, watched as in the demo, and by composition and ablation."""
    seldom = log_spaced(16, form.steps, first=form.steps // 20)
    watches = [
        *lm.watches(text, form.steps, repeats=repeats, draws=form.draws, context=form.context),
        Watch("composition", Composition(), log_spaced(36, form.steps) | every(form.steps // 50)),
        Watch("ablation", HeadAblation(len(text.alphabet), length=form.context), seldom),
    ]
    return fit(
        out,
        lambda: lm.Training(text, seed=seed, repeats=repeats, context=form.context),
        watches,
        steps=form.steps,
        saved=log_spaced(30, form.steps) | every(form.steps // 20),
        seed=seed,
        console=console,
        title=f"Induction, {f'seed {seed}' if repeats else 'control without repeats'}",
        control=not repeats,
        settings={"text": text.sha256, "repeats": repeats, "warm_up": lm.WARM_UP, **vars(form)},
        data=text.source,
    )


# -- what leads ------------------------------------------------------------------------------------------------------


def halves(run: Trajectory) -> dict[str, float]:
    """The step at which each of ORDER has risen half-way from its first value to its last.

    K-composition is that of the pair found at the end: the best induction head of layer 1 with the best previous-token
    head of layer 0.
    """
    prefix, previous = run["induction"]["prefix_matching"], run["previous_token"]["previous_token"]
    later, earlier = (
        int(score.isel(step=-1).sel(layer=at).argmax("head")) for score, at in ((prefix, 1), (previous, 0))
    )
    pair = run["composition"]["composition"].sel(kind="K", layer=1, head=later, layer_from=0, head_from=earlier)
    curves = (pair, previous.max(("layer", "head")), prefix.max(("layer", "head")), run["repeats"]["gain"])
    return {
        name: crossing(curve["step"], curve.values, float(curve[0] + curve[-1]) / 2)
        for name, curve in zip(ORDER, curves, strict=True)
    }


def order(seeds: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A sign test over seeds for every pair of ORDER."""
    tests = {}
    for a, b in combinations(ORDER, 2):
        lags = {seed: half[b] - half[a] for seed, half in seeds.items() if np.isfinite(half[a] + half[b])}
        test = sign_test(lags)
        counts = {"outcome": test.outcome, "before": test.a_first, "after": test.b_first}
        tests[f"{a} before {b}"] = counts | {"p": test.p_value, "lag": test.lag}
    return tests


# -- the heads -------------------------------------------------------------------------------------------------------


def head_mask(net: torch.nn.Module, layer: int, head: int) -> dict[str, torch.Tensor]:
    """The entries of the query, key, value and output weights that belong to a head, as `LLC(mask=...)` takes them."""
    weights = dict(net.named_parameters())
    qkv, out = (f"blocks.{layer}.attention.{name}.weight" for name in ("qkv", "out"))
    mask = {name: torch.zeros_like(weights[name], dtype=torch.bool) for name in (qkv, out)}
    mask[qkv].view(3, lm.HEADS, -1, lm.WIDTH)[:, head] = True
    mask[out].view(lm.WIDTH, lm.HEADS, -1)[:, head] = True
    return mask


def restricted(out: Path, run: Trajectory, text: Text, form: Form) -> dict[str, Series]:
    """The restricted LLC of every head over training, from the checkpoints of a run."""
    net = lm.AttentionOnly(len(text.alphabet), context=form.context)
    demo = lm.watches(text, form.steps, draws=form.draws, context=form.context)
    (whole,) = (watch.instrument for watch in demo if watch.name == "llc")
    assert isinstance(whole, LLC)
    saved = [step for step in checkpoints(out / "checkpoints") if step >= form.steps // 20]
    chosen = {saved[round(i)] for i in np.linspace(0, len(saved) - 1, form.estimates)}
    masks = {f"{layer}.{head}": head_mask(net, layer, head) for layer in range(lm.LAYERS) for head in range(lm.HEADS)}
    watches = {head: Watch(f"llc-{head}", replace(whole, mask=mask), chosen) for head, mask in masks.items()}
    measure_checkpoints(out, net, watches.values(), run)
    return {head: _accepted(llc(run[watch.name])) for head, watch in watches.items()}


def _accepted(estimates: xr.Dataset) -> Series:
    steps, values, se, verdict = (estimates[name].values for name in ("step", "llc", "se", "verdict"))
    return Series("restricted LLC", steps, values, se, rejected=~accepted(verdict))


def roles(run: Trajectory) -> dict[str, str]:
    """What each head does at the end: it matches prefixes, looks one token back, or neither."""
    prefix = run["induction"]["prefix_matching"].isel(step=-1)
    previous = run["previous_token"]["previous_token"].isel(step=-1)
    named = {}
    for layer in range(lm.LAYERS):
        for head in range(lm.HEADS):
            scores = {"induction": float(prefix[layer, head]), "previous token": float(previous[layer, head])}
            best = max(scores, key=lambda role: scores[role])
            named[f"{layer}.{head}"] = best if scores[best] >= ROLE else "other"
    return named


def clusters(curves: dict[str, Series], count: int) -> dict[str, int]:
    """Heads by their curves alone: average linkage of the Euclidean distances, cut into `count` clusters."""
    tree = linkage([curve.values for curve in curves.values()], "average")
    return dict(zip(curves, map(int, fcluster(tree, count, "maxclust")), strict=True))


def agreement(a: Sequence[Any], b: Sequence[Any], draws: int = 4000) -> tuple[float, float]:
    """Share of the pairs of heads that are together, or apart, in both groupings (the Rand index), and the share of
    random orders of the heads that agree as well."""

    def together(labels: Any) -> np.ndarray:
        return (labels[:, None] == labels)[np.triu_indices(len(labels), 1)]

    first, second = (np.unique(labels, return_inverse=True)[1] for labels in (a, b))
    share = float((together(first) == together(second)).mean())
    generator = np.random.default_rng(0)
    null = [(together(first) == together(generator.permutation(second))).mean() for _ in range(draws)]
    return share, float(1 + np.sum(np.array(null) >= share - 1e-12)) / (1 + draws)


# -- the study -------------------------------------------------------------------------------------------------------


def main(out: Path, form: Form, console: Console) -> None:
    text = read_text()
    runs = {}
    for seed in range(form.seeds):
        runs[f"seed-{seed}"] = one_run(out / f"seed-{seed}", text, form, seed, console)
    control = one_run(out / "control", text, form, 0, console, repeats=False) if form.control else None
    everything = runs | ({"control": control} if control is not None else {})
    console.print("searching for events")
    searched = {name: [curve for curve in series_of(run) if run_level(curve.name)] for name, run in everything.items()}
    compared = compare_runs(searched)
    if len(everything) > 1:
        write_whole(out / "compare.html", WRITERS[".html"](runs_content(everything, compared)).encode())
    console.print("the heads, one by one")
    first = runs["seed-0"]
    curves, doing = restricted(out / "seed-0", first, text, form), roles(first)
    figure, _ = plots.plot_runs({f"{head}, {doing[head]}": [curve] for head, curve in curves.items()})
    figure.savefig(out / "heads.png", dpi=150)
    write_report(first, out / "seed-0", compared.detections["seed-0"])
    half = {name: halves(run) for name, run in runs.items()}
    cluster = clusters(curves, max(2, len(set(doing.values()))))
    rand, rand_p = agreement([cluster[head] for head in doing], list(doing.values()))
    heads = {
        head: {"role": role, "cluster": cluster[head], "llc": curves[head].values.round(2).tolist()}
        for head, role in doing.items()
    }
    facts = {"half": half, "order": order(half), "heads": heads, "rand": rand, "rand_p": rand_p}
    conclude(out, checks(runs, control, compared, facts), console, facts)


def checks(
    runs: dict[str, Trajectory], control: Trajectory | None, compared: RunsComparison, facts: dict[str, Any]
) -> list[Check]:
    best = [run["induction"]["prefix_matching"].max(("layer", "head")) for run in runs.values()]
    early, late = max(float(b.sel(step=100, method="nearest")) for b in best), min(float(b[-1]) for b in best)
    last = [run["ablation"].isel(step=-1) for run in runs.values()]
    carried = min(float(row["gain_share"]) for row in last)
    # NaN where a layer has too few other heads, as where most of its heads became induction heads
    at_random = [value for row in last if np.isfinite(value := float(row["gain_share_random"]))]
    rising = sum(any(event.resolved for event in _rises(compared, name, above=0.2)) for name in runs)
    lacking = sum(not np.isfinite(b.values).all() for b in best)
    steps = [half["prefix matching"] for half in facts["half"].values()]
    listed = [
        Check("best prefix matching at step 100, largest of the seeds", early, 0, 0.15),
        Check("best prefix matching at the end, least of the seeds", late, 0.5, 1, "above .6 (demo)"),
        Check("seeds whose rise the detector finds", rising, len(runs), len(runs), "all"),
        Check("share of the repeat gain that the found heads carry, least", carried, 0.5, published="most of it"),
        *([Check("the same of matched random heads, largest", max(at_random), high=0.33)] if at_random else []),
        Check("seeds with missing values", lacking, 0, 0),
        Check("half-way step of prefix matching, earliest seed", min(steps), 100),
        Check("latest seed", max(steps), 100),
    ]
    if control is not None:
        prefix = control["induction"]["prefix_matching"].max(("layer", "head"))
        listed += [
            Check("control: best prefix matching at the end", float(prefix[-1]), 0, 0.2, "no induction"),
            Check("control: its events", len(_rises(compared, "control", above=0.1)), 0, 0, "none"),
        ]
    return listed


def _rises(compared: RunsComparison, name: str, above: float) -> list[Event]:
    """The events in which the best prefix matching of a run rises by more than `above`."""
    events = compared.detections[name].events
    return [event for event in events if event.series == "induction/prefix_matching max" and event.size > above]


app = typer.Typer(add_completion=False)


@app.command(
    help="Induction in a small language model: seeds, control, ablation, order of events, restricted LLC of heads."
)
def run(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/induction"),
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds; six or more can show an order.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="One small run, without control.")] = False,
) -> None:
    console = Console(stderr=True)
    form = FAST if fast else FULL
    with one_line_errors(console):
        main(out, form if seeds is None else replace(form, seeds=seeds), console)
        console.print(f"written to {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
