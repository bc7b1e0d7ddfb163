"""Grokking: a network of addition modulo p memorises, builds a Fourier circuit unseen, and then cleans up.

What it shows: trained on some of the p² pairs, the network answers those long before the others. Its test loss hides
what goes on between. Progress measures show it (Nanda et al. 2023, arXiv:2301.05217): the *restricted* loss, of the key
frequencies of the logits alone, falls while the test loss is still above that of a guess; the *excluded* loss, without
them, rises; the Gini coefficient of the embedding's Fourier spectrum rises last. The local learning coefficient rises
while pairs are memorised and falls as the circuit replaces the table.

Three forms. By default p = 53, a network of one hidden layer: about three minutes on one core. `--fast`: the same with
a learning rate two and a half times as large, twelve seconds. `--full`: the published settings, p = 113, a one-layer
transformer (d 128, 4 heads, 512 neurons, no LayerNorm), full batch, AdamW 1e-3 with weight decay 1, 50 000 steps: for a
GPU. With `--seeds 10` any of them is trained ten times and tells a grok rate with its interval.

Expect: train loss, restricted loss and test loss halve in this order, with disjoint intervals; four to eight key
frequencies at the end (published: five, 14, 35, 41, 42 and 52 of p = 113), restricted loss far below test loss at the
end; λ̂ at most a fifth at the end of what it is at its height. Published phases at p = 113: memorisation to step 1400,
circuit formation to 9400, clean-up to 14 000. Figure to expect: OUT/report.html, Overview.

Writes OUT/trajectory.zarr, OUT/checkpoints/, OUT/report.html, OUT/figures/, OUT/results.json (OUT/seed-K/… with seeds).
The same command goes on where it was interrupted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from scipy.stats import beta

from devmon import Trajectory, Watch, every, log_spaced
from devmon.analysis import Detection, Event, compare_runs, detect, llc
from devmon.analysis.derive.verdicts import accepted
from devmon.analysis.detection.events import meet
from devmon.instruments import LLC, FourierSpectrum, RestrictedLoss
from devmon.recipes.common import Check, conclude, crossing, fit, measure_checkpoints, one_line_errors, write_report
from devmon.recipes.models.addition_networks import OneHiddenLayer, OneLayerTransformer
from devmon.sampling import classification_loss
from devmon.snapshot import derive_seed


@dataclass(frozen=True)
class Form:
    """A size of the study; `share` of the pairs is trained on, all at once at every step."""

    p: int = 53
    share: float = 0.4
    width: int = 24
    hidden: int = 96
    transformer: bool = False
    steps: int = 16_000
    learning_rate: float = 2e-3
    nbeta: float = 160.0  # n / log n
    gamma: float = 30.0
    lr: float = 2e-3
    estimates: int = 40


SMALL = Form()
FAST = Form(steps=2400, learning_rate=5e-3, estimates=9)
FULL = Form(
    p=113, share=0.3, width=128, hidden=512, transformer=True, steps=50_000, learning_rate=1e-3, nbeta=464.0, lr=5e-4
)  # lr and gamma of the LLC are not calibrated for it: run `devmon calibrate` on its checkpoints first


# -- the data and the training ---------------------------------------------------------------------------------------


def trained_pairs(form: Form, seed: int) -> torch.Tensor:
    """(p, p) bool: the pairs that are trained on."""
    order = torch.randperm(form.p**2, generator=torch.Generator().manual_seed(derive_seed(seed, "pairs")))
    mask = torch.zeros(form.p**2, dtype=torch.bool)
    mask[order[: int(form.share * form.p**2)]] = True
    return mask.view(form.p, form.p)


def examples(form: Form, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (n, 2), or (n, 3) with "=", and answers (n,) of the pairs in the mask."""
    pairs = mask.nonzero()
    return (F.pad(pairs, (0, 1), value=form.p) if form.transformer else pairs), pairs.sum(1) % form.p


