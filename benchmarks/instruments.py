"""What an observation costs: each watch alone against what it says, all in one observation, and memory.

    python benchmarks/instruments.py [--model small|gpt2] [--vocab 5000] [--sequences 32] [--length 64]
        [--preset standard] [--rounds 3] [--device cpu] [--memory] [--together] [--json PATH]

`small` has 6 layers of d = 256, `gpt2` is of the size of GPT-2 small; both are random but for a planted induction
head. Every watch of the preset (the
LLC apart) is measured alone, then all of them in one `observe`, with its copies of the model and its rows. In forward
passes of the same `sequences` × `length` tokens, medians over rounds of the time of this process; `told` is what
`cost` says, `worst` the largest of measured over told, or told over measured, and `run` what the watches take at the
steps of the preset. With `--together` only all in one
observation. With `--memory` the most bytes that tensors take at once beside the model, counted, and told likewise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from devmon import Snapshot, Trajectory, Watch, cost, observe, presets
from devmon.cost import Shape, cost_of, estimates
from devmon.testing.memory import peak_bytes

LAST = 20_000  # steps of the run by whose schedule watches are weighed
SIZES = {"small": {"n_layer": 6, "n_embd": 256, "n_head": 8}, "gpt2": {}}


def build(size: str, vocab: int, device: str) -> torch.nn.Module:
    config = transformers.GPT2Config(**SIZES[size], vocab_size=vocab, bos_token_id=None, eos_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = transformers.GPT2LMHeadModel(config)
    plant_induction(net)
    return net.to(device).eval()


def plant_induction(net: torch.nn.Module) -> None:
    """A head of layer 0 that copies the token before, and one of the middle layer that looks for the current token
    among these copies and repeats what stands there: without a signal to explain, patching and circuits stop early."""
    model = net.transformer
    d, size = model.config.n_embd, model.config.n_embd // model.config.n_head
    place, token, before = (slice(i * size, (i + 1) * size) for i in range(3))
    rate, one = 10 ** -torch.linspace(0, 1.5, size // 2), torch.eye(size)
    angle = torch.arange(len(model.wpe.weight))[:, None] * rate
    cos, sin = rate.cos().diag(), rate.sin().diag()
    back = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])  # turns a place into the one before
    with torch.no_grad():
        model.wte.weight *= 4
        model.wte.weight[:, place] = 0
        model.wpe.weight[:, place] = 0.3 * torch.cat([angle.sin(), angle.cos()], 1)
        model.wpe.weight[:, token] = 0
        for layer, asks, shows, writes, turn, gain in (
            (0, place, place, before, back, 1.0),
            (model.config.n_layer // 2, token, before, token, one, 3.0),
        ):
            reads, out = model.h[layer].attn.c_attn.weight, model.h[layer].attn.c_proj.weight
            for at, source, weight in ((0, asks, 20 * turn), (d, shows, one), (2 * d, token, one)):
                reads[:, at : at + size] = 0
                reads[source, at : at + size] = weight
            out[:size] = 0
            out[:size, writes] = gain * one


def seconds(work: Callable[[], Any], device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=list(SIZES))
    parser.add_argument("--vocab", type=int, default=5000)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--preset", default="standard", choices=["economy", "standard", "full"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(args.vocab, (args.sequences, args.length), generator=generator)
    corpus = torch.randint(args.vocab, (256, args.length), generator=generator)
    options = {} if args.preset == "economy" else {"corpus": corpus}
    preset = getattr(presets, args.preset)(tokens, vocab_size=args.vocab, last=LAST, **options)
    watches = [Watch(watch.name, watch.instrument, range(10**6)) for watch in preset]
    net = build(args.model, args.vocab, args.device)
    found: dict[str, Any] = {"options": vars(args) | {"json": None}}
    found["memory_bytes" if args.memory else "forwards"] = (
        memory(net, watches) if args.memory else times(net, watches, tokens, args)
    )
    if not (args.memory or args.together):
        found["run"] = over_a_run(net, preset, found["forwards"]["measured"], tokens.numel())
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu, one thread"
    found["machine"] = {"platform": platform.platform(), "torch": torch.__version__, "device": device}
    print(json.dumps(found, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


def memory(net: torch.nn.Module, watches: list[Watch]) -> dict[str, Any]:
    """Of each watch alone, and of all in one observation less the copy of the model that it makes."""
    held: dict[str, int] = {watch.name: peak_bytes(lambda w=watch: w.instrument(Snapshot(0, net))) for watch in watches}
    with tempfile.TemporaryDirectory() as folder:
        trajectory = Trajectory(Path(folder) / "run.zarr", seed=0)
        together = peak_bytes(lambda: observe(0, net, watches, trajectory))
    held |= {"all together": together - sum(p.nbytes for p in net.parameters())}
    told = {e.name: e.memory for e in estimates(watches, 0, net)} | {"all together": cost.together(watches, net)}
    ratio = {name: held[name] / count for name, count in told.items() if count}
    worst = max(max(r, 1 / r) for r in ratio.values())
    return {"measured": held, "told": told, "worst": worst, "ratio": ratio}


def times(net: torch.nn.Module, watches: list[Watch], tokens: torch.Tensor, args: argparse.Namespace) -> Any:
    moved = tokens.to(args.device)

    def one_pass() -> None:
        with torch.no_grad():
            net(moved)

    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        trajectory = Trajectory(Path(folder) / "run.zarr", seed=0)
        observe(0, net, watches, trajectory)  # what is drawn or fitted once a run is kept
        for step in range(1, 1 + args.rounds):
            passes = [seconds(one_pass, args.device) for _ in range(4)]
            each = [] if args.together else watches
            alone = {w.name: seconds(lambda w=w: w.instrument(Snapshot(0, net)), args.device) for w in each}
            together = seconds(lambda step=step: observe(step, net, watches, trajectory), args.device)
            base = statistics.median([*passes, *(seconds(one_pass, args.device) for _ in range(4))])
            row = {name: took / base for name, took in alone.items()} | {"all together": together / base}
            rounds.append(row | {"seconds of a forward pass": base})
            print(json.dumps(rounds[-1]), flush=True)
    measured = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    return compared(net, watches, measured, tokens)


def compared(
    net: torch.nn.Module, watches: list[Watch], measured: dict[str, float], tokens: torch.Tensor
) -> dict[str, Any]:
    """What was measured beside what `cost` says."""
    shape = Shape.of(net)
    costs = {watch.name: cost_of(watch.instrument, shape) for watch in watches}
    told = {name: each.tokens(shape) / tokens.numel() for name, each in costs.items() if each is not None}
    saved = sum(e.saved / e.observations for e in estimates(watches, 0, net)) / tokens.numel()
    told["all together"] = sum(told.values()) - saved
    ratio = {name: measured[name] / told[name] for name in told if name in measured}
    return {"measured": measured, "told": told, "worst": max(max(r, 1 / r) for r in ratio.values()), "ratio": ratio}


def over_a_run(net: torch.nn.Module, watches: list[Watch], measured: dict[str, float], places: int) -> dict[str, Any]:
    """Forward passes up to step LAST at the steps of the preset, less those that watches share, and these over the
    passes of the watches at all of its steps, which for `full` are those of `standard`."""
    told = estimates(watches, LAST, net)
    often = {e.name: e.observations for e in told}
    each = {e.name: e.observations * measured[e.name] - e.saved / places for e in told}
    usual = sum(passes for name, passes in each.items() if often[name] == max(often.values()))
    return {"observations": often, "passes": sum(each.values()), "over standard": sum(each.values()) / usual}


if __name__ == "__main__":
    main()
