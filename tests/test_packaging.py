"""The frame of the project: what installs, who may import whom, what stays light."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from tests.support.rooms import ROOT, imports, modules

TORCH = {"torch", "lightning", "transformers", "devinterp"}


ALL = modules()


def offenders(inside: str, forbidden: set[str]) -> list[str]:
    return [
        f"{name} imports {target}" for name, path in ALL.items() if name.startswith(inside)
        for target in imports(path) if any(target == f or target.startswith(f + ".") for f in forbidden)
    ]  # fmt: skip


def reached(name: str) -> set[str]:
    """Every module that `name` brings in when imported, through devmon's own modules."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += imports(ALL[current], top_level=True) if current in ALL else []
    return seen


def test_analysis_reads_without_torch() -> None:
    for name in [*(n for n in ALL if n.startswith("devmon.analysis")), "devmon.store.trajectory", "devmon.cli"]:
        brought = {target.split(".")[0] for target in reached(name)} & TORCH
        assert not brought, f"{name} brings in {brought}"


def test_only_callbacks_and_recipes_import_lightning() -> None:
    assert [
        o for o in offenders("devmon", {"lightning"}) if not o.startswith(("devmon.callbacks", "devmon.recipes"))
    ] == []


def test_only_plots_and_report_import_matplotlib() -> None:
    allowed = ("devmon.analysis.plots", "devmon.analysis.reports")
    assert [o for o in offenders("devmon", {"matplotlib"}) if not o.startswith(allowed)] == []


def test_instruments_stand_alone() -> None:
    others = {name for name in ALL if name.startswith("devmon.instruments.")}
    for name in others:
        assert not imports(ALL[name]) & (others - {name} | {"lightning", "zarr", "matplotlib"}), name


def test_only_the_demo_command_reaches_recipes() -> None:
    others = {o for o in offenders("devmon", {"devmon.recipes"}) if not o.startswith("devmon.recipes.")}
    model = "devmon.recipes.language_model"
    assert others == {f"devmon.cli.instruments imports {target}" for target in (model, f"{model}.app")}
    assert not any("recipes" in target for target in imports(ALL["devmon.cli"], top_level=True))


def test_every_package_of_the_tree_is_installed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {name for name, path in ALL.items() if path.name == "__init__.py"}


def test_the_public_names_exist() -> None:
    import devmon
    import devmon.analysis
    import devmon.callbacks
    import devmon.instruments

    for package in (devmon, devmon.analysis, devmon.callbacks, devmon.instruments):
        for name in package.__all__:
            assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no"):
        _ = devmon.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("statement", ["import devmon", "import devmon.analysis", "import devmon.cli.root"])
def test_start_up_is_light(statement: str) -> None:
    heavy = "{'torch', 'xarray', 'pandas', 'matplotlib', 'zarr', 'scipy'}"
    code = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("folder", ["callbacks", "analysis", "recipes"])
def test_a_folder_is_refused_as_a_package_of_its_own(folder: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"devmon.{folder}" in run.stderr.splitlines()[-1]


def test_public_names_are_not_hidden_by_modules_of_their_name():
    code = (
        "import devmon.callbacks, devmon; from devmon import observe; "
        "assert not [name for name in devmon.__all__ if isinstance(getattr(devmon, name), type(devmon))]"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_importing_the_package_is_light_and_names_stay_functions() -> None:
    code = (
        "import sys, devmon.analysis as a\n"
        "heavy = {'torch', 'matplotlib', 'scipy', 'pandas', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import devmon.analysis.reports.report, devmon.analysis.detection.search, devmon.analysis.transitions.stages\n"
        "assert a.report.__name__ == 'report' and callable(a.report) and callable(a.detect) and callable(a.stages)\n"
        "from devmon.analysis import Event, Detector, report, plots, llc, series_of, Series, lead_lag, Fit, Detection\n"
        "assert callable(report) and plots.plot_series\n"
        "slow = {'torch', 'scipy.stats', 'scipy.optimize', 'scipy.ndimage'} & set(sys.modules)\n"
        "assert not slow, slow\n"
        "assert set(dir(a)) >= {'report', 'detect', 'plots'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
