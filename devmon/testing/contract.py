"""What every instrument owes its users, as tests to inherit."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Mapping

import numpy as np
import torch
import xarray as xr

from devmon.monitoring.isolation import HOOKS, isolated
from devmon.monitoring.observe import observe
from devmon.snapshot import Divisible, Instrument, Snapshot
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch

ROUNDING = 1e-6  # of the largest value: some roundings of float32, in which replicates are kept


class InstrumentContract:
    """Subclass it, name the subclass Test..., define `instrument` and `model`, and pytest runs these tests.

    `without_error` maps a headline variable that has no standard error to the reason why.

    >>> from devmon.instruments import InductionHeads
    >>> from devmon.testing import even
    >>> class TestMine(InstrumentContract):
    ...     def instrument(self):
    ...         return InductionHeads(vocab_size=50, length=16)
    ...
    ...     def model(self, seed):
    ...         return even(vocab_size=50, length=16)
    """

    without_error: Mapping[str, str] = {}

    def instrument(self) -> Instrument:
        """The instrument under test, configured anew at each call."""
        raise NotImplementedError("define instrument(self) -> Instrument")

    def model(self, seed: int) -> torch.nn.Module:
        """A small model that the instrument can measure; another seed gives other weights of the same architecture."""
        raise NotImplementedError("define model(self, seed) -> torch.nn.Module")

    def measure(self, model: torch.nn.Module) -> xr.Dataset:
        return self.instrument()(Snapshot(step=3, model=model, seed=7))

    def test_the_same_weights_give_the_same_numbers(self) -> None:
        model = self.model(0).eval()
        first, again, twin = self.measure(model), self.measure(model), self.measure(copy.deepcopy(model))
        xr.testing.assert_identical(first, again)
        xr.testing.assert_identical(first, twin)

    def test_the_step_does_not_matter(self) -> None:
        model, instrument = self.model(0).eval(), self.instrument()
        xr.testing.assert_identical(instrument(Snapshot(0, model, 7)), instrument(Snapshot(900, model, 7)))

    def test_other_weights_give_other_numbers(self) -> None:
        one, two = (self.measure(self.model(seed).eval()) for seed in (0, 1))
        headline = headlines(one)
        assert any(not np.array_equal(one[name], two[name], equal_nan=True) for name in headline), (
            f"{headline} do not change with the weights"
        )

    def test_the_model_is_untouched(self) -> None:
        model = self.model(0).eval()
        before = state(model)
        self.measure(model)
        after = state(model)
        changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
        assert not changed, f"the instrument changed {sorted(changed)} of the model"

    def test_frozen_parameters_give_the_same_numbers(self) -> None:
        model = self.model(0).eval()
        free = self.measure(model)
        frozen = self.measure(model.requires_grad_(False))  # some processors round otherwise where no gradient is kept
        xr.testing.assert_allclose(free, frozen, rtol=1e-5, atol=1e-6)

    def test_global_randomness_is_neither_used_nor_moved(self) -> None:
        model = self.model(0).eval()
        results = []
        for seed in (1, 2):
            with isolated():
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                random.seed(seed)
                before = randomness()
                results.append(self.measure(model))
                assert randomness() == before, "the instrument moved a global random state: use snapshot.generator(...)"
        xr.testing.assert_identical(*results)

    def test_process_wide_switches_come_back(self) -> None:
        model = self.model(0).eval()
        before = switches()
        self.measure(model)
        assert switches() == before

    def test_variables_and_dimensions_do_not_depend_on_the_weights(self) -> None:
        one, two = (self.measure(self.model(seed).eval()) for seed in (0, 1))
        assert dict(one.sizes) == dict(two.sizes)
        assert {name: (v.dims, v.dtype) for name, v in one.variables.items()} == {
            name: (v.dims, v.dtype) for name, v in two.variables.items()
        }
        assert headlines(one) == headlines(two)
        for name in one.coords:
            np.testing.assert_array_equal(one[name], two[name])

    def test_every_dimension_has_a_coordinate_and_every_variable_a_label(self) -> None:
        dataset = self.measure(self.model(0).eval())
        assert set(dataset.dims) <= set(dataset.coords), (
            f"dimensions without coordinate: {set(dataset.dims) - set(dataset.coords)}"
        )
        bare = [name for name, v in dataset.data_vars.items() if not {"long_name", "units"} <= set(v.attrs)]
        assert not bare, f"{bare} have no long_name or units"

    def test_headline_numbers_carry_their_error(self) -> None:
        dataset = self.measure(self.model(0).eval())
        for name in headlines(dataset):
            assert name in dataset, f"headline {name!r} is no variable"
            assert f"{name}_se" in dataset or self.without_error.get(name), (
                f"headline {name!r} has no {name}_se: give it one, or say why not in `without_error`"
            )
        for name in (str(n) for n in dataset.data_vars if str(n).endswith("_se")):
            assert dataset[name].dims == dataset[name.removesuffix("_se")].dims
            assert not bool((dataset[name] < 0).any()), f"{name} is negative"

    def test_replicates_are_the_value_by_groups_of_items(self) -> None:
        dataset = self.measure(self.model(0).eval())
        for name in (str(n) for n in dataset.data_vars if str(n).endswith("_replicates")):
            value, groups = dataset[name.removesuffix("_replicates")], dataset[name]
            assert groups.dims == ("replicate", *value.dims), f"{name} is over {groups.dims}, not replicate first"
            assert groups.dtype == np.float32, f"{name} is {groups.dtype}, not float32"
            groups = groups.astype(np.float64)
            rounding = ROUNDING * float(np.abs(groups).max()) if groups.notnull().any() else 0.0
            np.testing.assert_allclose(groups.mean("replicate", skipna=False), value, rtol=0, atol=rounding)
            se = dataset.get(f"{value.name}_se")
            if se is None:
                continue
            # one element's spread over few groups scatters: all elements together say whether it is that of the items
            known = se.notnull() & value.notnull()
            spread = groups.std("replicate", ddof=1).where(known) / np.sqrt(groups.sizes["replicate"])
            by_groups, by_items = (float(np.sqrt((each.where(known) ** 2).sum())) for each in (spread, se))
            assert max(by_groups, by_items) <= 3 * min(by_groups, by_items) + rounding * np.sqrt(known.sum()), (
                f"{name} spread as {by_groups:.3g}, but {se.name} says {by_items:.3g}: deal whole items to groups"
            )

    def test_numbers_are_finite_or_nan(self) -> None:
        dataset = self.measure(self.model(0).eval())
        for name, values in dataset.data_vars.items():
            if values.dtype.kind == "f":
                assert not np.isinf(values).any(), f"{name} is infinite"

    def test_online_is_offline(self) -> None:
        online, offline = self.model(0).train(), self.model(1).eval()
        with tempfile.TemporaryDirectory() as folder:
            first = self._observed(online, ["it"])
            torch.save(online.state_dict(), f"{folder}/step.pt")
            offline.load_state_dict(torch.load(f"{folder}/step.pt", weights_only=True))
            xr.testing.assert_identical(first, self._observed(offline, ["it"]))

    def test_alone_is_together_in_any_order(self) -> None:
        model = self.model(0).eval()
        alone = self._observed(model, ["it"])
        for names in (["other", "it"], ["it", "other"]):
            xr.testing.assert_identical(alone, self._observed(model, names))

    def test_shares_of_ranks_join_to_the_whole(self) -> None:
        model, instrument = self.model(0).eval(), self.instrument()
        if not isinstance(instrument, Divisible):
            return  # it runs on rank 0 alone
        snapshot = Snapshot(step=3, model=model, seed=7)
        for ranks in (2, 3):
            shares = [instrument.share(rank, ranks) for rank in range(ranks)]
            parts = [share(snapshot) for share in shares if share is not None]
            xr.testing.assert_allclose(instrument.join(parts), self.measure(model), rtol=1e-4)

    def _observed(self, model: torch.nn.Module, names: list[str]) -> xr.Dataset:
        """The row of the watch "it" when watches of these names, all of this instrument, are measured in this order."""
        with tempfile.TemporaryDirectory() as folder:
            trajectory = Trajectory(f"{folder}/run.zarr", seed=1)
            observe(3, model, [Watch(name, self.instrument(), range(9)) for name in names], trajectory)
            return trajectory["it"].drop_vars("seconds").drop_attrs(deep=False).load()


def headlines(dataset: xr.Dataset) -> list[str]:
    """The followed variables: attrs["headline"], or every scalar that is no standard error."""
    scalars = [str(name) for name, v in dataset.data_vars.items() if v.ndim == 0 and not str(name).endswith("_se")]
    return list(dataset.attrs.get("headline", scalars))


def state(model: torch.nn.Module) -> dict[str, object]:
    """Everything of a model that an instrument could change: values by bytes, gradients, modes, hooks, settings."""
    found: dict[str, object] = {"config": str(getattr(model, "config", None))}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = _bytes(tensor)
        found[f"{name}.requires_grad"] = tensor.requires_grad
        found[f"{name}.grad"] = None if tensor.grad is None else _bytes(tensor.grad)
    for name, module in model.named_modules():
        found[f"{name}.training"] = module.training
        found[f"{name}.hooks"] = [sorted(getattr(module, kind)) for kind in HOOKS]
        found[f"{name}.forward"] = "forward" in vars(module)
    return found


def _bytes(tensor: torch.Tensor) -> tuple[str, str, bytes]:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return str(tensor.dtype), str(tensor.device), flat.numpy().tobytes()


def randomness() -> tuple[bytes, str, str]:
    return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), str(random.getstate())  # noqa: NPY002


def switches() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_num_threads(),
    )
