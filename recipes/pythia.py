"""How a Pythia develops, from its checkpoints: loss, heads, layers and LLC over the whole of training.

    python recipes/pythia.py                                          # on a small stand-in that it trains itself
    python recipes/pythia.py --suite EleutherAI/pythia-70m --text my/pile/sample --forget    # on the real suite

What it does is what a user would do with `devmon measure`, twice: the `standard` preset at every checkpoint, and the
LLC at some, with the settings used for Pythia (gamma 300, nbeta 30, lr 3e-5, batches of 32, 4 chains of 100 draws, from
the weights on: no burn-in); then `devmon report`. An interrupted run goes on when the same command is given again.

What it shows on the stand-in, a 2-layer GPT-NeoX (width 64, 4 heads, MLPs, rotary positions) with a tokenizer of 128
tokens, trained on the sources of Python's standard library with, for half of every batch, random tokens repeated with a
random period: between steps 1000 and 1400 a head becomes an induction head (best prefix-matching score .08 → .82 with
seed 0) together with a previous-token head (.39 → .85), and both stay: the report finds the jumps of the two at steps
1248 and 1250. The loss on held-out text falls from 5.0 to 2.7 nats a token, most of it before step 200, and is 0.2
higher for a moment at that transition (a bump at step 1307). With 100 steps at lr · gamma / 2 = 0.0045 a chain forgets
its start over 222 steps, so these LLC settings, as published, give the LLC of chains on their way out: the sampler's
checks refuse such estimates as not mixed (4.7 ± 0.9 at step 820), the report shows them so, and `devmon calibrate`
looks for settings that mix.

Cost of the stand-in on one quiet core: training about two minutes, the preset about one and a half, the LLC about
twenty seconds a checkpoint, then the report; `--fast` about 20 seconds in all.
Writes OUT/checkpoints/ (154 folders as Hugging Face has them), OUT/text/, OUT/trajectory.zarr, OUT/report.html.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers.utils import logging

from devmon import DevmonError, Trajectory
from devmon.analysis import report, series_of
from devmon.data.text import read_documents
from devmon.monitoring.isolation import isolated
from devmon.offline.plan import Plan
from devmon.offline.run import run as measure
from devmon.snapshot import derive_seed

VOCAB, WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 128, 64, 4, 2, 64, 32
END, UNKNOWN = "<|endoftext|>", "<unk>"  # tokens 0 and 1
LEARNING_RATE, WARM_UP = 5e-3, 100
LAST, COUNT = 2860, 143  # steps of the stand-in's training, and how many of its checkpoints are evenly spaced
SETTINGS = ("nbeta=30", "gamma=300", "lr=3e-5", "batch_size=32", "chains=4", "draws=100", "burn_in=0")


# -- the stand-in -----------------------------------------------------------------------------------------------------


def schedule(last: int, count: int) -> list[int]:
    """Pythia's checkpoints at another length: 0, 1, 2, 4, … 512 and `count` evenly spaced ones up to `last`."""
    return sorted(
        {0, *(2**n for n in range(10) if 2**n <= last), *(round(last * n / count) for n in range(1, count + 1))}
    )


def texts(folder: Path, source: Path | None) -> tuple[list[str], Path]:
    """The documents to train on, and a file of those that are held out (every tenth)."""
    documents = [text for text in read_documents(source) if text]
    held = folder / "held_out.txt"
    folder.mkdir(parents=True, exist_ok=True)
    held.write_text("\n".join(documents[::10]), encoding="utf-8")
    return [text for n, text in enumerate(documents) if n % 10], held


