"""What a study will need, before it is begun: memory from the model's size, time from rows that are there or a trial."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from devmon.cost import Estimate
from devmon.instruments import LLC
from devmon.monitoring.isolation import isolated
from devmon.offline.study import Study
from devmon.watch import Watch

CHAIN = 3  # float32 numbers of a chain for each weight: the weights, their gradient, the noise
TRIAL = (4, 64)  # tokens of the forward pass that is timed
LARGEST = 500_000_000  # parameters of a model that is made for that


def memory(study: Study) -> str:
    """One line: the bytes of a copy of the weights, and how many copies a process holds."""
    model = study.model if study.model is not None else _made(study, "meta")
    sizes = [tensor.numel() for tensor in model.parameters()]
    kind = getattr(torch, study.plan.dtype) if study.model is None else next(model.parameters()).dtype
    copy, chains = sum(sizes) * kind.itemsize, max((watch.instrument.chains for watch in study.watches if isinstance(watch.instrument, LLC)), default=0)  # fmt: skip
    told = (f"memory of a process: a copy of the weights is {_size(copy)} ({sum(sizes):,} parameters, {study.plan.dtype}); "
            f"2 copies on {study.device.type} (the model, and what an instrument works on), 1 in main memory (the checkpoint "
            "read ahead)")  # fmt: skip
    if chains:
        told += f", {_size(chains * CHAIN * 4 * sum(sizes))} for {chains} chain{'s' * (chains > 1)} of an LLC (fewer at once where it does not fit)"
    return told + "; and the activations of a batch"


def seconds(study: Study, work: Mapping[int, Sequence[Watch]], found: Sequence[Estimate]) -> str:
    """One line: how long `work` takes a process, from rows of the same watches in the run, or from a timed forward pass."""
    names = [watch.name for due in work.values() for watch in due]
    rows = {name: study.trajectory[name]["seconds"].values for name in set(names) if study.trajectory is not None
            and name in study.trajectory and len(study.trajectory.steps(name))}  # fmt: skip
    total = sum(float(rows[name].mean()) for name in names if name in rows)
    sources = [f"the {sum(map(len, rows.values()))} rows that the run holds"] if rows else []
    untold = {name for name in names if name not in rows}
    costs = {one.name: one.work for one in found if one.name in untold and one.work is not None}
    if costs and (rate := _rate(study)) is not None:
        total += sum(costs.values()) / rate
        sources.append(f"a forward pass on this machine's {study.device.type} ({rate:,.0f} tokens a second)")
        untold -= costs.keys()
    if not sources:
        return f"time: not told before a checkpoint is measured: --steps {study.steps[-1]} first"
    shares = (
        "" if study.plan.workers == 1 else f", {_time(total / study.plan.workers)} with {study.plan.workers} at once"
    )
    told = f"time: about {_time(total)}{shares}, checkpoints' reading apart, from {' and '.join(sources)}"
    return told + (f"; not told for {', '.join(sorted(untold))}" if untold else "")


def _rate(study: Study) -> float | None:
    """Tokens a second of a forward pass, None where the model is no small language model."""
    vocab = study.config.get("vocab_size") if study.model is None else getattr(getattr(study.model, "config", None), "vocab_size", None)  # fmt: skip
    if vocab is None or (study.model is None and sum(p.numel() for p in _made(study, "meta").parameters()) > LARGEST):
        return None
    model = (study.model if study.model is not None else _made(study, str(study.device))).eval()
    tokens = torch.zeros(TRIAL, dtype=torch.int64, device=study.device)
    times = []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            model(tokens)
            if study.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return tokens.numel() / min(times)


def _made(study: Study, device: str) -> nn.Module:
    """The model that the checkpoints' config.json tells, with weights that nobody has set."""
    from transformers import AutoConfig, AutoModelForCausalLM

    told: dict[str, Any] = dict(study.config)
    config = AutoConfig.for_model(told.pop("model_type", ""), **told)
    with torch.device(device), isolated():
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _time(seconds: float) -> str:
    """
    >>> _time(5.21), _time(600), _time(10_000), _time(1e6)
    ('5.2 s', '10 min', '2.8 h', '11.6 days')
    """
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{round(seconds / unit, 1):g} {name}"
    return f"{seconds:.2g} s"
