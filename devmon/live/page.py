"""The page of a run that is still being written: its report, with few nulls, its events provisional."""

from __future__ import annotations

from devmon.live.server import Live


def live_report(run: str, every: float, nulls: int = 99) -> Live:
    """The live report of a run, made again when a step is committed."""
    from devmon.store.trajectory import Trajectory

    def state() -> object:
        trajectory = Trajectory(run, "r")
        return {name: trajectory.steps(name) for name in trajectory.names()}, trajectory.attrs.get("alarms")

    return Live(state, lambda: live_page(run, max(1, round(every)), nulls), every)


def live_page(run: str, refresh: int | None, nulls: int = 99) -> str:
    """The report of a run that may still grow: run-level series only, searched with few nulls, its events provisional.

    The page loads itself again every `refresh` seconds.
    """
    from devmon.analysis import Detector, series_of
    from devmon.analysis import detect as search
    from devmon.analysis.reports.findings import examine
    from devmon.analysis.reports.report import content_of
    from devmon.analysis.reports.writers import as_html
    from devmon.store.trajectory import Trajectory

    trajectory = Trajectory(run, "r")
    series = series_of(trajectory, each=False)
    note = (
        f"Provisional: the run may still be written. Only series of the whole run are searched, with {nulls} nulls, "
        "and every look is another chance of a false alarm; devmon report makes the final page."
    )
    findings = examine(trajectory, detection=search(series, Detector(n_null=nulls)))
    return as_html(content_of(findings, note=note), refresh=refresh)
