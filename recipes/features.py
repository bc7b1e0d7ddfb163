"""Features over training: dictionaries of a small language model at its MLP and its stream, born around induction.

What it shows, with the text of `recipes/language_model.py` and its model with an MLP in each layer:
- a star of dictionaries (BatchTopK, 2412.06410): one is trained at the last checkpoint, and from it one at each earlier
  one, so that latent j is the same feature at all steps; which latents are born, when, with intervals of the detector,
  how many of them with the induction heads, and the contexts that they fire in;
- how many features a step shares with the one before, beside the null: what two seeds of one step share;
- a crosscoder over six checkpoints (Lindsey et al. 2024): lengths of one dictionary in all of them;
- an induction circuit (sparse feature circuits, 2403.19647) of the latents of both layers of attention and of the last
  MLP, over checkpoints: what the answer "as it was after the last time" needs;
- steering: how far the answer moves along the direction in which attention of layer 1 at the end says one character
  and not another, over checkpoints, beside random directions;
- a control in which the births are known: sparse sums of planted directions, 16 of 48 of which begin at a known step.

Cost: `--fast`, a context of 32 characters, 900 steps: 90 s of one core. By default a quarter of an hour.

Expect: every planted birth found, inside its interval, and none beside them; latents born in the stream between the
half-way steps of prefix matching; a dictionary of the last step that recovers more than .8 of the loss at the MLP; a
circuit that has a signal from the transition on, most of which is lost without its ten first nodes, the errors of the
dictionaries at the places of induction among them (few nodes alone carry none of it: each prompt needs the latents of
its own characters at all three sites); a slope that grows with the transition.
Most latents are "unsure": a dictionary that must let as many latents fire everywhere (BatchTopK) lets them fire on
early states for nothing, so that densities go up and down by two of their errors from checkpoint to checkpoint.
Figures to expect: OUT/births.png, a raster whose births gather at the transition; OUT/crosscoder.png; OUT/circuit.png,
attention of layer 0 below, that of layer 1 above it; OUT/steering.png, a curve that leaves the grey band.

Writes OUT/trajectory.zarr, OUT/checkpoints/, OUT/dictionaries/ (folders that SAELens reads), OUT/report.html,
OUT/births.png, OUT/densities.png, OUT/crosscoder.png, OUT/circuit.png, OUT/steering.png, OUT/results.json.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import xarray as xr
from rich.console import Console
from torch import nn

from devmon import Trajectory, Watch, every, log_spaced
from devmon.analysis import feature_births, feature_matches, plots, report
from devmon.anatomy import Anatomy
from devmon.callbacks import checkpoints
from devmon.data import broken_repeats
from devmon.data.prompt_pairs import PromptPairs
from devmon.data.text import Text, read_text
from devmon.features import BatchTopK, Dictionary, Streamed, crosscode, save_dictionary, train
from devmon.features import Training as DictionaryTraining
from devmon.features.sources import site_activations
from devmon.instruments import FeatureCircuit, InductionHeads, ProbeLoss, SparseAutoencoder, Steering
from devmon.offline.source import with_weights
from devmon.recipes import language_model as lm
from devmon.recipes.common import Check, conclude, crossing, fit, measure_checkpoints, one_line_errors, table
from devmon.recipes.models.planted_births import planted_run

STREAM, MLP = ("resid_post", 1), ("mlp_out", 1)
NAMES = {"stream": STREAM, "mlp": MLP}
ATTENTION = ("attn_out", 0), ("attn_out", 1)
PERIOD = 8  # characters of a repeat, for the circuit and for steering
ONE, OTHER = 20, 60  # the characters between which is steered, any two


@dataclass(frozen=True)
class Form:
    """A size of the study: `observed` checkpoints have a dictionary of `fits` steps, `looks` are taken while it trains,
    `prompts` tell of circuits; dictionaries learn of `learnt` sequences and are judged on `held_out`."""

    steps: int = 2000
    context: int = lm.CONTEXT
    observed: int = 24
    looks: int = 80
    fits: int = 1500
    planted: int = 1500
    prompts: int = 64
    learnt: int = 4000
    held_out: int = 256


FULL = Form()
FAST = Form(steps=900, context=32, observed=7, looks=24, fits=150, prompts=24)


# -- the model -------------------------------------------------------------------------------------------------------


class Block(lm.Block):
    """Attention, then an MLP, each after a norm of its own."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__(width, heads, context)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x + self.mlp(self.mlp_norm(x))