def answer_loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Nats of each answer, (batch,), from the last place of a sequence model; in float64, where 1e-8 still counts."""

    def last(inputs: torch.Tensor) -> torch.Tensor:
        logits = model(inputs)
        return (logits[:, -1] if logits.ndim == 3 else logits).double()

    return classification_loss(last, batch)  # type: ignore[arg-type]


class Training(L.LightningModule):
    def __init__(self, form: Form, seed: int) -> None:
        super().__init__()
        self.form, self.data = form, examples(form, trained_pairs(form, seed))
        network = OneLayerTransformer if form.transformer else OneHiddenLayer
        self.net = network(form.p, form.width, form.hidden)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return answer_loss(self.net, batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.form.learning_rate, weight_decay=1.0, betas=(0.9, 0.98))

    def train_dataloader(self) -> Iterator[Any]:
        return itertools.repeat(tuple(part.to(self.device) for part in self.data))


def watches(form: Form, seed: int) -> list[Watch]:
    mask = trained_pairs(form, seed)
    return [
        Watch("progress", progress(form, mask), often(form)),
        Watch("spectrum", FourierSpectrum(form.p, ("embed.weight", "unembed.weight")), often(form)),
        Watch(
            "llc",
            LLC(
                examples(form, mask),
                answer_loss,
                nbeta=form.nbeta,
                gamma=form.gamma,
                lr=form.lr,
                chains=3,
                draws=100,
                burn_in=50,
                batch_size=128,
            ),
            log_spaced(form.estimates, form.steps, first=max(1, form.steps // 500)),
        ),
    ]


def progress(form: Form, mask: torch.Tensor, frequencies: tuple[int, ...] | None = None) -> RestrictedLoss:
    return RestrictedLoss(mask, frequencies, equals=form.p if form.transformer else None)


def often(form: Form) -> Any:
    return log_spaced(60, form.steps) | every(form.steps // 40)


# -- the study -------------------------------------------------------------------------------------------------------


def study(out: Path, form: Form, seed: int, accelerator: str, console: Console) -> tuple[Detection, dict[str, Any]]:
    """One seed: train, find the key frequencies, measure the checkpoints by them; returns the events and the facts."""
    trajectory = fit(
        out,
        lambda: Training(form, seed),
        watches(form, seed),
        steps=form.steps,
        saved=often(form),
        seed=seed,
        console=console,
        accelerator=accelerator,
        title=f"Grokking: addition modulo {form.p}",
        data=f"{form.share:.0%} of the {form.p**2} pairs",
        settings=vars(form),
    )
    last = trajectory["progress"].isel(step=-1)
    keys = tuple(last["frequency"].values[last["key"].values == 1].tolist())
    if keys:  # as published: the frequencies of the end, looked for all along
        by_keys = Watch("final_keys", progress(form, trained_pairs(form, seed), keys), every(1))
        measure_checkpoints(out, Training(form, seed).net, [by_keys], trajectory)
    return detect(trajectory), facts(trajectory, form, keys)


def facts(trajectory: Trajectory, form: Form, keys: tuple[int, ...]) -> dict[str, Any]:
    """Where train, restricted and test loss halve log p, the nats of a guess; λ̂ at its height and at the end."""
    data = trajectory["final_keys" if keys else "progress"]
    half = {
        name: crossing(data["step"], data[f"{name}_loss"], math.log(form.p) / 2, last=name != "train")
        for name in ("train", "restricted", "test")
    }
    at_end = ["train_loss", "test_loss", "restricted_loss", "excluded_loss", "excluded_loss_random", "test_accuracy"]
    end = {name: float(data[name][-1]) for name in (*at_end, "key_power")}
    gini = trajectory["spectrum"]["gini"].sel(parameter="embed.weight")
    ends = [float(gini[0]), float(gini[-1])]
    return {"keys": list(keys), "half": half, "end": end, "gini": ends, "llc": height_and_end(trajectory)}


def height_and_end(trajectory: Trajectory) -> dict[str, float]:
    """The largest and the last accepted λ̂; NaN where none is accepted."""
    estimates = llc(trajectory["llc"])
    estimates = estimates.isel(step=accepted(estimates["verdict"].values))
    if not estimates.sizes["step"]:
        return dict.fromkeys(("height", "height_se", "height_step", "end", "end_se"), math.nan)
    top, last = estimates.isel(step=int(estimates["llc"].values.argmax())), estimates.isel(step=-1)
    return {
        "height": float(top["llc"]),
        "height_se": float(top["se"]),
        "height_step": int(top["step"]),
        "end": float(last["llc"]),
        "end_se": float(last["se"]),
        "accepted": estimates.sizes["step"],
    }


def phases(half: dict[str, float], detection: Detection) -> dict[str, Event]:
    """The events of the three phases, as far as there are any: a change over more than a decade of steps, which the
    longer form has, is none that stands out from drift in log step."""
    windows = {
        "memorise: train_loss": (half["train"], half["train"]),
        "build: restricted_loss": (half["train"] * 2, half["test"]),
        "clean up: test_loss": (half["restricted"], half["test"]),
    }
    events = {}
    for name, window in windows.items():
        own = [event for event in detection.events if event.series.endswith(name.partition(": ")[2])]
        falls = [event for event in own if event.size < 0 or event.kind == "turn"]  # and where they begin
        near = [event for event in falls if meet(event.extent, window)]
        if near:
            events[name] = min(near, key=lambda event: event.p_value)
    return events


def checks(results: dict[str, Any], detection: Detection, form: Form) -> list[Check]:
    half, end, height = results["half"], results["end"], results["llc"]
    seen = phases(half, detection)
    onsets = [event.extent[0] for event in seen.values()]
    to_circuit, to_test = half["restricted"] / half["train"], half["test"] / half["restricted"]
    fall = (height["height"] - height["end"]) / math.hypot(height["height_se"], height["end_se"])
    to_height, latest = height["height_step"] / half["restricted"], form.steps / 10
    return [
        Check("memorised (train loss below half of a guess), step", half["train"], 1, latest, "p 113: by 1400"),
        Check("circuit (restricted loss) after that, ratio of steps", to_circuit, 1.5, published="p 113: 1400 to 9400"),
        Check("generalised (test loss) after that, ratio of steps", to_test, 1.05, published="p 113: 9400 to 14000"),
        Check("phases that the detector finds (of three)", len(seen), 2, 3),
        Check("their onsets in the known order", onsets == sorted(onsets), 1, published="memorise, build, clean up"),
        Check("key frequencies at the end", len(results["keys"]), 3, 10, "p 113: 5"),
        Check("their share of the logits' variance", end["key_power"], 0.75, 1),
        Check("test loss at the end, nats", end["test_loss"], 0, 0.1),
        Check("restricted / test loss at the end", end["restricted_loss"] / end["test_loss"], 0, 0.5, "below 1"),
        Check("excluded loss at the end, nats", end["excluded_loss"], 0.2, published="rises in circuit formation"),
        Check("the same for random frequencies", end["excluded_loss_random"], 0, 0.05),
        Check("Gini of the embedding's spectrum, first", results["gini"][0], 0, 0.12),
        Check("Gini of the embedding's spectrum, last", results["gini"][1], 0.3, 1, "rises in clean-up"),
        Check("λ̂ at its height over λ̂ at the end", height["height"] / height["end"], 5, published="rises, then falls"),
        Check("the difference in its standard errors", fall, 5),
        Check("λ̂ highest before the circuit, step over that of the circuit", to_height, 0, 1),
    ]


def grok_rate(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How many seeds answer 99% of the pairs that they were not trained on, with the 90% Clopper-Pearson interval."""
    n, k = len(runs), sum(facts["end"]["test_accuracy"] > 0.99 for facts in runs.values())
    low = float(beta.ppf(0.05, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(0.95, k + 1, n - k)) if k < n else 1.0
    return {"grokked": k, "of": n, "rate": k / n, "interval": [low, high]}


app = typer.Typer(add_completion=False)


@app.command(help="Train a small network on addition modulo p and watch it memorise, build a circuit and clean up.")
def run(
    out: Annotated[Path, typer.Option(help="Folder of the run, or of the runs of all seeds.")] = Path("runs/grokking"),
    seed: Annotated[
        int, typer.Option(help="Seed of the pairs, the weights and the measurements; the first of --seeds.")
    ] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: more than one tells a grok rate.")] = 1,
    fast: Annotated[bool, typer.Option("--fast", help="Twelve seconds.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="The published settings: p = 113, a transformer, 50 000 steps.")
    ] = False,
    accelerator: Annotated[str, typer.Option(help="cpu, gpu or auto.")] = "cpu",
) -> None:
    console = Console(stderr=True)
    form = FAST if fast else FULL if full else SMALL
    with one_line_errors(console):
        if seeds == 1:
            detection, results = study(out, form, seed, accelerator, console)
            trajectory = Trajectory(out / "trajectory.zarr", "r")
            write_report(trajectory, out, detection)
            conclude(out, checks(results, detection, form), console, results)
        else:
            several(out, form, range(seed, seed + seeds), accelerator, console)
        console.print(f"written to {out}", highlight=False, soft_wrap=True)


def several(out: Path, form: Form, seeds: range, accelerator: str, console: Console) -> None:
    """Every seed alone, then how many grok, and whether their events match."""
    runs = {f"seed-{seed}": study(out / f"seed-{seed}", form, seed, accelerator, console) for seed in seeds}
    facts_of = {name: own for name, (_, own) in runs.items()}
    rate = grok_rate(facts_of)
    rate["matched"] = compare_runs({name: run[0] for name, run in runs.items()}).to_frame().to_csv(index=False)
    halves = [own["half"] for own in facts_of.values()]
    in_order = sum(half["train"] < half["restricted"] < half["test"] for half in halves)
    order = "seeds that memorise, build, generalise in this order"
    checked = [
        Check("grok rate", rate["rate"], 0.5, 1, "to be reported over at least 10 seeds"),
        Check(order, in_order, rate["grokked"], len(seeds), "all"),
    ]
    conclude(out, checked, console, rate | {"runs": facts_of})


if __name__ == "__main__":
    app()
