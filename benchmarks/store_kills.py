"""Writers killed with SIGKILL at random instants: are rows lost that were acknowledged?

    python benchmarks/store_kills.py [--kills 200] [--writers 4] [--seed 0] [--json PATH]

Each writer appends rows to one trajectory, folds it now and then, and prints a step
once `append` has returned. It is killed at a random instant and another takes its place. At the end every printed step
must be there once, with its value, and the store must go on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr

from devmon.trajectory import Trajectory

WHO = {"instrument": "benchmarks.Row", "fields": {}, "fingerprint": "0", "doc": "A row."}


def row(step: int) -> xr.Dataset:
    """40 kB, so that a kill can come in the middle of a write."""
    values = np.arange(5000, dtype=np.float64) + step
    return xr.Dataset(
        {"score": ("head", values), "total": ((), np.float64(step)), "verdict": ((), np.array("ok", object))}
    )


def write(path: Path, first: int, every: int, count: int, fold: int) -> None:
    """Append `count` rows at steps `first`, `first + every`, …; fold after each `fold` rows."""
    store = Trajectory(path)
    store.declare("row", WHO)
    for i in range(count):
        step = first + i * every
        store.append("row", step, row(step), weights=f"w{step}", seconds=0.0)
        os.write(1, f"{step}\n".encode())
        if fold and i % fold == fold - 1:
            store.fold()


def start(path: Path, first: int, every: int, count: int, fold: int) -> subprocess.Popen[str]:
    words = [sys.executable, __file__, "--write", str(path), str(first), str(every), str(count), str(fold)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def end(victim: subprocess.Popen[str], acknowledged: list[int]) -> bool:
    """Kill it and add what it had acknowledged; whether it had ended otherwise before."""
    victim.send_signal(signal.SIGKILL)
    assert victim.stdout is not None
    words = victim.stdout.read()
    victim.stdout.close()
    victim.wait()
    acknowledged += [int(word) for word in words[: words.rfind("\n") + 1].split()]
    return victim.returncode != -signal.SIGKILL


def run(kills: int, writers: int, seed: int) -> dict[str, int]:
    """Kill `kills` writers, `writers` of them at work at a time; how many rows were acknowledged, lost, wrong, double."""
    rng = random.Random(seed)
    acknowledged: list[int] = []
    unclean = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        born = 0
        live: list[subprocess.Popen[str]] = []
        for _ in range(kills):
            while len(live) < writers:
                live.append(start(path, born * 100_000, 1, 100_000, rng.choice([3, 10, 40])))
                born += 1
            victim = live.pop(0)
            if rng.random() < 0.9:  # else killed while it starts
                assert victim.stdout is not None
                acknowledged.append(int(victim.stdout.readline()))
                time.sleep(rng.uniform(0.0, 0.15))
            unclean += end(victim, acknowledged)
            if sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) > 2**28:
                break  # enough for this disk
        for victim in live:
            unclean += end(victim, acknowledged)
        store = Trajectory(path)
        found = store["row"]
        store.append("row", 99_999_999, row(99_999_999), weights="last")
        store.fold()
        again = store["row"]
        steps = again["step"].values.tolist()
        right = (again["score"].values == again["step"].values[:, None] + np.arange(5000)).all(axis=1)
        return {
            "kills": born,
            "acknowledged": len(acknowledged),
            "lost": len(set(acknowledged) - set(found["step"].values.tolist()) | set(acknowledged) - set(steps)),
            "wrong": int((~right).sum()),
            "double": len(steps) - len(set(steps)),
            "ended_otherwise": unclean,
        }


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]), *map(int, sys.argv[3:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    began = time.perf_counter()
    found = run(asked.kills, asked.writers, asked.seed)
    result = found | {"writers": asked.writers, "seed": asked.seed, "seconds": round(time.perf_counter() - began, 1),
                      "platform": platform.platform(), "load": round(os.getloadavg()[0], 2)}  # fmt: skip
    print(json.dumps(result, indent=1))
    if asked.json is not None:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(found["lost"] or found["wrong"] or found["double"] or found["ended_otherwise"]))


if __name__ == "__main__":
    main()
