"""Damaged and foreign input: a DevmonError that says what to do, no traceback at the command line, the rest intact."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from devmon import StoreError, Trajectory, cli
from devmon.store import rows
from tests.support.store import flip, row, unit

Damage = Callable[[Path], object]


def patch(file: Callable[[Path], Path] | str, change: Callable[[bytes], bytes]) -> Damage:
    def do(path: Path) -> None:
        target = path / file if isinstance(file, str) else file(path)
        target.write_bytes(change(target.read_bytes()))

    return do


def attributes(file: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def do(data: bytes) -> bytes:
        node = json.loads(data)
        change(node["attributes"])
        return json.dumps(node).encode()

    return patch(file, do)


def instead(file: Callable[[Path], Path] | str, make: Callable[[Path], object]) -> Damage:
    """Take `file` away and put something else there."""

    def do(path: Path) -> None:
        target = path / file if isinstance(file, str) else file(path)
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        make(target)

    return do


def cut_to_one_row(path: Path) -> None:
    for node in path.glob("hurt/*/zarr.json"):
        node.write_text(json.dumps(json.loads(node.read_text()) | {"shape": [1]}))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


def a_pickle_in_a_row(data: bytes) -> bytes:
    """A whole record, with right checksums, whose header is a pickle."""
    bomb = pickle.dumps(Bomb())
    return data + b"".join(rows.record(bomb, []))


def a_row_of_objects(data: bytes) -> bytes:
    layout = json.dumps([[["total", [], [], "|O", {}]], [], {}]).encode()
    header = json.dumps({"step": 11, "weights": "w", "seconds": 0.0}).encode()
    return data + b"".join([*rows.record(b"", [layout]), *rows.record(header, [pickle.dumps(Bomb())[:8].ljust(8)])])


def loop(target: Path) -> None:
    target.symlink_to(target)


HURT = {  # the watch `hurt` is damaged, `fine` is not
    "the first record's length": (patch(unit, flip(5)), "is damaged at byte 0"),
    "the first record's mark": (patch(unit, flip(0)), "is damaged at byte 0"),
    "a layout's checksum": (patch(unit, flip(rows.HEAD.size + 4)), "a layout has a wrong checksum"),
    "a row's numbers": (patch(unit, lambda data: data[:-12] + b"x" * 12), "step 9 has a wrong checksum"),
    "foreign bytes after the rows": (patch(unit, lambda data: data + b"thesis" * 20), "this is no record of devmon"),
    "a text file as a unit": (patch(unit, lambda _: b"hello, world; this is a text, and a long one"), "truncate -s 0"),
    "a pickle as a unit": (patch(unit, lambda _: pickle.dumps([Bomb()] * 9)), "this is no record of devmon"),
    "a pickle in a row": (patch(unit, a_pickle_in_a_row), "a header is not readable"),
    "a row of Python objects": (patch(unit, a_row_of_objects), "a layout is not readable"),
    "a row without its step": (patch(unit, lambda d: d + b"".join(rows.record(b"{}", []))), "a header is not readable"),
    "a header that is a list": (
        patch(unit, lambda d: d + b"".join(rows.record(b"[]", []))),
        "a header is not readable",
    ),
    "a unit of an earlier devmon": (lambda p: (p / "_units/hurt/000000000007.npz").write_bytes(b""), "earlier devmon"),
    "a folder as a unit": (instead(unit, Path.mkdir), "cannot read"),
    "a symlink loop as a unit": (instead(unit, loop), "cannot read"),
    "a file as the folder of units": (instead("_units/hurt", Path.touch), "should be a folder"),
    "a symlink loop as the folder of units": (instead("_units/hurt", loop), "should be a folder"),
    "a truncated zarr.json of a watch": (patch("hurt/zarr.json", lambda d: d[: len(d) // 2]), "restore it"),
    "an empty zarr.json of a watch": (patch("hurt/zarr.json", lambda _: b""), "restore it"),
    "a list as zarr.json": (patch("hurt/zarr.json", lambda _: b"[]"), "restore it"),
    "an array as zarr.json of a watch": (
        patch("hurt/zarr.json", lambda d: d.replace(b'"group"', b'"array"')),
        "no Zarr v3 group",
    ),
    "a watch of Zarr v2": (
        patch("hurt/zarr.json", lambda d: d.replace(b'"zarr_format": 3', b'"zarr_format": 2')),
        "no Zarr v3 group",
    ),
    "a watch without metadata": (attributes("hurt/zarr.json", dict.clear), "says no instrument"),
    "a truncated zarr.json of an array": (
        patch("hurt/total/zarr.json", lambda d: d[: len(d) // 2]),
        "restore it from a copy",
    ),
    "a truncated chunk": (patch("hurt/total/c/0", lambda d: d[: len(d) // 2]), "hurt/total/c/0 is damaged"),
    "another chunk": (patch("hurt/total/c/0", lambda _: b"thesis"), "hurt/total/c/0 is damaged"),
    "an empty chunk": (patch("hurt/total/c/0", lambda _: b""), "hurt/total/c/0 is damaged"),
    "a bit of a chunk": (patch("hurt/verdict/c/0", flip(-9)), "hurt/verdict/c/0 is damaged"),
    "a chunk that is gone": (lambda p: (p / "hurt/total/c/0").unlink(), "hurt/total/c/0 is gone"),
    "a chunk of steps that is gone": (lambda p: (p / "hurt/step/c/0").unlink(), "hurt/step/c/0 is gone"),
    "a variable that is gone": (lambda p: shutil.rmtree(p / "hurt" / "total"), "hurt holds no total any more"),
    "steps that are gone": (lambda p: shutil.rmtree(p / "hurt" / "step"), "hurt holds no step any more"),
    "arrays that are all gone": (
        lambda p: [shutil.rmtree(f) for f in (p / "hurt").iterdir() if f.is_dir()],
        "holds no",
    ),
    "fewer rows than were written": (cut_to_one_row, "hurt holds 1 rows, 2 were written"),
    "an array of steps that is gone": (instead("hurt/step/zarr.json", lambda _: None), "restore it from a copy"),
    "weights that are gone": (lambda p: shutil.rmtree(p / "hurt" / "weights"), "restore it from a copy"),
}
RUN = {  # the run as a whole cannot be opened
    "a truncated zarr.json": (patch("zarr.json", lambda d: d[: len(d) // 2]), "cannot be read"),
    "a binary zarr.json": (patch("zarr.json", lambda _: b"\xff\xfe\x00"), "cannot be read"),
    "a deep zarr.json": (patch("zarr.json", lambda _: b"[" * 100_000), "cannot be read"),
    "no zarr.json": (lambda p: (p / "zarr.json").unlink(), "there is no trajectory at"),
    "a folder as zarr.json": (instead("zarr.json", Path.mkdir), "there is no trajectory at"),
    "a symlink loop as zarr.json": (instead("zarr.json", loop), "there is no trajectory at"),
    "attributes that are a list": (
        patch("zarr.json", lambda _: b'{"zarr_format": 3, "node_type": "group", "attributes": []}'),
        "cannot be read",
    ),
    "no metadata of devmon": (attributes("zarr.json", dict.clear), "no trajectory of devmon"),
    "no run_id": (attributes("zarr.json", lambda a: a.pop("run_id")), "says no run_id"),
    "no seed": (attributes("zarr.json", lambda a: a.pop("seed")), "says no seed"),
    "a newer schema": (attributes("zarr.json", lambda a: a.update(schema=99)), "install devmon >="),
    "a newer schema without versions": (
        attributes("zarr.json", lambda a: (a.update(schema=99), a.pop("versions"))),
        "install devmon",
    ),
    "a schema in words": (attributes("zarr.json", lambda a: a.update(schema="two")), "has schema two"),
}


def at_the_command_line(*words: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.argv", ["devmon", *map(str, words)])
    with pytest.raises(SystemExit) as stop:  # anything else is a traceback
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 1, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("case", HURT)
def test_a_damaged_watch_is_named_and_the_others_stay(
    path: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, said = HURT[case]
    damage(path)
    assert said in at_the_command_line("show", path, capsys=capsys, monkeypatch=monkeypatch)
    for words in (["export", path, "-o", path.parent / "x.csv"], ["compact", path]):
        assert said in at_the_command_line(*words, capsys=capsys, monkeypatch=monkeypatch)
    store = Trajectory(path)
    with pytest.raises(StoreError) as error:
        _ = store["hurt"]
    assert said in str(error.value)
    store.append("fine", 11, row(11.0), weights="w11")
    assert Trajectory(path)["fine"]["total"].values.tolist() == [0.0, 5.0, 7.0, 9.0, 11.0]


@pytest.mark.parametrize("case", RUN)
def test_a_damaged_run_is_named(
    path: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, said = RUN[case]
    kept = (path / "zarr.json").read_bytes()
    damage(path)
    assert said in at_the_command_line("show", path, capsys=capsys, monkeypatch=monkeypatch)
    with pytest.raises(StoreError):
        Trajectory(path)  # and it is not made afresh over the rows
    target = path / "zarr.json"
    target.rmdir() if target.is_dir() else target.unlink(missing_ok=True)
    target.write_bytes(kept)
    assert Trajectory(path)["hurt"]["total"].values.tolist() == [0.0, 5.0, 7.0, 9.0]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda p: None, "there is no trajectory at"),
        (lambda p: p.write_text("thesis"), "there is no trajectory at"),
        (loop, "there is no trajectory at"),
        (lambda p: (p.mkdir(), (p / "thesis.tex").write_text("…")), "there is no trajectory at"),
        (
            lambda p: xr.Dataset({"a": ("x", [1.0])}).to_zarr(p, zarr_format=3, consolidated=False),
            "no trajectory of devmon",
        ),
    ],
    ids=["nothing", "a file", "a symlink loop", "another folder", "another Zarr group"],
)
def test_what_is_no_run_is_told_and_left_alone(
    tmp_path: Path, make: Damage, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "x"
    make(place)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert said in at_the_command_line("show", place, capsys=capsys, monkeypatch=monkeypatch)
    if before:
        with pytest.raises(StoreError):
            Trajectory(place)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
