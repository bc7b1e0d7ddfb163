"""What a model says of the next token beside a law that is known: both as probabilities, in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def log_probabilities(scores: Tensor) -> Tensor:
    """log p (…, vocab) in float64 on the CPU of logits (…, vocab)."""
    return scores.detach().cpu().double().log_softmax(-1)


def divergence(law: Tensor, log_model: Tensor) -> np.ndarray:
    """KL(law ‖ model) = Σ_x law(x) (log law(x) - log model(x)) in nats, (…).

    `law` (…, vocab) and `log_model` (…, wide) from `log_probabilities`, wide >= vocab: what the model gives to tokens
    that the law does not know is lost. NaN where the model calls impossible what the law does not.
    """
    log_model = log_model[..., : law.shape[-1]]
    there = law > 0
    terms = torch.where(there, law * (law.clamp_min(1e-300).log() - torch.where(there, log_model, 0.0)), 0.0)
    total = terms.sum(-1).numpy()
    return np.where(np.isinf(total), np.nan, total)


def nats(law: Tensor, tokens: Tensor) -> np.ndarray:
    """-log law(token), (…), of tokens (…) under a law (…, vocab)."""
    return -law.gather(-1, tokens[..., None])[..., 0].log().numpy()
