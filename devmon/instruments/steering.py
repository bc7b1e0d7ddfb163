"""Steering: what adding a direction to the activations does to an answer, to other text, and to how real states are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.anatomy.patching import logit_difference
from devmon.anatomy.realism import Gauge
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches, probe_tokens
from devmon.data.prompt_pairs import PromptPairs
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.features.dictionary import Dictionary
from devmon.features.sources import MLP_IN, check_site, site_activations
from devmon.snapshot import Snapshot, derive_seed

STILL = "NaN where no state of the text moves along it"


@dataclass(frozen=True, eq=False)
class Steering(ByContent):
    """How an answer moves when a direction is added to the activations at a site, against random directions.

    At every place x becomes x + α v, v of length 1 and α = ± `strengths` · σ, σ the standard deviation of ⟨x, v⟩ over
    `tokens` (batch, pos), first places left out. v are the `directions` (direction, d), or those of the `latents` of a
    `dictionary`, d_j / ‖d_j‖. m(α) is the logit of the answer minus that of the foil at the last place of the clean
    prompts of `pairs` (`devmon.data.prompt_pairs`). The same α on `tokens` tells the side effect. With one direction
    the `random` ones, drawn from `seed`, get its α; with several the mean of theirs.

    - `slope` (direction, strength), nats per unit: (m(α) - m(-α)) / 2α, α in units of the activations; behind a linear
      readout w it is ⟨v, w⟩ at any α, behind a norm it falls with α. Null: `slope_random`.
    - `slope_se` (direction, strength), nats per unit: its standard error over prompts.
    - `slope_p` (direction, strength), share: (1 + random directions with an absolute slope as large) / (1 + `random`).
    - `slope_random` (strength), nats per unit: mean absolute slope of random directions; ‖w‖ √(2/πd) behind a linear
      readout.
    - `slope_random_sd` (strength), nats per unit: standard deviation of their slopes.
    - `slope_matched` (strength), nats per unit: of a dictionary, mean absolute slope of as many other latents that fire
      about as often as those given; NaN where there are none.
    - `curvature` (direction, strength), nats per squared unit: (m(α) - 2 m(0) + m(-α)) / α². Null: 0 for a linear
      readout.
    - `curvature_se` (direction, strength), nats per squared unit: its standard error over prompts.
    - `curvature_random` (strength), nats per squared unit: mean absolute curvature of random directions.
    - `kl` (direction, strength), nats per token: divergence of the steered predictions of `tokens` from the plain ones,
      mean of both signs. Null: `kl_random`.
    - `kl_se` (direction, strength), nats per token: its standard error over sequences.
    - `kl_random` (strength), nats per token: the same of random directions.
    - `norm_ratio` (direction, strength), 1: mean norm of the stream after the layer at the last place, over that of
      plain prompts, mean of both signs. Null: 1.
    - `quantile` (direction, strength), 1: its mean Mahalanobis quantile among plain prompts. Null: 0.5.
    - `sigma` (direction), units: σ.
    - `firing` (direction), share: of a dictionary, places of `tokens` at which the latent fires.

    A slope is one of a mean over prompts and of its foils: a direction that moves all logits alike has none. Read it
    beside `kl` and `quantile`, as a state that no prompt makes may do anything (Heimersheim & Nanda 2024, 2404.15255).
    Cost: 1 + 2 · strengths · (directions + random) passes of the prompts and of `tokens`, with a dictionary half as
    many directions more. Raises InstrumentError for a site that the model lacks and for directions of another width,
    DataError for settings.
    """

    pairs: PromptPairs
    tokens: Tensor
    site: tuple[str, int]
    directions: Tensor | None = None
    dictionary: Dictionary | None = None
    latents: tuple[int, ...] = ()
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    random: int = 20
    seed: int = 0
    layout: Layout | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "Steering"))
        object.__setattr__(self, "strengths", tuple(float(each) for each in self.strengths))
        if (self.directions is None) == (self.dictionary is None):
            raise DataError("Steering needs either directions (direction, d) or a dictionary with latents")
        if self.directions is not None:
            given = torch.as_tensor(self.directions).detach().to("cpu", copy=True)
            lengths = given.double().norm(dim=-1) if given.ndim == 2 else torch.zeros(1)
            if not given.is_floating_point() or not len(given) or not bool(((lengths > 0) & lengths.isfinite()).all()):
                raise DataError(
                    f"Steering needs directions (direction, d) of finite floats, none of length 0; got "
                    f"{tuple(given.shape)} of {given.dtype}, lengths {lengths.tolist()[:8]}"
                )
            object.__setattr__(self, "directions", given)
        if self.dictionary is not None:
            m = self.dictionary.latents
            if not self.latents or any(not 0 <= latent < m for latent in self.latents):
                raise DataError(f"Steering needs latents of its dictionary, 0 to {m - 1}; got {self.latents}")
        if self.random < 2 or not self.strengths or min(self.strengths) <= 0 or len(self.pairs.clean) < 6:
            raise DataError(
                f"Steering needs random >= 2, strengths above 0 and at least 6 prompts; got {self.random}, "
                f"{self.strengths} and {len(self.pairs.clean)}"
            )

    def cost(self) -> Cost:
        given = len(self.latents) if self.directions is None else len(self.directions)
        matched = 0 if self.dictionary is None else self.random
        passes = 1 + 2 * len(self.strengths) * (given + self.random + matched)
        texts = 2 + 2 * len(self.strengths) * (given + self.random)
        prompts, length = self.pairs.clean.shape
        tokens = passes * prompts * length + texts * self.tokens.numel()
        return Cost(forwards=round(tokens / self.tokens.shape[1]), positions=self.tokens.shape[1])

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        anatomy = Anatomy.of(snapshot, self.layout, type(self).__name__)
        check_site(anatomy, self.site)
        anatomy.need_causal(self.tokens)
        if self.site[0] == MLP_IN:
            raise InstrumentError("Steering: 'mlp_in' can be read, not written: steer 'resid_mid' or 'mlp_out'")
        chosen = self._directions(anatomy)
        given, alphas = len(chosen.sigma), np.array(self.strengths) * chosen.alpha[:, None]  # (vector, strength)

        # what all of them do to the answer, and all but the matched latents to other text and to the states
        plain, steered, states = self._answers(anatomy, chosen.vectors, alphas)
        both = given + self.random
        with np.errstate(invalid="ignore", divide="ignore"):
            slopes = (steered[..., 0] - steered[..., 1]) / (2 * alphas)  # (prompt, vector, strength)
            bends = (steered.sum(-1) - 2 * plain[:, None, None]) / alphas**2
        apart, counts = self._side_effects(anatomy, chosen.vectors[:both], alphas[:both])

        # the given directions with their error, the random ones as the null
        rows = Rows(headline=["slope"], error="standard error over prompts")
        dims, ones = ("direction", "strength"), np.ones(len(plain))
        for name, values, unit, label in (
            ("slope", slopes, "unit", "slope of the logit difference along the direction"),
            ("curvature", bends, "squared unit", "curvature of the logit difference along the direction"),
        ):
            mean, se = clustered_mean(values, ones)
            about: dict[str, Any] = {"units": f"nats per {unit}", "nan": STILL}
            groups = clustered_groups(values[:, :given], ones)
            rows.put(name, dims, mean[:given], se[:given], label, **about, replicates=groups)
            null = np.abs(mean[given:both])
            rows.put(f"{name}_random", "strength", null.mean(0), None, f"{label}, random, absolute", **about)
            if name == "slope":
                larger = (null[None] >= np.abs(mean[:given, None])).sum(1)
                share = np.where(np.isnan(mean[:given]), np.nan, (1 + larger) / (1 + self.random))
                text = "share of random directions with as large a slope"
                rows.put("slope_p", dims, share, None, text, units="share", nan=STILL)
                spread = mean[given:both].std(0, ddof=1)
                rows.put("slope_random_sd", "strength", spread, None, "sd of slopes of random directions", **about)
                if self.dictionary is not None:
                    matched = np.abs(mean[both:])
                    value = matched.mean(0) if len(matched) else np.full(len(self.strengths), np.nan)
                    text = "mean absolute slope of other latents that fire as often"
                    rows.put("slope_matched", "strength", value, None, text, **about)

        mean, se = clustered_mean(apart, counts)
        text = "divergence of steered from plain predictions of other text"
        errors = "standard error over sequences"
        rows.put("kl", dims, mean[:given], se[:given], text, units="nats per token", nan=STILL, error=errors)
        rows.put("kl_random", "strength", mean[given:].mean(0), None, f"{text}, random", units="nats per token")
        self._put_realism(rows, states, given)
        rows.put("sigma", "direction", chosen.sigma, None, "sd of the text along the direction", units="units")
        if chosen.firing is not None:
            rows.put("firing", "direction", chosen.firing, None, "places at which the latent fires", units="share")
        names = self.latents if self.directions is None else range(given)
        return rows.dataset(direction=np.array(names), strength=np.array(self.strengths))

    def _directions(self, anatomy: Anatomy) -> _Directions:
        """The given, the random and the matched directions, of length 1, and the α of strength 1 of each."""
        x, _ = site_activations(anatomy, self.tokens, [self.site], batch_size=self.batch_size)
        width, firing, matched = x.shape[1], None, x.new_zeros(0, x.shape[1])
        if self.dictionary is None:
            assert self.directions is not None
            given = self.directions.to(x)
        else:
            self._check_width(anatomy, self.dictionary.outputs, width)
            rows = self.dictionary.W_dec.to(x)
            given = rows[list(self.latents)]
            rates = self._firing(anatomy, x)
            firing = rates[list(self.latents)].cpu().numpy()

            # other living latents, those next in the logarithm of how often they fire
            others = [i for i in (rates > 0).nonzero()[:, 0].tolist() if i not in self.latents]
            middle = rates[list(self.latents)].clamp(min=1 / len(x)).log().mean()
            order = (rates[others].log() - middle).abs().argsort(stable=True)[: self.random]
            matched = rows[[others[i] for i in order.tolist()]]
        self._check_width(anatomy, given.shape[1], width)

        generator = torch.Generator().manual_seed(derive_seed(self.seed, "Steering", "random"))
        drawn = torch.randn(self.random, width, generator=generator, dtype=torch.float64).to(x)
        vectors = torch.cat([given, drawn, matched])
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        along = x.double() @ vectors[: len(given)].double().T
        sigma = along.std(0, correction=0).cpu().numpy()
        mean = float(sigma[sigma > 0].mean()) if (sigma > 0).any() else 0.0
        return _Directions(vectors, sigma, np.concatenate([sigma, np.full(len(vectors) - len(sigma), mean)]), firing)

    def _firing(self, anatomy: Anatomy, x: Tensor) -> Tensor:
        """The share of places (latent,) at which a latent fires; a transcoder reads what its MLP reads."""
        assert self.dictionary is not None
        if not self.dictionary.centred:
            read = [(MLP_IN, self.site[1])]
            x, _ = site_activations(anatomy, self.tokens, read, batch_size=self.batch_size)
        self._check_width(anatomy, self.dictionary.inputs, x.shape[1])
        coder = self.dictionary.to(x)
        total = sum((coder.encode(x[rows]) > 0).double().sum(0) for rows in minibatches(len(x), 4096))
        return torch.as_tensor(total) / len(x)

    def _check_width(self, anatomy: Anatomy, got: int, width: int) -> None:
        if got != width:
            raise InstrumentError(
                f"Steering: {self.site} of {type(anatomy.model).__name__} is {width} wide, its directions are {got}: "
                "give directions, or a dictionary, of this site"
            )

    def _answers(
        self, anatomy: Anatomy, vectors: Tensor, alphas: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, tuple[Tensor, Tensor]]:
        """m (prompt,) plain and (prompt, vector, strength, sign) steered; the stream at the last place, plain (prompt,
        d) and steered (vector, strength, sign, prompt, d)."""
        after, pairs = ("resid_post", self.site[1]), self.pairs
        found: list[tuple[Any, ...]] = []
        for rows in minibatches(len(pairs.clean), self.batch_size):

            def ends(write: Any, rows: slice = rows) -> tuple[np.ndarray, Tensor]:
                output, reads = anatomy.run(pairs.clean[rows], [after], write)
                m = logit_difference(output, pairs.answer[rows], pairs.foil[rows], type(self).__name__)
                return m.cpu().numpy(), next(iter(reads.values()))[:, -1]

            m, state = ends({})
            steered = [ends({self.site: write}) for write in _writes(vectors, alphas)]
            found.append((m, state, np.stack([each for each, _ in steered], -1), [each for _, each in steered]))
        plain, states, moved, moved_states = zip(*found, strict=True)
        by_vector = (*alphas.shape, 2)
        steered_states = torch.cat([torch.stack(each) for each in moved_states], 1).unflatten(0, by_vector)
        return (
            np.concatenate(plain),
            np.concatenate(moved).reshape(-1, *by_vector),
            (torch.cat(states), steered_states),
        )

    def _side_effects(self, anatomy: Anatomy, vectors: Tensor, alphas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """KL of steered from plain predictions, summed over places, (sequence, vector, strength), and their number."""
        totals = []
        for rows in minibatches(len(self.tokens), self.batch_size):
            plain = _log_p(anatomy.run(self.tokens[rows])[0])
            found = []
            for write in _writes(vectors, alphas):
                moved = _log_p(anatomy.run(self.tokens[rows], write={self.site: write})[0])
                found.append((plain.exp() * (plain - moved)).sum(-1).double().sum(-1).clamp(min=0).cpu().numpy())
            totals.append(np.stack(found, -1).reshape(len(plain), *alphas.shape, 2).mean(-1))
        total = np.concatenate(totals)
        total[:, alphas == 0] = np.nan
        return total, np.full(len(total), float(self.tokens.shape[1]))

    def _put_realism(self, rows: Rows, states: tuple[Tensor, Tensor], given: int) -> None:
        plain, steered = states
        gauge = Gauge.fit(plain[None])
        found = np.array([[[gauge(0, each) for each in signs] for signs in one] for one in steered[:given]])
        norm, quantile = found.mean(2).transpose(2, 0, 1)
        dims = ("direction", "strength")
        rows.put("norm_ratio", dims, norm, None, "norm of the stream after the layer over the plain one", units="1")
        label = "Mahalanobis quantile of the stream among plain prompts"
        rows.put("quantile", dims, quantile, None, label, units="1")


class _Directions(NamedTuple):
    """`vectors` (vector, d) of length 1, the given ones first; their σ (direction,); the α of strength 1 (vector,); how
    often latents fire (direction,)."""

    vectors: Tensor
    sigma: np.ndarray
    alpha: np.ndarray
    firing: np.ndarray | None


def _writes(vectors: Tensor, alphas: np.ndarray) -> list[Any]:
    """What adds α v to a site, for each vector, strength and sign."""
    return [
        _added(float(sign * alpha) * vector)
        for vector, row in zip(vectors, alphas, strict=True)
        for alpha in row
        for sign in (1, -1)
    ]


def _added(step: Tensor) -> Any:
    return lambda value: value + step.to(value).view(value.shape[2:])


def _log_p(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
