"""Faults planted into a stand-in of the hub and into folders: each found by metadata alone, none in a clean suite."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from devmon.checkpoints.audit import Audit, _gaps, audit
from devmon.checkpoints.series import Series
from devmon.cli.root import app
from tests.support.hub import Hub, commit

PYTHIA = [0, *(2**n for n in range(10)), *range(1000, 144_000, 1000)]
BOTH = ("model.safetensors", "pytorch_model.bin")
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


def suite(folder: Path, steps: Sequence[int], files: Sequence[str] = BOTH) -> None:
    """Revisions whose files differ by name and step."""
    for n, step in enumerate(steps):
        place = folder / f"step{step}"
        place.mkdir(parents=True)
        for name in files:
            (place / name).write_text(f"{name} {step:08}")
            os.utime(place / name, (1e9 + 3600 * n, 1e9 + 3600 * n))
        (place / "config.json").write_text("{}")
        (place / "optimizer.bin").write_text("the same everywhere")
        if files[0] in SHARDS:
            (place / "model.safetensors.index.json").write_text("{}")


def audited(folder: Path, repository: str, serve: Callable[[Hub], Hub]) -> tuple[Audit, Hub]:
    names = sorted(path.name for path in folder.iterdir())
    hub = serve(Hub(folder, ["main", *names], repositories=[repository]))
    return audit(Series.open(repository)), hub


def command(*args: str) -> Result:
    return CliRunner().invoke(app, args)


def kinds(found: Audit) -> list[tuple[str, tuple[int, ...]]]:
    return [(fault.kind, fault.steps) for fault in found.faults]


def test_a_clean_suite_of_155_revisions_has_no_fault(tmp_path: Path, serve: Callable[[Hub], Hub]) -> None:
    suite(tmp_path / "repository", PYTHIA)
    (tmp_path / "repository" / "main").mkdir()
    shutil.copy(tmp_path / "repository" / "step143000" / "model.safetensors", tmp_path / "repository" / "main")
    found, hub = audited(tmp_path / "repository", "EleutherAI/pythia-70m", serve)
    assert (len(found.listings), found.faults, found.notes, found.kinds) == (154, [], [], {})
    assert len([path for path in hub.requests if "/tree/" in path]) == 154
    assert len(hub.requests) <= 160
    assert not [path for path in hub.requests if "resolve" in path], "downloaded"
    assert found.listings[8].files[0].digest != found.listings[16].files[0].digest


def test_faults_of_public_suites_are_found(tmp_path: Path, serve: Callable[[Hub], Hub]) -> None:
    folder = tmp_path / "repository"
    suite(folder, [step for step in PYTHIA if step != 4000])
    stale = [1, 2, *range(50_000, 100_000, 1000), 143_000]
    for step in stale:  # as one conversion of the last model would serve it under many branches
        (folder / f"step{step}" / "model.safetensors").write_text("model.safetensors 00143000")
    for name in BOTH:  # one set of weights, whatever is read
        shutil.copy(folder / "step7000" / name, folder / "step8000" / name)
    for name in BOTH:
        (folder / "step9000" / name).unlink()
    shutil.rmtree(folder / "step10000")  # listed, and not there
    hub = serve(Hub(folder, [f"step{step}" for step in PYTHIA if step != 4000], repositories=["EleutherAI/pythia-70m"]))
    found = audit(Series.open("EleutherAI/pythia-70m"))
    told = dict(kinds(found))
    assert told == {
        "stale": tuple(stale), "twins": (7000, 8000), "missing": (10_000,), "gap": (4000,),
    }  # fmt: skip
    assert ("missing", (9000,)) in kinds(found)
    assert found.kinds == dict.fromkeys(stale, "bin")
    assert found.twins == [(7000, 8000)]
    assert "model.safetensors is one file under steps 1, 2, 50000" in str(found.faults[0])
    assert "pytorch_model.bin is not: the latter is read" in str(found.faults[0])
    assert len(hub.requests) <= 2 * 154


def test_shards_that_lack_or_are_of_another_step(tmp_path: Path, serve: Callable[[Hub], Hub]) -> None:
    folder = tmp_path / "repository"
    suite(folder, range(0, 900, 100), files=SHARDS)
    assert audited(folder, "lab/model", serve)[0].faults == []
    shutil.copy(folder / "step200" / SHARDS[1], folder / "step300" / SHARDS[1])
    (folder / "step400" / SHARDS[2]).unlink()
    (folder / "step500" / "model-00001-of-00002.safetensors").write_text("of an earlier cut")
    (folder / "step600" / "model.safetensors").write_text("whole")
    (folder / "step700" / "model.safetensors.index.json").unlink()
    found, _ = audited(folder, "lab/model", serve)
    assert sorted(kinds(found)) == [
        ("extra", (500,)), ("extra", (600,)), ("missing", (400,)), ("missing", (500,)), ("missing", (700,)),
        ("shard", (200, 300)),
    ]  # fmt: skip
    assert "model-00002-of-00003.safetensors is one file at steps 200, 300" in " ".join(map(str, found.faults))


def test_a_frozen_shard_is_no_fault_and_a_pair_of_twins_in_the_other_format_is_one(
    tmp_path: Path, serve: Callable[[Hub], Hub]
) -> None:
    folder = tmp_path / "repository"
    suite(folder, range(0, 500, 100), files=SHARDS)
    for step in range(100, 500, 100):
        shutil.copy(folder / "step0" / SHARDS[0], folder / f"step{step}" / SHARDS[0])
    assert audited(folder, "lab/model", serve)[0].faults == []
    # a stale format whose fresh twin is itself equal at two steps: those two have no format of their own
    folder = tmp_path / "other"
    suite(folder, range(0, 500, 100))
    for step in (100, 200, 300):
        shutil.copy(folder / "step400" / "model.safetensors", folder / f"step{step}" / "model.safetensors")
    shutil.copy(folder / "step200" / "pytorch_model.bin", folder / "step300" / "pytorch_model.bin")
    found, _ = audited(folder, "lab/model", serve)
    assert kinds(found) == [("stale", (100, 400)), ("twins", (200, 300))]


def test_a_folder_is_told_by_digest(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    for step in range(0, 700, 100):
        content = bytearray(b"x" * 3_000_000)
        content[1_234_567] = step // 100  # where a quick look does not see it
        (folder / f"step-{step}.pt").write_bytes(content)
    assert audit(Series.open(folder)).faults == []
    shutil.copy(folder / "step-200.pt", folder / "step-500.pt")
    found = audit(Series.open(folder))
    assert kinds(found) == [("twins", (200, 500))]
    (folder / "step-300.pt").unlink()
    assert kinds(audit(Series.open(folder))) == [("twins", (200, 500)), ("gap", (200, 400))]


def test_sizes_and_dates_are_notes(tmp_path: Path, serve: Callable[[Hub], Hub]) -> None:
    folder = tmp_path / "repository"
    suite(folder, range(0, 2100, 100))
    (folder / "step700" / "model.safetensors").write_text("cut")
    os.utime(folder / "step700" / "model.safetensors", (1e9 + 7 * 3600, 1e9 + 7 * 3600))
    os.utime(folder / "step1500" / "model.safetensors", (1e9, 1e9))
    found, _ = audited(folder, "lab/model", serve)
    assert found.faults == []
    assert found.notes == [
        "steps 700 have another size than most (3 bytes, most 26)",
        "the files of steps 1500 are older than those of the steps before them",
    ]


@pytest.mark.parametrize(
    ("steps", "gaps"),
    [
        (PYTHIA, []),
        ([s for s in PYTHIA if s != 64], [(32, 128, 1)]),
        ([s for s in PYTHIA if s not in (3000, 70_000, 71_000)], [(2000, 4000, 1), (69_000, 72_000, 2)]),
        ([0, 1000, 2000, 4000, 6000, 7000, 8000], [(2000, 4000, 1), (4000, 6000, 1)]),
        ([0, 1000, 2000, 3000, 5000, 10_000, 15_000, 20_000], []),  # thinner from 5000 on
        ([0, 1, 2, 4, 8, 16, 32, 40, 48, 56, 64], []),  # from doubling to even steps
        ([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], []),
        ([0, 150, 1000, 2000, 3000, 3210], []),  # the last off the grid
    ],
)
def test_gaps_are_where_both_sides_are_regular(steps: list[int], gaps: list[tuple[int, int, int]]) -> None:
    assert _gaps(steps) == gaps


def test_the_command_prints_faults_and_its_exit_code_says_so(tmp_path: Path, serve: Callable[[Hub], Hub]) -> None:
    folder = tmp_path / "repository"
    suite(folder, range(0, 500, 100))
    names = sorted(path.name for path in folder.iterdir())
    serve(Hub(folder, ["main", *names]))
    result = command("audit", "lab/model")
    assert (result.exit_code, "no fault" in result.output) == (0, True), result.output
    assert "5 of 5 checkpoints, 10 files of weights" in result.output
    assert "left out: main" in result.output
    shutil.copy(folder / "step100" / "model.safetensors", folder / "step200" / "model.safetensors")
    result = command("audit", "lab/model")
    assert result.exit_code == 1
    assert "stale  model.safetensors is one file under steps 100, 200" in result.output
    said = json.loads(command("audit", "lab/model", "--json").output)
    assert [(fault["kind"], fault["steps"]) for fault in said["faults"]] == [("stale", [100, 200])]
    assert said["read"] == {"100": "bin", "200": "bin"}
    assert said["files"]["0"]["model.safetensors"]["bytes"] == 26
    assert commit("step0") not in json.dumps(said["files"])
