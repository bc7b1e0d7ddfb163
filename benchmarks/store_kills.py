"""Processes killed with SIGKILL at random instants: are rows lost that were acknowledged?

    python benchmarks/store_kills.py [--kills 300] [--writers 4] [--seed 0] [--json PATH]

A third of the kills each fall on processes that append rows, that fold after every few rows (killed after a fold has
begun), and that measure one series of checkpoints together with `observe`. Each prints a step once the row is stored,
is killed at a random instant, and another takes its place. At the end of each store every printed step must be there
once, with its numbers, and the store must go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from devmon.store.trajectory import Trajectory

WHO = {"instrument": "benchmarks.Row", "fields": {}, "fingerprint": "0", "doc": "A row."}


def row(step: int) -> xr.Dataset:
    return row_of(np.arange(5000, dtype=np.float64) + step)


def row_of(values: np.ndarray) -> xr.Dataset:
    """40 kB, so that a kill can come in the middle of a write."""
    return xr.Dataset({"score": ("head", values), "total": ((), values[0]), "verdict": ((), np.array("ok", object))})


def write(path: Path, first: int, every: int, count: int, fold: int) -> None:
    """Append `count` rows at steps `first`, `first + every`, …; fold after each `fold` rows."""
    store = Trajectory(path)
    store.declare("row", WHO)
    for i in range(count):
        step = first + i * every
        store.append("row", step, row(step), weights=f"w{step}", seconds=0.0)
        os.write(1, f"{step}\n".encode())
        if fold and i % fold == fold - 1:
            os.write(1, b"fold\n")
            store.fold()
            os.write(1, b"folded\n")


def sweep(path: Path, checkpoints: Path, seed: int) -> None:
    """Measure every checkpoint that is not yet in the trajectory, in an order of one's own."""
    import torch

    from devmon import Watch, every, observe

    torch.set_num_threads(1)
    model = torch.nn.Linear(5000, 1, bias=False)
    store, watches = Trajectory(path), [Watch("row", Weights(), every(1))]
    steps = [int(file.stem) for file in checkpoints.glob("*.pt")]
    random.Random(seed).shuffle(steps)
    for step in steps:
        model.load_state_dict(torch.load(checkpoints / f"{step}.pt", weights_only=True))
        if observe(step, model, watches, store):
            os.write(1, f"{step}\n".encode())


@dataclass(frozen=True)
class Weights:
    """The weights themselves, as the rows of `write`."""

    def __call__(self, snapshot: Any) -> xr.Dataset:
        return row_of(next(snapshot.model.parameters()).detach().numpy()[0].astype(np.float64))


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True)


class Phase:
    """Kills of one kind, on one store after the other."""

    def __init__(self, kind: str, kills: int, writers: int, seed: int) -> None:
        self.kind, self.kills, self.writers = kind, kills, writers
        self.rng = random.Random(f"{kind} {seed}")
        self.counts = dict.fromkeys(
            ("kills", "in_a_fold", "acknowledged", "lost", "wrong", "double", "ended_otherwise"), 0
        )

    def run(self) -> dict[str, int]:
        while self.counts["kills"] < self.kills:
            with tempfile.TemporaryDirectory() as folder:
                self.one_store(Path(folder))
        return self.counts

    def one_store(self, folder: Path) -> None:
        """Kill until it is enough, or the store is large."""
        path, live, acknowledged, born = folder / "run.zarr", [], set[int](), 0
        if self.kind == "sweep":
            save_checkpoints(folder, min(2000, 60 * self.kills))
        while self.counts["kills"] < self.kills and size(path) < 2**26:
            while len(live) < self.writers:
                live.append(self.begin(path, born))
                born += 1
            victim = live.pop(0)
            said = self.wait(victim)
            self.end(victim, said, acknowledged)
            if victim.returncode == 0:  # the sweep is through
                break
        for victim in live:
            self.end(victim, "", acknowledged, counted=False)
        self.check(path, acknowledged)

    def begin(self, path: Path, born: int) -> subprocess.Popen[str]:
        if self.kind == "sweep":
            return start("--sweep", path, path.parent, born)
        return start("--write", path, born * 100_000, 1, 100_000, 3 if self.kind == "fold" else 0)

    def wait(self, victim: subprocess.Popen[str]) -> str:
        """Wait for the instant to kill it; returns what it has printed until then."""
        said = ""
        if self.rng.random() < 0.9:  # else killed while it starts
            assert victim.stdout is not None
            for line in victim.stdout:
                said += line
                if self.kind != "fold" or line == "fold\n":
                    break
            time.sleep(self.rng.uniform(0.0, 0.05 if self.kind == "fold" else 0.15))
        return said

    def end(self, victim: subprocess.Popen[str], said: str, acknowledged: set[int], counted: bool = True) -> None:
        victim.send_signal(signal.SIGKILL)
        assert victim.stdout is not None
        said += victim.stdout.read()
        victim.stdout.close()
        victim.wait()
        words = said[: said.rfind("\n") + 1].split()
        acknowledged.update(int(word) for word in words if word.isdecimal())
        killed = victim.returncode == -signal.SIGKILL
        self.counts["kills"] += killed and counted
        self.counts["in_a_fold"] += killed and counted and words[-1:] == ["fold"]
        self.counts["ended_otherwise"] += not killed and not (self.kind == "sweep" and victim.returncode == 0)

    def check(self, path: Path, acknowledged: set[int]) -> None:
        store = Trajectory(path)
        found = set(store["row"]["step"].values.tolist()) if "row" in store else set()
        if "row" not in store:
            store.declare("row", WHO)
        store.append("row", 99_999_999, row(99_999_999), weights="last")
        store.fold()
        rows = store["row"]
        steps = rows["step"].values.tolist()
        right = (rows["score"].values == rows["step"].values[:, None] + np.arange(5000)).all(axis=1)
        self.counts["acknowledged"] += len(acknowledged)
        self.counts["lost"] += len((acknowledged - found) | (acknowledged - set(steps)))
        self.counts["wrong"] += int((~right).sum())
        self.counts["double"] += len(steps) - len(set(steps))


def save_checkpoints(folder: Path, count: int) -> None:
    import torch

    for step in range(count):
        torch.save({"weight": torch.arange(5000.0)[None] + step}, folder / f"{step}.pt")


def size(path: Path) -> int:
    total = 0
    for folder, _, files in os.walk(path):  # a fold deletes at the same time
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(folder, name))
    return total


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--write"]:
        return write(Path(words[1]), *map(int, words[2:]))
    if words[:1] == ["--sweep"]:
        return sweep(Path(words[1]), Path(words[2]), int(words[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    began = time.perf_counter()
    shares = {"write": asked.kills - 2 * (asked.kills // 3), "fold": asked.kills // 3, "sweep": asked.kills // 3}
    phases = {kind: Phase(kind, kills, asked.writers, asked.seed).run() for kind, kills in shares.items()}
    total = {key: sum(phase[key] for phase in phases.values()) for key in phases["write"]}
    result = total | {
        "phases": phases,
        "writers": asked.writers,
        "seed": asked.seed,
        "seconds": round(time.perf_counter() - began, 1),
        "platform": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(result, indent=1))
    if asked.json is not None:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(total[key] for key in ("lost", "wrong", "double", "ended_otherwise")))


if __name__ == "__main__":
    main()
