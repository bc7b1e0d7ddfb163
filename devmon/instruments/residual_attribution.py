"""Direct logit attribution: which parts of the model write the difference between two logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout, Reads
from devmon.anatomy.circuits import Contributions
from devmon.anatomy.passes import Read, Seen, read
from devmon.anatomy.sites import Site
from devmon.cost import GPT2_SMALL, Cost, Shape, trials
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches, probe_tokens, repeats
from devmon.data.jackknife import bootstrap_of_sizes, jackknife_of_mean
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot, derive_seed

ROUNDING_OF_NORMS = 3e-4  # RMSNorms of transformers round to float32 whatever the model's dtype
FLOOR = 1e-9  # of logits: under it no part says anything

Write = dict[tuple[str, int], Callable[[Tensor], Tensor]]


@dataclass(frozen=True, eq=False)
class ResidualAttribution(ByContent):
    """The logit difference of answer and foil, split into what each part of the model adds to the residual stream.

    `tokens` (prompt, pos) are the prompts, `answers`, `foils` (prompt,) two tokens each, `positions` (prompt,) where
    the answer is predicted (the last by default). `ResidualAttribution.repeated(vocab_size)` makes a probe of repeated
    random tokens: the answer is the token that followed last time, the foil a random other one.

    The final norm is a linear map once its scale is frozen at what it is in this forward pass, so with x_c what part c
    adds to the final stream and u = W_U[:, answer] − W_U[:, foil]: DLA_c = norm(x_c) · u, and Σ_c DLA_c is the logit
    difference exactly (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Wang et al. 2022,
    2211.00593). Parts, the coordinate `component`: "embedding" (tokens and learned positions), "head 2.5" (head 5 of
    layer 2), "attention bias 2" (of the output map), "mlp 2", "bias" (of the final norm and the unembedding). What
    stands between a part and the stream (Gemma 2, OLMo 2) is frozen in the same way. All logits are before any cap. The
    first `ablation_prompts` prompts (at least 3; 0 leaves `effect` and `linearity` out) are run again for every head
    and MLP, with its output replaced, at every position, by its mean over those prompts at that position.

    - `logit_difference`, logit: logit of the answer minus that of the foil, mean over prompts. Null: 0.
    - `logit_difference_se`, logit: its standard error over prompts.
    - `attribution` (component), logit: DLA_c, mean over prompts. Null: `attribution_null`.
    - `attribution_se` (component), logit: its standard error over prompts.
    - `attribution_null` (component), logit: the same for the answer of the next prompt, what a part says whatever the
      prompt.
    - `closure`, logit: max over prompts of abs(Σ_c DLA_c − difference), below 1e-4 in float32 for logits of ordinary
      size.
    - `top_share`, share: max_c |DLA_c| / Σ_c |DLA_c| of the means over prompts; NaN where Σ |DLA| is under 1e-9 logits.
      Null: `top_share_null`.
    - `top_share_se`, share: its standard error, by the bootstrap over prompts.
    - `top_share_null`, share: top_share of attribution_null.
    - `participation`, parts: (Σ_c |DLA_c|)² / Σ_c DLA_c² of the means over prompts, the number of parts that share the
      work, from 1; NaN likewise.
    - `participation_se`, parts: its standard error, by the bootstrap over prompts.
    - `effect` (component), logit: difference − difference with the part ablated; NaN for what is no head or MLP.
    - `effect_se` (component), logit: its standard error over the ablated prompts.
    - `linearity`, 1: corr²(DLA, effect) over heads and MLPs, of the means over the ablated prompts, in [0, 1]; NaN
      where either hardly varies, or for fewer than 3 such parts.
    - `linearity_se`, 1: its standard error, by the jackknife over prompts.

    Pitfalls: DLA is not the total effect: what later parts make of x_c counts for them, and they repair what is
    missing, hence `linearity`. Large parts that cancel (an MLP against the embedding) look important. Ablation runs the
    model once for every head and MLP. Raises InstrumentError for models whose stream is normed after each addition or
    whose unembedding does not read it directly (BERT, ESM), for tokens outside the vocabulary, and where the parts do
    not sum up to the logits (another `layout` is needed); DataError for a probe of the wrong shape.
    """

    tokens: Tensor
    answers: Tensor
    foils: Tensor
    positions: Tensor | None = None
    ablation_prompts: int = 16
    batch_size: int = 32
    layout: Layout | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "ResidualAttribution", shortest=1))
        prompts, length = self.tokens.shape
        for name in ("answers", "foils", "positions"):
            given = getattr(self, name)
            if given is None:
                continue
            if given.shape != (prompts,):
                shape = tuple(given.shape)
                raise DataError(f"ResidualAttribution needs {name} ({prompts},), one for each prompt, got {shape}")
            object.__setattr__(self, name, probe_tokens(given[:, None], "ResidualAttribution", name, 1)[:, 0])
        if self.positions is not None and not bool(((self.positions >= -length) & (self.positions < length)).all()):
            raise DataError(f"ResidualAttribution needs positions within prompts of {length} tokens")
        if bool((self.answers == self.foils).any()):
            raise DataError("ResidualAttribution needs a foil other than the answer in every prompt")
        if self.ablation_prompts and min(self.ablation_prompts, prompts) < 3:
            raise DataError(
                f"ResidualAttribution needs ablation_prompts of 0 or at least 3, got {self.ablation_prompts} of "
                f"{prompts} prompts"
            )

    @classmethod
    def repeated(
        cls,
        vocab_size: int,
        prompts: int = 64,
        length: int = 64,
        seed: int = 0,
        bos: int | None = None,
        exclude: tuple[int, ...] = (),
        ablation_prompts: int = 16,
        batch_size: int = 32,
        layout: Layout | None = None,
    ) -> ResidualAttribution:
        """A probe of repeated random tokens: one position in the second copy of each sequence of `devmon.data.repeats`.

        Its next token is in that copy too and free of accidental collisions; sequences without one are left out. The
        foil is a random other token.
        """
        probe = repeats(vocab_size, prompts, length, seed, bos, exclude)
        generator = torch.Generator().manual_seed(derive_seed(seed, "ResidualAttribution"))
        # a random usable position of each sequence that has one
        usable = probe.query[:, :-1] & probe.query[:, 1:]
        rows = usable.any(1)
        places = torch.rand(usable.shape, generator=generator).masked_fill(~usable, -1.0).argmax(1)[rows]
        tokens = probe.tokens[rows]
        answers = tokens.gather(1, places[:, None] + 1)[:, 0]
        # a foil a random number of tokens further, around the circle of those allowed: never the answer itself
        allowed = torch.tensor(sorted(set(range(vocab_size)) - {*exclude, bos}))
        rank = torch.searchsorted(allowed, answers)
        step = torch.randint(1, len(allowed), answers.shape, generator=generator)
        foils = allowed[(rank + step) % len(allowed)]
        return cls(tokens, answers, foils, places, min(ablation_prompts, len(tokens)), batch_size, layout)

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        """Without the ablations, whose number is that of the model's heads and MLPs, times `ablation_prompts`."""
        sequences, positions = self.tokens.shape
        before = trials(positions, 1)
        # what every part adds at the measured place, in float64, three times while norms are taken out
        parts = 24 * sequences * (shape.layers * (shape.heads + 2) + 2) * shape.d_model
        return Cost(sequences, positions=positions, softmaxes=sequences * positions, trials=before, held=parts)

    def reads(self) -> list[Read]:
        sites: list[Site] = [("resid_pre", 0), "z", ("resid_post", -1)]
        asked: dict[str, Any] = {"sites": sites, "optional": ["mlp_out"], "layout": self.layout, "predicts": "all"}
        return [Read(self, self.tokens, self._here, self.batch_size, **asked)]

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        anatomy = Anatomy.of(snapshot, self.layout, type(self).__name__)
        _refuse(anatomy, max(int(self.answers.max()), int(self.foils.max())))
        [parts] = read(snapshot, self)

        # all at the one position of each prompt where the answer is predicted, in float64
        difference, off = (torch.cat(column).numpy() for column in zip(*(part[:2] for part in parts), strict=True))
        here = Reads({site: torch.cat([part.sites[site] for part in parts]).double() for site in parts[0].sites})
        written = Contributions(anatomy, here)
        split = written.attribution(self.answers, self.foils)
        null = written.attribution(self.answers.roll(1), self.foils)

        # a layout that misses a part that writes to the stream shows here, and nowhere else
        gap = np.maximum(np.abs(split.sum(1) - difference), off)
        eps = torch.finfo(parts[0].sites["resid_pre", 0].dtype).eps
        self._check_closure(type(snapshot.model).__name__, gap, split, difference, eps)

        effect = self._effects(anatomy, parts, difference) if self.ablation_prompts else None
        return _dataset(written.names, split, null, difference, float(gap.max()), effect)

    def _here(self, seen: Seen) -> _Part:
        """Of a minibatch, where its answers are predicted: the differences of logits, and the sites."""
        anatomy, prompt, place = seen.anatomy, torch.arange(len(seen.inputs)), self._predicted[seen.rows]
        answers, foils = self.answers[seen.rows], self.foils[seen.rows]
        sites = Reads({site: value[prompt, place] for site, value in seen.sites.items()})

        def difference(scores: Tensor) -> Tensor:
            return scores[prompt, answers].cpu().double() - scores[prompt, foils].cpu().double()

        # a cap is no linear map: the logits before it are worked out, and those after it held against the model's
        capped = not torch.equal(anatomy.capped(torch.ones(1)), torch.ones(1))
        model = difference(seen.log_p[prompt, place])
        if capped:
            before = anatomy.unembedding(anatomy.final_norm(sites["resid_post", anatomy.layers - 1]))
        # of the prompts that are ablated, all positions: their means are put in place of the parts
        ablated = slice(0, max(min(self.ablation_prompts, len(self.tokens)) - seen.rows.start, 0))
        return _Part(
            difference(before) if capped else model,
            (difference(anatomy.capped(before)) - model).abs() if capped else torch.zeros_like(model),
            sites,
            Reads({site: value[ablated] for site, value in seen.sites.items() if site[0] in ("z", "mlp_out")}),
        )

    def _check_closure(self, name: str, gap: np.ndarray, split: np.ndarray, difference: np.ndarray, eps: float) -> None:
        """InstrumentError where the parts do not sum up to the difference, within rounding."""
        eps = max(math.sqrt(eps), ROUNDING_OF_NORMS)
        if bool((gap > eps * (1 + np.abs(split).sum(1))).any()):
            raise InstrumentError(
                f"{type(self).__name__}: the parts of {name} sum up to logit differences that "
                f"are off by {gap.max():.3g} (of {np.abs(difference).max():.3g}): its layout misses a part that writes "
                "to the stream; check it with Anatomy(model, layout).rebuild(tokens)"
            )

    @cached_property
    def _predicted(self) -> Tensor:
        """The position of each prompt after which the answer comes, (prompt,)."""
        length = self.tokens.shape[1]
        return torch.full((len(self.tokens),), length - 1) if self.positions is None else self.positions % length

    def _effects(self, anatomy: Anatomy, parts: list[_Part], difference: np.ndarray) -> np.ndarray:
        """(prompt, component) of the ablated prompts: the drop of the difference, NaN where nothing is ablated."""
        count = min(self.ablation_prompts, len(self.tokens))
        reads = {site: torch.cat([part.ablated[site] for part in parts]) for site in parts[0].ablated}
        nothing = np.full(count, np.nan)

        def effect(write: Write) -> np.ndarray:
            return difference[:count] - self._ablated(anatomy, write, count)

        # in the order of the components: embedding, then layer by layer heads, bias and MLP, then the last bias
        columns = [nothing]
        for layer in range(anatomy.layers):
            mean = reads["z", layer].mean(0, dtype=torch.float64)  # (pos, head, d_head)
            columns += [effect({("z", layer): partial(_put, head, mean[:, head])}) for head in range(anatomy.heads)]
            columns.append(nothing)
            if anatomy.has_mlp:
                mean = reads["mlp_out", layer].mean(0, dtype=torch.float64)  # (pos, d)
                columns.append(effect({("mlp_out", layer): partial(_constant, mean)}))
        return np.stack([*columns, nothing], 1)

    def _ablated(self, anatomy: Anatomy, write: Write, count: int) -> np.ndarray:
        """The logit difference (prompt,) of the first `count` prompts with a site written."""
        differences = []
        for rows in minibatches(count, self.batch_size):
            _, reads = anatomy.run(self.tokens[rows], ["unembedded"], write)
            prompt = torch.arange(rows.stop - rows.start)
            here = reads["unembedded", 0][prompt, self._predicted[rows]].cpu().double()
            differences.append(here.gather(1, self.answers[rows, None]) - here.gather(1, self.foils[rows, None]))
        return torch.cat(differences)[:, 0].numpy()


