"""`devmon measure`: the instruments on checkpoints that lie on disk or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def measure(
    series: Annotated[str | None, typer.Argument(metavar="SERIES", help="A folder of checkpoints, or owner/name on the Hugging Face hub.")] = None,
    into: Annotated[str | None, typer.Option(metavar="RUN", help="The run to write into, made where there is none.")] = None,
    source: Annotated[str | None, typer.Option(help="path/to/script.py:name or package.module:name: the model, the watches, or (model, watches).")] = None,
    preset: Annotated[str | None, typer.Option(help="economy, standard or full: the usual watches for a language model.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="PATH", help="The preset's probe batch: tokens (batch, pos) in a .npy, .pt or .safetensors file; or text to make it of: a file, a folder, a dataset on disk.")] = None,
    tokenizer: Annotated[str | None, typer.Option(show_default="the series'", help="What makes tokens of text: a folder, or owner/name on the hub.")] = None,
    sequences: Annotated[int | None, typer.Option(min=1, show_default="64 of text", help="Sequences of the probe batch.")] = None,
    length: Annotated[int | None, typer.Option(min=2, show_default="256 of text", help="Tokens of a sequence.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=2, show_default="the model's", help="Of the preset's random tokens.")] = None,
    bos: Annotated[int | None, typer.Option(min=0, help="The token that stands first, for the preset.")] = None,
    llc: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Add an LLC with this setting (repeatable), as in nbeta=30; examples=N is the number of its sequences.")] = None,
    watch: Annotated[list[str] | None, typer.Option(help="Only this watch (repeatable).")] = None,
    steps: Annotated[str | None, typer.Option(show_default="all", help="all, log:40, every:100, 0,10,20, 100-500, or several with commas.")] = None,
    pattern: Annotated[str | None, typer.Option(help="A regular expression with one group: the step in the checkpoints' names.")] = None,
    prefix: Annotated[str | None, typer.Option(help="What the checkpoints' keys start with (net.), where several would do.")] = None,
    dtype: Annotated[str | None, typer.Option(show_default="float32", help="Of models that the checkpoints bring themselves.")] = None,
    seed: Annotated[int | None, typer.Option(help="The run's seed.", show_default="the run's, or 0")] = None,
    allow_pickle: Annotated[bool | None, typer.Option("--allow-pickle", help="Read checkpoints that hold more than weights, which runs code they hold.")] = None,
    forget: Annotated[bool | None, typer.Option("--forget", help="Keep no revision of the hub on disk once it is measured.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, show_default="1", help="Processes, tasks or jobs at once: one thread each, or one GPU each.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, show_default="torch's of a single process, else 1", help="CPU threads of each.")] = None,
    engine: Annotated[str | None, typer.Option(show_default="processes", help="processes of this machine, ray or slurm.")] = None,
    options: Annotated[list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Of the engine (repeatable), as in num_gpus=1 (ray) or slurm_partition=gpu (slurm).")] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Do this part of N, for any scheduler of jobs.")] = None,
    device: Annotated[str | None, typer.Option(show_default="cuda where there is one", help="Where the model is put.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file of these options, series and into included.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured and what it costs; write nothing.")] = False,
) -> None:  # fmt: skip
    """Measure checkpoints that lie on disk or on the hub: the same instruments and numbers as during training.

    What the run holds is skipped, so an interrupted command goes on when it is given again. Checkpoints that cannot be
    read or do not fit, and instruments that fail, are named and recorded; the others are measured, and the exit code is 1.
    """
    given = {name: value for name, value in locals().items() if name not in ("config", "dry_run") and value != []}
    from devmon.offline.plan import Plan

    plan = Plan.read(config, given)
    if plan.engine == "processes" and plan.workers > 1 and not dry_run:
        from devmon.offline.engines import forkserver

        forkserver.start(plan)
    from devmon.offline.run import run

    raise typer.Exit(run(plan, dry_run))
