"""A series of checkpoints measured by one process, by two, by Ray, by an array of jobs, and by killed processes.

    python benchmarks/offline.py SERIES TEXT [--parts scaling engines kills memory] [--steps log:40] [--json PATH]

SERIES and TEXT are what `recipes/pythia.py` makes: OUT/checkpoints and OUT/text/held_out.txt. Every process has one
thread. The results of the parts that are asked for replace those in PATH.

- scaling: wall time of `devmon measure` with the preset `standard` by 1 and by 2 workers, in turn, `--repeats` times;
  the same command with nothing left to do is the start-up. CPU seconds are of all processes of the command (of Ray's
  and the jobs not all), `others` are those of all other jobs of the machine meanwhile: where they are many, the wall
  times say little. `profile` is where one process' time goes.
- engines: the same by Ray and by submitit's local executor; are the trajectories the same, bit for bit?
- kills: two processes (shards) measure the series with the preset `economy`; one of them is killed with SIGKILL at a
  random instant and begun again, `--kills` times. Rows that were told of and are not in the store are lost; rows told
  of by two processes were measured twice.
- memory: `--checkpoints` checkpoints of 100 MB, one after another: resident memory at its highest during each.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import ctypes
import hashlib
import json
import os
import platform
import pstats
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from devmon.offline.plan import Plan
from devmon.offline.study import Progress, Study
from devmon.store.trajectory import Trajectory

MEASURE = [sys.executable, "-m", "devmon.cli", "measure"]


class Bench:
    def __init__(self, asked: argparse.Namespace, folder: Path) -> None:
        self.asked, self.folder = asked, folder

    def plan(self, name: str, **more: Any) -> Plan:
        given = {"preset": "standard", "steps": self.asked.steps} | more
        return Plan(
            str(self.asked.series),
            str(self.folder / name),
            tokens=str(self.asked.text),
            sequences=32,
            length=64,
            threads=1,
            **given,
        )

    def measured(self, plan: Plan) -> dict[str, float]:
        """The command in its own process: seconds, CPU seconds of all its processes, and of all others meanwhile."""
        keys = ("preset", "tokens", "sequences", "length", "steps", "into", "workers", "threads", "engine")
        words = [f"--{key}={getattr(plan, key)}" for key in keys]
        words += [f"--option={value}" for value in plan.options]
        before, began, busy = cpu(), time.perf_counter(), machine()
        subprocess.run([*MEASURE, plan.series, *words], check=True, capture_output=True)
        took = time.perf_counter() - began
        with contextlib.suppress(ChildProcessError):
            while plan.engine == "processes":  # what the command left behind: the server that its workers were forks of
                os.waitpid(-1, 0)
        mine = cpu() - before
        return {"seconds": round(took, 2), "cpu_seconds": round(mine, 2), "others": round(machine() - busy - mine, 2)}

    def scaling(self) -> dict[str, Any]:
        found: dict[str, Any] = {"1": [], "2": []}
        digests = []
        for n in range(self.asked.repeats):
            for workers in (1, 2) if n % 2 == 0 else (2, 1):
                plan = self.plan(f"{workers}-{n}.zarr", workers=workers)
                found[str(workers)].append(self.measured(plan) | {"started": self.measured(plan)["seconds"]})
                digests.append(digest(plan.into))
        rows = sum(len(Trajectory(plan.into, "r").steps(name)) for name in Trajectory(plan.into, "r"))
        wall = [a["seconds"] / b["seconds"] for a, b in zip(found["1"], found["2"], strict=True)]
        steady = [
            (a["seconds"] - a["started"]) / (b["seconds"] - b["started"])
            for a, b in zip(found["1"], found["2"], strict=True)
        ]
        cost = [b["cpu_seconds"] / a["cpu_seconds"] for a, b in zip(found["1"], found["2"], strict=True)]
        return found | {
            "rows": rows,
            "identical": len(set(digests)) == 1,
            "speed_up": rounded(wall),
            "after_start_up": rounded(steady),
            "cpu_of_two_over_one": rounded(cost),
            "profile": self.profile(),
        }

    def profile(self) -> dict[str, float]:
        """Shares of the time of a process, start-up apart: the store, waiting for a checkpoint, building it."""
        watched = cProfile.Profile()
        study = Study(self.plan("profile.zarr"))
        began = time.perf_counter()
        watched.runcall(study.measure)
        total = time.perf_counter() - began
        stats = pstats.Stats(watched).stats  # type: ignore[attr-defined]

        def share(file: str, *names: str) -> float:
            found = [t[3] for (path, _, name), t in stats.items() if path.endswith(file) and name in names]
            return round(sum(found) / total, 4)

        return {
            "seconds": round(total, 1),
            "instruments": share("devmon/monitoring/observe.py", "_measure"),
            "store": share("devmon/store/trajectory.py", "append", "fail"),
            "weights digest": share("devmon/snapshot.py", "weights_digest"),
            "model from checkpoint": share("devmon/checkpoints/pretrained.py", "causal_lm"),
            "wait for prefetch": share("concurrent/futures/_base.py", "result"),
        }

    def engines(self) -> dict[str, Any]:
        plans = {
            "1 worker": self.plan("one.zarr"),
            "2 workers": self.plan("two.zarr", workers=2),
            "ray": self.plan("ray.zarr", workers=2, engine="ray"),
            "array of 2 jobs": self.plan("jobs.zarr", workers=2, engine="slurm", options=("cluster=local",)),
        }
        found = {name: self.measured(plan) | {"digest": digest(plan.into)} for name, plan in plans.items()}
        return found | {"identical": len({one["digest"] for one in found.values()}) == 1}

    def kills(self) -> dict[str, Any]:
        rng, counts, stores = random.Random(0), Counter[str](), 0
        reference = digest(self.whole())
        while counts["kills"] < self.asked.kills:
            plan = self.plan(f"kills-{stores}.zarr", preset="economy")
            log, stores = self.folder / f"log-{stores}", stores + 1
            live = {shard: begin(replace(plan, shard=f"{shard}/2"), log) for shard in (1, 2)}
            while live:
                shard = rng.choice([*live])
                time.sleep(rng.uniform(0.02, 2.0))
                if counts["kills"] < self.asked.kills:
                    os.kill(live[shard], signal.SIGKILL)
                _, status = os.waitpid(live.pop(shard), 0)
                if os.WIFSIGNALED(status):
                    counts["kills"] += 1
                    live[shard] = begin(replace(plan, shard=f"{shard}/2"), log)
                else:
                    counts["ended otherwise"] += os.waitstatus_to_exitcode(status) != 0
            told = Counter(line for line in log.read_text().split("\n") if line)
            Trajectory(plan.into).fold()
            store = Trajectory(plan.into, "r")
            held = Counter(f"{step} {name}" for name in store for step in store[name]["step"].values.tolist())
            counts["rows"] += sum(held.values())
            counts["lost"] += len(told.keys() - held.keys())
            counts["measured twice"] += sum(n - 1 for n in told.values())
            counts["held twice"] += sum(n - 1 for n in held.values())
            counts["stores that differ"] += digest(plan.into) != reference
        return {"stores": stores} | {
            key: counts[key]
            for key in (
                "kills",
                "rows",
                "lost",
                "measured twice",
                "held twice",
                "stores that differ",
                "ended otherwise",
            )
        }

    def whole(self) -> str:
        plan = self.plan("whole.zarr", preset="economy")
        pid = begin(plan, self.folder / "whole.log")
        os.waitpid(pid, 0)
        Trajectory(plan.into).fold()
        return plan.into

    def memory(self) -> dict[str, Any]:
        series = large_series(self.folder / "large", self.asked.checkpoints)
        tokens = self.folder / "tokens.pt"
        torch.save(torch.randint(1000, (4, 16), generator=torch.Generator().manual_seed(0)), tokens)
        plan = Plan(
            str(series),
            str(self.folder / "memory.zarr"),
            preset="economy",
            tokens=str(tokens),
            threads=1,
            watch=("loss", "repeats"),
        )
        told = subprocess.run(
            [sys.executable, __file__, "--peaks", json.dumps(plan.record() | {"into": plan.into})],
            check=True,
            capture_output=True,
            text=True,
        )
        before, *peaks = json.loads(told.stdout)
        copy = sum(file.stat().st_size for file in (series / "step0").glob("*.safetensors")) / 2**20
        return {
            "checkpoints": len(peaks),
            "weights_mb": round(copy),
            "before_mb": before,
            "first_mb": peaks[0],
            "most_mb": max(peaks),
            "last_mb": peaks[-1],
            "most_over_first": round(max(peaks) / peaks[0], 3),
            "copies_at_most": round((max(peaks) - before) / copy, 2),
        }


def begin(plan: Plan, log: Path) -> int:
    """A process that measures, forked so that it starts at once; it writes a line a row into `log`."""
    if pid := os.fork():
        return pid
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(event: Progress) -> None:
        os.write(file, f"{event.step} {event.watch}\n".encode())

    try:
        Study(plan).measure(tell=tell)
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr)
    os._exit(1)


def large_series(folder: Path, count: int) -> Path:
    """Three checkpoints of 100 MB under many names."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    for step in range(count):
        if step < 3:
            torch.manual_seed(step)
            GPTNeoXForCausalLM(
                GPTNeoXConfig(
                    vocab_size=10_000,
                    hidden_size=512,
                    num_hidden_layers=5,
                    num_attention_heads=8,
                    intermediate_size=2048,
                    max_position_embeddings=64,
                    use_cache=False,
                )
            ).save_pretrained(folder / f"step{step}")
        else:
            shutil.copytree(folder / f"step{step % 3}", folder / f"step{step}", copy_function=os.link)
    return folder


