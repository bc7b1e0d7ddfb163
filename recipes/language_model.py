"""A small language model goes through its induction phase transition, watched by devmon.

What it shows: a 2-layer attention-only transformer (4 heads, 96 characters) is trained on real text. Between steps 300
and 1000 a head of the second layer learns to look for the previous occurrence of the current character and to copy what
followed it there (an induction head; Olsson et al. 2022, arXiv:2209.11895), after a head of the first layer has learnt
to look one character back. The best prefix-matching score goes from under .05 to over .6; previous-token attention,
the gain on repeated text and the in-context-learning score rise with it, and the local learning coefficient turns.

What it is trained on: windows of a text (by default the sources of Python's standard library, on every machine), and,
for half of every batch, random characters repeated with a random period. The second half is there because a text this
small rewards induction too little for a model of this size to learn it within minutes. `--no-repeats` leaves it out:
the control, in which the detector finds no induction event.

Cost: about three minutes on two cores. Writes OUT/trajectory.zarr, OUT/checkpoints/, OUT/report.html, OUT/figures/.
An interrupted run goes on where its last checkpoint was saved when the same command is given again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
import torch.nn.functional as F
import typer
from rich.console import Console

from devmon import Trajectory, Watch, every, log_spaced, presets
from devmon.analysis import report
from devmon.anatomy import Layout
from devmon.data.text import Text, read_text
from devmon.instruments import LLC, InductionHeads, LinearProbe, PreviousTokenHeads, ProbeLoss, RepeatGain
from devmon.recipes.common import batches, fit, one_line_errors
from devmon.snapshot import derive_seed

CONTEXT, BATCH, WIDTH, HEADS, LAYERS = 64, 32, 64, 4, 2
LEARNING_RATE, WARM_UP = 5e-3, 100


# -- the model -------------------------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """Causal self-attention with rotary positions (base 100)."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width, bias=False)
        self.out = torch.nn.Linear(width, width, bias=False)
        size = width // heads
        angle = torch.arange(context)[:, None] * 100.0 ** (-torch.arange(0, size, 2) / size)  # (context, size / 2)
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, pos, width)
        batch, pos, width = x.shape
        # each (batch, head, pos, size)
        q, k, v = self.qkv(x).view(batch, pos, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(z.transpose(1, 2).reshape(batch, pos, width))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * self.cos[: x.shape[-2]] + turned * self.sin[: x.shape[-2]]  # type: ignore[index]


class Block(torch.nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.attention = Attention(width, heads, context)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(self.norm(x))


class AttentionOnly(torch.nn.Module):
    """Characters (batch, pos) to logits (batch, pos, vocab)."""

    anatomy = Layout(
        blocks="blocks",
        qkv="attention.qkv",
        out="attention.out",
        heads="attention.heads",
        attention_norm="norm",
        embed="embed",
        norm="norm",
        unembed="unembed",
    )

    def __init__(
        self, vocab: int, width: int = WIDTH, heads: int = HEADS, layers: int = LAYERS, context: int = CONTEXT
    ) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocab, width)
        self.blocks = torch.nn.ModuleList(Block(width, heads, context) for _ in range(layers))
        self.norm = torch.nn.LayerNorm(width)
        self.unembed = torch.nn.Linear(width, vocab, bias=False)
        torch.nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))


# -- the data --------------------------------------------------------------------------------------------------------


