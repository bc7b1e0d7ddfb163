"""How the house is built: no import circle, no arrow back up, folders and files of a size that can be read."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.support.rooms import (
    ANALYSIS,
    ROOT,
    arrows,
    back_arrows,
    circles,
    floors,
    imports,
    lengths,
    modules,
    own_faces,
    rooms,
)

MAX_LINES, MAX_FILES = 350, 20
ONE_KIND = {"devmon/instruments", "tests/instruments"}  # folders of many files of one kind

KNOWN = modules()


@cache
def graph() -> dict[str, set[str]]:
    return arrows(KNOWN)


def test_no_file_imports_itself_through_others() -> None:
    assert circles(graph()) == []


def test_the_rooms_stand_above_what_they_import_as_the_page_on_architecture_draws_them() -> None:
    between = rooms(KNOWN)
    assert circles(between) == []
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = [line.split() for line in page.split("```floors\n")[1].split("```")[0].splitlines()]
    assert drawn == floors(between)


def test_no_module_imports_the_face_of_its_own_package() -> None:
    assert own_faces(KNOWN) == []


def test_each_part_of_the_analysis_imports_only_what_stands_left_of_it() -> None:
    assert back_arrows(graph()) == []
    parts = {name.split(".")[2] for name in graph() if name.startswith("devmon.analysis.") and name.count(".") > 2}
    assert parts == set(ANALYSIS)  # a new part has a place in the order


def test_no_folder_holds_more_files_than_a_reader_can_take_in() -> None:
    folders: dict[str, int] = {}
    for name in lengths():
        folders[str(Path(name).parent)] = folders.get(str(Path(name).parent), 0) + 1
    assert {name: n for name, n in folders.items() if n > MAX_FILES and name not in ONE_KIND} == {}


def test_no_file_is_too_long() -> None:
    assert {name: n for name, n in lengths().items() if n > MAX_LINES} == {}


# ---- what the picture itself would miss ----


def test_a_circle_is_found_whatever_its_length_and_apart_from_what_hangs_on_it() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"c"}}) == [["c", "d"], ["a", "b"]]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


@pytest.mark.parametrize(("target", "back"), [("plots.style", True), ("derive.llc", False), ("series", False)])
def test_an_arrow_to_the_right_is_one_back(target: str, back: bool) -> None:
    graph = {"devmon.analysis.detection.events": {f"devmon.analysis.{target}"}, f"devmon.analysis.{target}": set()}
    assert bool(back_arrows(graph)) == back
    top = {"devmon.analysis.series": {"devmon.analysis.derive.llc"}, "devmon.analysis.derive.llc": set()}
    assert back_arrows(top) == ["devmon.analysis.series imports devmon.analysis.derive.llc"]


def test_an_import_inside_a_function_counts_and_one_for_types_does_not(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import for_types\n"
        "def f():\n    from lazy import name\n"
    )
    assert imports(path) == {"typing", "typing.TYPE_CHECKING", "lazy", "lazy.name"}
    assert imports(path, top_level=True) == {"typing", "typing.TYPE_CHECKING"}


def test_the_face_of_ones_own_package_is_told_from_a_module_in_it(tmp_path: Path) -> None:
    (tmp_path / "face.py").write_text("from devmon.own import Thing\n")
    (tmp_path / "module.py").write_text("from devmon.own import part\n")
    known = {"devmon.own": tmp_path / "__init__.py", "devmon.own.part": tmp_path / "part.py",
             "devmon.own.face": tmp_path / "face.py", "devmon.own.module": tmp_path / "module.py"}  # fmt: skip
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "part.py").write_text("")
    assert own_faces(known) == ["devmon.own.face imports devmon.own"]
