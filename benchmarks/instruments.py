"""What an observation costs on a GPT-2-small-sized random model, in forward and backward passes of the probe batch.

    python benchmarks/instruments.py [--sequences 16] [--length 64] [--preset standard] [--rounds 3] [--device cpu]
        [--json PATH]

Every watch of the preset (the LLC apart) is measured alone, and then all of them in one observation, where what one has
read serves the others. Ratios to a forward and backward pass of the same `sequences` × `length` tokens; medians over
rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from devmon import Snapshot, Watch, presets

VOCAB = 50257


def model(layers: int, device: str) -> torch.nn.Module:
    config = transformers.GPT2Config(n_layer=layers)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).to(device).eval()


def seconds(work: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def one_pass(net: torch.nn.Module, tokens: torch.Tensor) -> None:
    net.zero_grad()
    logits = net(tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


def small(watch: Watch, sequences: int) -> Watch:
    """The same watch on probes of `sequences` sequences, where it draws its own."""
    instrument = watch.instrument
    fields = getattr(instrument, "__dataclass_fields__", {})
    if "sequences" in fields:
        from dataclasses import replace

        instrument = replace(instrument, sequences=sequences)
    return Watch(watch.name, instrument, watch.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--preset", default="standard", choices=["economy", "standard", "full"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (args.sequences, args.length), generator=generator)
    corpus = torch.randint(VOCAB, (256, args.length), generator=generator)
    make = getattr(presets, args.preset)
    options = {} if args.preset == "economy" else {"corpus": corpus}
    watches = [small(w, args.sequences) for w in make(tokens, vocab_size=VOCAB, last=1000, **options)]
    net = model(args.layers, args.device)
    moved = tokens.to(args.device)
    one_pass(net, moved)
    for watch in watches:
        watch.instrument(Snapshot(0, net))  # frozen probes are fitted and cached once a run
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        base = statistics.median(seconds(lambda: one_pass(net, moved), args.device) for _ in range(3))
        net.zero_grad()
        row = {"one_pass_s": base}
        for watch in watches:
            row[watch.name] = seconds(lambda w=watch: w.instrument(Snapshot(0, net)), args.device) / base
        memo: dict[Any, Any] = {}
        row["all together"] = (
            seconds(lambda m=memo: [watch.instrument(Snapshot(0, net, 0, m)) for watch in watches], args.device) / base
        )
        rounds.append(row)
        print(json.dumps(row), flush=True)
    result: dict[str, Any] = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    result["sum of each alone"] = sum(result[watch.name] for watch in watches)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu, one thread"
    machine = {"platform": platform.platform(), "torch": torch.__version__, "device": device}
    found = {"machine": machine, "options": vars(args) | {"json": None}, "ratios": result}
    print(json.dumps(found, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
