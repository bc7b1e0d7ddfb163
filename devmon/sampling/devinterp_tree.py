"""Per-token traces in the tree that devinterp 2 reads: LLC, susceptibilities and influence functions run on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from devmon.errors import InstrumentError
from devmon.sampling.losses import next_token_loss, outputs
from devmon.sampling.traces import Settings, sample


def sample_tree(
    model: nn.Module, tokens: Tensor, observables: Mapping[str, Tensor], settings: Settings, *, seed: int = 0
) -> xr.DataTree:
    """Chains of a language model with per-token losses (nats) of the `observables` at each kept draw.

    `tokens` (example, pos) are sampled on, `observables` maps names to tokens of the same length. The tree has
    `loss_NAME` (chain, draw, batch_NAME, token_pos), `input_ids_NAME`, `init_loss`, `sampling_loss_micro` and the
    sampler's settings as devinterp writes them, draws after burn-in alone. What we store per minibatch stands for all
    of its tokens, and `init_loss` is that of the same examples: `devinterp.slt.llc.compute_llc` gives our λ̂.
    Raises InstrumentError for tokens of unequal length.
    """
    length = tokens.shape[1]
    for name, probe_tokens in observables.items():
        if probe_tokens.shape[1] != length:
            raise InstrumentError(f"observable {name!r} has {probe_tokens.shape[1]} tokens a row, the data {length}")
    shape = (settings.chains, settings.draws)
    losses = {name: np.zeros((*shape, len(t), length - 1), np.float32) for name, t in observables.items()}

    def probe(network: nn.Module, chain: int, draw: int) -> None:
        if draw >= settings.burn_in:
            for name, probe_tokens in observables.items():
                losses[name][chain, draw - settings.burn_in] = token_losses(network, probe_tokens)

    traces = sample(model, next_token_loss, tokens, settings, seed=seed, probe=probe)
    kept = traces.isel(draw=slice(settings.burn_in, None))
    scored = (kept["loss"] - kept["linear"] if "linear" in kept else kept["loss"]).values
    spread = np.broadcast_to(scored[:, :, None, None], (*shape, 1, length - 1))
    start = np.broadcast_to(kept["baseline"].values.mean(1)[:, None], (settings.chains, length - 1))
    variables: dict[str, Any] = {
        "init_loss": (("chain", "token_pos"), start),
        "sampling_loss": (("chain", "draw", "batch", "token_pos"), spread),
        "sampling_loss_micro": (("chain", "step", "batch_sampling", "token_pos"), spread),
    }
    for name, values in losses.items():
        variables[f"loss_{name}"] = (("chain", "draw", f"batch_{name}", "token_pos"), values)
        variables[f"input_ids_{name}"] = ((f"batch_{name}", "token"), observables[name].cpu().numpy())
    sampler = {
        "lr": settings.lr_and_gamma[0],
        "n_beta": traces.attrs["nbeta"],
        "localization": settings.lr_and_gamma[1],
        "batch_size": settings.batch_size,
        "num_chains": settings.chains,
        "num_draws": settings.draws,
        "num_burnin_steps": settings.burn_in * settings.steps_per_draw,
        "num_steps_bw_draws": settings.steps_per_draw,
        "init_seed": seed,
    }
    config = {
        "sampler": sampler,
        "observables": [{"obs_id": name, "batches_per_draw": 1} for name in observables],
        "shared_observable_dims": ["token", "token_pos"],
        "tokenizer_context_length": length,
    }
    return xr.DataTree(xr.Dataset(variables, attrs={"metadata": {"config": config}, "completed": 1}))


def token_losses(model: nn.Module, tokens: Tensor, size: int = 32) -> np.ndarray:
    """Negative log-likelihoods in nats, (example, pos − 1), float32."""
    losses = []
    with torch.no_grad():
        for part in tokens.to(next(model.parameters()).device).split(size):
            logits = outputs(model(part))
            losses.append(F.cross_entropy(logits[:, :-1].transpose(1, 2), part[:, 1:], reduction="none").float().cpu())
    return torch.cat(losses).numpy()
