"""The server that worker processes are forks of: begun before anything else is imported, it imports while its caller does."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing import forkserver
from typing import Any

from devmon.plan import Plan

STUDY = ["devmon.measuring"]
MODEL = ["transformers.models.auto.modeling_auto", "transformers.modeling_layers", "transformers.generation.utils"]


def start(plan: Plan) -> Any:
    """The context of the processes. On Linux they are forks of a server that has imported what they need, once, and has
    started nothing (no CUDA, no threads)."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(STUDY if plan.source is not None else STUDY + MODEL)
    forkserver.ensure_running()
    return context