def repeated(vocab: int, count: int, generator: torch.Generator, context: int = CONTEXT) -> torch.Tensor:
    """Random characters repeated with a period that is random for each sequence, (count, context)."""
    period = torch.randint(context // 4, context // 2 + 1, (count, 1), generator=generator)
    fresh = torch.randint(vocab, (count, context), generator=generator)
    return fresh.gather(1, torch.arange(context) % period)


def mixture(
    text: Text,
    count: int,
    generator: torch.Generator,
    *,
    repeats: bool,
    held_out: bool = False,
    context: int = CONTEXT,
) -> torch.Tensor:
    """Windows of the text; with `repeats`, every second sequence is repeated random characters instead."""
    tokens = text.windows(count, context, generator=generator, held_out=held_out)
    if repeats:
        tokens[::2] = repeated(len(text.alphabet), len(tokens[::2]), generator, context)
    return tokens


class Training(L.LightningModule):
    def __init__(self, text: Text, *, seed: int, repeats: bool, context: int = CONTEXT) -> None:
        super().__init__()
        self.text, self.seed, self.repeats, self.context = text, seed, repeats, context
        self.net = AttentionOnly(len(text.alphabet), context=context)

    def training_step(self, tokens: torch.Tensor, _: int) -> torch.Tensor:
        return F.cross_entropy(self.net(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
        return [optimizer], [{"scheduler": warm_up, "interval": "step"}]

    def train_dataloader(self) -> torch.utils.data.DataLoader[torch.Tensor]:
        return batches(self, self._draw)

    def _draw(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "batch", step))
        return mixture(self.text, BATCH, generator, repeats=self.repeats, context=self.context)


# -- what is measured ------------------------------------------------------------------------------------------------


def watches(
    text: Text, steps: int, *, repeats: bool = True, draws: int = 50, full: bool = False, context: int = CONTEXT
) -> list[Watch]:
    """The monitor's watches: cheap ones at about 80 steps, the LLC at about 20 (from where there is a basin to sample);
    with `full` those of `devmon.presets.full` too."""
    vocab = len(text.alphabet)
    often = log_spaced(36, steps) | every(max(1, steps // 50), stop=steps)
    seldom = log_spaced(20, steps, first=max(1, steps // 100))

    def probe(name: str, count: int, *, repeats: bool, held_out: bool = True) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(0, "probe", name))
        return mixture(text, count, generator, repeats=repeats, held_out=held_out, context=context)

    # what is cheap often; chains seldom, and only from where there is a basin to sample
    plain = probe("text", 128, repeats=False)
    examples = probe("llc", 2048, repeats=repeats, held_out=False)
    chains: dict[str, Any] = {"chains": 3, "draws": draws, "burn_in": max(1, 2 * draws // 3), "batch_size": 16}
    chosen = [
        Watch("loss", ProbeLoss(plain), often),
        Watch("in_context", ProbeLoss(probe("in context", 128, repeats=True)), often),
        Watch("induction", InductionHeads(vocab, length=context), often),
        Watch("previous_token", PreviousTokenHeads(vocab, length=context), often),
        Watch("repeats", RepeatGain(vocab, length=context), often),
        Watch("probe", LinearProbe(plain, *previous_kinds(plain, text.alphabet)), often),
        Watch("llc", LLC(examples, nbeta=300, gamma=1000, lr=1e-4, **chains), seldom),
    ]
    # the rest of the preset, without what is watched already
    if full:
        corpus = probe("corpus", 2048, repeats=False, held_out=False)
        more = presets.full(plain, vocab_size=vocab, last=steps, corpus=corpus)
        taken = {watch.name for watch in chosen}
        chosen += [watch for watch in more if watch.name not in taken]
    return chosen


def model_and_llc() -> tuple[torch.nn.Module, LLC]:
    """An untrained model and the LLC of `watches`, of the demo as it is by default (its own text, with repeats):

    devmon calibrate devmon.recipes.language_model:model_and_llc runs/demo
    """
    text = read_text()
    (llc,) = (watch.instrument for watch in watches(text, 2000) if isinstance(watch.instrument, LLC))
    return AttentionOnly(len(text.alphabet)), llc


def previous_kinds(tokens: torch.Tensor, alphabet: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The probe's task: the kind of the previous character (letter, digit, space, other); and that character itself."""
    kinds = [0 if c.isalpha() else 1 if c.isdigit() else 2 if c.isspace() else 3 for c in alphabet]
    previous = tokens.roll(1, dims=1)
    labels = torch.tensor(kinds)[previous]
    labels[:, 0] = -100  # no character before the first
    return labels, previous


# -- the run ---------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(help="Train a small language model on real text and watch its induction phase transition.")
def run(
    out: Annotated[
        Path, typer.Option(help="Folder for trajectory.zarr, checkpoints/, report.html and figures/.")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the measurements.")] = 0,
    steps: Annotated[int, typer.Option(min=20, help="Optimizer steps.")] = 2000,
    text: Annotated[
        Path | None,
        typer.Option(
            show_default="the sources of Python's standard library",
            help="A text file, or a folder of them, to train on.",
        ),
    ] = None,
    repeats: Annotated[
        bool,
        typer.Option(
            help="Make half of every batch of repeated random characters. "
            "Without them no induction event is expected: the control."
        ),
    ] = True,
    draws: Annotated[
        int, typer.Option(min=4, help="SGLD draws of each LLC chain: fewer are quicker, and rejected more often.")
    ] = 50,
    full: Annotated[
        bool,
        typer.Option("--full", help="Watch with every instrument of devmon.presets.full: about three times as long."),
    ] = False,
) -> None:
    """Run it; ends the process with an error in one line where something is wrong with the input."""
    console = Console(stderr=True)
    with one_line_errors(console):
        main(out, seed=seed, steps=steps, text=text, repeats=repeats, draws=draws, full=full, console=console)


def main(
    out: Path, *, seed: int, steps: int, text: Path | None, repeats: bool, draws: int, full: bool, console: Console
) -> Trajectory:
    # what it is trained on, said before minutes pass
    corpus = read_text(text)
    mixed = (
        f"Half of each batch of {BATCH} is text; the other half is random characters repeated with a random period, "
        "which is what makes induction pay within minutes."
    )
    alone = "Control: text alone, no repeated random characters."
    size = len(corpus.train) + len(corpus.held_out)
    console.print(
        f"text: {corpus.source}, {size:,} characters. {mixed if repeats else alone}", highlight=False, soft_wrap=True
    )
    # the settings are kept in the run: another configuration in its folder is refused
    trajectory = fit(
        out,
        lambda: Training(corpus, seed=seed, repeats=repeats),
        watches(corpus, steps, repeats=repeats, draws=draws, full=full),
        steps=steps,
        saved=log_spaced(40, steps) | every(max(1, steps // 20)),
        seed=seed,
        console=console,
        title="Demo: induction in a small language model",
        settings={
            "text": corpus.sha256,
            "steps": steps,
            "repeats": repeats,
            "context": CONTEXT,
            "batch": BATCH,
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
            "learning_rate": LEARNING_RATE,
            "warm_up": WARM_UP,
        },
        data=corpus.source
        + (", half of each batch repeated random characters" if repeats else ", text alone (control)"),
    )
    console.print("writing the report")
    page = report(trajectory, out / "report.html", figures=out / "figures")
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return trajectory


if __name__ == "__main__":
    app()
