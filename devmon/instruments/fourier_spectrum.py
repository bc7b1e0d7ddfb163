"""Fourier spectrum of weights whose rows stand for the numbers modulo p, and how sparse it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr

from devmon.cost import Cost
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot


@dataclass(frozen=True)
class FourierSpectrum:
    """Norm of every frequency of embeddings and unembeddings over the numbers modulo p, and its Gini coefficient.

    `parameters` are names of parameters W (rows, columns) whose first p rows stand for 0 .. p - 1, p odd, such as
    `("embed.weight", "unembed.weight")`. F is the orthonormal basis of constant, cosines and sines, and all is done in
    float64. The coefficient rises as a model of modular addition cleans up (Nanda et al. 2023, 2301.05217).

    - `norm` (parameter, frequency), weight: ‖(F W) of the cosine and the sine of this frequency‖, frequencies 0 to
      (p - 1)/2: Σ norm² = ‖W‖².
    - `gini` (parameter), 1: of the n norms x of the frequencies from 1 on, (Σᵢ (2i - n - 1) xᵢ) / (n Σ x) with x sorted
      upwards (Hurley & Rickard 2009): 0 where all are equal, 1 - 1/n where a single frequency carries all; NaN where
      all weights of these frequencies are 0. Null: `gini_reference`.
    - `gini_reference` (parameter), 1: that of Gaussian weights, (1 - 1/n) / √(4π columns), up to O(1 / columns).

    Exact functions of the weights: there is no standard error, and no forward pass. A scale that a later layer undoes
    changes the norms and not gini. Raises DataError for p that is even or less than 3, InstrumentError for a model
    without such a parameter.

    >>> import torch
    >>> from devmon.snapshot import Snapshot
    >>> model = torch.nn.Embedding(5, 1)
    >>> _ = model.weight.data.copy_(torch.cos(2 * torch.pi * 2 * torch.arange(5.0) / 5)[:, None])
    >>> result = FourierSpectrum(5, ("weight",))(Snapshot(0, model))
    >>> result["norm"].values.round(4).tolist(), result["gini"].values.round(4).tolist()
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
                    f"FourierSpectrum needs a parameter {name!r} of {self.p} rows or more; "
                    f"{type(snapshot.model).__name__} has {', '.join(fit) or 'none'}"
                )
            waves = np.fft.rfft(weight[: self.p].double().cpu().numpy(), axis=0)  # (frequency, column)
            both = np.where(np.arange(n + 1) > 0, 2.0, 1.0)  # a cosine and a sine, but for the constant
            norms.append(np.sqrt(both * np.square(np.abs(waves)).sum(1) / self.p))
            reference.append((1 - 1 / n) / math.sqrt(4 * math.pi * weight.shape[1]))
        result = Rows(headline=["gini"])
        label = "norm of the weights along a frequency"
        result.put("norm", ("parameter", "frequency"), np.array(norms), None, label, units="weight")
        gini, label = np.array([_gini(each) for each in norms]), "Gini coefficient of the norms"
        result.put("gini", "parameter", gini, None, label, units="1", smallest_change=0.05, nan="constant")
        label = "Gini coefficient of Gaussian weights"
        result.put("gini_reference", "parameter", np.array(reference), None, label, units="1")
        return result.dataset(parameter=np.array(self.parameters, dtype=object), frequency=np.arange(n + 1))

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
