"""Identity knows what matters: the same in other words is accepted and recorded, another configuration is refused."""

from __future__ import annotations

import functools
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr

from devmon import IdentityError, LoopMonitor, Snapshot, Trajectory, Watch, every
from devmon.monitoring.fingerprint import describe, identity
from devmon.store.same import said_otherwise


@dataclass(frozen=True)
class Probe:
    value: Any

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        return xr.Dataset({"step": ((), 1.0)}).rename(step="one")


LOSS = '''
"""A module."""
import math
SCALE = {scale}

def helper(x):
    return {helper} * x

def loss(model, batch, power={power}):
    """{doc}"""
    return SCALE * helper(math.sqrt(batch)) ** power  # {doc}
'''


def module(tmp_path: Path, name: str, **changes: object) -> types.ModuleType:
    """A module of the user's, which holds a loss."""
    text = LOSS.format(**({"scale": 2, "helper": 3, "power": 1, "doc": "as before"} | changes))
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    made = types.ModuleType(name)
    sys.modules[name] = made
    exec(compile(text, str(path), "exec"), made.__dict__)
    return made


def nested(value: Any) -> Any:
    return {"losses": [value, 1.0], "n": 3}


CASES: dict[str, tuple[Any, Any, bool]] = {
    "whole numbers": (100, 100.0, True),
    "a number in a list": ([1, 2.5, "x"], [1.0, 2.5, "x"], True),
    "a number in a mapping": ({"lr": 1e3}, {"lr": 1000}, True),
    "a large number": (1e16, 10**16, True),
    "minus": (-4.0, -4, True),
    "another number": (100, 100.5, False),
    "a close number": (1e-3, 1.0000001e-3, False),
    "text is no number": ("100", "100.0", False),
    "text and a number": ("100", 100, False),
    "a flag is no number": (True, 1, False),
    "none is no zero": (None, 0.0, False),
    "part of a name": ("step1.0", "step1", False),
    "data": (torch.zeros(2), torch.zeros(2, dtype=torch.float64), False),
    "weights": (torch.zeros(2), torch.ones(2), False),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_in_other_words(case: str) -> None:
    old, new, same = CASES[case]
    for a, b in ((old, new), (new, old), (nested(old), nested(new))):
        assert (said_otherwise(identity(Probe(a)), identity(Probe(b))) is not None) == same, (a, b)


MOVES: dict[str, tuple[dict[str, object], bool]] = {
    "moved": ({}, True),
    "moved, with other comments": ({"doc": "said anew"}, True),
    "another constant": ({"scale": 5}, False),
    "another helper of the same name": ({"helper": 4}, False),
    "another default": ({"power": 2}, False),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_function_that_was_moved_to_another_module(move: str, tmp_path: Path) -> None:
    changes, same = MOVES[move]
    old, new = module(tmp_path, "losses_before"), module(tmp_path, "losses_after", **changes)
    pairs = [(old.loss, new.loss), (nested(old.loss), nested(new.loss)), (Probe(old.loss), Probe(new.loss))]
    pairs += [(functools.partial(old.loss, power=2), functools.partial(new.loss, power=2))]
    for a, b in pairs:
        assert (said_otherwise(identity(Probe(a)), identity(Probe(b))) is not None) == same, (a, b)
    # An instrument that is a function itself, and one without recorded code, of an earlier version.
    assert (said_otherwise(identity(old.loss), identity(new.loss)) is not None) == same
    earlier = {key: value for key, value in identity(Probe(old.loss)).items() if key != "code"}
    assert said_otherwise(earlier, identity(Probe(new.loss))) is None


def test_a_function_in_its_place_is_known_by_its_name_as_before(tmp_path: Path) -> None:
    old = identity(Probe(module(tmp_path, "losses_here").loss))
    new = identity(Probe(module(tmp_path, "losses_here", scale=9).loss))
    assert old["fingerprint"] == new["fingerprint"]
    assert old["code"] != new["code"]


def test_what_a_partial_function_holds_counts() -> None:
    one, other = (functools.partial(torch.sum, dim=dim) for dim in (0, 1))
    assert identity(Probe(one))["fingerprint"] != identity(Probe(other))["fingerprint"]
    assert said_otherwise(identity(Probe(one)), identity(Probe(other))) is None
    stored = identity(Probe(one)) | {"fields": {"value": "functools.partial"}}  # of an earlier version
    assert said_otherwise(stored, identity(Probe(one))) is not None
    assert describe(one).endswith(", dim=0)")


def train(run: Path, value: Any, steps: range) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    with LoopMonitor(
        run, [Watch("probe", Probe(value), every(1)), Watch("late", Probe(value), every(9, start=9))]
    ) as m:
        for step in steps:
            m.step(step, model)


def test_a_run_goes_on_and_says_what_it_accepted(tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    old, new = module(tmp_path, "run_before").loss, module(tmp_path, "run_after").loss
    train(run, [100, old], range(2))
    Trajectory(run).fold()  # which keeps the digests of the code
    train(run, [100.0, new], range(1, 3))
    train(run, [100, old], range(2, 4))
    store = Trajectory(run)
    assert store.steps("probe") == [0, 1, 2, 3]
    (accepted,) = store["probe"].attrs["accepted"].values()
    assert accepted == {"value": ["[100, run_before.loss]", "[100.0, run_after.loss]"]}

    # A watch without a row gives way to any configuration; one with rows does not, whatever was accepted before.
    store.declare("late", identity(Probe(7)))
    train(run, [100, old], range(3, 5))
    with pytest.raises(IdentityError, match=r"'probe' of another configuration \(value: stored \[100, run_before"):
        train(run, [101, old], range(4, 6))
