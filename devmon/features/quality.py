"""How good a dictionary is at a site of a snapshot: sparsity, error, what the model loses, bits, use of latents."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.layout import Layout
from devmon.anatomy.passes.kept import activations
from devmon.data.probe import clustered_groups, clustered_mean, minibatches
from devmon.data.rows import Rows
from devmon.data.shares import share, share_groups
from devmon.errors import InstrumentError
from devmon.features.constants import BINS, BITS_TOLERANCE, DENSE, TOP_PLACES
from devmon.features.dictionary import Dictionary
from devmon.features.sources import MLP_IN, check_site, flat
from devmon.snapshot import Snapshot, derive_seed


class Quality(NamedTuple):
    """Sums by sequence (sequence,), and arrays by latent."""

    places: int  # of a sequence
    by_sequence: dict[str, np.ndarray]
    fired: np.ndarray  # (sequence, latent): places where it fires
    strength: np.ndarray  # (latent,): mean activation there, NaN for a silent one
    top: np.ndarray  # (latent, rank): places sequence · length + pos of the largest activations, -1 where none
    top_activation: np.ndarray
    bits: float
    gaussian: dict[str, float]
    mean_state: np.ndarray  # (sequence, d) and (sequence, latent): means over places
    mean_f: np.ndarray
    x: Tensor  # (sequence, place, d) and (sequence, place, latent): the states and the latents, without first places
    f: Tensor


def quality(
    snapshot: Snapshot,
    dictionary: Dictionary,
    tokens: Tensor,
    site: tuple[str, int],
    who: str,
    layout: Layout | None = None,
    batch_size: int = 32,
) -> Quality:
    """What `put_quality` tells of an autoencoder at a site, for tokens (batch, pos) without their first places.

    Raises InstrumentError for a site that the model lacks, or of another width than the dictionary.
    """
    anatomy = Anatomy.of(snapshot, layout, who)
    check_site(anatomy, site)
    if site[0] == MLP_IN:
        raise InstrumentError(f"{who}: {MLP_IN!r} is read, and cannot be replaced alone: take 'resid_mid' or 'mlp_out'")
    anatomy.need_causal(tokens)
    output, reads = activations(snapshot, tokens, [site], who, layout, batch_size)
    at = anatomy.expand(site)[0]
    x = flat(anatomy, site, reads[at])[:, 1:]
    if x.shape[-1] != dictionary.inputs or dictionary.parts != 1 or not dictionary.centred:
        raise InstrumentError(
            f"{who}: {site} of {type(anatomy.model).__name__} is {x.shape[-1]} wide, the dictionary an autoencoder of "
            f"{dictionary.inputs}: give one that was trained there"
        )
    coder, mean = dictionary.to(x), x.flatten(0, 1).mean(0)

    # What the dictionary makes of the site, sequence by sequence, and what the model loses by it
    with torch.no_grad():
        f = torch.cat([coder.encode(x[rows]) for rows in minibatches(len(x), batch_size)])
        made = torch.cat([coder.decode(f[rows]) for rows in minibatches(len(x), batch_size)])
        sums = {
            "l0": (f > 0).sum((1, 2)),
            "error": (x - made).square().sum((1, 2)),
            "variance": (x - mean).square().sum((1, 2)),
            "made": made.square().sum((1, 2)),
            "aligned": (x * made).sum((1, 2)),
        }
        sums |= _losses(anatomy, tokens, at, output, reads[at], made, mean, batch_size)
        by_sequence = {name: each.double().cpu().numpy() for name, each in sums.items()}

        # By latent: how often it fires, how strongly, and where most
        fired = (f > 0).sum(1)
        count = fired.sum(0)
        strength = (f.flatten(0, 1).double().sum(0) / count).cpu().numpy()
        top, top_activation = _top(f, tokens.shape[1])
        return Quality(
            x.shape[1],
            by_sequence,
            fired.cpu().numpy(),
            strength,
            top,
            top_activation,
            description_length(f.flatten(0, 1), coder.W_dec, float(sums["variance"].sum())),
            _gaussian(coder, x.flatten(0, 1)),
            x.mean(1).double().cpu().numpy(),
            f.mean(1).double().cpu().numpy(),
            x,
            f,
        )


def put_quality(rows: Rows, found: Quality) -> None:
    """The variables of a `Quality` (the docstrings of the instruments say what each is)."""
    sums, places = found.by_sequence, np.full(len(found.by_sequence["l0"]), found.places)
    ratios = {
        "l0": ("l0", places, "latents that fire in a place", "latents", 0.5),
        "fvu": ("error", sums["variance"], "share of the variance that is not explained", "share", 0.02),
        "shrinkage": ("made", sums["aligned"], "length of what is made along the true state", "1", None),
        "loss": ("loss", places - 1, "loss of the model", "nats per token", None),
        "loss_spliced": ("loss_spliced", places - 1, "loss with the reconstruction in place", "nats per token", 0.05),
        "kl": ("kl_spliced", places, "divergence with the reconstruction in place", "nats", None),
    }
    for name, (sum_of, count, label, units, change) in ratios.items():
        mean, se = clustered_mean(sums[sum_of], count)
        groups = clustered_groups(sums[sum_of], count)
        rows.put(name, (), mean, se, label, units=units, smallest_change=change, replicates=groups)
    gone = "the ablation costs less than 3 standard errors"
    for kind in ("zero", "mean"):
        for name, sum_of, of in (("loss_recovered", "loss", "loss"), ("kl_score", "kl", "divergence")):
            before = sums["loss"] if sum_of == "loss" else 0.0
            whole = sums[f"{sum_of}_{kind}"] - before
            regained = sums[f"{sum_of}_{kind}"] - sums[f"{sum_of}_spliced"]
            mean, se = share(regained[:, None], whole)
            about = {"nan": gone, "smallest_change": 0.02, "replicates": share_groups(regained[:, None], whole)[:, 0]}
            label = f"share of the {of} that {kind} ablation costs, regained"
            rows.put(f"{name}_{kind}", (), mean[0], se[0], label, units="share", **about)  # type: ignore[arg-type]
    density, density_se = clustered_mean(found.fired, places)
    shares = {
        "dead": (density == 0, "latents that never fire"),
        "dense": (density > DENSE, f"latents that fire in more than {DENSE:.0%} of places"),
    }
    for name, (values, label) in shares.items():
        rows.put(name, (), values.mean(), None, label, units="share", smallest_change=0.02)
    rows.put("description_length", (), found.bits, None, "bits that tell the latents of a place", units="bits")
    for name, value in found.gaussian.items():
        label = "of Gaussian states of equal mean and covariance"
        rows.put(f"{name}_gaussian", (), value, None, label, units="latents" if name == "l0" else "share")
    rows.put("density", "latent", density, density_se, "share of places where it fires", units="share")
    rows.put("strength", "latent", found.strength, None, "mean activation", units="activation", nan="it never fires")
    where = "places of the largest activations, sequence · length + position"
    rows.put("top_place", ("latent", "rank"), found.top, None, where, units="place")
    rows.put("top_activation", ("latent", "rank"), found.top_activation, None, "activation there", units="activation")


def _losses(
    anatomy: Anatomy,
    tokens: Tensor,
    at: tuple[str, int],
    output: Tensor,
    clean: Tensor,
    made: Tensor,
    mean: Tensor,
    batch_size: int,
) -> dict[str, Tensor]:
    """Sums over places 1 … of the loss of the next token and of KL(clean ‖ changed), with the site changed there."""
    sums: dict[str, list[Tensor]] = {}
    for rows in minibatches(len(tokens), batch_size):
        target = tokens[rows, 1:].to(output.device)
        log_p = F.log_softmax(_floats(output[rows, 1:]), -1)
        new = {"spliced": made[rows], "zero": torch.zeros_like(made[rows]), "mean": mean.expand_as(made[rows])}
        for name, value in new.items():
            written = clean[rows].clone()
            written[:, 1:] = value.reshape(written[:, 1:].shape).to(written)
            log_q = F.log_softmax(_floats(anatomy.run(tokens[rows], write={at: written})[0][:, 1:]), -1)
            sums.setdefault(f"loss_{name}", []).append(_next(log_q, target))
            sums.setdefault(f"kl_{name}", []).append((log_p.exp() * (log_p - log_q)).sum((1, 2)))
        sums.setdefault("loss", []).append(_next(log_p, target))
    return {name: torch.cat(parts) for name, parts in sums.items()}


def _next(log_p: Tensor, target: Tensor) -> Tensor:
    """The loss summed over the places that have a next token; `log_p` (batch, pos - 1, vocab) of places 1 …"""
    return -log_p[:, :-1].gather(-1, target[:, 1:, None])[..., 0].sum(1)


def _floats(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def _top(f: Tensor, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and activations (latent, rank) of the largest of f (batch, pos - 1, latent), first places left out."""
    flat_f = f.flatten(0, 1)
    values, at = flat_f.topk(min(TOP_PLACES, len(flat_f)), dim=0)
    place = at // f.shape[1] * length + at % f.shape[1] + 1
    return torch.where(values > 0, place, -1).T.cpu().numpy(), values.T.float().cpu().numpy()


