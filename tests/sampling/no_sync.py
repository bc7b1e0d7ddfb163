"""Work that must not wait for a device: on CUDA by its own debug mode, on the CPU by the operations that would wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# `.item()`, `float()` and `bool()`; results whose size depends on values
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")


class _Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in tree_leaves(indices))
        if name in WAITING or by_mask:
            raise RuntimeError(f"{operation} waits for the device")
        return operation(*args, **(kwargs or {}))


@contextmanager
def no_synchronisation(device: str = "cpu") -> Iterator[None]:
    """Raises RuntimeError where an operation inside would wait for a GPU; "cpu" knows those of `WAITING` and indexing
    by masks, not `.tolist()` and copies to the CPU."""
    if device == "cpu":
        with _Refuse():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