class _Part(NamedTuple):
    """Of one minibatch, at the position of each prompt where the answer is predicted: the difference of logits before
    any cap, how far its logits are off the model's, the sites; and of the prompts that are ablated, all positions."""

    difference: Tensor
    off: Tensor
    sites: Reads
    ablated: Reads


def _refuse(anatomy: Anatomy, largest: int) -> None:
    name = type(anatomy.model).__name__
    anatomy.need_sum()
    if largest >= anatomy.W_U.shape[1]:
        raise InstrumentError(
            f"{anatomy.who}: answers and foils go up to {largest} but {name} has {anatomy.W_U.shape[1]} logits: give "
            "tokens of this model's vocabulary"
        )


def _put(head: int, mean: Tensor, z: Tensor) -> Tensor:
    """z (batch, pos, head, d_head) with the mean (pos, d_head) in place of a head."""
    z = z.clone()
    z[:, :, head] = mean.to(z)
    return z


def _constant(mean: Tensor, x: Tensor) -> Tensor:
    """The mean (pos, d) in place of x (batch, pos, d)."""
    return mean.to(x).expand_as(x)


def _dataset(
    names: list[str],
    split: np.ndarray,
    null: np.ndarray,
    difference: np.ndarray,
    closure: float,
    effect: np.ndarray | None,
) -> xr.Dataset:
    headline = ["logit_difference", "top_share", "participation", *(["linearity"] if effect is not None else [])]
    rows, each = Rows(headline), np.ones(len(split))

    def put(name: str, dims: str | tuple[str, ...], found: tuple[Any, ...], label: str, **more: Any) -> None:
        value, se, groups = (*found, None)[:3]
        error = f"standard error of {name} over prompts"
        rows.put(name, dims, value, se, label, error=error, replicates=groups, **more)

    # means over prompts, in logits
    answer = *clustered_mean(difference, each), clustered_groups(difference, each)
    label = "logit of the answer minus that of the foil"
    put("logit_difference", (), answer, label, units="logit", smallest_change=0.1)
    direct = clustered_mean(split, each)
    put("attribution", "component", direct, "direct contribution to the logit difference", units="logit")
    put("attribution_null", "component", (null.mean(0), None), "the same for another prompt's answer", units="logit")
    put("closure", (), (closure, None), "largest error of the sum of the parts", units="logit")

    # functions of those means
    nothing = f"the parts write less than {FLOOR} logits"
    top, few = bootstrap_of_sizes(_top_share, split), bootstrap_of_sizes(_participation, split)
    label = "largest part of the sum of abs(contribution)"
    put("top_share", (), top, label, units="share", nan=nothing, smallest_change=0.05)
    other = _top_share(null.mean(0)), None
    put("top_share_null", (), other, "top share for another prompt's answer", units="share", nan=nothing)
    label = "number of parts that share the work"
    put("participation", (), few, label, units="parts", nan=nothing, smallest_change=0.5)
    if effect is not None:
        _put_effects(put, split, effect)
    return rows.dataset(component=np.array(names, dtype=object))


