"""Any order of appends, crashes, resumptions, folds, second writers, copies: the store holds what a dict holds."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from devmon import IdentityError, Trajectory
from devmon.store.compact import compact

WHO = {"instrument": "a.B", "fields": {}, "fingerprint": "0", "doc": "Measures."}
NAMES = ("scalars", "trace")
names, steps, cuts = st.sampled_from(NAMES), st.integers(0, 9), st.floats(0, 1)
kills = st.sampled_from([1, 2, 3, 3, 4, 5, 7, 8, 12])  # 3 is between the two renames of a swap


class Killed(BaseException):
    pass


def row(name: str, value: float) -> xr.Dataset:
    """Rows whose value can be seen in each of their numbers; 0 and "" are fill values of Zarr."""
    if name == "scalars":
        return xr.Dataset({"value": ((), np.float64(value)), "word": ((), np.array("x" * int(value), dtype=object))})
    return xr.Dataset({"value": (("chain", "draw"), np.full((2, 3), value), {"units": "nats"})}, {"chain": [0, 1]})


class Store(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = Trajectory(self.folder / "run.zarr")
        for name in NAMES:
            self.store.declare(name, WHO)
        self.other = Trajectory(self.store.path)
        self.rows: dict[str, dict[int, int]] = {name: {} for name in NAMES}
        self.failed: dict[str, dict[int, str]] = {name: {} for name in NAMES}
        self.earlier: set[tuple[str, int, int]] = set()
        self.written = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # -- writing -----------------------------------------------------------------------------------------------------

    def write(self, store: Trajectory, name: str, step: int) -> int:
        self.written += 1
        store.append(name, step, row(name, self.written), weights=f"w{self.written}", seconds=self.written)
        return self.written

    @rule(name=names, step=steps, second=st.booleans())
    def append(self, name: str, step: int, second: bool) -> None:
        store = self.other if second else self.store
        if step in self.rows[name]:
            held = self.rows[name][step]
            store.append(name, step, row(name, -1.0), weights=f"w{held}")  # left as it is
            with pytest.raises(IdentityError):
                store.append(name, step, row(name, held), weights="other")
        else:
            self.rows[name][step] = self.write(store, name, step)
            self.failed[name].pop(step, None)

    @rule(name=names, step=steps)
    def fail(self, name: str, step: int) -> None:
        self.store.fail(name, step, f"no {step}")
        if step not in self.rows[name]:
            self.failed[name][step] = f"no {step}"

    @rule(second=st.booleans())
    def fold(self, second: bool) -> None:
        (self.other if second else self.store).fold()
        assert not (self.store.path / "_units").exists()

    @rule(after=steps)
    def resume(self, after: int) -> None:
        late = {(name, step, value) for name in NAMES for step, value in self.rows[name].items() if step > after}
        assert self.store.supersede(after) == len(late)
        self.gone(after, late)

    def gone(self, after: int, late: set[tuple[str, int, int]]) -> None:
        if late:  # else nothing is set aside, failures neither
            for name in {name for name, *_ in late}:
                self.failed[name] = {step: why for step, why in self.failed[name].items() if step <= after}
        for name, step, _ in late:
            del self.rows[name][step]
        self.earlier |= late

    # -- crashes -----------------------------------------------------------------------------------------------------

    @rule(name=names, step=steps, cut=cuts)
    def crash_in_an_append(self, name: str, step: int, cut: float) -> None:
        """The last record is cut at any byte: the writer never came back from `append`."""
        if step in self.rows[name]:
            return
        before = {path: path.stat().st_size for path in self.store.path.glob("_units/*/*.rows")}
        self.write(self.store, name, step)
        for path in self.store.path.glob("_units/*/*.rows"):
            old, new = before.get(path, 0), path.stat().st_size
            if new > old:
                os.truncate(path, old + int(cut * (new - old - 1)))
        self.reopen()

    @rule(at=kills)
    def crash_in_a_fold(self, at: int) -> None:
        self.killed(at, self.store.fold)
        self.reopen()

    @rule(at=kills, after=steps)
    def crash_in_a_resumption(self, at: int, after: int) -> None:
        late = {(name, step, value) for name in NAMES for step, value in self.rows[name].items() if step > after}
        self.killed(at, lambda: self.store.supersede(after))
        self.reopen()
        self.store.supersede(after)
        self.gone(after, late)

    @rule(name=names, at=kills)
    def crash_in_a_drop(self, name: str, at: int) -> None:
        self.killed(at, lambda: self.store.drop(name))
        self.reopen()
        if name in self.store:  # else the kill came too late
            self.store.drop(name)
        assert name not in self.store
        self.store.declare(name, WHO | {"fingerprint": "1"})  # another may measure under its name
        self.earlier |= {(name, step, value) for step, value in self.rows[name].items()}
        self.rows[name], self.failed[name] = {}, {}
        self.store.drop(name)
        self.store.declare(name, WHO)
        self.reopen()

    def killed(self, at: int, call: Callable[[], object]) -> None:
        """Die before the `at`-th rename or deletion."""
        count = 0

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **words: object) -> object:
                nonlocal count
                count += 1
                if count >= at:
                    raise Killed
                return real(*args, **words)

            return call

        real = counted(Path.unlink)

        def unlink(path: Path, *args: object, **words: object) -> object:
            return real(path, *args, **words)

        with (
            mock.patch.object(os, "rename", counted(os.rename)),
            mock.patch.object(os, "replace", counted(os.replace)),
            mock.patch.object(shutil, "rmtree", counted(shutil.rmtree)),
            mock.patch.object(Path, "unlink", unlink),
            contextlib.suppress(Killed),
        ):
            call()

    @rule()
    def reopen(self) -> None:
        self.store, self.other = Trajectory(self.store.path), Trajectory(self.store.path)

    # -- reading -----------------------------------------------------------------------------------------------------

    @rule()
    def copy(self) -> None:
        path = compact(self.store, self.folder / "copy.zarr")
        self.compare(Trajectory(path, "r"))
        shutil.rmtree(path)

    @invariant()
    def holds_what_the_dict_holds(self) -> None:
        for store in (self.store, self.other):
            self.compare(store)
        found = {
            (group.rsplit("/", 1)[1], int(step), int(weights[1:]))
            for group, rows in self.store.attempts().items()
            for step, weights in zip(rows["step"].values, rows["weights"].values, strict=True)
        }
        assert found == self.earlier

    def compare(self, store: Trajectory) -> None:
        for name, rows in self.rows.items():
            held = sorted(rows)
            dataset = store[name]
            assert dataset["step"].values.tolist() == store.steps(name) == held
            assert store.failures(name) == self.failed[name]
            if held:
                values = np.array([rows[step] for step in held], dtype=float)
                np.testing.assert_array_equal(dataset["value"].values.reshape(len(held), -1) - values[:, None], 0.0)
                assert dataset["weights"].values.tolist() == [f"w{rows[step]}" for step in held]
                assert dataset["seconds"].values.tolist() == values.tolist()
            for step in range(10):
                assert store.holds(name, step) == (step in rows)


TestStore = Store.TestCase
TestStore.settings = settings(
    max_examples=20,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("at", range(1, 20, 2))
def test_a_drop_killed_while_it_sets_rows_aside(at: int) -> None:
    machine = Store()
    for step in (1, 2):
        machine.append("scalars", step, second=False)
        machine.append("trace", step, second=False)
    machine.fold(second=False)
    machine.append("scalars", 3, second=True)
    machine.crash_in_a_drop("scalars", at)
    machine.holds_what_the_dict_holds()
    machine.append("scalars", 1, second=True)
    machine.holds_what_the_dict_holds()
    machine.teardown()


@pytest.mark.parametrize("at", range(1, 16))
def test_a_resumption_killed_while_it_sets_rows_aside(at: int) -> None:
    """At any of the files of the attempt: the rows are in the run until the next resumption has moved all of them."""
    machine = Store()
    machine.append("scalars", 1, second=False)
    machine.fold(second=False)
    machine.crash_in_a_resumption(at=at, after=0)
    machine.holds_what_the_dict_holds()
    machine.teardown()
