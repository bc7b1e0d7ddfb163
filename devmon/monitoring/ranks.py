"""The ranks of a data-parallel training, which measure together: a failure of one never leaves the others waiting."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from devmon.errors import DevmonError

P = ParamSpec("P")
T = TypeVar("T")
# Ranks wait in their group while another measures, which may take hours; one that died is noticed at once all the same.
GROUP_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of the `size` that train together. Where it is the only one (the default), every method is a
    plain call.

    All ranks make the same calls in the same order. An exception on any rank is raised on all of them: the same one,
    a `DevmonError` before any other, then that of the lowest rank, with a note that names the rank.
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, repr=False)

    @classmethod
    def of_training(cls) -> Ranks:
        """The ranks of the default process group, with a gloo group of their own: it carries objects whatever the
        training's backend, and ranks that wait in it do not run into that backend's timeout."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT))

    def gather(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """What `work` gives on every rank, in order of rank, on every rank (pickled: for small results)."""
        if self.size == 1:
            return [work(*args, **kwargs)]
        own: Exception | None = None
        try:
            packed = pickle.dumps((work(*args, **kwargs), None))
        except Exception as error:
            own, packed = error, pickle.dumps((None, _portable(error)))
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, packed, group=self.group)
        outcomes = [pickle.loads(box) for box in boxes]
        failed = {rank: error for rank, (_, error) in enumerate(outcomes) if error is not None}
        if failed:
            first = min(failed, key=lambda rank: (not isinstance(failed[rank], DevmonError), rank))
            chosen = own if own is not None and first == self.rank else failed[first]
            chosen.add_note(f"on rank {first}")
            raise chosen
        return [value for value, _ in outcomes]

    def agree(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` gives on this rank, once all ranks have done theirs."""
        done: list[T] = []
        self.gather(lambda: done.append(work(*args, **kwargs)))
        return done[0]

    def first(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` gives on rank 0, on every rank; the others do not do it."""
        return self.gather(lambda: work(*args, **kwargs) if self.rank == 0 else None)[0]  # type: ignore[return-value]

    @torch.no_grad()
    def equalise(self, model: torch.nn.Module) -> None:
        """Write rank 0's parameters and buffers into every rank's `model` (running statistics differ under DDP)."""
        for tensor in (*model.parameters(), *model.buffers()) if self.size > 1 else ():
            held = tensor.detach().cpu().contiguous()
            if held.numel():
                dist.broadcast(held.reshape(-1).view(torch.uint8), src=0, group=self.group)
                received = held.to(tensor.device)
                if not torch.equal(received, tensor):
                    tensor.copy_(received)

    def close(self) -> None:
        """Give the group back; every rank does, at the end."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)


SINGLE = Ranks()


def _portable(error: Exception) -> Exception:
    """The error itself if other ranks can read it, else one of the kind that decides what is done about it."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # an exception that cannot be pickled, or not rebuilt
        pass
    kind = DevmonError if isinstance(error, DevmonError) else RuntimeError
    return kind(f"{type(error).__name__}: {error}")
