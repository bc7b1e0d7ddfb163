"""The one way a measurement is made, online and offline: instruments on a snapshot, rows to a trajectory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable

import torch

from devmon.errors import DevmonError
from devmon.fingerprint import identity
from devmon.isolation import isolated, private_copy
from devmon.snapshot import Snapshot, derive_seed, weights_digest
from devmon.trajectory import Trajectory
from devmon.watch import Watch, unique_names


def observe(
    step: int, model: torch.nn.Module, watches: Iterable[Watch], trajectory: Trajectory, *, strict: bool = True
) -> list[str]:
    """Measure every watch that is due at `step` and not yet in the trajectory; returns the names it appended.

    Each instrument gets its own copy of the model and a seed made of the run's seed and the watch's name, so its
    numbers do not depend on which other instruments ran, or when. Nothing of the caller's process or model changes.

    With `strict=False` an instrument that fails (other than by not fitting the model, or a refused store) is
    recorded with its reason, warned of once, and the others go on.

    Raises `InstrumentError` where an instrument does not fit the model, `IdentityError` where the trajectory holds
    another configuration or other weights for this step.
    """
    due = [watch for watch in unique_names(watches) if step in watch.steps]
    if not due:
        return []
    digest = weights_digest(model)
    appended = []
    for watch in due:
        trajectory.declare(watch.name, identity(watch.instrument))
        if trajectory.holds(watch.name, step, weights=digest):
            continue
        started = time.perf_counter()
        try:
            with isolated():
                snapshot = Snapshot(step, private_copy(model), derive_seed(trajectory.seed, watch.name))
                dataset = watch.instrument(snapshot)
        except DevmonError:
            raise
        except Exception as error:
            if strict:
                raise
            reason = f"{type(error).__name__}: {error}"
            if not trajectory.failures(watch.name):
                warnings.warn(f"{watch.name} failed at step {step} ({reason}); the others go on", stacklevel=2)
            trajectory.fail(watch.name, step, reason)
            continue
        trajectory.append(watch.name, step, dataset, weights=digest, seconds=time.perf_counter() - started)
        appended.append(watch.name)
    return appended
