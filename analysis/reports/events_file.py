"""The events of a run as a table for a paper: LaTeX (booktabs), or CSV with every number."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from devmon.analysis.detection.events import Event
from devmon.analysis.reports.findings import Findings
from devmon.analysis.reports.prose.words import amount, called
from devmon.analysis.series import run_level
from devmon.analysis.wording import count, number, step
from devmon.errors import DataError
from devmon.files import write_whole

ENDINGS = (".tex", ".csv")
NAMED = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
ESCAPES = NAMED | {sign: f"\\{sign}" for sign in "&%$#_{}"}
MATHS = {"λ̂": r"$\hat{\lambda}$", "λ": r"$\lambda$", "−": "$-$", "±": r"$\pm$", "β": r"$\beta$", "γ": r"$\gamma$",
         "≤": r"$\le$", "≥": r"$\ge$", "→": r"$\to$", "·": r"$\cdot$", "‖": r"$\|$", "²": "$^2$", "σ": r"$\sigma$",
         "∞": r"$\infty$", "√": r"$\surd$", "×": r"$\times$"}  # fmt: skip


def write_events(findings: Findings, out: Path) -> Path:
    """The events of a run in the form that the ending names. Raises DataError for another ending.

    - .csv: a line an event, every series, with the numbers of `Detection.to_frame`, the `label` and `unit` of its
      series and the `transition` it is part of (1, 2, … in the order of steps); a series without an event has a line
      with its outcome
    - .tex: the events of the run's own series that stand (q ≤ 0.05) as a `table` of the package booktabs
    """
    if out.suffix not in ENDINGS:
        raise DataError(f"events are written as {' or '.join(ENDINGS)}, got {out.name!r}")
    text = latex(findings) if out.suffix == ".tex" else frame(findings).to_csv(index=False)
    write_whole(out, text.encode())
    return out


def frame(findings: Findings) -> pd.DataFrame:
    """One row an event, or a series without one, with what a reader calls it and the transition that it is part of."""
    table = findings.detection.to_frame()
    names = [str(name) for name in table["series"]]
    table.insert(1, "label", [called(findings.labels, name) for name in names])
    table.insert(2, "unit", [findings.labels[name].unit if name in findings.labels else "" for name in names])
    parts = {
        (event.series, event.step): number
        for number, change in enumerate(findings.transitions, 1)
        for event in change.events
    }
    places = zip(names, table["step"], strict=True)
    table["transition"] = pd.array([parts.get(place) for place in places], dtype="Int64")
    return table


def latex(findings: Findings) -> str:
    """The sure events of the whole run, in the order of steps; those of the main transition are marked."""
    events = [event for event in findings.events if event.sure and run_level(event.series)]
    main = () if findings.main is None else findings.main.events
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        "\\begin{tabular}{lllrr}",
        "\\toprule",
        "Series & Event & Step [90\\%] & Size & $q$ \\\\",
        "\\midrule",
        *(row(findings, event, event in main) for event in sorted(events, key=lambda event: event.step)),
        *([] if events else ["\\multicolumn{5}{l}{no event} \\\\"]),
        "\\bottomrule",
        "\\end{tabular}",
        f"\\caption{{{caption(findings, events)}}}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def row(findings: Findings, event: Event, main: bool) -> str:
    low, high = map(step, event.interval)
    name, word = called(findings.labels, event.series), event.word + ("" if event.resolved else "*")
    cells = [name, word, f"{step(event.step)} [{low}, {high}]", signed(findings, event), number(event.q_value, 2)]
    mark = "$^\\dagger$" if main else ""
    first, *rest = map(escaped, cells)
    return " & ".join([first + mark, *rest]) + " \\\\"


def signed(findings: Findings, event: Event) -> str:
    return ("−" if event.size < 0 else "") + amount(event, findings.labels)


def caption(findings: Findings, events: list[Event]) -> str:
    """What the table says without the text around it: what was searched, what intervals and q are, what marks mean."""
    searched = count(len(findings.detection.fits), "series", "series")
    among = f"{findings.detection.family} tests ({searched})"
    words = [f"Events with $q \\le 0.05$ among {among}; brackets: 90\\% intervals."]
    if findings.main is not None:
        words.append("$^\\dagger$ part of the main transition.")
    if any(not event.resolved for event in events):
        words.append("* fewer than three checkpoints within.")
    return " ".join(words)


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    text = re.sub(r"[\\&%$#_{}~^]", lambda match: ESCAPES[match[0]], text)
    for sign, command in MATHS.items():
        text = text.replace(sign, command)
    return text