def _put_effects(put: Callable[..., None], split: np.ndarray, effect: np.ndarray) -> None:
    drop, label = clustered_mean(effect, np.ones(len(effect))), "drop of the difference by mean ablation"
    put("effect", "component", drop, label, units="logit", nan="only heads and MLPs are ablated")
    used = ~np.isnan(effect[0])
    both = np.stack([split[: len(effect), used], effect[:, used]], 1)  # (prompt, 2, part)
    square, label = jackknife_of_mean(_linearity, both), "corr² of contribution and effect"
    nothing = "contributions or effects hardly vary, or fewer than 3 heads and MLPs"
    put("linearity", (), square, label, units="1", nan=nothing, smallest_change=0.1)


def _top_share(mean: np.ndarray) -> float:
    size = np.abs(mean)
    return float(size.max() / size.sum()) if size.sum() > FLOOR else math.nan


def _participation(mean: np.ndarray) -> float:
    size = np.abs(mean)
    return float(size.sum() ** 2 / (size**2).sum()) if size.sum() > FLOOR else math.nan


def _linearity(both: np.ndarray) -> float:
    """corr² of the two rows."""
    if both.shape[1] < 3 or both.std(1).min() <= FLOOR:
        return math.nan
    return float(np.corrcoef(both)[0, 1] ** 2)
