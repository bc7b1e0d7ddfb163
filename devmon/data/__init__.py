"""Probe data with known answers, and what instruments share to hold and average it."""

from devmon.data.probe import ByContent, clustered_mean, minibatches, probe_tokens, random_tokens
from devmon.data.repeats import RepeatProbe, best_fixed_offset, repeats

__all__ = [
    "ByContent",
    "RepeatProbe",
    "best_fixed_offset",
    "clustered_mean",
    "minibatches",
    "probe_tokens",
    "random_tokens",
    "repeats",
]