def tokenizer_of(documents: list[str], folder: Path) -> Any:
    """A byte-pair tokenizer of the text, which lies beside the checkpoints."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        pairs = Tokenizer(models.BPE(unk_token=UNKNOWN))
        pairs.train_from_iterator(
            (text[:4000] for text in documents),
            trainers.BpeTrainer(
                vocab_size=VOCAB, limit_alphabet=95, special_tokens=[END, UNKNOWN], show_progress=False
            ),
        )
        PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token=END, unk_token=UNKNOWN).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def model_of(seed: int) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    rotary = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=CONTEXT,
        rope_parameters=rotary,
        initializer_range=0.06,
        use_cache=False,
    )
    with isolated():
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config)


def batches(tokens: torch.Tensor, seed: int, last: int) -> Iterator[torch.Tensor]:
    """A batch (BATCH, CONTEXT) a step: windows of the text, every second one replaced by repeated random tokens."""
    for step in range(last):
        generator = torch.Generator().manual_seed(derive_seed(seed, "batch", step))
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=generator)
        batch = tokens[starts + torch.arange(CONTEXT)]
        period = torch.randint(CONTEXT // 4, CONTEXT // 2 + 1, (BATCH // 2, 1), generator=generator)
        fresh = torch.randint(2, VOCAB, (BATCH // 2, CONTEXT), generator=generator)
        batch[::2] = fresh.gather(1, torch.arange(CONTEXT) % period)
        yield batch


def stand_in(folder: Path, source: Path | None, *, last: int, count: int, seed: int, console: Console) -> Path:
    """Train it, saving `folder/checkpoints/step…` as Hugging Face does; one that is there already is not trained again.

    Returns the file of held-out text.
    """
    saved = folder / "checkpoints"
    steps = set(schedule(last, count))
    documents, held = texts(folder / "text", source)
    asked = json.dumps({"last": last, "count": count, "seed": seed, "source": str(source)})
    done = saved / "trained.json"
    if done.exists() and done.read_text() == asked:
        return held
    if done.exists():
        raise DevmonError(f"{saved} holds another training ({done.read_text()}): give another --out")
    shutil.rmtree(saved, ignore_errors=True)
    saved.mkdir(parents=True)
    # at most a million tokens, documents one after another
    encode = tokenizer_of(documents, saved)
    stream: list[int] = []
    for text in documents:
        stream += [*encode(text[:20_000], verbose=False)["input_ids"], encode.eos_token_id]
        if len(stream) > 1_000_000:
            break
    # a checkpoint is the weights before the batch of its number; the last one comes after all batches
    model = model_of(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    for step, batch in enumerate([*batches(torch.tensor(stream), seed, last), None]):
        if step in steps:
            model.save_pretrained(saved / f"step{step}")
        if batch is None:
            break
        loss = torch.nn.functional.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        warm_up.step()
        optimizer.zero_grad()
        if step % max(1, last // 20) == 0:
            console.print(f"step {step}/{last}, loss {loss.item():.2f} nats", highlight=False)
    done.write_text(asked)
    return held


# -- the analysis -----------------------------------------------------------------------------------------------------


def analysis(plan: Plan, llc_steps: str) -> int:
    """Measure all but the LLC at the plan's steps, then the LLC at `llc_steps`; 1 where anything is left unmeasured."""
    llc = replace(plan, watch=("llc",), steps=llc_steps)
    return max(measure(part, dry_run=False) for part in (replace(plan, llc=()), llc))


def shown(run: Trajectory) -> dict[str, float]:
    """The numbers that the docstring promises: loss (nats a token) and best prefix-matching score, first and last; the
    step at which that score has come half of its way; the LLC's last value."""
    series = {curve.name: curve for curve in series_of(run)}
    loss, heads, llc = series["loss/loss"], series["induction/prefix_matching max"], series["llc/llc"]
    half = (heads.values[0] + heads.values.max()) / 2
    return {
        "loss first": float(loss.values[0]),
        "loss last": float(loss.values[-1]),
        "induction first": float(heads.values[0]),
        "induction last": float(heads.values[-1]),
        "induction half way at step": float(heads.steps[(heads.values >= half).argmax()]),
        "llc last": float(llc.values[-1]),
    }


app = typer.Typer(add_completion=False)


@app.command(help="Measure how a Pythia develops: a stand-in that is trained here, or the real suite by its name.")
def run(
    out: Annotated[Path, typer.Option(help="Folder for everything that is written.")] = Path("runs/pythia"),
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", show_default="the stand-in", help="A suite on the hub, such as EleutherAI/pythia-70m."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            show_default="the sources of Python's standard library",
            help="A text file, a folder of them, or a dataset on disk: what the probe data are made of.",
        ),
    ] = None,
    steps: Annotated[str, typer.Option(help="Checkpoints to measure, as devmon measure has it.")] = "all",
    llc_steps: Annotated[str, typer.Option(help="Checkpoints at which the LLC is sampled.")] = "log:20",
    workers: Annotated[int, typer.Option(min=1, help="Processes, tasks or jobs at once.")] = 1,
    engine: Annotated[str, typer.Option(help="processes, ray or slurm.")] = "processes",
    option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of the engine.")] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Keep no revision on disk once it is measured.")] = False,
    seed: Annotated[int, typer.Option(help="Of the stand-in and of the measurements.")] = 0,
    fast: Annotated[
        bool, typer.Option("--fast", help="A tenth of the training, few checkpoints, short chains, no report.")
    ] = False,
) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    torch.set_num_threads(1)  # the same numbers on any machine and any number of workers
    logging.disable_progress_bar()
    try:
        llc: tuple[str, ...] = SETTINGS
        # the size of the study: `--fast` is a tenth of it
        length, held, last, count = 256, text, LAST, COUNT
        if fast:
            steps, llc_steps, last, count = "log:5", "log:1", LAST // 25, 8
            llc = (*SETTINGS[:4], "chains=2", "draws=10", "burn_in=0", "examples=64")
        # the checkpoints, and the text that the probe data are made of
        if suite is None:
            length = CONTEXT
            held = stand_in(out, text, last=last, count=count, seed=seed, console=console)
        elif held is None:
            _, held = texts(out / "text", None)
        plan = Plan(
            series=suite or str(out / "checkpoints"),
            into=str(out / "trajectory.zarr"),
            preset="standard",
            tokens=str(held),
            sequences=32 if fast else 64,
            length=length,
            llc=llc,
            steps=steps,
            seed=seed,
            forget=forget,
            workers=workers,
            engine=engine,
            options=tuple(option or ()),
            threads=None if suite else 1,
        )
        # measure, print what the docstring promises, report
        code = analysis(plan, llc_steps)
        trajectory = Trajectory(plan.into, "r")
        for name, value in shown(trajectory).items():
            console.print(f"{name}: {value:.4g}")
        if not fast:
            console.print(f"report: {report(trajectory, out / 'report.html')}")
    except DevmonError as error:
        console.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
