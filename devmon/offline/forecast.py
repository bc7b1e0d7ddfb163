"""What a study will need, before it starts: memory from the model's size, time from rows of the run or a trial."""

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

TRIAL = (4, 64)  # tokens of the forward pass that is timed
MAX_PARAMETERS = 500_000_000  # parameters of a model that is built for that: 2 GB in float32, seconds to build


def memory(study: Study) -> str:
    """One line: the bytes of a copy of the weights, and how many copies a process holds."""
    model = study.model if study.model is not None else _untrained(study, "meta")
    numbers = sum(tensor.numel() for tensor in model.parameters())
    dtype = getattr(torch, study.plan.dtype) if study.model is None else next(model.parameters()).dtype
    copies = max((watch.instrument.copies() for watch in study.watches if isinstance(watch.instrument, LLC)), default=0)
    line = (
        f"memory of a process: a copy of the weights is {_size(numbers * dtype.itemsize)} ({numbers:,} parameters, "
        f"{study.plan.dtype}); 2 copies on {study.device.type} (the model, and what an instrument works on), 1 in main "
        "memory (the checkpoint read ahead)"
    )
    if copies:
        line += f", at most {_size(copies * 4 * numbers)} for a chain of an LLC ({copies:g} copies in float32)"
    return line + "; and the activations of a batch"


def seconds(study: Study, work: Mapping[int, Sequence[Watch]], estimates: Sequence[Estimate]) -> str:
    """One line: how long `work` takes a process, from rows of the same watches in the run, or a timed forward pass."""
    names = [watch.name for due in work.values() for watch in due]
    # what the run holds is the best forecast: the mean of its rows, instrument by instrument
    run = study.trajectory
    measured = [name for name in set(names) if run is not None and name in run and len(run.steps(name))]
    rows = {name: run[name]["seconds"].values for name in measured}
    total = sum(float(rows[name].mean()) for name in names if name in rows)
    sources = [f"the {sum(map(len, rows.values()))} rows that the run holds"] if rows else []
    # for the others, their cost in tokens at the speed of this machine
    unknown = set(names).difference(rows)
    costs = {e.name: e.work for e in estimates if e.name in unknown and e.work is not None}
    if costs and (rate := _rate(study)) is not None:
        total += sum(costs.values()) / rate
        sources.append(f"a forward pass on this machine's {study.device.type} ({rate:,.0f} tokens a second)")
        unknown -= costs.keys()
    if not sources:
        return f"time: unknown until a checkpoint is measured: --steps {study.steps[-1]} first"
    workers = study.plan.workers
    shares = "" if workers == 1 else f", {_time(total / workers)} with {workers} at once"
    line = f"time: about {_time(total)}{shares}, checkpoints' reading apart, from {' and '.join(sources)}"
    return line + (f"; unknown for {', '.join(sorted(unknown))}" if unknown else "")


def _rate(study: Study) -> float | None:
    """Tokens a second of a forward pass, None where the model is no small language model."""
    own = getattr(getattr(study.model, "config", None), "vocab_size", None)
    vocab = study.config.get("vocab_size") if study.model is None else own
    if vocab is None:
        return None
    if study.model is None and sum(p.numel() for p in _untrained(study, "meta").parameters()) > MAX_PARAMETERS:
        return None
    model = (study.model if study.model is not None else _untrained(study, str(study.device))).eval()
    tokens = torch.zeros(TRIAL, dtype=torch.int64, device=study.device)
    times = []
    with torch.no_grad():
        for _ in range(3):  # the fastest counts: the first warms up, and others share the machine
            started = time.perf_counter()
            model(tokens)
            if study.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return tokens.numel() / min(times)


def _untrained(study: Study, device: str) -> nn.Module:
    """The model that the checkpoints' config.json describes, with weights that nobody has set."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = dict(study.config)
    config = AutoConfig.for_model(settings.pop("model_type", ""), **settings)
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
