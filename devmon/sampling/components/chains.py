"""The chains of many components: each has the traces of a run of its own, and passes are shared."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from devmon.sampling.center import Memo
from devmon.sampling.components.masks import Component
from devmon.sampling.components.passes import Passes, Plan
from devmon.sampling.components.variants import Kept, Variants
from devmon.sampling.data import Examples
from devmon.sampling.losses import Loss
from devmon.sampling.traces import Settings, sample, with_kernel

# Parameters of chains that are held at once, all components of a block together: 1 GiB in float32, three times that
# with gradients and the state of a kernel. More share a pass over the earlier blocks. Moves cost and memory alone.
HELD = 2**28

# The trial of shared passes: weights are moved by this share of their root mean square, far enough that losses differ,
# and losses and gradients must be those of the model as it is within these shares. float32 rounds to 1e-5 of either.
MOVED, LOSS_ERROR, GRADIENT_ERROR = 0.1, 1e-3, 1e-2

FIELDS = ("excess", "square", "slope", "linear")


@dataclass(frozen=True)
class Sweep:
    """The traces of all components, float64 on the CPU.

    - `baseline` (chain, draw): mean loss at w* of the minibatches, which are common to the components
    - `excess`, `distance`, `slope`, `linear` (component, chain, draw): as in `devmon.sampling.group.Traces`, `excess`
      the loss at w minus the baseline
    - `shared` (component): whether its passes were shared; else it was run alone
    """

    baseline: Tensor
    excess: Tensor
    distance: Tensor
    slope: Tensor
    linear: Tensor
    shared: list[bool]


def sweep(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    components: Sequence[Component],
    blocks: Sequence[nn.Module],
    settings: Settings,
    *,
    seed: int = 0,
    chains: Sequence[int] | None = None,
    memo: Memo | None = None,
) -> Sweep:
    """The traces that `sample` with the mask of each component gives, up to rounding.

    Components that begin at one block are run together: what enters that block is computed once a minibatch, the
    gradient at w* of control variates too, and a pass goes on from there with many components and chains as its batch.
    A trial compares this with the model as it is; where they differ, or where the model cannot be run so, the
    component is run alone. `memo` is that of `sample`. Raises InstrumentError as `sample` does.
    """
    settings, kernel = with_kernel(settings, examples.n)
    numbers = list(range(settings.chains)) if chains is None else list(chains)
    schedule = settings.schedule(seed)
    dtype = torch.float64 if settings.float64 else torch.float32
    plan = Plan.of(model, loss, examples, components, kernel, schedule, numbers, dtype, memo)
    private = copy.deepcopy(model).to(dtype).eval()
    paths = {module: path for path, module in model.named_modules()}
    twins = [private.get_submodule(paths[block]) for block in blocks]

    variants = Variants(private, loss, twins)

    # Block by block, so that what is held together begins close by; all steps of what is held before the next.
    sums: dict[str, Tensor] = {}
    shape = (len(FIELDS), schedule.draws, len(numbers))
    held: list[_Lane] = []
    for lane in _lanes(plan, variants, sorted(components, key=lambda component: component.start)):
        if not lane.agrees():
            continue
        if held and sum(each.size for each in held) + lane.size > HELD:
            sums |= _run(plan, variants, held)
            held = []
        held.append(lane)
    sums |= _run(plan, variants, held) if held else {}

    # What could not be shared is run as an LLC of its own.
    shared = [component.name in sums for component in components]
    for component in components:
        if component.name not in sums:
            masked = replace(settings, mask=component.mask)
            alone = sample(model, loss, examples, masked, seed=seed, chains=numbers, memo=memo)
            alone = alone.transpose("chain", "draw")
            traces = {name: torch.as_tensor(alone[name].values) for name in alone.data_vars}
            excess, square = traces["loss"] - traces["baseline"], traces["distance"] ** 2
            linear = traces.get("linear", torch.zeros_like(excess))
            one = torch.stack([excess, square, traces["slope"], linear]).transpose(1, 2)
            sums[component.name] = one.reshape(shape) * schedule.steps_per_draw
    total = torch.stack([sums[component.name] for component in components]).transpose(2, 3) / schedule.steps_per_draw
    excess, square, slope, linear = total.unbind(1)
    return Sweep(plan.baseline(), excess, square.sqrt(), slope, linear, shared)


def _lanes(plan: Plan, variants: Variants, components: Sequence[Component]) -> Iterator[_Lane]:
    """Components that share their tensors, no more together than are held at once."""
    groups: dict[tuple[str, ...], list[Component]] = {}
    for component in components:
        names = tuple(name for name in plan.center if name in component.mask.names)
        groups.setdefault(names, []).append(component)
    for names, group in groups.items():
        size = len(plan.chains) * sum(plan.center[name].numel() for name in names)
        most = max(1, HELD // size)
        for first in range(0, len(group), most):
            yield _Lane(plan, variants, names, group[first : first + most])


def _run(plan: Plan, variants: Variants, lanes: Sequence[_Lane]) -> dict[str, Tensor]:
    """Sums over the steps of a draw, (field, draw, chain), of every component of some lanes."""
    schedule = plan.schedule
    passes = Passes(plan, variants)
    for lane in lanes:
        lane.begin()
    names = dict.fromkeys(name for lane in lanes for name in lane.names) if schedule.control_variate else ()
    starts = {lane.start for lane in lanes if lane.start > 0 or lane.resting}
    resting = list(dict.fromkeys(module for lane in lanes for module in lane.resting))
    for step, index in enumerate(plan.index):
        # Once for all: what this minibatch gives at w*, and the noise of its gradient there.
        kept, noise = passes.at_center(index, starts, resting, names)
        baseline = plan.table[index].mean(1)
        for lane in lanes:
            lane.step(passes, step // schedule.steps_per_draw, index, kept, baseline, noise)
    return {
        component.name: sums.cpu()
        for lane in lanes
        for component, sums in zip(lane.components, lane.sums.transpose(0, 1), strict=True)
    }


class _Lane:
    """The chains of components that share their tensors, (component, chain, parameter), in the layout of one run.

    They begin at block `start`; `resting` are the modules in it that do not depend on what moves (after `agrees`).
    """

    def __init__(self, plan: Plan, variants: Variants, names: tuple[str, ...], components: Sequence[Component]) -> None:
        self.plan, self.variants, self.names, self.components = plan, variants, names, components
        self.start = min(component.start for component in components)
        self.resting: list[nn.Module] = []
        self.center = torch.cat([plan.center[name].reshape(-1) for name in names])
        self.shapes = [tuple(plan.center[name].shape) for name in names]
        self.where = [c.mask.vector(names, self.shapes, self.center) for c in components]
        self.size = len(components) * len(plan.chains) * len(self.center)

    def needs(self, kept: Kept) -> Kept:
        """What a pass of these chains begins with."""
        block = [self.variants.blocks[self.start]] if self.start > 0 else []
        return {module: kept[module] for module in [*block, *self.resting]}

    def begin(self) -> None:
        """All chains at w*."""
        plan, chains = self.plan, len(self.plan.chains)
        self.rows = self.center.expand(len(self.components), chains, -1).clone()
        self.grads, self.away = torch.zeros_like(self.rows), torch.empty_like(self.rows)
        self.states = [plan.kernel.init(rows, where) for rows, where in zip(self.rows, self.where, strict=True)]
        self.noise = plan.schedule.normals("noise", plan.chains, self.rows[0])
        shape = (len(FIELDS), len(self.components), plan.schedule.draws, chains)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=self.center.device)

    @torch.no_grad()
    def step(
        self,
        passes: Passes,
        draw: int,
        index: Tensor,
        kept: Kept,
        baseline: Tensor,
        center_noise: Mapping[str, Tensor],
    ) -> None:
        """Scores the minibatches where the chains are, adds to the sums of `draw`, then moves."""
        rows, grads = self.rows, self.grads
        values, slopes = self.parts(rows.flatten(0, 1)), self.parts(grads.flatten(0, 1))
        losses = passes.score(values, slopes, index, self.start, self.needs(kept))
        excess, square, slope, linear = self.sums[:, :, draw]
        excess += losses.to(torch.float64).mean(1).view(excess.shape) - baseline
        away = torch.sub(rows, self.center, out=self.away)
        if center_noise:
            noise = torch.cat([center_noise[name].flatten(1) for name in self.names], 1)  # (chain or 1, parameter)
            grads.sub_(noise)
            linear += torch.linalg.vecdot(away, noise.expand_as(away))
        square += torch.linalg.vecdot(away, away)
        slope += torch.linalg.vecdot(away, grads)
        kernel, whole = self.plan.kernel, slice(0, len(self.center))
        for i, state in enumerate(self.states):
            kernel.pull(state, whole, away[i], grads[i])
            kernel.turn(state)
        # A kernel uses up its noise, which is that of the chain, whatever component it belongs to.
        for part, normals in next(self.noise):
            for state in self.states:
                kernel.push(state, part, normals.clone())

    def parts(self, stack: Tensor) -> dict[str, Tensor]:
        """Views of (…, parameter) by name, (…, *shape)."""
        sizes = [self.plan.center[name].numel() for name in self.names]
        parts = zip(self.names, stack.split(sizes, -1), self.shapes, strict=True)
        return {name: part.unflatten(-1, shape) if shape else part.squeeze(-1) for name, part, shape in parts}

    def agrees(self) -> bool:
        """Whether two moved variants in one shared pass have the losses and gradients of the model as it is."""
        plan, index = self.plan, self.plan.index[0][:1]
        generator = torch.Generator().manual_seed(0)
        size = MOVED * float(self.center.square().mean().sqrt()) or MOVED
        moves = size * torch.randn(2, len(self.center), generator=generator).to(self.center)
        for move, where in zip(moves, (self.where[0], self.where[-1]), strict=True):
            move *= 1 if where is None else where
        values = self.parts(self.center + moves)
        grads = {name: torch.zeros_like(value) for name, value in values.items()}
        try:
            passes = Passes(plan, self.variants)
            passes.at_once = 2
            self.resting = self.variants.resting(values, plan.examples.batch(index.repeat(2, 1).flatten()), self.start)
            starts = {self.start} if self.start > 0 or self.resting else set()
            kept, _ = passes.at_center(index, starts, self.resting, ())
            losses = passes.score(values, grads, index, self.start, self.needs(kept))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever this model cannot do in this way, it may do in its own
            return False
        batch = plan.examples.batch(index[0])
        for variant in range(2):
            leaves = {name: value[variant].clone().requires_grad_() for name, value in values.items()}
            plain = self.variants.plain(leaves, batch)
            found = torch.autograd.grad(plain.mean(), list(leaves.values()), allow_unused=True)
            gradient = torch.cat([grads[name][variant].flatten() for name in leaves])
            pairs = zip(leaves.values(), found, strict=True)
            true = torch.cat([(torch.zeros_like(v) if g is None else g).flatten() for v, g in pairs])
            moved = (plain.detach() - plan.table[index[0]]).abs().mean()
            wrong = (losses[variant] - plain.detach()).abs().mean()
            if not wrong <= LOSS_ERROR * moved + 1e-5 * plain.detach().abs().mean():
                return False
            if not (gradient - true).norm() <= GRADIENT_ERROR * true.norm() + 1e-7:
                return False
        return True
