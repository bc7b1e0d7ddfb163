"""Recall of what anyone sees on labelled curves, and the events too many, of the detector and of what others would use.

    python benchmarks/curves.py                     # benchmarks/curves/*.csv with benchmarks/curves/labels.json
    python benchmarks/curves.py FOLDER --out FILE   # curves of one's own
    python benchmarks/curves.py --figure docs/curves.png   # every curve with its events and labels, nothing scored

Each curve is `NAME.csv`, a header and then step,value a row. `labels.json` holds for each NAME two lists, `must`
(what anyone sees) and `may` (what a reader may or may not name), of [kinds, from, to]: kinds are of turn, jump (a
rise or fall), plateau and bump, separated by commas, and the event lies between two steps. Each event counts for one
label; those left over are too many. Baselines name no kinds: theirs count wherever they lie within a label.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from detection_baselines import BASELINES

from devmon.analysis.detection.detector import Detector
from devmon.analysis.series import Array

Label = tuple[str, float, float]
Found = tuple[str, float]  # kind ("" where none is named) and step


def matched(found: Iterable[Found], must: list[Label], may: list[Label]) -> tuple[int, int]:
    """How many of `must` are found, and how many events are left over.

    >>> matched([("turn", 100), ("jump", 300), ("jump", 900)], [("turn,bump", 90, 110)], [("jump", 200, 400)])
    (1, 1)
    """
    left = list(found)
    hits = 0
    for number, (kinds, low, high) in enumerate([*must, *may]):
        fits = [one for one in left if one[0] in ("", *kinds.split(",")) and low <= one[1] <= high]
        if fits:
            hits += number < len(must)
            left.remove(fits[0])
    return hits, len(left)


def read(folder: Path) -> dict[str, tuple[Array, Array, list[Label], list[Label]]]:
    """Steps, values and labels of every curve of a folder."""
    curves = {}
    for name, label in json.loads((folder / "labels.json").read_text(encoding="utf-8")).items():
        steps, values = np.loadtxt(folder / f"{name}.csv", delimiter=",", skiprows=1, unpack=True)
        must, may = (
            [(str(kinds), float(low), float(high)) for kinds, low, high in label[key]] for key in ("must", "may")
        )
        curves[name] = steps, values, must, may
    return curves


def score(folder: Path) -> dict[str, Any]:
    """Recall and events too many a curve for each way of search, and what the detector finds in each curve."""
    totals = {name: np.zeros(3, dtype=int) for name in ("devmon", *BASELINES)}
    each: dict[str, Any] = {}
    curves = read(folder)
    for name, (steps, values, must, may) in curves.items():
        events = Detector().fit(steps, values).events()
        hits, extra = matched([(event.kind, event.step) for event in events], must, may)
        totals["devmon"] += hits, len(must), extra
        each[name] = {"found": hits, "of": len(must), "too many": extra,
                      "events": [f"{event.word} at {event.step:.0f}" for event in events]}  # fmt: skip
        print(name, each[name], flush=True)
        for other, search in BASELINES.items():
            hits, extra = matched([("", step) for step in search(steps, values, 1.0)], must, may)
            totals[other] += hits, len(must), extra
    summary = {
        name: {
            "recall": round(float(hits / max(asked, 1)), 3),
            "too many a curve": round(float(extra / len(curves)), 2),
        }
        for name, (hits, asked, extra) in totals.items()
    }
    return {"summary": summary, "curves": each}


def figure(folder: Path, path: Path) -> None:
    """Every curve with the events that the detector finds; shaded are the labels, darker what must be found."""
    from matplotlib.figure import Figure

    colours = {"jump": "tab:red", "turn": "tab:blue", "plateau": "tab:green", "bump": "tab:purple"}
    curves = read(folder)
    page = Figure(figsize=(16, 2.6 * -(-len(curves) // 4)), layout="constrained")
    panels = page.subplots(-(-len(curves) // 4), 4, squeeze=False).ravel()
    for ax in panels[len(curves) :]:
        ax.set_visible(False)
    for ax, (name, (steps, values, must, may)) in zip(panels, curves.items(), strict=False):
        first = steps[steps > 0][0]  # a place for step 0: log(step + first), as the detector sees it
        ax.plot(steps + first, values, "k.-", lw=0.6, ms=2.5)
        for labels, shade in ((must, 0.25), (may, 0.08)):
            for _, low, high in labels:
                ax.axvspan(low + first, high + first, color="orange", alpha=shade, lw=0)
        for event in Detector().fit(steps, values).events():
            low, high = event.interval
            ax.axvspan(low + first, high + first, color=colours[event.kind], alpha=0.2, lw=0)
            ax.axvline(event.step + first, color=colours[event.kind], lw=1.2)
            ax.annotate(event.word, (event.step + first, 0.97), xycoords=("data", "axes fraction"), fontsize=6,
                        rotation=90, va="top", ha="right", color=colours[event.kind])  # fmt: skip
        ax.set_xscale("log")
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=6)
    page.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "curves")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if options.figure:
        figure(options.folder, options.figure)
        return
    result = score(options.folder)
    for name, row in result["summary"].items():
        print(f"{name:20s} recall {row['recall']:.2f}, too many {row['too many a curve']:.2f} a curve")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
