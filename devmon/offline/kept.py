"""What a run keeps of a measurement besides its rows: the plan, the checkpoints, and what an audit found of them."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch

from devmon.checkpoints.audit import Audit
from devmon.checkpoints.series import Checkpoint, Series
from devmon.errors import DataError
from devmon.monitoring.fingerprint import describe
from devmon.store.rows import plain

if TYPE_CHECKING:
    from devmon.offline.study import Study


def checkpoint(series: Series, read: Checkpoint) -> dict[str, Any]:
    """Of a checkpoint its name, stage and tokens, its commit, and its files of weights with their SHA-256."""
    told = {"stage": series.stage[read.step], "tokens": series.tokens[read.step], "commit": read.commit}
    known = {key: value for key, value in told.items() if value not in (None, "")}
    return {"name": read.name, "files": dict(read.files)} | known


def formats(trajectory: Any) -> dict[int, str]:
    """Step to the format to read, where an audit found that the first is stale."""
    held = {} if trajectory is None else trajectory.attrs.get("formats", {})
    return {int(step): str(kind) for step, kind in held.items()}


def refuse_twins(study: Study, found: Audit, work: Container[int]) -> None:
    """Raises DataError where steps that are to be measured have one set of files, unless the plan allows it."""
    for group in found.twins:
        if not study.plan.allow_twins and any(step in work for step in group):
            raise DataError(
                f"steps {', '.join(map(str, group[:8]))} of {study.series.name} have one set of weights, so that all "
                "but one are not what their names say (devmon audit): leave them out by --steps, or measure and mark "
                "them with --allow-twins"
            )


def record(study: Study, found: Audit) -> None:
    """Keep the plan, the last of the list `measured`, with the digests of the probe data; how names were read; and of
    the audit the `formats` to read where the first is stale, and the groups of `twins`.

    Raises DataError where the stages of the run begin elsewhere on its axis.
    """
    trajectory, attrs = study.trajectory, study.trajectory.attrs
    # the axis: the same as before, or the rows of one step would be of two checkpoints
    read = study.series.axis
    held = attrs.get("series", {}).get("offsets", {})
    if differ := [stage for stage, at in read.offsets.items() if held.get(stage, at) != at]:
        raise DataError(
            f"{trajectory.path} has {differ[0] or 'the first stage'} begin at {held[differ[0]]}, this series at "
            f"{read.offsets[differ[0]]}: give the checkpoints of all stages as they were then, or another run"
        )
    series = {"name": study.series.name, "unit": read.unit, "offsets": held | read.offsets, "said": read.said()}

    # what the audit found, of the steps that it looked at
    before = {step: kind for step, kind in formats(trajectory).items() if step not in found.listings}
    study.series.kinds = before | found.kinds
    kinds = {str(step): kind for step, kind in sorted(study.series.kinds.items())}
    twins = {tuple(group) for group in attrs.get("twins", [])} | set(found.twins)

    # the plan, with the data that it was carried out on
    digests = {}
    if study.probe is not None:
        digests = {"tokens_held": describe(study.probe.tokens), "examples_held": describe(study.probe.examples)}
    single = study.plan.engine == "processes" and study.plan.workers == 1
    threads = study.plan.threads or (torch.get_num_threads() if single else 1)  # the last bits depend on it
    plan = plain(study.plan.record() | digests | {"checkpoints": len(study.steps), "threads": threads})
    earlier = attrs.get("measured", [])
    earlier = [earlier] if isinstance(earlier, dict) else earlier  # of an earlier devmon
    trajectory.record(
        series=series,
        formats=kinds,
        twins=sorted(map(list, twins)),
        measured=[*(other for other in earlier if other != plan), plan],
    )
