"""Sampling around trained weights: kernels, chains, losses, data and the LLC estimate made of them."""

# One call from a model, a loss and data to an estimate
from devmon.sampling.calibration import Calibration, calibrate
from devmon.sampling.estimate import estimate_llc
from devmon.sampling.kernels.baoab import BAOAB

# Kernels
from devmon.sampling.kernels.preconditioned import PreconditionedSGLD
from devmon.sampling.kernels.sgld import SGLD
from devmon.sampling.kernels.sgnht import SGNHT

# Losses: loss(model, batch) -> (batch,)
from devmon.sampling.losses import classification_loss, next_token_loss, regression_loss
from devmon.sampling.traces import Settings, sample

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
