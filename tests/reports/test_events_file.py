"""The events of a run as a table for a paper."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from devmon.analysis.reports.events_file import escaped, frame, latex, write_events
from devmon.analysis.reports.findings import Findings, examine
from devmon.cli.root import app
from devmon.errors import DataError
from tests.support.reports import detection, jump, small_run
from tests.support.stored_run import STORED


def found(*events: object, outcomes: dict[str, str] | None = None) -> Findings:
    return examine(small_run(), detection=detection(*events, outcomes=outcomes))  # type: ignore[arg-type]


EVENTS = (jump("llc/llc", 640), jump("loss/loss", 630), jump("induction/prefix_matching max", 900, q=0.4))


def test_the_latex_table_has_the_events_that_stand_in_the_order_of_steps_by_name() -> None:
    text = latex(found(*EVENTS))
    rows = [line.split(" & ") for line in text.splitlines() if line.count(" & ") == 4][1:]
    assert [row[2] for row in rows] == ["630 [625, 635]", "640 [635, 645]"]
    assert rows[0][0].startswith("loss")
    assert rows[1][0].startswith(r"$\hat{\lambda}$")
    assert all(row[4] == r"0.01 \\" for row in rows)
    assert "among 40 tests (3 series)" in text
    assert text.count("{") == text.count("}")
    assert text.isascii()


def test_events_of_the_main_transition_are_marked_and_no_event_is_a_result() -> None:
    both = found(*EVENTS)
    assert both.main is not None
    assert latex(both).count(r"$^\dagger$ ") == 3  # two rows and the caption
    none = latex(found(outcomes={"loss/loss": "NO EVENT"}))
    assert r"\multicolumn{5}{l}{no event} \\" in none
    assert "dagger" not in none


def test_what_latex_takes_for_commands_is_escaped() -> None:
    assert escaped("50% of a_b & {c} #1 $x$ ~ ^ \\") == (
        r"50\% of a\_b \& \{c\} \#1 \$x\$ \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )
    assert escaped("λ̂ ± 2") == r"$\hat{\lambda}$ $\pm$ 2"


def test_the_csv_has_every_series_with_its_label_unit_and_transition(tmp_path: Path) -> None:
    out = write_events(found(*EVENTS, outcomes={"loss/icl_score": "UNRESOLVED"}), tmp_path / "events.csv")
    table = pd.read_csv(out)
    assert list(table["series"]) == ["llc/llc", "loss/loss", "induction/prefix_matching max", "loss/icl_score"]
    assert list(table["step"][:3]) == [640, 630, 900]
    assert list(table["transition"][:2]) == [1, 1]
    assert table["transition"][2:].isna().all()
    assert table["outcome"][3] == "UNRESOLVED"
    assert "nats" in table["unit"][1]
    assert frame(found())["series"].empty


def test_the_command_writes_both_and_refuses_what_has_no_events(tmp_path: Path) -> None:
    def command(*arguments: object) -> tuple[int, str]:
        said = CliRunner().invoke(app, ["export", str(STORED), *map(str, arguments)])
        return said.exit_code, said.output + str(said.exception)

    out = tmp_path / "table.tex"
    assert command("-o", out)[0] == 0
    assert re.search(r"\\begin\{tabular\}\{lllrr\}(.|\n)*no event", out.read_text())
    assert command("--events", "-o", tmp_path / "events.csv")[0] == 0
    assert len(pd.read_csv(tmp_path / "events.csv")) > 20
    code, said = command("--events", "-o", tmp_path / "x.nc")
    assert code == 1
    assert "events are written as .tex or .csv" in said
    assert "--watch does not go with events" in command("--watch", "loss", "-o", out)[1]
    with pytest.raises(DataError, match="got 'a.md'"):
        write_events(found(), tmp_path / "a.md")
