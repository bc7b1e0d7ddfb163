"""docs/families.md: what every instrument does with every family, as the contract tests run them.

python -m tests.anatomy.families_page          # measure, and write the page
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import numpy as np

from devmon import presets
from devmon.errors import DataError, InstrumentError
from devmon.monitoring.observe import attempt
from devmon.snapshot import Snapshot
from devmon.testing.contract import headlines
from tests.anatomy.families import CONFIGS, ENCODERS, MASKED, OTHERS, PYRAMIDS, TWO_STACKS, VISION
from tests.anatomy.test_anatomy_sites import VOCAB
from tests.instruments.test_instruments_families import INSTRUMENTS, TEXT, instrument_of, model_of, of_images

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
ALSO = (
    "apertus", "biogpt", "ctrl", "falcon, by group, one norm", "glm4", "mpt", "persimmon", "vaultgemma", "xglm",
)  # fmt: skip
RUNS, REFUSES, FLAT, RAW = "yes", "–", "NaN", "raw error"
GROUPS = {
    "Language models": [
        name
        for name in (*CONFIGS, *OTHERS)
        if name not in (*MASKED, *VISION, *ENCODERS, *PYRAMIDS, *TWO_STACKS, "beit", "clip, both towers")
    ],
    "Encoders of text": [*MASKED, *ENCODERS],
    "Encoders of images": [*VISION, "beit", *PYRAMIDS],
    "Encoder–decoders, two towers": [*TWO_STACKS, "clip, both towers"],
}


def outcome(case_name: str, family: str) -> str:
    """What an instrument does with a family: runs, runs with NaN for a reason, or refuses in a line."""
    case = next(case for case in INSTRUMENTS if case.name == case_name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = instrument_of(case, family)(Snapshot(0, model_of(family)))
    except (InstrumentError, DataError):
        return REFUSES
    except Exception as error:  # named, so that one does not hide the others
        sys.stderr.write(f"RAW {family} {case_name} {type(error).__name__}: {str(error)[:200]}\n")
        return RAW
    return RUNS if all(np.isfinite(found[key].values).any() for key in headlines(found)) else FLAT


def left_out(family: str) -> list[str]:
    """Watches of `presets.standard` that do not fit a family: what a monitor refuses at once, before training."""
    return list(attempt(0, model_of(family), presets.standard(TEXT, last=10, vocab_size=VOCAB), {}))


def page(outcomes: dict[str, dict[str, str]], preset: dict[str, list[str]]) -> str:
    """The page from outcomes by family and instrument, and what the standard preset has to leave out of each."""
    names = list(dict.fromkeys(case.name for case in INSTRUMENTS))
    lines = [HEAD.format(also="; ".join(ALSO))]
    for title, families in GROUPS.items():
        lines += [f"## {title}", "", "| family | runs | refused in one line |", "|---|---|---|"]
        for family in families:
            row = outcomes[family]
            runs = [name for name in names if row[name] != REFUSES]
            rest = [name for name in names if row[name] == REFUSES]
            counted = "all" if not rest else "none" if not runs else ", ".join(runs)
            lines.append(f"| {family} | {counted} | {', '.join(rest) if runs else 'all'} |")
        lines.append("")
    lines += [PRESET, "| families | left out |", "|---|---|"]
    for missing in dict.fromkeys(map(tuple, preset.values())):
        alike = [family for family, names in preset.items() if tuple(names) == missing]
        lines.append(f"| {'; '.join(alike)} | {', '.join(missing) if missing else 'nothing'} |")
    return "\n".join(lines) + "\n"


HEAD = """# Which instrument reads which family

Made by `python -m tests.anatomy.families_page` from tiny random models of each family of transformers, and held by
`tests/instruments/test_families_page.py`. An instrument runs on a family, or refuses it in one line that says what it
lacks; there is no third way: layouts, known, guessed or declared, are tried on the model before they are believed
(`devmon.anatomy.fit`), and weights are what the modules compute, whatever adapter or packing they have
(`devmon.anatomy.linear`). Not in the table, as they need no parts of a model: `LLC`, `Curvature`,
`GradientStatistics` and `ModelCode` (any loss), `NeuralCollapse` (any classifier), `ReferenceDrift` (two models of one
form), `RestrictedLoss` and `FourierSpectrum` (addition modulo p).

A model of your own is a row of its own: `anatomy = Layout(...)` (`devmon.anatomy.Layout`) says where its parts are, and
`devmon anatomy script.py:model` writes that line ([your_model.md](your_model.md)).
What a layout cannot say is refused: streams that are multiplied, gated or branched (Granite, DiffLlama, Bloom with its
residual from the norm), and stacks in which some layers do not attend (Qwen3-Next, Jamba, RecurrentGemma, MiniMax).
Attention, losses and representations of these are read all the same, and `layer` is the index of the block.

Known too, put together in `tests/anatomy/test_known_layouts.py` and without a row here: {also}.
"""

PRESET = """## The standard preset

`presets.standard` on each family of text: a monitor tries all of it on the first batch, and refuses once, before
training, with the list of watches to leave out and the line that does so; the others run.
`presets.full` adds what causes what: about 50 forward passes at a fifth of the steps and 45 (circuit, tuned lens) at a
twelfth, over a run two and a half times the standard one (`devmon cost` tells it for a model).
"""


def main() -> None:
    outcomes = {}
    for families in GROUPS.values():
        for family in families:
            outcomes[family] = {case.name: outcome(case.name, family) for case in INSTRUMENTS}
            sys.stderr.write(f"{family}: {' '.join(f'{k}={v}' for k, v in outcomes[family].items())}\n")
    preset = {family: left_out(family) for families in GROUPS.values() for family in families if not of_images(family)}
    PAGE.write_text(page(outcomes, preset), encoding="utf-8")


if __name__ == "__main__":
    importlib.invalidate_caches()
    main()
