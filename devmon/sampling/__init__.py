"""Sampling around trained weights: kernels, chains, losses, data and the LLC estimate made of them."""

# One call from a model, a loss and data to an estimate
from devmon.sampling.calibrate import Calibration, calibrate
from devmon.sampling.estimate import Settings, estimate_llc, sample

# Losses: loss(model, batch) -> (batch,)
from devmon.sampling.losses import classification_loss, next_token_loss, regression_loss

# Kernels
from devmon.sampling.preconditioned import PreconditionedSGLD
from devmon.sampling.sgld import SGLD
from devmon.sampling.thermostat import SGNHT
from devmon.sampling.underdamped import BAOAB

__all__ = [  # noqa: RUF022 (in groups)
    # estimates
    "estimate_llc",
    "calibrate",
    "Calibration",
    "sample",
    "Settings",
    # losses
    "next_token_loss",
    "classification_loss",
    "regression_loss",
    # kernels
    "SGLD",
    "PreconditionedSGLD",
    "BAOAB",
    "SGNHT",
]
