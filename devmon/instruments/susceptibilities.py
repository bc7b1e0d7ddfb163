"""Susceptibilities: how λ̂ of a component answers to more of a token in the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import xarray as xr

from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.verdicts import accepted
from devmon.cost import Cost
from devmon.data.rows import Rows
from devmon.errors import InstrumentError
from devmon.sampling.center import Sampled
from devmon.sampling.data import as_examples
from devmon.sampling.kernels.sampler import Sampler
from devmon.sampling.losses import Loss, next_token_loss
from devmon.sampling.masks import Mask, as_mask
from devmon.sampling.responses.covariances import Response, averaged, batches_of, responses, spread
from devmon.sampling.responses.gaussians import SecondMoment, both_sides, localisation
from devmon.sampling.responses.labels import chosen, evenly, label, shuffled
from devmon.sampling.responses.scores import Excess, ItemLoss, Scored, next_token_losses
from devmon.sampling.traces import Settings, sample
from devmon.snapshot import Instrument, Snapshot

# Bytes of one token of one component in a row: χ, its error and the token's own λ̂, two each.
TOKEN_BYTES = 6
NULLS = ("localisation", "gaussian", "shuffled")
DATA = " data"  # the set that the observable is the loss of; no probe can have the name


@dataclass(frozen=True)
class _Of:
    """The fields before the settings."""

    data: Any
    probes: Mapping[str, Any]
    components: Mapping[str, Any] | Sequence[str]
    loss: Loss = next_token_loss
    token_loss: ItemLoss = next_token_losses


@dataclass(frozen=True, eq=False, kw_only=True)
class Susceptibilities(Sampled, Settings, _Of):
    """How λ̂ of a component would answer to more of one token in the data: χ = −nβ² Cov[L(w) − L(w*), ℓ(w) − L(w)].

    Under the law exp(−nβ L(w) − (gamma/2)‖w − w*‖²) in which one component moves and all else rests; L is the mean loss
    of `data`, ℓ that of one token y after its context x. In a mixture of (1 − h) of the data and h of the token, λ̂ =
    nβ E[L(w) − L(w*)] of the component changes by h χ: χ < 0 is a token that pins the component down, χ > 0 one that is
    at odds with what it does for the rest. Baker et al. 2025 (2504.18274), per token Wang et al. 2025 (2508.00331) and
    Elliott and Murfet 2026 (2605.07980), whose χ are these over nβ², and centred on the mean of ℓ − L with *all*
    parameters free: `devmon.analysis.derive.susceptibilities.on_the_whole` gives that form where a component is free.

    `probes` maps names to tokens (sequence, pos), or to data as for `loss`, whose items `token_loss(model, batch)`
    scores, (batch,) or (batch, pos). `components` maps names to masks (`devmon.sampling.masks.as_mask`; None is the
    whole model), or lists masks that name themselves. L is taken on `scored` examples of the data, the same at each
    draw. Settings are those of `devmon.sampling.Settings`; noise and batches are the same at every checkpoint, so
    changes are sharper than levels. `mirrored` chains come in pairs of opposite noise, in which the first order of ℓ,
    the largest part of its variance, cancels. Errors are over batches of draws of chains, or pairs.

    Nulls, each with the same L and tokens: "localisation", the law at nβ = 0, exact draws of N(w*, 1/gamma);
    "gaussian", the Gaussian with the chains' own covariance, what a harmonic well as wide would give (both of `nulls`
    draws and their mirror images; memory for as many copies of a component); "shuffled", the first `shuffled` sequences
    of a probe with their tokens in random order, what χ owes to the tokens without their context.

    A row keeps χ of the same tokens at every step, as many as fit into `budget` bytes, and the `top` tokens of each
    component by |χ| of all; `words[i]` is the text of token i in labels.

    - `llc` (component), 1: λ̂ of the component, on the examples scored. Null: 0.
    - `temperature` (component), 1: the configurational temperature of its chains; 1 in the law asked for.
    - `accepted` (component), 1: 1 where the verdict on its chains is "ok" or "finite-time" (`devmon.analysis.llc`).
    - `mean` (component, probe), 1: χ of the mean loss of a probe. Null: `mean_null`.
    - `mean_se` (component, probe), 1: its standard error.
    - `mean_null` (null, component, probe), 1: the same under each null; NaN for one that was not asked for.
    - `mean_null_se` (null, component, probe), 1: its standard error.
    - `spread` (component, probe), 1: root mean square of χ over the tokens of a probe, noise taken out. Null:
      `spread_null`.
    - `spread_null` (null, component, probe), 1: the same under each null.
    - `susceptibility` (component, token), 1: χ of the kept tokens, float16. Null: 0 with `susceptibility_se`.
    - `susceptibility_se` (component, token), 1: its standard error, float16.
    - `token_llc` (component, token), 1: nβ E[ℓ(w) − ℓ(w*)] of the kept tokens, float16.
    - `top_token` (component, rank), 1: number of the token with the next largest |χ| among all tokens of all probes.
    - `top_label` (component, rank), text: its context ▸ the token.
    - `top_susceptibility` (component, rank), 1: its χ, float16: the largest of many, so it leans outward.
    - `top_susceptibility_se` (component, rank), 1: its standard error, float16.

    Pitfalls: a covariance needs more draws than a mean: see the errors. Tokens of opposite χ may share a mechanism. χ
    is of the localised law of its settings: compare at equal nβ and gamma. Raises InstrumentError for settings that
    cannot be run, an odd number of mirrored chains, and a loss that is not finite at w*.
    """

    sampler: str | Sampler = "baoab"
    scored: int = 64
    mirrored: bool = True
    nulls: int = 32
    shuffled: int = 8
    budget: int = 65536
    top: int = 16
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.probes or not self.components or self.mask is not None:
            raise InstrumentError("expected probes, components and no mask: name some, a component is a mask itself")
        if self.mirrored and self.chains % 2:
            raise InstrumentError(f"mirrored chains come in pairs, got {self.chains}: give an even number")
        if DATA in self.probes or min(self.scored, self.top) < 1 or min(self.nulls, self.shuffled) < 0:
            raise InstrumentError("scored and top must be at least 1, nulls and shuffled at least 0")
        if self.budget < TOKEN_BYTES * len(self._masks):
            raise InstrumentError(f"the budget of {self.budget} bytes holds no token: give more, or fewer components")

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        return self._measured(snapshot, list(self._masks))

    def share(self, rank: int, ranks: int) -> Instrument | None:
        """Components rank, rank + ranks, …"""
        names = list(self._masks)[rank::ranks]
        return partial(self._measured, names=names) if names else None

    def join(self, parts: list[xr.Dataset]) -> xr.Dataset:
        """All components in their order."""
        joined = xr.concat(parts, "component", data_vars="minimal", coords="minimal", compat="override", join="exact")
        return joined.sel(component=list(self._masks))

    def cost(self) -> Cost:
        """The steps of the chains, and a forward pass of all that is scored at each draw, for each component; once for
        all what is known at w*, which other watches share (`at_center`)."""
        data, sets = as_examples(self.data), self._sets()
        steps = (self.draws + self.burn_in) * self.steps_per_draw * self.chains * self.batch_size
        scored = sum(each.examples.n for each in sets.values())
        passes = self.draws * self.chains + (2 * 2 * self.nulls)
        twice = 2 if self.control_variate else 1
        count, whole = len(self._masks), self.of_gradient(data.n)
        left = min(data.n, max(steps, whole)) - whole
        forwards = count * (twice * steps + passes * scored + left) + scored + whole
        return Cost(forwards=forwards, backwards=count * twice * steps + whole, positions=data.positions())

    def row_bytes(self) -> int:
        """Bytes of the numbers of a row at most, known before anything runs: what `budget` allows and what is fixed."""
        components, probes = len(self._masks), len(self.probes)
        units = self.chains // 2 if self.mirrored else self.chains
        replicates = 4 * units * batches_of(units, self.draws)
        fixed = 8 * (4 + probes * (3 + 3 * len(NULLS)) + self.top) + 4 * self.top + replicates * probes
        return self.budget + components * fixed

    @property
    def runs(self) -> int:
        return len(self._masks)

    @cached_property
    def _masks(self) -> dict[str, Any]:
        given = self.components
        return dict(given) if isinstance(given, Mapping) else {name: name for name in given}

    def _sets(self) -> dict[str, Scored]:
        """What is scored at each draw: the data's own examples, the probes, and the probes shuffled."""
        data = as_examples(self.data)
        some = data.batch(evenly(data, self.scored))
        sets = {DATA: Scored(as_examples(some), self.loss, self.batch_size)}
        probes = {name: as_examples(given) for name, given in self.probes.items()}
        sets |= {name: Scored(examples, self.token_loss, self.batch_size) for name, examples in probes.items()}
        for name, examples in probes.items():
            if (mixed := shuffled(examples, self.shuffled)) is not None:
                sets[DATA + name] = Scored(mixed, self.token_loss, self.batch_size)
        return sets

    def _measured(self, snapshot: Snapshot, names: list[str]) -> xr.Dataset:
        sets = self._sets()
        parts = [self._component(snapshot, as_mask(self._masks[name], snapshot.model), sets) for name in names]
        return self._dataset(names, parts, sets)

    def _component(self, snapshot: Snapshot, mask: Mask | None, sets: dict[str, Scored]) -> dict[str, Any]:
        """All that is known of one component, as arrays over (probe,), (token,), (rank,)."""
        model, seed = snapshot.model, snapshot.seed
        excess = Excess(sets, range(self.chains), self.draws, self.burn_in, memo=snapshot.memo)
        moment = SecondMoment(mask, self.nulls, self.burn_in, self.chains * self.draws, seed)

        def probe(network: torch.nn.Module, chain: int, draw: int) -> None:
            excess(network, chain, draw)
            if self.nulls:
                moment(network, chain, draw)

        # The chains, with everything scored on the way; in a pair of mirrored chains the loss is known once, not twice.
        settings = Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})
        settings = replace(settings, mask=mask, examples=0)
        how: dict[str, Any] = {"probe": probe, "mirrored": self.mirrored, "memo": snapshot.memo}
        traces = sample(model, self.loss, self.data, settings, seed=seed, **how)
        health = llc(traces.coarsen(chain=2).mean() if self.mirrored else traces)
        nbeta = float(traces.attrs["nbeta"])
        answers = self._answers(excess, nbeta, self.mirrored)
        units = self.chains // 2 if self.mirrored else self.chains
        result = self._summary(excess, answers, nbeta, units)
        result["temperature"] = float(health["temperature"])
        result["accepted"] = int(accepted(health["verdict"].item()))

        # The nulls: the same scores at weights drawn from a Gaussian, and at w* ± each draw.
        dtype = torch.float64 if self.float64 else torch.float32
        nulls = {name: np.full((3, len(self.probes)), np.nan) for name in NULLS}
        if self.nulls:
            drawn = {"gaussian": moment.sums}
            if (gamma := settings.lr_and_gamma[1]) > 0:
                drawn["localisation"] = localisation(model, mask, gamma, self.nulls, seed)
            for name, displacements in drawn.items():
                around = Excess(sets, range(2), self.nulls, 0, excess.start)
                for moved, side, draw in both_sides(model, displacements, dtype):
                    around(moved, side, draw)
                # independent draws, so that what the means take from the covariance is known
                known = self._answers(around, nbeta * np.sqrt(self.nulls / max(self.nulls - 1, 1)), True)
                nulls[name] = np.array(self._of_probes(known, self.probes, 1)[:3])
        mixed = [DATA + name for name in self.probes]
        nulls["shuffled"] = np.array(self._of_probes(answers, mixed, units)[:3])
        result["nulls"] = np.stack([nulls[name] for name in NULLS])
        result["nbeta"] = nbeta
        return result

    def _answers(self, excess: Excess, nbeta: float, mirrored: bool) -> dict[str, Response]:
        """χ of every item of every set but the data."""
        observable = excess.kept[DATA].astype(np.float64).mean(2)
        with np.errstate(invalid="ignore", over="ignore"):
            return {
                name: responses(observable, kept - observable[:, :, None], nbeta, mirrored=mirrored)
                for name, kept in excess.kept.items()
                if name != DATA
            }

    def _of_probes(self, answers: dict[str, Response], names: Sequence[str] | Mapping[str, Any], units: int) -> Any:
        """Mean, spread, and the error and replicates of the mean of these sets, (probe,) and (replicate, probe)."""
        rows: list[tuple[Any, ...]] = []
        for name in names:
            if name not in answers:
                rows.append((np.nan, np.nan, np.nan, None))
                continue
            whole = averaged(answers[name], len(answers[name].replicates) // units, units=units)
            rows.append((whole.value[0], spread(answers[name].replicates), whole.se[0], whole.replicates[:, 0]))
        return [np.array([row[i] for row in rows]) if i < 3 else [row[i] for row in rows] for i in range(4)]

    def _summary(self, excess: Excess, answers: dict[str, Response], nbeta: float, units: int) -> dict[str, Any]:
        """Of one component: λ̂, the probes' means and spreads, the kept tokens and the top ones."""
        observable = excess.kept[DATA].astype(np.float64).mean(2)
        mean, width, mean_se, replicates = self._of_probes(answers, self.probes, units)
        sizes = [len(answers[name].value) for name in self.probes]
        kept = chosen(sizes, self.budget // (TOKEN_BYTES * len(self._masks)))
        where = kept[:, 1] + np.cumsum([0, *sizes])[kept[:, 0]]
        value, se = (np.concatenate([getattr(answers[name], what) for name in self.probes]) for what in ("value", "se"))
        own = nbeta * np.concatenate([excess.kept[name].mean((0, 1), dtype=np.float64) for name in self.probes])
        order = np.argsort(-np.where(np.isfinite(value), np.abs(value), -np.inf), kind="stable")[: self.top]
        return {
            "llc": nbeta * float(observable.mean()),
            "mean": mean,
            "spread": width,
            "mean_se": mean_se,
            "replicates": np.array(replicates).T,
            "kept": where,
            "susceptibility": value[where],
            "susceptibility_se": se[where],
            "token_llc": own[where],
            "top_token": order,
            "top_susceptibility": value[order],
            "top_susceptibility_se": se[order],
            "places": [(excess.start[name].shape, excess.items[name]) for name in self.probes],
        }

    def _dataset(self, names: list[str], parts: list[dict[str, Any]], sets: dict[str, Scored]) -> xr.Dataset:
        def column(key: str) -> np.ndarray:
            return np.stack([part[key] for part in parts])

        places, probes = parts[0]["places"], list(self.probes)
        ends = np.cumsum([0, *(len(items) for _, items in places)])

        def named(item: int) -> str:
            which = int(np.searchsorted(ends, item, "right")) - 1
            shape, items = places[which]
            return label(sets[probes[which]].examples, shape, int(items[item - ends[which]]), self.words)

        error = "standard error over batches of draws (90% interval / 1.645)"
        rows = Rows(headline=["mean"], error=error, kind="susceptibilities", nbeta=parts[0]["nbeta"], gamma=self.gamma)
        rows.put("llc", "component", column("llc"), None, "local learning coefficient of the component", units="1")
        rows.put("temperature", "component", column("temperature"), None, "configurational temperature", units="1")
        rows.put("accepted", "component", column("accepted"), None, "1 where the chains are healthy", units="1")
        about = "susceptibility of the component's λ̂ to the probe"
        replicates = column("replicates").transpose(1, 0, 2)
        rows.put(
            "mean",
            ("component", "probe"),
            _finite(column("mean")),
            _finite(column("mean_se")),
            about,
            units="1",
            replicates=_finite(replicates),
        )
        rows.put(
            "spread",
            ("component", "probe"),
            _finite(column("spread")),
            None,
            "root mean square susceptibility over tokens",
            units="1",
        )
        nulls = _finite(column("nulls"))  # (component, null, mean or spread or error of the mean, probe)
        for i, name in enumerate(("mean", "spread")):
            values, se = (nulls[:, :, k].transpose(1, 0, 2) for k in (i, 2))
            known = se if name == "mean" else None
            rows.put(f"{name}_null", ("null", "component", "probe"), values, known, f"{name} under a null", units="1")
        # The arrays over tokens are what a run weighs: halves, and no more of them than the budget says.
        for key, text in (("susceptibility", "susceptibility to a token"), ("token_llc", "λ̂ of a token")):
            own = _half(column(f"{key}_se")) if key == "susceptibility" else None
            rows.put(key, ("component", "token"), _half(column(key)), own, text, units="1")
        top = column("top_token")
        rows.put("top_token", ("component", "rank"), top.astype(np.int32), None, "token of large |χ|", units="1")
        texts = np.array([[named(int(item)) for item in row] for row in top], dtype=object)
        rows.put("top_label", ("component", "rank"), texts, None, "context and token", units="text")
        rows.put(
            "top_susceptibility",
            ("component", "rank"),
            _half(column("top_susceptibility")),
            _half(column("top_susceptibility_se")),
            "susceptibility to a top token",
            units="1",
        )
        kept = parts[0]["kept"]
        dataset = rows.dataset(
            component=np.array(names, dtype=object),
            probe=np.array(probes, dtype=object),
            token=kept,
            rank=np.arange(top.shape[1]),
            null=np.array(NULLS, dtype=object),
        )
        texts = np.array([named(int(item)) for item in kept], dtype=object)
        which = np.array([probes[int(np.searchsorted(ends, item, "right")) - 1] for item in kept], dtype=object)
        return dataset.assign_coords(label=("token", texts), probe_of=("token", which))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _half(values: np.ndarray) -> np.ndarray:
    """As float16: three digits, at most 65504 in size; what is not finite is NaN."""
    largest = float(np.finfo(np.float16).max)
    return np.clip(_finite(values), -largest, largest).astype(np.float16)