class WithMLP(lm.AttentionOnly):
    """The demo's model with an MLP in each layer."""

    anatomy = replace(lm.AttentionOnly.anatomy, neurons="mlp.2", mlp_norm="mlp_norm")

    def __init__(self, vocab: int, context: int = lm.CONTEXT) -> None:
        super().__init__(vocab, context=context)
        self.blocks = nn.ModuleList(Block(lm.WIDTH, lm.HEADS, context) for _ in range(lm.LAYERS))


class Training(lm.Training):
    def __init__(self, text: Text, *, seed: int, context: int) -> None:
        super().__init__(text, seed=seed, repeats=True, context=context)
        self.net = WithMLP(len(text.alphabet), context=context)


# -- a run of the model ----------------------------------------------------------------------------------------------


def tokens_of(text: Text, count: int, name: str, context: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(lm.derive_seed(0, "features", name))
    return lm.mixture(text, count, generator, repeats=True, held_out=name == "held out", context=context)


def one_run(out: Path, text: Text, form: Form, console: Console) -> Trajectory:
    plain = tokens_of(text, 128, "held out", form.context)
    often = log_spaced(form.looks // 2, form.steps) | every(max(1, 2 * form.steps // form.looks), stop=form.steps)
    watches = [
        Watch("loss", ProbeLoss(plain), often),
        Watch("induction", InductionHeads(len(text.alphabet), length=form.context), often),
    ]
    return fit(
        out,
        lambda: Training(text, seed=0, context=form.context),
        watches,
        steps=form.steps,
        saved=log_spaced(form.observed, form.steps, first=max(1, form.steps // 100)),
        seed=0,
        console=console,
        title="Features of a small language model",
        settings={"text": text.sha256, **vars(form)},
        data=text.source,
    )


def star(out: Path, run: Trajectory, text: Text, form: Form, console: Console) -> None:
    """Dictionaries of both sites at every checkpoint: from that of the last one, and at a few with two fresh seeds."""
    net = WithMLP(len(text.alphabet), context=form.context)
    saved = checkpoints(out / "checkpoints")
    last = max(saved)
    learnt, held_out = (
        tokens_of(text, count, name, form.context)
        for count, name in ((form.learnt, "learnt"), (form.held_out, "held out"))
    )
    training = DictionaryTraining(BatchTopK(6), width=3, steps=form.fits)

    def told(step: int, steps: int, record: dict[str, float]) -> None:
        status.update(f"step {step} of {steps}: FVU {record['fvu']:.3f}, L0 {record['l0']:.1f}")

    for name, site in NAMES.items():
        console.print(f"a dictionary of {name} at step {last}, and from it one at each of {len(saved)} checkpoints")
        model = with_weights(net, saved[last])
        source = Streamed(model, learnt, [site], batch=512)
        reference = train(training, source).dictionary
        assert isinstance(reference, Dictionary)
        save_dictionary(reference, out / "dictionaries" / name, site, context_size=form.context, step=last)
        shorter = replace(training, steps=form.fits // 3, lr=1e-3)
        watch = SparseAutoencoder(learnt, held_out, site, shorter, start=reference, batch=512, progress=told)
        watches = [Watch(f"features-{name}", watch, range(last + 1))]
        if name == "stream":
            few = sorted(saved)[:: max(1, len(saved) // 3)]
            fresh = SparseAutoencoder(learnt, held_out, site, training, batch=512)
            twin = replace(fresh, training=replace(training, seed=1))
            watches += [Watch("fresh", fresh, few), Watch("fresh-twin", twin, few)]
        with console.status("") as status:
            measure_checkpoints(out, net, watches, run)


def crosscoder(out: Path, text: Text, form: Form) -> xr.Dataset:
    """Lengths over six checkpoints of the stream."""
    net = WithMLP(len(text.alphabet), context=form.context)
    saved = checkpoints(out / "checkpoints")
    steps = sorted(saved)[:: -max(1, len(saved) // 6)][::-1]
    tokens = tokens_of(text, form.learnt // 6, "learnt", form.context)
    states = []
    for at in steps:
        states.append(site_activations(Anatomy(with_weights(net, saved[at])), tokens, [STREAM])[0])
    training = DictionaryTraining(BatchTopK(8), width=4, steps=form.fits)
    return crosscode(states, steps, training, batch=512).table


def saying(net: nn.Module, vocab: int, count: int) -> torch.Tensor:
    """The direction (1, d) in which attention of layer 1 says `ONE` and not `OTHER` where that comes next in a repeat:
    mean difference of its output at the last place."""
    means = []
    for token in (ONE, OTHER):
        prompts = broken_repeats(vocab, count, PERIOD, seed=1, exclude=(ONE, OTHER)).clean.clone()
        prompts[:, PERIOD // 2 + 1] = token
        _, reads = Anatomy(net).run(prompts, [ATTENTION[1]])
        means.append(reads[ATTENTION[1]][:, -1].mean(0))
    return (means[0] - means[1])[None]


def circuit_and_steering(out: Path, run: Trajectory, text: Text, form: Form, console: Console) -> None:
    """The induction circuit of dictionaries of the last checkpoint, and the slope along what its attention writes."""
    vocab, saved = len(text.alphabet), checkpoints(out / "checkpoints")
    net = with_weights(WithMLP(vocab, context=form.context), saved[max(saved)])
    learnt = tokens_of(text, form.learnt // 2, "learnt", form.context)
    training = DictionaryTraining(BatchTopK(6), width=3, steps=form.fits)
    coders: dict[tuple[str, int], Dictionary] = {}
    for site in (*ATTENTION, MLP):
        found = train(training, Streamed(net, learnt, [site], batch=512)).dictionary
        assert isinstance(found, Dictionary)
        coders[site] = found
    counts = (1, 3, 10, 30, 100)
    pairs = broken_repeats(vocab, form.prompts, PERIOD, seed=0)
    circuit = FeatureCircuit(pairs, coders, steps=6, counts=counts)

    # Steering is of prompts that say neither of the two characters.
    neutral = broken_repeats(vocab, 16, PERIOD, seed=2, exclude=(ONE, OTHER))
    one, other = (torch.full((16,), token) for token in (ONE, OTHER))
    two = PromptPairs(neutral.corrupt, neutral.clean, one, other)
    text_of = tokens_of(text, 32, "held out", form.context)
    steering = Steering(two, text_of, ATTENTION[1], saying(net, vocab, form.prompts), strengths=(1.0,))
    few = sorted(saved)[:: -max(1, len(saved) // 6)]
    watches = [Watch("circuit", circuit, few), Watch("steering", steering, range(max(saved) + 1))]
    console.print(f"an induction circuit at {len(few)} checkpoints, and a slope at {len(saved)}")
    measure_checkpoints(out, net, watches, run)


def contexts(text: Text, tokens: torch.Tensor, row: xr.Dataset, latent: int, count: int = 4) -> list[str]:
    """The characters before the places where a latent is largest, and that place behind a ▸."""
    named = []
    for place in row["top_place"].sel(latent=latent).values[:count]:
        if place >= 0:
            sequence, at = divmod(int(place), tokens.shape[1])
            window = [text.alphabet[int(i)] for i in tokens[sequence, max(0, at - 12) : at + 1]]
            named.append(repr("".join(window[:-1]))[1:-1] + "▸" + repr(window[-1])[1:-1])
    return named


def study(out: Path, form: Form, console: Console) -> tuple[dict[str, Any], dict[str, xr.Dataset]]:
    """All of it: what was found, and the last rows of both stars of dictionaries."""
    torch.set_num_threads(1)
    console.print("features that are known: when is each born?")
    known = planted_run(form.planted)
    text = read_text()
    run = one_run(out, text, form, console)
    star(out, run, text, form, console)
    console.print("a crosscoder over six checkpoints")
    shared = crosscoder(out, text, form)
    circuit_and_steering(out, run, text, form, console)

    # When features are born, beside the transition of the heads
    prefix = run["induction"]["prefix_matching"].max(("layer", "head"))
    level = float(prefix[-1])
    transition = [crossing(prefix["step"], prefix.values, share * level) for share in (0.1, 0.9)]
    stream = run["features-stream"]
    births = feature_births(stream)
    born = births["born"].values
    half = crossing(prefix["step"], prefix.values, level / 2, last=True)
    circuit, slope = run["circuit"], run["steering"]["slope"][:, 0, 0]
    wide = [transition[0] / 2, transition[1] * 2]
    within = np.flatnonzero((born >= wide[0]) & (born <= wide[1]))
    matches = feature_matches(run["fresh"], run["fresh-twin"])
    for name, (figure, _) in {
        "births": plots.plot_births(births),
        "densities": plots.plot_densities(stream),
        "crosscoder": plots.plot_crosscoder(shared),
        "circuit": plots.plot_feature_circuit(circuit),
        "steering": plots.plot_steering(run["steering"]),
    }.items():
        figure.savefig(out / f"{name}.png", dpi=150)
    held_out = tokens_of(text, form.held_out, "held out", form.context)
    last = stream.isel(step=-1)
    strongest = within[np.argsort(-last["density"].values[within])][:8]
    rows = [(int(j), f"{born[j]:.0f}", "   ".join(contexts(text, held_out, last, int(j)))) for j in strongest]
    console.print(table("born with the induction heads", ["latent", "step", "where it is largest"], rows))
    quality = {name: run[f"features-{name}"].isel(step=-1) for name in NAMES}
    facts = {
        "planted": known,
        "transition": transition,
        "births": {"all": int(np.isfinite(born).sum()), "with induction": len(within), "latents": len(born)},
        "shared with the step before": matches["same"].values.tolist(),
        "shared by two seeds": matches["twin_same"].values.tolist(),
        "crosscoder FVU": shared["fvu"].values.tolist(),
        "contexts": {str(row[0]): row[2] for row in rows},
        "half-way of prefix matching": half,
        "circuit": {name: circuit[name].values.tolist() for name in ("step", "signal", "area", "area_random")}
        | {"without ten": circuit["completeness"].sel(count=10).values.tolist()},
        "slope": slope.values.tolist(),
        "slope at random": float(run["steering"]["slope_random_sd"][-1].max()),
        "half-way of the slope": crossing(slope["step"], slope.values, float(slope[-1]) / 2, last=True),
    }
    return facts, quality


def main(out: Path, form: Form, console: Console) -> None:
    facts, quality = study(out, form, console)
    report(Trajectory(out / "trajectory.zarr", "r"), out / "report.html", figures=out / "figures")
    conclude(out, checks(facts, quality), console, facts)


def checks(facts: dict[str, Any], quality: dict[str, xr.Dataset]) -> list[Check]:
    known, births, slope = facts["planted"], facts["births"], facts["slope"]
    moments = facts["half-way of the slope"] / facts["half-way of prefix matching"]
    listed = [
        Check("planted births found, of 16", known["found"], 16, 16, "exact: 16"),
        Check("of these inside their interval", known["inside"], 16, 16, "exact: 16"),
        Check("false births among 32 that are there all along", known["false"], 0, 0, "exact: 0"),
        Check("mean best cosine to the planted directions", known["cosine"], 0.96, 1),
        Check("features born, as a share", births["all"] / births["latents"], 0.02, 1),
        Check("of these within a factor of two of the induction transition", births["with induction"], 1),
        Check("signal of the induction circuit at the end, nats", facts["circuit"]["signal"][-1], 1),
        Check("of it, in all nodes but the ten first", facts["circuit"]["without ten"][-1], -0.3, 0.7, "1 at random"),
        Check("steering slope at the end, over that of random ones", slope[-1] / facts["slope at random"], 3),
        Check("half-way steps: slope over prefix matching", moments, 0.4, 2.5, "1: it grows with it"),
    ]
    for name, row in quality.items():
        listed.append(Check(f"FVU of the {name}, last step", float(row["fvu"]), 0, 0.5))
        if np.isfinite(recovered := float(row["loss_recovered_zero"])):
            listed.append(Check(f"loss recovered at the {name}, last step", recovered, 0.6, 1.05))
    return listed


app = typer.Typer(add_completion=False)


@app.command(help="Dictionaries of a small language model over its training: features born, and when.")
def run(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/features"),
    fast: Annotated[bool, typer.Option("--fast", help="A short run, and a check of its numbers.")] = False,
) -> None:
    console = Console(stderr=True)
    with one_line_errors(console):
        main(out, FAST if fast else FULL, console)
        console.print(f"written to {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
