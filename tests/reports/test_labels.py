"""What a reader calls a series: every headline of every instrument has a name, elements and twins are told apart."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import xarray as xr

import devmon.instruments
from devmon.analysis.detection.events import Event
from devmon.analysis.labels import KNOWN, distinct, label_of
from devmon.analysis.reports.prose.words import amount, clause, joined, labels_of, naming
from devmon.analysis.run import ReadOnce
from devmon.analysis.series import Series
from devmon.analysis.wording import measured
from tests.support.synthetic import STEPS, Run, induction_run, watch


def headlines() -> set[str]:
    """All names in a `headline` of the instruments' sources."""
    found = set()
    for file in Path(devmon.instruments.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            given = isinstance(node, ast.keyword) and node.arg == "headline"
            if given or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "headline"):
                named = (c.value for c in ast.walk(node) if isinstance(c, ast.Constant))
                found |= {name for name in named if isinstance(name, str)}
    return found


def test_every_headline_of_an_instrument_has_a_label() -> None:
    assert len(headlines()) > 40
    assert headlines() <= {variable for _, variable in KNOWN}
    assert {kind for kind, _ in KNOWN} <= set(devmon.instruments.__all__)


def test_elements_and_maxima_have_names_of_their_own() -> None:
    data = induction_run()["induction"]
    assert label_of("induction", data, "prefix_matching", "max").short == "induction (best head)"
    assert label_of("induction", data, "prefix_matching", "layer=1, head=2").short == "induction (head 1.2)"
    assert label_of("induction", data, "prefix_matching", "max").long.startswith("best head: attention to the token")
    components = label_of("parts", xr.Dataset(attrs={"instrument": "x.RestrictedLLC"}), "llc", "layer 0 head 1")
    assert components.short == "λ̂ (layer 0 head 1)"


def test_a_watch_of_a_users_own_goes_by_what_it_says_of_itself() -> None:
    data = watch(STEPS, {"dead_share": STEPS * 1.0}, None, "Mine")
    data["dead_share"].attrs |= {"long_name": "share of dead neurons", "units": "share"}
    label = label_of("neurons", data, "dead_share")
    assert (label.short, label.long, label.unit) == ("neurons: dead share", "share of dead neurons", "")
    assert label_of("dead_share", data, "dead_share").short == "dead share"
    assert label_of("log", xr.Dataset(), "val_loss").short == "log: val loss"


def test_one_name_for_two_watches_has_the_watch_beside_it() -> None:
    run = induction_run()
    data = Run({"loss": run["loss"], "in_context": run["loss"], "a": run["induction"], "b": run["induction"]})
    names = ["loss/loss", "in_context/loss", "a/prefix_matching max", "b/prefix_matching max"]
    labels = labels_of(ReadOnce(data), [Series(name, STEPS, STEPS * 1.0) for name in names])
    assert [labels[name].short for name in names] == [
        "loss (loss)", "loss (in context)", "induction (best head, a)", "induction (best head, b)",
    ]  # fmt: skip
    assert distinct({"a/x": labels[names[0]]})["a/x"].short == "loss (loss)"


def sized(series: str, size: float, half: float, kind: str = "jump") -> Event:
    return Event(kind, 100, (90, 110), size, (size - half, size + half), None, None, 0.001, 0.01, True, "", series,
                 abrupt=True)  # fmt: skip


def test_clauses_have_the_digits_of_their_errors_and_share_a_verb() -> None:
    run = induction_run()
    series = [
        Series(name, STEPS, STEPS * 1.0) for name in ("induction/prefix_matching max", "repeat_gain/gain", "loss/loss")
    ]
    labels = labels_of(ReadOnce(run), series)
    up, more = sized("induction/prefix_matching max", 0.71234, 0.0329), sized("repeat_gain/gain", 3.2149, 0.1)
    down = sized("loss/loss", -0.3126, 0.004)
    assert amount(up, labels) == "0.71 of its attention"  # standard error .02
    assert clause(down, labels) == "loss falls by 0.313 nats per token"
    assert joined([up, more, down], labels) == (
        "induction (best head) rises by 0.71 of its attention, gain on repeats by 3.2 nats per token and "
        "loss falls by 0.31 nats per token"
    )
    assert clause(sized("loss/loss", 0.5, 0.01, "bump"), labels) == "loss has a bump of 0.500 nats per token"
    # the most telling change names the transition, whichever is larger; what goes the other way names nothing
    assert naming([down, more, up], labels) == (up, "learns induction")
    assert naming([down, more], labels)[1] == "learns to continue what it has seen before"
    assert naming([sized("loss/loss", 0.3, 0.01)], labels) == (None, "")


@pytest.mark.parametrize(("value", "se", "text"), [
    (-1.1081, 0.0231, "−1.11 ± 0.02"),
    (34.2, 5.13, "34 ± 5"),
    (1234.5, 150.0, "1230 ± 150"),
    (0.5, 0.014, "0.500 ± 0.014"),
    (2.5, None, "2.5"),
    (2.5, float("nan"), "2.5"),
    (2.5, 0.0, "2.5"),
    (float("nan"), 0.1, "–"),
    (1e12, 1e-9, "1000000000000 ± 1e−9"),
])  # fmt: skip
def test_a_value_has_the_digits_of_its_error(value: float, se: float | None, text: str) -> None:
    assert measured(value, se) == text
