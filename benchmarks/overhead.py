"""What `presets.economy` adds to a training: 40 observations in 2,000 steps, with and without, side by side.

    python benchmarks/overhead.py [--steps 2000] [--count 40] [--loops apart plain trainer] [--json PATH]

The training is nanoGPT's small one for a CPU (4 layers, 4 heads, width 128, 64 places, batches of 12, 65 characters) on
the docstrings of Python's standard library, as a plain loop and by the Trainer of transformers. The probe batch are 32
sequences of 64 tokens. Both trainings of the plain loop take turns of 50 steps in one process, the one without a
monitor at every fourth turn, as its steps all cost the same; the Trainer's run one after the other. Seconds of a step
are compared, those of the process (one thread), so that other jobs of the machine do not count; `wall` is what the
clock says. `weights_equal` is whether both have the same weights, bit for bit, after as many steps. `apart` takes
seconds only: a few steps and a few observations, each timed by itself.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devmon import LoopMonitor, Trajectory, presets
from devmon.recipes.common import docstrings

PLACES, BATCH, VOCAB, TURN = 64, 12, 65, 50
EVERY = 4  # turns to one without a monitor
PROBE = 32


def data() -> tuple[Tensor, Tensor]:
    """Text as tokens below `VOCAB`: what is trained on, and the probe batch."""
    text = "\n".join(map(inspect.cleandoc, docstrings()[:600])).encode()
    ids = torch.tensor([byte % VOCAB for byte in text])
    rows = ids[: len(ids) // PLACES * PLACES].view(-1, PLACES)
    return rows[PROBE:], rows[:PROBE]


def model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_positions=PLACES, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def watches(probe: Tensor, steps: int, count: int) -> list[Any]:
    return presets.economy(probe, vocab_size=VOCAB, last=steps, count=count)


def plain(steps: int, count: int, folder: Path) -> dict[str, Any]:
    rows, probe = data()
    nets = {"without": model(), "with": model()}
    optimizers = {name: torch.optim.AdamW(net.parameters(), lr=1e-3) for name, net in nets.items()}
    seconds, wall, done = dict.fromkeys(nets, 0.0), dict.fromkeys(nets, 0.0), dict.fromkeys(nets, 0)
    monitor = LoopMonitor(folder / "run.zarr", watches(probe, steps, count))
    halfway: dict[str, Tensor] = {}
    for turn in range(steps // TURN):
        for name, net in nets.items():
            if name == "without" and turn % EVERY:
                continue
            net.train()
            began, clock = time.process_time(), time.perf_counter()
            if name == "with" and not turn:
                monitor.step(0, net)
            for step in range(done[name] + 1, done[name] + TURN + 1):
                picked = torch.randint(len(rows), (BATCH,), generator=torch.Generator().manual_seed(step))
                net(rows[picked], labels=rows[picked])["loss"].backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                if name == "with":
                    monitor.step(step, net)
            done[name] += TURN
            if name == "with" and done[name] >= steps:
                monitor.close()
            seconds[name] += time.process_time() - began
            wall[name] += time.perf_counter() - clock
        if done["with"] == steps // EVERY:
            halfway = {name: tensor.clone() for name, tensor in nets["with"].state_dict().items()}
    run = Trajectory(folder / "run.zarr", "r")
    per_step = {name: seconds[name] / done[name] for name in nets}
    clock_per_step = {name: wall[name] / done[name] for name in nets}
    end = nets["without"].state_dict()
    return {
        "steps": done,
        "seconds_per_step": per_step,
        "wall_per_step": clock_per_step,
        "overhead": per_step["with"] / per_step["without"] - 1,
        "overhead_wall": clock_per_step["with"] / clock_per_step["without"] - 1,
        "observations": len(run.steps("loss")),
        "by_watch": {name: float(run[name]["seconds"].sum()) for name in run},
        "weights_equal": bool(halfway) and all(torch.equal(end[name], halfway[name]) for name in end),
    }


def apart(steps: int, count: int, folder: Path) -> dict[str, Any]:
    """Seconds of a step and of an observation, each by itself, and what so many observations come to."""
    rows, probe = data()
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    first, last = 7, 12  # steps between which steps are timed, and after them observations
    asked = watches(probe, steps, count)
    observed = {0, *range(last, last + 4)}
    monitor = LoopMonitor(folder / "run.zarr", [replace(watch, steps=observed) for watch in asked])
    monitor.step(0, net)
    for step in range(1, last):
        if step == first:
            began = time.process_time()
        net(rows[:BATCH], labels=rows[:BATCH])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(step, net)
    a_step, began = (time.process_time() - began) / (last - first), time.process_time()
    for step in range(last, last + 4):
        monitor.step(step, net)
    an_observation = (time.process_time() - began) / 4
    monitor.close()
    run = Trajectory(folder / "run.zarr", "r")
    number = sum(step in asked[0].steps for step in range(steps + 1))
    return {
        "seconds_per_step": a_step,
        "seconds_per_observation": an_observation,
        "observations": number,
        "overhead": number * an_observation / (steps * a_step),
        "by_watch": {name: float(run[name]["seconds"][1:].mean()) for name in run},
    }


def trainer(steps: int, count: int, folder: Path) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    from devmon.callbacks import TrainerMonitor

    rows, probe = data()
    dataset: Any = [{"input_ids": row, "labels": row} for row in rows]
    per_step, ends = {}, []
    for name in ("without", "with"):
        arguments = TrainingArguments(
            str(folder / name), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-3, use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, seed=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        monitors = [TrainerMonitor(folder / "run.zarr", watches(probe, steps, count))] if name == "with" else []
        training = Trainer(model(), arguments, train_dataset=dataset, callbacks=monitors)
        began = time.process_time()
        training.train()
        per_step[name] = (time.process_time() - began) / steps
        ends.append(training.model.state_dict())
    run = Trajectory(folder / "run.zarr", "r")
    return {
        "steps": dict.fromkeys(per_step, steps),
        "seconds_per_step": per_step,
        "overhead": per_step["with"] / per_step["without"] - 1,
        "observations": len(run.steps("loss")),
        "by_watch": {name: float(run[name]["seconds"].sum()) for name in run},
        "weights_equal": all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument(
        "--loops", nargs="+", choices=["apart", "plain", "trainer"], default=["apart", "plain", "trainer"]
    )
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if asked.json is not None and asked.json.exists():
        found = json.loads(asked.json.read_text())
    found["machine"] = {"torch": torch.__version__, "cpu": platform.processor() or platform.machine()}
    for loop in asked.loops:
        with tempfile.TemporaryDirectory() as folder:
            kind = {"apart": apart, "plain": plain, "trainer": trainer}[loop]
            found[loop] = kind(asked.steps, asked.count, Path(folder))
        print(loop, json.dumps(found[loop], indent=1))
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
