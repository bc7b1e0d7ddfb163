"""How real patched states are: where they stand among the states of prompts that nothing was done to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Gauge:
    """Where states (batch, d) at the last position stand among those of clean prompts, layer by layer."""

    centre: list[np.ndarray]
    whiten: list[np.ndarray]
    norm: list[float]
    distance: list[np.ndarray]

    @classmethod
    def fit(cls, clean: Tensor) -> Gauge:
        """The gauge of the states (layer, prompt, d) of clean prompts."""
        from sklearn.covariance import ledoit_wolf  # an import of a third of a second, for this alone

        gauge = cls([], [], [], [])
        for state in clean.double().cpu().numpy():
            # the first half of the prompts is what is normal; dimensions that are the same in all of them say nothing
            half = len(state) // 2
            gauge.centre.append(state[:half].mean(0))
            spread = state[:half].std(0)
            inverse = 1 / np.where(spread > 1e-9 * max(spread.max(), 1e-300), spread, np.inf)

            # shrunk correlations: with fewer prompts than dimensions the plain ones cannot be inverted
            values, vectors = np.linalg.eigh(ledoit_wolf((state[:half] - gauge.centre[-1]) * inverse)[0])
            keep = values > 1e-12 * max(values[-1], 1e-300)
            gauge.whiten.append(inverse[:, None] * vectors[:, keep] / np.sqrt(values[keep]))

            # the second half is what others are compared with: what fitted the covariance lies too near
            gauge.norm.append(float(np.linalg.norm(state[half:], axis=1).mean()))
            gauge.distance.append(gauge._distance(len(gauge.norm) - 1, state[half:]))
        return gauge

    def __call__(self, layer: int, state: Tensor) -> tuple[float, float]:
        """Norm ratio and quantile of the second half; equal distances count half."""
        own = state.double().cpu().numpy()[len(state) // 2 :]
        away, clean = self._distance(layer, own)[:, None], self.distance[layer]
        close = np.isclose(away, clean, rtol=1e-6, atol=1e-12)
        nearer = np.where(close, 0.5, (clean < away).astype(float)).mean()
        norm = self.norm[layer]
        return float(np.linalg.norm(own, axis=1).mean() / norm) if norm else float("nan"), float(nearer)

    def _distance(self, layer: int, state: np.ndarray) -> np.ndarray:
        return np.linalg.norm((state - self.centre[layer]) @ self.whiten[layer], axis=1)
