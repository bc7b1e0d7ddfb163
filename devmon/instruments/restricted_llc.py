"""The local learning coefficient of every head, MLP and layer: what is left when all other parameters rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import xarray as xr

from devmon.anatomy.layout import Layout
from devmon.cost import Cost
from devmon.errors import InstrumentError
from devmon.sampling.by_chain import ByChain
from devmon.sampling.center import Sampled
from devmon.sampling.components.chains import sweep
from devmon.sampling.components.masks import KINDS, components_of
from devmon.sampling.data import as_examples
from devmon.sampling.losses import Loss, next_token_loss
from devmon.sampling.traces import Settings, with_kernel
from devmon.snapshot import Snapshot

UNUSED = ("mask", "examples", "acceptance", "precision", "micro_batch")  # settings of an LLC that a sweep does not take


@dataclass(frozen=True)
class _Components:
    data: Any
    loss: Loss = next_token_loss
    components: Sequence[str] | Mapping[str, Any] = KINDS
    null: bool = True
    layout: Layout | None = None


@dataclass(frozen=True)
class RestrictedLLC(ByChain, Sampled, Settings, _Components):
    """Loss traces of chains that move one component alone, from which its λ̂ is derived: all components in one sweep.

    The weight-refined LLC of Wang et al. 2024 (2410.02984): the traces of component c are those of
    `devmon.instruments.LLC` with its mask, at the same settings and seed, up to rounding. `components` is a choice of
    "heads" (the head's columns of queries, keys and values with their biases, and its rows of the output map; with
    grouped attention the keys and values of its group), "mlps" (what of a block is neither its attention's nor a
    norm's) and "layers" (all of a block)
    of a model that `devmon.anatomy.Anatomy` knows or is told by `layout`; or masks by name, such as
    `{"first": "layers.0.*"}` (`devmon.sampling.masks.as_mask`), of any model. With `null`, a random mask of as many
    parameters stands beside each: of its own tensors where it is at most half of each of them (a head), else of its
    block, else of all blocks. One random mask serves all components of one size and place. λ̂ grows with the number of
    parameters: only beside its random mask does it say that a component is special.

    What enters the first block of a component is computed once for all components and passes go on from there, many
    components and chains at once; noise and minibatches belong to the chain and are common to all components, so their
    differences are sharper than their levels. All settings are those of `devmon.sampling.Settings`, without `mask`,
    `examples` and `acceptance`; fewer `draws` of more `steps_per_draw` are stored smaller.

    Returns traces, burn-in included, the means over the steps of a draw; settings in attrs:

    - `excess` (component, chain, draw), loss: mean loss at w of the minibatch minus that at w* of the same examples.
    - `baseline` (chain, draw), loss: mean loss at w* of the minibatch, common to all components.
    - `distance` (component, chain, draw), weight: root mean square of ‖w − w*‖.
    - `slope` (component, chain, draw), loss: ∇L_B(w)·(w − w*), with the gradient that moved the chain.
    - `linear` (component, chain, draw), loss: with `control_variate`, (∇L_B(w*) − ∇L(w*))·(w − w*), the first-order
      noise of the score, to be subtracted. Null: 0 in the mean.
    - `parameters` (component), 1: how many move.
    - `layer` (component), 1: the block that holds all of them; -1 for none.
    - `null` (component), 1: the place among the components of the random mask to compare with; -1 for a random mask
      itself and where none of that size can be drawn.
    - `shared` (component), 1: whether its passes were shared; 0 for one that was run alone, since this model does not
      run from block to block or by module.

    `devmon.analysis.component_llc` turns them into λ̂ by component, with errors, verdicts, the difference from the
    random mask, and groups of components whose curves are alike. Cost: the chains of each component and random mask;
    how many there are only the model tells. Raises InstrumentError for settings that cannot be run, components that the
    model does not have, and a loss that is not finite.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in UNUSED:
            if getattr(self, name) != getattr(Settings, name):
                raise InstrumentError(
                    f"{type(self).__name__} does not take {name}={getattr(self, name)!r}: its components are its "
                    "masks; use LLC for one mask with further traces"
                )

    def cost(self) -> Cost | None:
        """At most: every component's passes whole. None where the model must tell how many components there are."""
        if not isinstance(self.components, Mapping):
            return None
        examples = as_examples(self.data)
        runs = len(self.components) * (1 + self.null)
        met = (self.draws + self.burn_in) * self.steps_per_draw * self.chains * self.batch_size
        varied = met * (runs + self.control_variate)
        whole = self.of_gradient(examples.n)
        seen = max(min(examples.n, met), whole)
        return Cost(forwards=varied + met + seen, backwards=varied + whole, positions=examples.positions())

    def _traces(self, snapshot: Snapshot, chains: Sequence[int]) -> xr.Dataset:
        who, examples = type(self).__name__, as_examples(self.data)
        components, blocks = components_of(
            snapshot.model,
            self.components,
            examples,
            layout=self.layout,
            null=self.null,
            seed=snapshot.seed,
            who=who,
        )
        which: dict[str, Any] = {"seed": snapshot.seed, "chains": chains, "memo": snapshot.memo}
        found = sweep(snapshot.model, self.loss, examples, components, blocks, self, **which)
        names = [component.name for component in components]
        traced, each = ("component", "chain", "draw"), "component"
        # What differs between components is kept as it differs, in float32: the minibatch's own loss is common to all.
        variables: dict[str, Any] = {
            "excess": (traced, found.excess, "mean loss of the minibatch at w minus that at w*", "loss"),
            "baseline": (traced[1:], found.baseline, "mean loss of the minibatch at w*", "loss"),
            "distance": (traced, found.distance, "root mean square distance from w*", "weight"),
            "slope": (traced, found.slope, "gradient at w times the displacement from w*", "loss"),
        }
        if self.control_variate:
            variables["linear"] = (traced, found.linear, "first-order noise of the score", "loss")
        variables = {
            name: (dims, values.numpy().astype(np.float32), {"long_name": words, "units": units})
            for name, (dims, values, words, units) in variables.items()
        }
        null = [names.index(component.null) if component.null else -1 for component in components]
        for name, numbers, words in (
            ("parameters", [component.size for component in components], "parameters that move"),
            ("layer", [component.layer for component in components], "the block that holds them, -1 for none"),
            ("null", null, "place of the random mask of equal size, -1 for none"),
            ("shared", list(map(int, found.shared)), "1 where passes were shared, 0 where it was run alone"),
        ):
            variables[name] = (each, np.array(numbers, dtype=np.int64), {"long_name": words, "units": "1"})
        coords = {
            "component": np.array(names, dtype=object),
            "chain": np.array(chains),
            "draw": np.arange(self.burn_in + self.draws),
        }
        return xr.Dataset(variables, coords, self._attrs(snapshot.seed, examples.n))

    def _attrs(self, seed: int, n: int) -> dict[str, Any]:
        """Every setting that a later reader needs to repeat the traces."""
        settings, _ = with_kernel(self, n)
        attrs: dict[str, Any] = {
            field.name: getattr(settings, field.name) for field in fields(Settings) if field.name not in UNUSED
        }
        attrs |= {
            "kind": "llc by component",
            "nbeta": float(settings.nbeta_for(n)),
            "n": n,
            "seed": seed,
            "sampler": self.sampler if isinstance(self.sampler, str) else repr(self.sampler),
            "units": "the loss's own, mean per example; nbeta times it is without unit",
            "headline": ["llc"],
        }
        return {name: int(value) if isinstance(value, bool) else value for name, value in attrs.items()}
