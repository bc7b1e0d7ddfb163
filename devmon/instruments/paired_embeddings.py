"""Two modalities in one space: the gap between them, how near pairs are, how evenly each is spread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.anatomy.forward import original, uncompiled
from devmon.cost import Cost
from devmon.data import ByContent, jackknife, minibatches, probe_inputs
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot

GROUPS = 8  # of pairs, each left out in turn
Encode = Callable[[nn.Module, Tensor, Tensor], Any]
LABELS = {  # long name, units, smallest change
    "gap": ("distance between the means of the two modalities", "1", 0.05),
    "alignment": ("mean squared distance of pairs", "1", 0.05),
    "uniformity_first": ("log mean Gaussian potential of the first", "nats", 0.1),
    "uniformity_second": ("log mean Gaussian potential of the second", "nats", None),
    "cosine_paired": ("mean cosine of pairs", "cosine", None),
    "cosine_unpaired": ("mean cosine of what is no pair", "cosine", None),
    "cosine_within": ("mean cosine within a modality", "cosine", None),
    "recall": ("pairs nearest of all, from the first", "share", 0.05),
}


def two_towers(model: nn.Module, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (item, d) of images and texts by a CLIP of transformers, or a model that returns such a pair."""
    if hasattr(getattr(model, "config", None), "vision_config"):
        output = model(pixel_values=first, input_ids=second)
        return output.image_embeds, output.text_embeds
    return model(first, second)