def description_length(f: Tensor, W_dec: Tensor, variance: float, bins: int | None = None) -> float:
    """Bits that tell the latents of a place, Σ_j H₂(p_j) + p_j H(bins of f_j where it fires) (MDL-SAEs, 2410.11179).

    f (place, latent); each latent has `bins` equal ones between its least and its largest activation. Without a number,
    the fewest of 2, 4, … 256 that move what is decoded by at most 1% of `variance`, Σ ‖x − x̄‖² of these places.
    """
    place, latent = f.nonzero(as_tuple=True)
    if not len(latent):
        return 0.0
    values, m = f[place, latent], f.shape[1]
    low = values.new_full((m,), float("inf")).scatter_reduce(0, latent, values, "amin")
    high = values.new_zeros(m).scatter_reduce(0, latent, values, "amax")
    width = (high - low).clamp(min=torch.finfo(values.dtype).tiny)[latent]
    bits = 0.0
    for number in BINS if bins is None else (bins,):
        bin_of = ((values - low[latent]) / width * number).long().clamp(max=number - 1)

        # Entropy of who fires, and of the bins of each latent among its firings
        fired = torch.bincount(latent, minlength=m).double()
        p = fired / len(f)
        who = (torch.special.entr(p) + torch.special.entr(1 - p)).sum()
        often = torch.bincount(latent * number + bin_of, minlength=m * number).view(m, number).double()
        which = (p * torch.special.entr(often / fired.clamp(min=1)[:, None]).sum(1)).sum()
        bits = float(who + which) / float(np.log(2))

        # What is moved when each activation is the middle of its bin
        middle = low[latent] + (bin_of + 0.5) / number * width
        moved = torch.zeros_like(f).index_put_((place, latent), middle - values) @ W_dec
        if float(moved.square().sum()) <= BITS_TOLERANCE * variance:
            break
    return bits


def _gaussian(coder: Dictionary, x: Tensor) -> dict[str, float]:
    """FVU and L0 of as many Gaussian states of the mean and covariance of x (place, d): nothing but second moments."""
    mean = x.mean(0)
    spectrum = torch.linalg.eigh(((x - mean).T @ (x - mean)).double() / len(x))
    root = (spectrum.eigenvectors * spectrum.eigenvalues.clamp(min=0).sqrt()).to(x)
    generator = torch.Generator().manual_seed(derive_seed(0, "gaussian"))
    drawn = mean + torch.randn(len(x), x.shape[1], generator=generator).to(x) @ root.T
    f = coder.encode(drawn)
    error = (drawn - coder.decode(f)).square().sum()
    return {"fvu": float(error / (drawn - drawn.mean(0)).square().sum()), "l0": float((f > 0).sum(1).double().mean())}
