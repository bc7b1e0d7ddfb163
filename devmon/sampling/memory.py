"""How much is in memory at once: what is planned before chains start, and what is tried where memory ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from devmon.sampling.constants import EXAMPLES_SHARE, MEMORY_SHARE, STACK_BELOW
from devmon.sampling.data import Examples
from devmon.sampling.evaluators import Stacked
from devmon.sampling.flat import Flat
from devmon.sampling.kernels.sampler import Sampler
from devmon.sampling.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """`size` chains in memory, stacked or in turn, and `micro` examples of a pass. `whole`: gradients of all parameters
    before the weights move."""

    size: int
    stacked: bool
    micro: int
    whole: bool = False

    def after(self, error: RuntimeError) -> Plan | None:
        """What to try after `error`; None where it is another error than those that less can help.

        Out of memory: half of the chains, down to one with the model's own kernels, then half of the examples.
        """
        if "modified by an inplace operation" in str(error) and not self.whole:
            return replace(self, whole=True)
        if not out_of_memory(error):
            return None
        if self.size > 1:
            size = (self.size + 1) // 2
            return replace(self, size=size, stacked=self.stacked and size > 1)
        if self.stacked:
            return replace(self, stacked=False)
        return replace(self, micro=(self.micro + 1) // 2) if self.micro > 1 else None


def out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the machine had no more memory to give."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)


def first_plan(flat: Flat, examples: Examples, schedule: Schedule, sampler: Sampler, chains: int) -> Plan:
    """As many chains at once as are worth it and fit."""
    stacked = _stacking_pays(flat, examples, schedule, chains) if schedule.stacked is None else schedule.stacked
    # All chains that are stacked or share a gradient at w* are held at once, otherwise one.
    together = stacked or (schedule.control_variate and schedule.shared_batches)
    size = chains if together else 1
    if flat.device.type == "cuda":
        # Stacked chains hold all their gradients before they move.
        of_a_chain = (sampler.copies + stacked) * flat.numel * flat.dtype.itemsize
        size = min(size, max(1, int(MEMORY_SHARE * free_bytes(flat.device) / of_a_chain)))
        if schedule.stacked is None:
            stacked = stacked and size > 1
    return Plan(schedule.group or size, stacked, schedule.micro_batch or schedule.batch_size)


def free_bytes(device: torch.device) -> int:
    """Memory of an accelerator that nobody has, with what torch holds back for itself."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def most_for_examples(device: torch.device) -> float:
    """Bytes of examples that are held where the model is; of more each batch is brought there as it is met."""
    return EXAMPLES_SHARE * free_bytes(device) if device.type == "cuda" else math.inf


def _stacking_pays(flat: Flat, examples: Examples, schedule: Schedule, chains: int) -> bool:
    if chains < 2:
        return False
    work = flat.numel * schedule.batch_size * examples.numel()
    if work > STACK_BELOW.get(flat.device.type, STACK_BELOW["cuda"]):
        return False
    return Stacked(flat, examples, schedule.batch_size).works()
