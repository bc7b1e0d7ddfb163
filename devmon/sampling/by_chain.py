"""Instruments whose chains the ranks of a training run together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import xarray as xr

from devmon.snapshot import Instrument, Snapshot


class ByChain:
    """Deals the `chains` of an instrument to ranks (`devmon.snapshot.Divisible`)."""

    chains: int

    def _traces(self, snapshot: Snapshot, chains: Sequence[int]) -> xr.Dataset:
        raise NotImplementedError

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        return self._traces(snapshot, range(self.chains))

    def share(self, rank: int, ranks: int) -> Instrument | None:
        """Chains rank, rank + ranks, …: a chain's noise and batches are its own, whoever runs it."""
        chains = range(rank, self.chains, ranks)
        return partial(self._traces, chains=chains) if chains or rank == 0 else None

    def join(self, parts: list[xr.Dataset]) -> xr.Dataset:
        """The traces of all chains, in order of their numbers."""
        joined = xr.concat(
            parts,
            "chain",
            data_vars="minimal",
            coords="minimal",
            compat="override",
            join="exact",
            combine_attrs="identical",
        )
        return joined.sortby("chain")
