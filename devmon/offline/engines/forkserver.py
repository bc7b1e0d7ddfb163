"""The server that worker processes are forks of: started before other imports, it imports while its caller does."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from multiprocessing import forkserver, resource_tracker
from typing import Any

from devmon.offline.plan import Plan

STUDY = ["devmon.offline.study"]
MODEL = ["transformers.models.auto.modeling_auto", "transformers.modeling_layers", "transformers.generation.utils"]


def start(plan: Plan) -> Any:
    """The context that processes are started from.

    On Linux they are forks of a server that has imported what they need, once, and has started nothing (no CUDA, no
    threads).
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(STUDY if plan.source is not None else STUDY + MODEL)
    resource_tracker.ensure_running()  # by itself: it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for the command, which ends them
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
