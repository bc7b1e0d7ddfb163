"""Keeping training untouched: what an instrument may disturb is put back, and it only ever holds a copy of the model."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from devmon.errors import InstrumentError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def isolated() -> Iterator[None]:
    """Put every process-wide switch back on leaving: the Python, NumPy, torch and CUDA random states, grad mode,
    default dtype, deterministic mode, thread count; autocast is off inside."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    grad, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.backends.mha.set_fastpath_enabled(fastpath)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def private_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A deep copy in evaluation mode without gradients and without the user's hooks (torch's own, such as those of
    `torch.nn.utils`, stay: they are part of the function). A compiled wrapper is left out: the original is copied."""
    original = getattr(model, "_orig_mod", model)
    try:
        twin = copy.deepcopy(original)
    except Exception as error:
        raise InstrumentError(
            f"{type(original).__name__} cannot be copied ({type(error).__name__}: {error}). Instruments work on a copy: "
            "hand the bare network over (Monitor(model='net') names an attribute), or save checkpoints with "
            "CheckpointSeries and measure them afterwards"
        ) from error
    for module in twin.modules():
        for kind in HOOKS:
            hooks = getattr(module, kind)
            for key in [k for k, hook in hooks.items() if not _is_torch(hook)]:
                del hooks[key]
    return twin.eval()


def _is_torch(hook: object) -> bool:
    owner = getattr(hook, "__func__", hook)
    return (getattr(owner, "__module__", None) or type(owner).__module__ or "").startswith("torch.")
