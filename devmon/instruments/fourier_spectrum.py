"""Fourier spectrum of weights whose rows stand for the numbers modulo p, and how sparse it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr

from devmon.cost import Cost
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot


@dataclass(frozen=True)
class FourierSpectrum:
    """Norm of every frequency of embeddings and unembeddings over the numbers modulo p, and its Gini coefficient.

    `parameters` are names of parameters (rows, columns) whose first p rows stand for 0 .. p - 1, p odd, such as
    `("embed.weight", "unembed.weight")`. In float64, with F the orthonormal basis of constant, cosines and sines,
    norm(parameter, frequency) = ‖(F W) of the cosine and the sine of this frequency‖, 0 .. (p - 1)/2: Σ norm² = ‖W‖².
    gini(parameter): of the norms of the frequencies from 1 on, (Σᵢ (2i - n - 1) xᵢ) / (n Σ x) with x sorted upwards
    (Hurley & Rickard 2009): 0 where all are equal, 1 - 1/n where one carries all. It rises as a model of modular
    addition cleans up (Nanda et al. 2023, 2301.05217).
    gini_reference(parameter): that of Gaussian weights, (1 - 1/n) / √(4π columns), up to O(1 / columns).

    Exact functions of the weights: there is no standard error, and no forward pass. A scale that a later layer undoes
    changes the norms and not gini. NaN where all weights of the frequencies from 1 on are 0. Raises DataError for p
    that is even or less than 3, InstrumentError for a model without such a parameter.

    >>> import torch
    >>> from devmon.snapshot import Snapshot
    >>> model = torch.nn.Embedding(5, 1)
    >>> _ = model.weight.data.copy_(torch.cos(2 * torch.pi * 2 * torch.arange(5.0) / 5)[:, None])
    >>> found = FourierSpectrum(5, ("weight",))(Snapshot(0, model))
    >>> found["norm"].values.round(4).tolist(), found["gini"].values.round(4).tolist()
    ([[0.0, 0.0, 1.5811]], [0.5])
    """

    p: int
    parameters: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.p < 3 or self.p % 2 == 0:
            raise DataError(f"FourierSpectrum needs p odd and at least 3, got {self.p}")
        given = (self.parameters,) if isinstance(self.parameters, str) else tuple(self.parameters)
        if not given:
            raise DataError("FourierSpectrum needs the name of at least one parameter")
        object.__setattr__(self, "parameters", given)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        named = {name.replace("_orig_mod.", ""): w.detach() for name, w in snapshot.model.named_parameters()}
        norms, reference = [], []
        n = self.p // 2
        for name in self.parameters:
            weight = named.get(name)
            if weight is None or weight.ndim != 2 or len(weight) < self.p:
                fit = [key for key, w in named.items() if w.ndim == 2 and len(w) >= self.p]
                raise InstrumentError(
                    f"FourierSpectrum needs a parameter {name!r} of {self.p} rows or more; {type(snapshot.model).__name__} "
                    f"has {', '.join(fit) or 'none'}"
                )
            waves = np.fft.rfft(weight[: self.p].double().cpu().numpy(), axis=0)  # (frequency, column)
            both = np.where(np.arange(n + 1) > 0, 2.0, 1.0)  # a cosine and a sine, but for the constant
            norms.append(np.sqrt(both * np.square(np.abs(waves)).sum(1) / self.p))
            reference.append((1 - 1 / n) / math.sqrt(4 * math.pi * weight.shape[1]))
        about = {"long_name": "norm of the weights along a frequency", "units": "weight"}
        return xr.Dataset(
            {
                "norm": (("parameter", "frequency"), np.array(norms), about),
                "gini": (
                    "parameter",
                    np.array([_gini(each) for each in norms]),
                    {
                        "long_name": "Gini coefficient of the norms",
                        "units": "1",
                        "smallest_change": 0.05,
                        "nan": "constant",
                    },
                ),
                "gini_reference": (
                    "parameter",
                    np.array(reference),
                    {"long_name": "Gini coefficient of Gaussian weights", "units": "1"},
                ),
            },
            coords={"parameter": np.array(self.parameters, dtype=object), "frequency": np.arange(n + 1)},
            attrs={"headline": ["gini"]},
        )

    def cost(self) -> Cost:
        """No passes: a Fourier transform of each matrix."""
        return Cost()


def _gini(norms: np.ndarray) -> float:
    """Gini coefficient of the norms after the first, that of the constant; NaN where all are 0 up to rounding."""
    values = norms[1:]
    n, total = len(values), values.sum()
    if not total > 1e-12 * norms[0]:
        return math.nan
    return float((2 * np.arange(1, n + 1) - n - 1) @ np.sort(values) / (n * total))
