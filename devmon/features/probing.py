"""What the latents of a dictionary stand for, by labels: sparse probes, and what erasing latents does to probes.

States x (item, d) and activations f (item, latent) are means over the places of an item, such as a text; labels are
integers (item,). Half of the items, drawn by a seed, train the probes (logistic regression, C = 1 of standardised
columns), the other half tests them. After SAEBench (2503.09532), on which scores depend: compare at equal L0 alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from devmon.errors import DataError

Array = NDArray[np.float64]
FEW = (1, 2, 5)  # latents of a sparse probe
ERASED = (2, 5, 10, 20, 50, 100, 500)  # latents erased, those that there are
LEAST_GAP = 1e-3  # of accuracies, below which a score is 0 (SAEBench)


class Probe:
    """Whether an item is of a class, from its columns."""

    def __init__(self, x: Array, label: NDArray[np.bool_]) -> None:
        self.scale = StandardScaler().fit(x)
        self.fitted = LogisticRegression(C=1.0, max_iter=1000).fit(self.scale.transform(x), label)

    def accuracy(self, x: Array, label: NDArray[np.bool_]) -> float:
        return float((self.fitted.predict(self.scale.transform(x)) == label).mean())

    @property
    def direction(self) -> Array:
        """w (column,) in the units of the columns: the logit grows by w for one of each."""
        return np.asarray(self.fitted.coef_[0] / self.scale.scale_)


def sparse_probing(f: Array, x: Array, label: NDArray[Any], seed: int = 0) -> xr.Dataset:
    """Accuracy of probes of few latents, mean over classes (2503.09532; Gurnee et al. 2023).

    - `accuracy` (few), share: of the 1, 2 or 5 latents of largest difference of means. Nulls: `accuracy_channels`, as
      many coordinates of x, and `accuracy_shuffled`, of the same latents with labels drawn anew
    - `accuracy_full`, share: of all of x: the ceiling
    - `majority`, share: of the more frequent answer
    - `accuracy_se` (few), share: standard error over test items
    - `best` (class, few), latent: the latents, in their order

    Raises DataError for fewer than two classes, or classes of fewer than four items.
    """
    classes, train, test = _split(label, seed)
    rng = np.random.default_rng(seed)
    scores: dict[str, list[Any]] = {name: [] for name in ("accuracy", "channels", "shuffled", "full", "majority")}
    best = []
    for each in classes:
        own = label == each
        order = _by_difference(f[train], own[train])[: max(FEW)]
        raw = _by_difference(x[train], own[train])
        mixed = own[rng.permutation(len(own))]
        best.append(np.pad(order, (0, max(FEW) - len(order)), constant_values=-1))
        few = [_tried(f[:, order[:k]], own, train, test) for k in FEW]
        scores["accuracy"].append(few)
        scores["channels"].append([_tried(x[:, raw[:k]], own, train, test) for k in FEW])
        scores["shuffled"].append([_tried(f[:, order[:k]], mixed, train, test) for k in FEW])
        scores["full"].append(_tried(x, own, train, test))
        scores["majority"].append(max(own[test].mean(), 1 - own[test].mean()))
    mean = {name: np.mean(values, 0) for name, values in scores.items()}
    se = np.sqrt(mean["accuracy"] * (1 - mean["accuracy"]) / len(test))
    return xr.Dataset(
        {
            "accuracy": ("few", mean["accuracy"]),
            "accuracy_se": ("few", se),
            "accuracy_channels": ("few", mean["channels"]),
            "accuracy_shuffled": ("few", mean["shuffled"]),
            "accuracy_full": ((), float(mean["full"])),
            "majority": ((), float(mean["majority"])),
            "best": (("class", "rank"), np.array(best)),
        },
        coords={"few": list(FEW), "class": classes, "rank": np.arange(max(FEW))},
    )


def targeted_perturbation(f: Array, x: Array, W_dec: Array, label: NDArray[Any], seed: int = 0) -> xr.Dataset:
    """Whether erasing the latents of one class hurts the probe of that class alone (TPP, 2503.09532).

    Latents of class c are those of largest E_j = (mean of f_j in c − outside) · ⟨w_c, d_j⟩, clamped at 0; erased are
    their f_j d_j, the error of the dictionary stays.

    - `score` (erased), share: mean over classes of (drop of its own probe − mean drop of the others)
    - `own`, `others` (erased), share: the drops
    - `score_random` (erased), share: the same of as many random living latents: the null
    """
    classes, train, test = _split(label, seed)
    probes = {each: Probe(x[train], label[train] == each) for each in classes}
    clean = {each: probe.accuracy(x[test], label[test] == each) for each, probe in probes.items()}
    erased = [n for n in ERASED if n <= f.shape[1]]
    rng, living = np.random.default_rng(seed), np.flatnonzero((f > 0).any(0))

    def drops(latents: NDArray[np.int64], each: Any) -> tuple[float, float]:
        less = x[test] - f[test][:, latents] @ W_dec[latents]
        down = {name: clean[name] - probe.accuracy(less, label[test] == name) for name, probe in probes.items()}
        return down[each], float(np.mean([drop for name, drop in down.items() if name != each]))

    own, null = np.zeros((len(erased), 2)), np.zeros((len(erased), 2))
    for each in classes:
        effect = _effect(f[train], label[train] == each, W_dec @ probes[each].direction).clip(min=0)
        order = np.argsort(-effect, kind="stable")
        for i, n in enumerate(erased):
            own[i] += np.array(drops(order[:n], each)) / len(classes)
            null[i] += np.array(drops(rng.permutation(living)[:n], each)) / len(classes)
    return xr.Dataset(
        {
            "score": ("erased", own[:, 0] - own[:, 1]),
            "own": ("erased", own[:, 0]),
            "others": ("erased", own[:, 1]),
            "score_random": ("erased", null[:, 0] - null[:, 1]),
        },
        coords={"erased": erased},
    )


def spurious_removal(
    f: Array, x: Array, W_dec: Array, label: NDArray[Any], spurious: NDArray[Any], seed: int = 0
) -> xr.Dataset:
    """Whether erasing the latents of a spurious label mends a probe that learnt it (SCR, 2503.09532; 2411.18895).

    Two binary labels. The biased probe of `label` is trained where the two agree, the clean one on all; the latents of
    largest abs(E_j) of a probe of `spurious` are erased.

    - `score` (erased), share: (A_erased − A_biased) / (A_clean − A_biased), accuracies on items where all four
      combinations weigh the same; 0 where the denominator is below .001
    - `score_random` (erased), share: of random living latents
    - `biased`, `clean`, share: the accuracies before
    """
    _, train, test = _split(label, seed)
    own, other = label == label.max(), spurious == spurious.max()
    groups = [np.flatnonzero((own[test] == a) & (other[test] == b)) for a in (0, 1) for b in (0, 1)]
    fewest = min(map(len, groups))
    agree = train[own[train] == other[train]]
    if fewest < 2 or len(np.unique(own[agree])) < 2:
        raise DataError("spurious_removal: two binary labels whose four combinations have four items or more each")
    even = test[np.concatenate([group[:fewest] for group in groups])]
    biased, clean, other_probe = Probe(x[agree], own[agree]), Probe(x[train], own[train]), Probe(x[train], other[train])
    low, high = (probe.accuracy(x[even], own[even]) for probe in (biased, clean))
    effect = np.abs(_effect(f[train], other[train], W_dec @ other_probe.direction))
    order, rng = np.argsort(-effect, kind="stable"), np.random.default_rng(seed)
    living = rng.permutation(np.flatnonzero((f > 0).any(0)))
    erased = [n for n in ERASED if n <= f.shape[1]]

    def score(latents: NDArray[np.int64]) -> float:
        less = x[even] - f[even][:, latents] @ W_dec[latents]
        return (biased.accuracy(less, own[even]) - low) / (high - low) if high - low >= LEAST_GAP else 0.0

    return xr.Dataset(
        {
            "score": ("erased", [score(order[:n]) for n in erased]),
            "score_random": ("erased", [score(living[:n]) for n in erased]),
            "biased": ((), low),
            "clean": ((), high),
        },
        coords={"erased": erased},
    )


def absorption(
    f: Array, x: Array, W_dec: Array, direction: Array, present: NDArray[np.bool_], seed: int = 0
) -> xr.Dataset:
    """How often a feature's own latent is silent where the feature is, and another latent writes it (2409.14507).

    f and x are by place, `direction` (d,) is the feature's, a probe's or a planted one, `present` (place,) where it is.
    Its main latent is that of the best probe of one latent; more are taken while they raise F1 by .03.

    - `full`, share: of places with the feature, those where no main latent fires and the latent of largest f_j ⟨d_j, w⟩
      has a cosine of .025 or more to it and makes .4 or more of ⟨x, w⟩
    - `silent`, share: of places with the feature, those where no main latent fires
    - `main`, latents: how many main latents there are
    - `absorbed` (place,), share: 1 in the places that `full` counts, of all with the feature in their order
    """
    w = direction / np.linalg.norm(direction)
    train = np.random.default_rng(seed).permutation(len(f))[: len(f) // 2]
    main: list[int] = []
    best = 0.0
    for candidate in _by_difference(f[train], present[train])[:10]:
        fires = (f[train][:, [*main, candidate]] > 0).any(1)
        hit = float((fires & present[train]).sum())
        f1 = 2 * hit / max(float(fires.sum() + present[train].sum()), 1.0)
        if main and f1 - best < 0.03:
            break
        main, best = [*main, int(candidate)], f1
    at = np.flatnonzero(present)
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True).clip(min=1e-12)
    silent = ~(f[at][:, main] > 0).any(1)
    parts = f[at] * (W_dec @ w)
    largest = parts.argmax(1)
    share = parts[np.arange(len(at)), largest] / np.abs(x[at] @ w).clip(min=1e-12)
    absorbed = silent & ((unit @ w)[largest] >= 0.025) & (share >= 0.4)
    return xr.Dataset(
        {
            "full": ((), absorbed.mean()),
            "silent": ((), silent.mean()),
            "main": ((), len(main)),
            "absorbed": ("place", absorbed.astype(np.float64)),
        },
    )


def _split(label: NDArray[Any], seed: int) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    classes, counts = np.unique(label, return_counts=True)
    if len(classes) < 2 or counts.min() < 4:
        held = dict(zip(classes.tolist(), counts.tolist(), strict=True))
        raise DataError(f"probes need two labels of four items each or more, got {held}: give more items")
    order = np.random.default_rng(seed).permutation(len(label))
    return classes, np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])


def _by_difference(values: Array, own: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Columns by the size of the difference of their means, the largest first."""
    return np.argsort(-np.abs(values[own].mean(0) - values[~own].mean(0)), kind="stable")


def _effect(f: Array, own: NDArray[np.bool_], aligned: Array) -> Array:
    return np.asarray((f[own].mean(0) - f[~own].mean(0)) * aligned)


def _tried(columns: Array, own: NDArray[np.bool_], train: NDArray[np.int64], test: NDArray[np.int64]) -> float:
    return Probe(columns[train], own[train]).accuracy(columns[test], own[test])
