"""The atomic writer: a file is there whole or not at all, and nothing is left beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from devmon import StoreError
from devmon.files import aside, refuse_existing, write_whole


def test_a_file_is_replaced_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "report.html"
    write_whole(file, b"old")
    write_whole(file, b"the new one")
    assert file.read_bytes() == b"the new one"
    assert [path.name for path in file.parent.iterdir()] == ["report.html"]


def test_the_old_file_is_there_until_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, order, replace, fsync = tmp_path / "x", [], os.replace, os.fsync
    write_whole(file, b"old")

    def renamed(source: Path, target: Path) -> None:
        order.append(("renamed", file.read_bytes(), Path(source).read_bytes()))
        replace(source, target)

    def flushed(number: int) -> None:
        order.append(("flushed", file.read_bytes()))
        fsync(number)

    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "fsync", flushed)
    write_whole(file, b"new")
    assert order == [("flushed", b"old"), ("renamed", b"old", b"new")]


def write_half(path: Path, kind: str, error: BaseException) -> None:
    with aside(path) as fresh:
        assert fresh.suffix == path.suffix  # by which some writers know the form
        if kind == "folder":
            fresh.mkdir()
        (fresh / "part" if kind == "folder" else fresh).write_bytes(b"half")
        raise error


@pytest.mark.parametrize(
    "error, told",
    [(OSError(28, "no room"), StoreError), (KeyError("x"), KeyError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_fails_in_the_middle_leaves_the_old_and_no_litter(
    tmp_path: Path, kind: str, error: BaseException, told: type[BaseException]
) -> None:
    path = tmp_path / "run.csv"
    path.write_bytes(b"old")
    with pytest.raises(told):
        write_half(path, kind, error)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["run.csv"]


def test_a_folder_or_a_link_is_refused_where_it_would_be_taken_away(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"")
    for name in ("folder", "link"):
        with pytest.raises(StoreError, match=f"{name} exists: give the name of a new"):
            refuse_existing(tmp_path / name)
    refuse_existing(tmp_path / "file")
    refuse_existing(tmp_path / "nothing")