@dataclass(frozen=True, eq=False)
class PairedEmbeddings(ByContent):
    """Modality gap, alignment and uniformity of embeddings of pairs: 2203.02053, 2005.10242 (Wang & Isola 2020).

    `first` and `second` (pair, …) are what belongs together, such as images and captions; `encode(model, first,
    second)` gives their embeddings, which are made unit vectors x, y. All are nulls of themselves at initialisation,
    where a gap is there already (1.14 in a CLIP of random weights, .85 after training). `_se` are a jackknife over
    eight groups of pairs, what is left out taken from both sides.

    - `gap`, 1: ‖mean x - mean y‖.
    - `gap_se`, 1: its standard error.
    - `alignment`, 1: mean ‖x_i - y_i‖². Null: `alignment_unpaired`.
    - `alignment_se`, 1: its standard error.
    - `alignment_unpaired`, 1: mean ‖x_i - y_j‖², i ≠ j.
    - `uniformity_first`, nats: ln mean exp(-2 ‖x_i - x_j‖²), i ≠ j; 0 is one point. Null: `uniformity_even`.
    - `uniformity_first_se`, nats: its standard error.
    - `uniformity_second`, nats: of the y.
    - `uniformity_second_se`, nats: its standard error.
    - `uniformity_even`, nats: of vectors spread evenly in as many dimensions, -4 + ln ₀F₁(d/2; 4).
    - `cosine_paired`, cosine: mean ⟨x_i, y_i⟩. Null: `cosine_unpaired`.
    - `cosine_paired_se`, cosine: its standard error.
    - `cosine_unpaired`, cosine: mean ⟨x_i, y_j⟩, i ≠ j.
    - `cosine_unpaired_se`, cosine: its standard error.
    - `cosine_within`, cosine: mean over both of ⟨x_i, x_j⟩, i ≠ j. Above `cosine_unpaired`, the two lie apart.
    - `cosine_within_se`, cosine: its standard error.
    - `recall`, share: i whose y_i is the nearest of all y to x_i. Null: `recall_chance`.
    - `recall_se`, share: its standard error.
    - `recall_chance`, share: 1 / pairs.

    Cost: one pass of both. Raises DataError for fewer than 16 pairs, InstrumentError for what are no pairs of vectors.
    """

    first: Tensor
    second: Tensor
    encode: Encode = two_towers
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            object.__setattr__(self, name, probe_inputs(getattr(self, name), f"PairedEmbeddings.{name}"))
        if len(self.first) != len(self.second) or len(self.first) < 2 * GROUPS:
            raise DataError(
                f"PairedEmbeddings needs {2 * GROUPS} pairs at least, got {len(self.first)} and {len(self.second)}"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        x, y = self._embeddings(snapshot)
        group = np.arange(len(x)) % GROUPS
        whole = _measures(x, y)
        without = [_measures(x[group != g], y[group != g]) for g in range(GROUPS)]
        # the nearest of all depends on how many there are: whether each is found is not asked anew without some
        found = (x @ y.T).argmax(1) == np.arange(len(x))
        whole["recall"] = float(found.mean())
        for g, values in enumerate(without):
            values["recall"] = float(found[group != g].mean())

        rows = Rows(headline=["gap", "alignment", "uniformity_first", "recall"], error="standard error, jackknife")
        for name, (label, units, change) in LABELS.items():
            se, groups = jackknife(whole[name], np.array([each[name] for each in without]))
            rows.put(name, (), whole[name], se, label, units=units, smallest_change=change, replicates=groups)
        unpaired = 2 - 2 * whole["cosine_unpaired"]
        rows.put("alignment_unpaired", (), unpaired, None, "mean squared distance of what is no pair", units="1")
        label = "log mean Gaussian potential of evenly spread vectors"
        rows.put("uniformity_even", (), _even(x.shape[1]), None, label, units="nats")
        rows.put("recall_chance", (), 1 / len(x), None, "nearest by chance", units="share")
        return rows.dataset()

    def cost(self) -> Cost:
        text = [t for t in (self.first, self.second) if not t.is_floating_point()]
        return Cost(forwards=len(self.first), positions=max((t.shape[1] for t in text), default=1))

    def _embeddings(self, snapshot: Snapshot) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors (pair, d) of both."""
        model, parts = original(snapshot.model), []
        with torch.no_grad(), uncompiled(model):
            for at in minibatches(len(self.first), self.batch_size):
                given = (each[at].to(snapshot.device) for each in (self.first, self.second))
                made = self.encode(model, *given)
                if not isinstance(made, tuple | list) or len(made) != 2 or made[0].shape != made[1].shape:
                    raise InstrumentError(
                        "PairedEmbeddings needs encode(model, first, second) to give two tensors (pair, d), "
                        f"{type(model).__name__} gave {type(made).__name__}: write one"
                    )
                parts.append([nn.functional.normalize(each.double(), dim=-1).cpu().numpy() for each in made])
        x, y = (np.concatenate(each) for each in zip(*parts, strict=True))
        if x.ndim != 2:
            raise InstrumentError(f"PairedEmbeddings needs embeddings (pair, d), got {x.shape}: pool them in encode")
        return x, y


def _measures(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """All but the recall, from unit vectors (pair, d)."""
    n = len(x)
    apart, own = ~np.eye(n, dtype=bool), (x * y).sum(1)
    across, in_first, in_second = x @ y.T, x @ x.T, y @ y.T
    return {
        "gap": float(np.linalg.norm(x.mean(0) - y.mean(0))),
        "alignment": float((2 - 2 * own).mean()),
        "uniformity_first": float(np.log(np.exp(4 * in_first[apart] - 4).mean())),
        "uniformity_second": float(np.log(np.exp(4 * in_second[apart] - 4).mean())),
        "cosine_paired": float(own.mean()),
        "cosine_unpaired": float(across[apart].mean()),
        "cosine_within": float((in_first[apart].mean() + in_second[apart].mean()) / 2),
    }


def _even(d: int) -> float:
    """ln E exp(-2 ‖u - v‖²) of independent uniform unit vectors: E e^{4⟨u,v⟩} = ₀F₁(d/2; 4), by its series."""
    term, total = 1.0, 1.0
    for k in range(1, 60):
        term *= 4 / (k * (d / 2 + k - 1))
        total += term
    return float(np.log(total) - 4)