def peaks(plan: Plan) -> list[float]:
    """Resident memory (MB) before anything is measured, and at its highest up to each checkpoint's last row."""
    study, page = Study(plan), os.sysconf("SC_PAGE_SIZE") / 2**20
    now = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * page  # noqa: E731
    before = now()
    seen, high, done = dict[int, float](), 0.0, threading.Event()

    def look() -> None:
        nonlocal high
        while not done.wait(0.005):
            high = max(high, now())

    def tell(event: Progress) -> None:
        nonlocal high
        if event.watch == study.watches[-1].name:
            seen[event.step], high = high, 0.0

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    study.measure(tell=tell)
    done.set()
    return [round(before, 1), *(round(value, 1) for value in seen.values())]


def digest(run: str) -> str:
    """Of every number of a run but the seconds."""
    store, found = Trajectory(run, "r"), hashlib.sha256()
    for name in sorted(store):
        dataset = store[name].drop_vars("seconds")
        for variable in sorted(map(str, dataset.variables)):
            value = dataset[variable].values
            found.update(f"{name} {variable} {value.shape} {value.dtype}".encode())
            found.update(value.tobytes() if value.dtype != object else repr(value.tolist()).encode())
    return found.hexdigest()[:16]


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine() -> float:
    """CPU seconds that the machine has spent (user, nice, system, interrupts, and stolen by its host)."""
    user, nice, system, _, _, *more = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK")


def rounded(values: list[float]) -> list[float]:
    return [round(value, 2) for value in values]


def main() -> None:
    if sys.argv[1:2] == ["--peaks"]:
        print(json.dumps(peaks(Plan(**json.loads(sys.argv[2])))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--parts", nargs="*", default=["scaling", "engines", "kills", "memory"])
    parser.add_argument("--steps", default="log:40")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--checkpoints", type=int, default=150)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans of a command become children of this process
    result = json.loads(asked.json.read_text()) if asked.json is not None and asked.json.exists() else {}
    for part in asked.parts:
        with tempfile.TemporaryDirectory() as folder:
            began, load = time.perf_counter(), os.getloadavg()[0]
            found = getattr(Bench(asked, Path(folder)), part)()
        result[part] = found | {
            "steps": asked.steps,
            "took_seconds": round(time.perf_counter() - began, 1),
            "load_before": round(load, 1),
            "cores": os.cpu_count(),
            "platform": platform.platform(),
        }
        print(json.dumps({part: result[part]}, indent=1))
        if asked.json is not None:
            asked.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
