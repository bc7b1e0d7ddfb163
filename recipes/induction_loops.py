"""The induction study trained three ways: Lightning, the Trainer of transformers, and a loop of your own.

What it shows: the same watches go into a `Monitor` (Lightning), a `TrainerMonitor` (Hugging Face, extra `hf`) and a
`LoopMonitor` (a plain loop), and where weights, optimizer and the order of the data are the same, all three
trajectories hold the same numbers, bit for bit on one thread. The model and text are those of
`recipes/language_model.py`. Copy the function that is like your own training.

Cost: `--fast`, 100 steps, 10 s on one core; by default 1000 steps, through the induction transition, three minutes. On
a GPU sums are not made in one order, so expect differences of rounding there.

Expect: the largest difference of any number of any watch is 0, and so is that of the final weights. By default best
prefix matching ends above .5 in all three (the demo: above .6).

Writes OUT/lightning/, OUT/trainer/, OUT/loop/ (trajectory.zarr) and OUT/results.json. Start it anew after an
interruption.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from transformers import Trainer, TrainingArguments

from devmon import LoopMonitor, Trajectory, Watch, log_spaced
from devmon.callbacks import Monitor, TrainerMonitor
from devmon.data.text import Text, read_text
from devmon.recipes import language_model as lm
from devmon.recipes.common import Check, conclude, one_line_errors
from devmon.recipes.progress import quiet
from devmon.snapshot import derive_seed, weights_digest


class Shared:
    """What is the same in all three: model, data, optimizer, watches."""

    def __init__(self, text: Text, seed: int, *, steps: int, draws: int, rows: int) -> None:
        self.text, self.seed, self.steps, self.draws, self.context = text, seed, steps, draws, 32
        self.rows = log_spaced(rows, steps)

    def model(self) -> WithLoss:
        torch.manual_seed(self.seed)
        return WithLoss(len(self.text.alphabet), context=self.context)

    def watches(self) -> list[Watch]:
        usual = lm.watches(self.text, self.steps, draws=self.draws, context=self.context)
        return [replace(watch, steps=self.rows) for watch in usual]

    def batches(self) -> Iterator[torch.Tensor]:
        for step in itertools.count():
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "batch", step))
            yield lm.mixture(self.text, lm.BATCH, generator, repeats=True, context=self.context)

    def optimizer(self, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lm.LEARNING_RATE)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / lm.WARM_UP))


class WithLoss(lm.AttentionOnly):
    """The model of the demo; given labels it returns a loss too, as the Trainer wants it. Instruments give it none."""

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = super().forward(tokens)
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


def with_loop(shared: Shared, run: Trajectory) -> torch.nn.Module:
    """A loop of your own."""
    model = shared.model()
    optimizer, schedule = shared.optimizer(model)
    with LoopMonitor(run, shared.watches(), strict=True) as monitor:
        monitor.step(0, model)
        for step, tokens in enumerate(itertools.islice(shared.batches(), shared.steps), 1):
            optimizer.zero_grad()
            model(tokens, labels=tokens)["loss"].backward()
            optimizer.step()
            schedule.step()
            monitor.step(step, model)
    return model


def with_lightning(shared: Shared, run: Trajectory) -> torch.nn.Module:
    """Lightning: the monitor is a callback."""

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = shared.model()

        def training_step(self, tokens: torch.Tensor, _: int) -> torch.Tensor:
            return self.net(tokens, labels=tokens)["loss"]

        def configure_optimizers(self) -> Any:
            optimizer, schedule = shared.optimizer(self)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    module = Module()
    L.Trainer(
        max_steps=shared.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Monitor(run, shared.watches(), strict=True)],
    ).fit(module, shared.batches())
    return module.net


def with_trainer(shared: Shared, run: Trajectory, folder: Path) -> torch.nn.Module:
    """The Trainer of transformers: the monitor is a callback there, too. It clips gradients unless told not to."""

    class Data(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for tokens in shared.batches():
                yield from ({"tokens": row, "labels": row} for row in tokens)

    model = shared.model()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=shared.steps,
        per_device_train_batch_size=lm.BATCH,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=shared.seed,
        remove_unused_columns=False,
    )
    monitor = TrainerMonitor(run, shared.watches(), strict=True)
    Trainer(
        model=model, args=arguments, train_dataset=Data(), optimizers=shared.optimizer(model), callbacks=[monitor]
    ).train()
    return model


def largest_difference(run: Trajectory, other: Trajectory) -> float:
    """Between all numbers of all watches; infinite where steps, watches or missing values are not the same."""
    if run.names() != other.names() or any(run.steps(name) != other.steps(name) for name in run.names()):
        return float("inf")
    largest = 0.0
    for name in run.names():
        for variable, values in run[name].data_vars.items():
            a, b = values.values, other[name][variable].values
            if a.dtype.kind == "f":
                if not np.array_equal(np.isnan(a), np.isnan(b)):
                    return float("inf")
                largest = max(largest, float(np.nanmax(np.abs(a - b), initial=0.0)))
    return largest


def main(out: Path, shared: Shared, least: float, console: Console) -> None:
    torch.set_num_threads(1)
    quiet()
    runs, models = {}, {}
    for name, train in (
        ("lightning", with_lightning),
        ("trainer", lambda s, r: with_trainer(s, r, out / "trainer")),
        ("loop", with_loop),
    ):
        console.print(f"training with {name}")
        settings = {"steps": shared.steps, "context": shared.context, "warm_up": lm.WARM_UP}
        runs[name] = Trajectory(
            out / name / "trajectory.zarr", seed=shared.seed, title=f"Induction by {name}", settings=settings
        )
        models[name] = train(shared, runs[name])
    best = {name: float(run["induction"]["prefix_matching"][-1].max()) for name, run in runs.items()}
    trainer, loop = (largest_difference(runs[name], runs["lightning"]) for name in ("trainer", "loop"))
    digests = {weights_digest(model) for model in models.values()}
    compared = sum(v.size for name in runs["loop"].names() for v in runs["loop"][name].data_vars.values())
    checks = [
        Check("Trainer against Lightning: largest difference of any number", trainer, 0, 0, "0 (exact)"),
        Check("plain loop against Lightning", loop, 0, 0, "0 (exact)"),
        Check("different final weights", len(digests), 1, 1, "1 (exact)"),
        Check("numbers compared", compared, 1000),
        Check("best prefix matching at the end, least of the three", min(best.values()), least, 1),
    ]
    conclude(out, checks, console, {"prefix_matching": best})


app = typer.Typer(add_completion=False)


@app.command(
    help="The induction study by Lightning, by the Trainer of transformers and by a plain loop: the same numbers."
)
def run(
    out: Annotated[Path, typer.Option(help="Folder of the three runs; should not exist yet.")] = Path("runs/loops"),
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the measurements.")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="100 steps: the same numbers, but no induction yet.")] = False,
) -> None:
    console = Console(stderr=True)
    text = read_text()
    with one_line_errors(console):
        form = {"steps": 100, "draws": 4, "rows": 6} if fast else {"steps": 1000, "draws": 20, "rows": 24}
        main(out, Shared(text, seed, **form), 0.0 if fast else 0.5, console)
        console.print(f"written to {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
